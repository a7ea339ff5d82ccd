"""Runs one workload in one container: starts it, hands over its descriptors, watches it, cleans up."""
