"""Nodes of `pipelines.hifi_tuner`."""

from . import reference, reference_guidance, segmentation, subject_embedding

NODES = [*reference.NODES, *reference_guidance.NODES, *segmentation.NODES, *subject_embedding.NODES]
