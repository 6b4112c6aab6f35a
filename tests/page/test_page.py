"""The shipped workflows on ComfyUI's real page, in a real browser."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from api_workflows import demo_values
from engine import PACK_FOLDER
from page import drawn_texts, load_workflow, open_page, take_notices, to_prompt
from page_workflows import differences

if TYPE_CHECKING:
    from identity_edit_pack.tests.conftest import RunningServer
    from playwright.sync_api import Page

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))


@pytest.fixture(scope="module")
def page(server: RunningServer, chromium: str) -> Iterator[Page]:
    with open_page(server.process) as page:
        yield page


def open_template(page: Page, server: RunningServer, name: str) -> list[str]:
    """Open a workflow as the template browser does, from the server's list; returns the unknown node types."""
    workflow = server.client.get(f"/api/workflow_templates/{PACK_FOLDER}/{name}.json").json()
    return load_workflow(page, workflow, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_is_whole_legible_and_queues_what_the_api_form_says(
    name: str, page: Page, server: RunningServer
) -> None:
    take_notices(page)
    assert open_template(page, server, name) == []
    assert take_notices(page) == []
    api = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert differences(to_prompt(page), api) == []
    check_places(page)
    check_texts(page)


def check_places(page: Page) -> None:
    """Each node stands in one group, and none covers another."""
    script = """() => ({
        nodes: app.graph.nodes.map(node => [node.title, ...node.getBounding()]),
        groups: app.graph.groups.map(group => [group.title, ...group.pos, ...group.size]),
        notes: app.graph.nodes.filter(node => node.type === "MarkdownNote").length,
    })"""
    found = page.evaluate(script)
    assert found["groups"] and found["notes"]
    for title, left, top, width, height in found["nodes"]:
        inside = [
            group
            for group, x, y, w, h in found["groups"]
            if x <= left and y <= top and left + width <= x + w and top + height <= y + h
        ]
        assert len(inside) == 1, f"{title} stands in {inside}"
    for number, (title, *box) in enumerate(found["nodes"]):
        for other, *another in found["nodes"][number + 1 :]:
            assert not overlap(box, another), f"{title} covers {other}"


def check_texts(page: Page) -> None:
    """No text on a node is cut."""
    nodes = page.evaluate("() => app.graph.nodes.map(node => [node.id, node.title])")
    texts = {title: drawn_texts(page, node) for node, title in nodes}
    assert all(texts.values()), "a node was not drawn"
    cut = {title: found for title, found in texts.items() if any(text.endswith(("…", "...")) for text in found)}
    assert cut == {}


def overlap(one: list[float], two: list[float]) -> bool:
    return (
        one[0] < two[0] + two[2] and two[0] < one[0] + one[2] and one[1] < two[1] + two[3] and two[1] < one[1] + one[3]
    )


@pytest.mark.skipif(not NAMES, reason="no workflow is shipped")
def test_the_run_button_runs_a_workflow(page: Page, server: RunningServer, tmp_path: Path) -> None:
    """Opens the workflow with the fewest nodes, makes it cheap on the page, and presses Run."""
    names = [name for name in NAMES if name not in demo_values()]  # without the user's photos
    workflows = {name: json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")) for name in names}
    name = min(names, key=lambda key: len(workflows[key]["nodes"]))
    assert open_template(page, server, name) == []
    page.evaluate("""() => {
        for (const node of app.graph.nodes)
            for (const widget of node.widgets ?? [])
                if (/steps|iterations/.test(widget.name) && widget.value > 4) widget.value = 4;
    }""")
    take_notices(page)
    expected = to_prompt(page)
    before = set(server.client.get("/history").json())
    # A frontend of 2026 gives the mark to the button, an older one to the group around it.
    page.locator("button[data-testid=queue-button], [data-testid=queue-button] button").first.click()
    run = wait_for_new_run(server, before)
    assert run["status"]["status_str"] == "success"
    assert differences(run["prompt"][2], expected) == []
    # The page shows the images on the nodes that made them.
    page.wait_for_function("app.graph.nodes.some(node => node.imgs?.length)", timeout=30_000)
    page.screenshot(path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def wait_for_new_run(server: RunningServer, before: set[str], timeout: float = 300.0) -> dict[str, Any]:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        history = server.client.get("/history").json()
        finished = [key for key in history if key not in before]
        if finished:
            return history[finished[0]]
        time.sleep(0.2)
    raise AssertionError(f"the Run button started nothing that finished within {timeout:.0f} s")
