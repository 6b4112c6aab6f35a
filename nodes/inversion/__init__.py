"""Nodes of `pipelines.inversion`."""

from . import edit_friendly, inversion_sampler, noise_inversion, null_text, saved_inversions

NODES = [
    *noise_inversion.NODES,
    *edit_friendly.NODES,
    *inversion_sampler.NODES,
    *null_text.NODES,
    *saved_inversions.NODES,
]
