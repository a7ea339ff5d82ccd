"""The service of a host that makes containers for workers which have no privilege; docs/node.md describes it."""
