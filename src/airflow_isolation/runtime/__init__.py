"""The container runtime that the rest of the project sees, and its two backends."""
