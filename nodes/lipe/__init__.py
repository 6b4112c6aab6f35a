"""Nodes of `pipelines.lipe`."""
