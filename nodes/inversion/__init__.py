"""Nodes of `pipelines.inversion`."""

from . import ddim, edit_friendly, null_text, saved_inversions

NODES = [*ddim.NODES, *edit_friendly.NODES, *null_text.NODES, *saved_inversions.NODES]
