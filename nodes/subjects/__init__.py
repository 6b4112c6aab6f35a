"""Nodes of `pipelines.subjects`."""

from . import augmentation, captioning, images, regularization_prompts

NODES = [*images.NODES, *augmentation.NODES, *captioning.NODES, *regularization_prompts.NODES]
