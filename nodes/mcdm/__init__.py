"""Nodes of `pipelines.mcdm`."""

from . import identity_words, pair_guider, pair_settings, pairs, portrait, train_mcdm

NODES = [
    *identity_words.NODES,
    *pair_guider.NODES,
    *pair_settings.NODES,
    *pairs.NODES,
    *portrait.NODES,
    *train_mcdm.NODES,
]
