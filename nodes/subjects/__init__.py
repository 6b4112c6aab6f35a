"""Nodes of `pipelines.subjects`."""
