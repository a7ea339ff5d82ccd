"""Stubs of containerd's API, made by hack/gen-protos from protos/. Do not edit."""
