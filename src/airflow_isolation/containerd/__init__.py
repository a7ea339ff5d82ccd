"""A client of containerd's gRPC API, complete enough to import, pull and run. Imports nothing of the rest of the project."""
