"""Random valid graphs over all nodes of the pack and stock nodes on one server: each ends well or with one sentence.

`IDENTITY_EDIT_GRAPHS=200` runs as many graphs, else GRAPHS; `IDENTITY_EDIT_GRAPHS_SEED` draws others.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from identity_edit_pack.tests.endurance.random_graphs import Graphs, prepared, run_graphs

if TYPE_CHECKING:
    from identity_edit_pack.tests.conftest import RunningServer

pytestmark = [pytest.mark.endurance, pytest.mark.fuzz]

GRAPHS = 8


@pytest.fixture(scope="module")
def graphs(server: RunningServer) -> Graphs:
    return prepared(server)


def test_every_graph_ends_well_or_with_one_sentence(graphs: Graphs) -> None:
    wanted = int(os.environ.get("IDENTITY_EDIT_GRAPHS", GRAPHS))
    faults = run_graphs(graphs, wanted, int(os.environ.get("IDENTITY_EDIT_GRAPHS_SEED", "0")))
    assert not faults, f"{len(faults)} faults\n" + "\n\n".join(faults)
    ours = graphs.catalog.of_the_pack()
    if wanted >= 2 * len(ours):
        assert set(ours) <= set(graphs.occurred), set(ours) - set(graphs.occurred)


def test_every_node_can_take_part(graphs: Graphs) -> None:
    assert graphs.catalog.left_out == {}
