"""Nodes of `pipelines.mcdm`."""
