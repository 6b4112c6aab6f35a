"""Nodes of `pipelines.pidiff` and `pipelines.faces`."""
