"""The interface of a container runtime, which the rest of the project uses, and its two backends."""
