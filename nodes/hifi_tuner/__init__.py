"""Nodes of `pipelines.hifi_tuner`."""
