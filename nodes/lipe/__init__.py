"""Nodes of `pipelines.lipe`."""

from . import identity_attention, identity_prior, mask_blend

NODES = [*identity_prior.NODES, *identity_attention.NODES, *mask_blend.NODES]
