"""Nodes of `pipelines.pidiff` and `pipelines.faces`."""

from . import face, style_attention, w_plus

NODES = [*face.NODES, *style_attention.NODES, *w_plus.NODES]
