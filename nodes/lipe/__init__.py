"""Nodes of `pipelines.lipe`."""

from . import identity_prior, masks

NODES = [*identity_prior.NODES, *masks.NODES]
