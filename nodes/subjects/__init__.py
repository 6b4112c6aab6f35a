"""Nodes of `pipelines.subjects`."""

from . import captioning, images, regularization_prompts

NODES = [*images.NODES, *captioning.NODES, *regularization_prompts.NODES]
