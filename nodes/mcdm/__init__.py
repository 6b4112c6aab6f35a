"""Nodes of `pipelines.mcdm`."""

from . import identity_words, pairs, portrait, train_mcdm

NODES = [*identity_words.NODES, *pairs.NODES, *portrait.NODES, *train_mcdm.NODES]
