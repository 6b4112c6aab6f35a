"""Nodes of `pipelines.hifi_tuner`."""

from . import reference, reference_guidance, replace_subject, segmentation, subject_embedding

NODES = [
    *reference.NODES,
    *reference_guidance.NODES,
    *replace_subject.NODES,
    *segmentation.NODES,
    *subject_embedding.NODES,
]
