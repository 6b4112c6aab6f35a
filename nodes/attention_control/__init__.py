"""Nodes of `pipelines.attention_control`."""
