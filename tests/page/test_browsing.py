"""What a user sees before running anything: the template browser, a node alone on the canvas, and its help."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from engine import PACK_FOLDER
from page import PATIENCE, choose_template, drawn_texts, open_page, take_notices, to_prompt
from page_workflows import differences

if TYPE_CHECKING:
    from identity_edit_pack.tests.conftest import RunningServer
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ("reconstruct", "mcdm_edit", "pidiff_style_mix")
"""Workflows that are opened by clicking; the others are opened as the template browser does, by test_page.py."""


@pytest.fixture(scope="module")
def page(server: RunningServer, chromium: str) -> Iterator[Page]:
    with open_page(server.process) as page:
        page.set_default_timeout(PATIENCE)
        yield page


@pytest.mark.parametrize("name", SAMPLE)
def test_a_click_in_the_template_browser_opens_the_workflow(name: str, page: Page) -> None:
    choose_template(page, PACK_FOLDER, name)
    assert page.get_by_role("dialog").count() == 0, "something is missing"
    assert take_notices(page) == []
    api = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert differences(to_prompt(page), api) == []
    # Its whole width is in sight, beside the side bar and below the menu.
    left, top, right, bottom = page.evaluate("""() => {
        const view = app.canvas.ds, boxes = app.graph.groups.map(group => [...group.pos, ...group.size]);
        const shown = (place, axis) => (place + view.offset[axis]) * view.scale;
        return [
            shown(Math.min(...boxes.map(box => box[0])), 0), shown(Math.min(...boxes.map(box => box[1])), 1),
            shown(Math.max(...boxes.map(box => box[0] + box[2])), 0),
            shown(Math.max(...boxes.map(box => box[1] + box[3])), 1),
        ];
    }""")
    assert left >= 50 and top >= 80
    assert right <= 1800 and bottom <= 1000


def node_alone(page: Page, node_type: str) -> dict[str, Any]:
    """A new node on an empty canvas: its id and the names of its inputs and outputs."""
    script = """(type) => {
        app.graph.clear();
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        return {
            id: node.id,
            slots: [...node.inputs.filter(input => !input.widget), ...node.outputs].map(
                slot => slot.label ?? slot.localized_name ?? slot.name),
        };
    }"""
    return page.evaluate(script, node_type)


def widgets_of(page: Page, node_id: int) -> dict[str, Any]:
    """The node's height, and of each widget its label, top, height, what an empty text field says, whether it fits."""
    script = """(id) => {
        const node = app.graph.getNodeById(id);
        const ruler = document.createElement("canvas").getContext("2d");
        ruler.font = app.canvas.inner_text_font;
        return {
            height: node.size[1],
            widgets: (node.widgets ?? []).filter(widget => !widget.hidden).map(widget => ({
                label: widget.label ?? widget.name, top: widget.y, height: widget.computedHeight ?? 20,
                text: widget.element ? (widget.element.placeholder ?? "") : null,
                fits: 90 + [widget.label ?? widget.name, String(widget.value)].reduce(
                    (sum, text) => sum + ruler.measureText(text).width, 0) <= node.size[0],
            })),
        };
    }"""
    return page.evaluate(script, node_id)


def test_every_node_alone_shows_its_names(page: Page, server: RunningServer) -> None:
    faults = []
    ours = [key for key in server.client.object_info() if key.startswith("IdentityEdit")]
    assert len(ours) > 50
    for node_type in ours:
        node = node_alone(page, node_type)
        texts = drawn_texts(page, node["id"])
        faults += [f"{node_type}: the name of {slot} is cut" for slot in node["slots"] if slot not in texts]
        found = widgets_of(page, node["id"])
        end = 0.0
        for widget in found["widgets"]:
            label = widget["label"]
            if widget["top"] < end - 1:
                faults.append(f"{node_type}: {label} covers the widget above it")
            end = widget["top"] + widget["height"]
            if widget["text"] is not None:
                if not widget["text"]:
                    faults.append(f"{node_type}: the empty text field {label} does not say its name")
            # The page gives a new node its width and cuts a label whose value is long; a pack has no say in that.
            elif label not in texts and widget["fits"]:
                faults.append(f"{node_type}: the label {label} is cut")
        if end > found["height"] + 1:
            faults.append(f"{node_type}: its widgets end below it")
    assert faults == []


@pytest.mark.parametrize("node_type", ["IdentityEditNoiseInversion", "IdentityEditTrainMCDM", "IdentityEditMCDMGuider"])
def test_the_help_button_shows_our_page(node_type: str, page: Page) -> None:
    node_alone(page, node_type)
    # In the middle of the page, as the help opens over its left side.
    page.evaluate("""() => {
        app.canvas.ds.scale = 1;
        app.canvas.ds.offset = [1100, 400];
        app.canvas.selectNode(app.graph.nodes[0]);
    }""")
    page.get_by_test_id("info-button").click()
    text = (ROOT / "web" / "docs" / f"{node_type}.md").read_text(encoding="utf-8")
    title = text.splitlines()[0].lstrip("# ")
    shown = page.locator(".node-help-content")
    shown.get_by_role("heading", name=title).first.wait_for()
    words = [word for word in text.split("\n\n")[1].split() if word.isalpha()][:5]
    assert words and all(word in shown.inner_text() for word in words)
    images = shown.locator("img")
    images.evaluate_all("images => Promise.all(images.map((image) => image.decode()))")  # fails for a broken image
    assert images.count() == text.count("![")
    page.get_by_test_id("info-button").click()  # closes it


@pytest.mark.parametrize("path", sorted((ROOT / "subgraphs").glob("*.json")), ids=lambda path: path.stem)
def test_a_blueprint_of_the_library_becomes_a_node_with_its_parts(path: Path, page: Page) -> None:
    """The page lists the blueprints of the pack's `subgraphs` and makes a node of each."""
    script = """async (name) => {
        const listed = Object.entries(await (await fetch("/api/global_subgraphs")).json());
        const [[id]] = listed.filter(([, entry]) => entry.name === name);
        const { data } = await (await fetch(`/api/global_subgraphs/${id}`)).json();
        await app.loadGraphData(JSON.parse(data), true, true);
        const [node] = app.graph.nodes;
        return [node.title, node.inputs.length, node.outputs.length, node.subgraph.nodes.map(inner => inner.type)];
    }"""
    title, inputs, outputs, types = page.evaluate(script, path.stem)
    assert title == path.stem and inputs and outputs
    [part] = json.loads(path.read_text(encoding="ascii"))["definitions"]["subgraphs"]
    assert sorted(types) == sorted(node["type"] for node in part["nodes"])
    assert page.evaluate("app.graph.nodes[0].subgraph.nodes.filter(node => node.has_errors).length") == 0
