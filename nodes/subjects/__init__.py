"""Nodes of `pipelines.subjects`."""

from . import subject

NODES = [*subject.NODES]
