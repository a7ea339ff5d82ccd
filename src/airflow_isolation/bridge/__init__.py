"""One workload in one container: start it, hand over descriptors, watch it, clean up."""
