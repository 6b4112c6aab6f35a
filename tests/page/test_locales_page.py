"""The nodes in Chinese and Japanese on ComfyUI's real page, in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from environment import ROOT
from page import load_workflow, open_page, take_notices, to_prompt
from page_workflows import differences
from translations import LANGUAGES, LOCALES, read, shown

if TYPE_CHECKING:
    from identity_edit_pack.tests.conftest import RunningServer
    from playwright.sync_api import Page

WORKFLOWS = ROOT / "workflows"


@pytest.fixture(scope="module", params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def page(language: str, server: RunningServer, chromium: str) -> Iterator[Page]:
    with open_page(server.process, language) as page:
        yield page


def test_every_node_is_shown_in_the_language(page: Page, language: str) -> None:
    script = """ids => ids.map(id => {
        const node = LiteGraph.createNode(id);
        const labels = list => Object.fromEntries((list ?? []).map(item => [item.name, item.label]));
        return {
            title: node.title,
            category: node.constructor.category,
            description: node.constructor.nodeData.description,
            inputs: Object.fromEntries(node.inputs.map(slot => [slot.name, slot.localized_name])),
            outputs: node.outputs.map(slot => slot.localized_name),
            widgets: labels(node.widgets?.filter(widget => widget.name in node.constructor.nodeData.inputs)),
        };
    })"""
    texts = read(LOCALES / language / "nodeDefs.json")
    categories = read(LOCALES / language / "main.json")["nodeCategories"]
    for wanted, found in zip(texts.values(), page.evaluate(script, list(texts)), strict=True):
        names = {key: value["name"] for key, value in wanted["inputs"].items()}
        assert found["title"] == wanted["display_name"]
        assert found["description"] == shown(wanted["description"])
        assert found["category"].startswith(categories["identity edit"] + "/")
        assert found["inputs"] == names
        assert found["widgets"].items() <= names.items()
        assert found["outputs"] == [value["name"] for value in wanted.get("outputs", {}).values()]


def test_tooltips_are_shown_in_the_language(page: Page, language: str) -> None:
    """The pointer rests on a node's title, on its input, on its output and on its widget."""
    texts = read(LOCALES / language / "nodeDefs.json")["IdentityEditTrainStyleAttention"]
    places = page.evaluate("""async () => {
        app.graph.clear();
        const node = LiteGraph.createNode("IdentityEditTrainStyleAttention");
        node.pos = [200, 150];
        app.graph.add(node);
        app.canvas.ds.scale = 1;
        app.canvas.ds.offset = [0, 0];
        app.canvas.draw(true, true);
        await new Promise(done => setTimeout(done, 500));
        const box = app.canvas.canvas.getBoundingClientRect();
        const at = (x, y) => [box.left + x, box.top + y];
        const slot = (is_input, name) => at(...node.getConnectionPos(is_input, is_input
            ? node.inputs.findIndex(input => input.name === name) : 0));
        const widget = node.widgets.find(widget => widget.name === "steps");
        return {
            title: at(node.pos[0] + 100, node.pos[1] - 15),
            input: slot(true, "w_plus"),
            output: slot(false),
            widget: at(node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10),
        };
    }""")
    wanted = {
        "title": texts["description"],
        "input": texts["inputs"]["w_plus"]["tooltip"],
        "output": texts["outputs"]["0"]["tooltip"],
        "widget": texts["inputs"]["steps"]["tooltip"],
    }
    for name, (x, y) in places.items():
        page.mouse.move(x - 3, y)
        page.mouse.move(x, y)
        tooltip = page.locator(".node-tooltip")
        tooltip.wait_for(state="visible", timeout=10_000)
        assert tooltip.inner_text() == shown(wanted[name]), name


@pytest.mark.parametrize("name", ["mcdm_generate_pairs", "timestep_aware_edit"])
def test_a_workflow_queues_the_same_prompt(name: str, page: Page) -> None:
    """Translated names are labels alone: what is queued has the ids."""

    def loaded(path: Path) -> dict[str, Any]:
        return json.loads(path.read_text(encoding="utf-8"))

    take_notices(page)
    assert load_workflow(page, loaded(WORKFLOWS / f"{name}.json"), name) == []
    assert take_notices(page) == []
    assert differences(to_prompt(page), loaded(WORKFLOWS / "api" / f"{name}.json")) == []
