"""Nodes of `pipelines.pidiff` and `pipelines.faces`."""

from . import face, identity_similarity, style_attention, w_plus

NODES = [*face.NODES, *identity_similarity.NODES, *style_attention.NODES, *w_plus.NODES]
