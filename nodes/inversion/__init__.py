"""Nodes of `pipelines.inversion`."""

from . import inversion

NODES = [*inversion.NODES]
