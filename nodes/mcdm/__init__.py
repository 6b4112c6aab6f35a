"""Nodes of `pipelines.mcdm`."""

from . import edit_mask, identity_words, pair_guider, pair_settings, pairs, portrait, train_mcdm

NODES = [
    *identity_words.NODES,
    *pair_guider.NODES,
    *pair_settings.NODES,
    *pairs.NODES,
    *portrait.NODES,
    *edit_mask.NODES,
    *train_mcdm.NODES,
]
