"""Nodes that keep of any edit only what it was asked for."""

from .keep import NODES as KEEP_NODES
from .select import NODES as SELECT_NODES

NODES = [*KEEP_NODES, *SELECT_NODES]
