"""Nodes of `pipelines.inversion`."""
