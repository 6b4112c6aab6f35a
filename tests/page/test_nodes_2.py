"""The shipped workflows in "Nodes 2.0", the page's newer way to draw nodes: as elements, and higher than before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from page import load_workflow, open_page, to_prompt
from page_workflows import differences

if TYPE_CHECKING:
    from identity_edit_pack.tests.conftest import RunningServer
    from playwright.sync_api import Page

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))

BOXES = """() => {
    const { scale, offset } = app.canvas.ds, canvas = app.canvas.canvas.getBoundingClientRect();
    return [...document.querySelectorAll("[data-node-id]")].map(element => {
        const box = element.getBoundingClientRect();
        const node = app.graph.nodes.find(node => String(node.id) === element.dataset.nodeId);
        const left = (box.x - canvas.x) / scale - offset[0], top = (box.y - canvas.y) / scale - offset[1];
        return [node.title, left, top, left + box.width / scale, top + box.height / scale];
    });
}"""
"""Of every node's element its title and its left, top, right and bottom, in the graph's coordinates."""


@pytest.fixture(scope="module")
def page(server: RunningServer, chromium: str) -> Iterator[Page]:
    with open_page(server.process, nodes_2=True) as page:
        yield page


@pytest.mark.parametrize("name", NAMES)
def test_nodes_stand_apart_and_queue_what_the_api_form_says(name: str, page: Page) -> None:
    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    assert load_workflow(page, workflow, name) == []
    nodes = len(workflow["nodes"])
    page.wait_for_function("wanted => document.querySelectorAll('[data-node-id]').length === wanted", arg=nodes)
    page.wait_for_timeout(1000)  # elements get their height a moment after they are there
    boxes = page.evaluate(BOXES)
    groups = page.evaluate("() => app.graph.groups.map(group => [...group.pos, ...group.size])")
    for title, left, top, right, bottom in boxes:
        inside = [1 for x, y, w, h in groups if x <= left and y <= top and right <= x + w and bottom <= y + h]
        assert len(inside) == 1, f"{title} stands in {len(inside)} groups"
    for number, (title, left, top, right, bottom) in enumerate(boxes):
        for other, x, y, to_x, to_y in boxes[number + 1 :]:
            assert not (left < to_x and x < right and top < to_y and y < bottom), f"{title} covers {other}"
    api = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert differences(to_prompt(page), api) == []
