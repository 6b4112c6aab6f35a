"""Makes the two forms of every shipped workflow from one source, on ComfyUI's real page.

A workflow is written once:
- `workflows/api/NAME.json`, in the API format: the nodes, their inputs and (`_meta.title`) their titles;
- `workflows/layout/NAME.yaml`, where they stand on the page:

      groups:                        # side by side, from left to right
        - title: The image
          columns: [["1", "2"], ["3"]]   # node ids: columns from left to right, each from top to bottom;
                                     # {fold: Title, columns: [...]} in the place of an id folds nodes into a subgraph,
                                     which shows their widgets of show: ["1.steps", ...]; with blueprint: true it
                                     becomes subgraphs/Title.json too, a node of the page's library
          note: Markdown text, shown below the columns    # optional
          color: "#3f789e"          # optional
          row: 0                     # optional: a further row of groups below the first
      sizes: {"7": [400, 420]}       # optional: width and height of single nodes
      thumbnail: ["4", "9"]          # the output nodes whose images make the thumbnail

usage (after `python3 scripts/demo.py` or `test.py` has made .venv):
  page_workflows.py build [NAME ...]       write workflows/NAME.json; fill every default into workflows/api/NAME.json
  page_workflows.py thumbnail [NAME ...]   run the workflow and write workflows/NAME.jpg
  page_workflows.py check [NAME ...]       say where the two forms disagree
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import re
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import environment
from engine import ENGINE_VERSION

WORKFLOWS = environment.ROOT / "workflows"
BLUEPRINTS = environment.ROOT / "subgraphs"
RANDOM_ID = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")
THUMBNAIL_SIZE = 512
THUMBNAIL_BACKGROUND = "#202020"


def api_path(name: str) -> Path:
    return WORKFLOWS / "api" / f"{name}.json"


def page_path(name: str) -> Path:
    return WORKFLOWS / f"{name}.json"


def read_layout(name: str, prompt: dict[str, Any]) -> dict[str, Any]:
    """The layout of a workflow; raises ScriptError when it does not place every node exactly once."""
    import yaml

    path = WORKFLOWS / "layout" / f"{name}.yaml"
    layout = yaml.safe_load(path.read_text(encoding="utf-8"))
    folded = [entry["columns"] if isinstance(entry, dict) else [[entry]] for entry in entries_of(layout)]
    placed = [str(node) for columns in folded for column in columns for node in column]
    if sorted(placed) != sorted(prompt):
        wrong = sorted(set(placed) ^ set(prompt)) or sorted({node for node in placed if placed.count(node) > 1})
        raise environment.ScriptError(f"{path.name} must place every node once; look at {', '.join(wrong)}.")
    return layout


def entries_of(layout: dict[str, Any]) -> list[Any]:
    """What a layout places: node ids, and folded parts with ids of their own."""
    return [entry for group in layout["groups"] for column in group["columns"] for entry in column]


def unfolded(page_prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt that the page would queue, with the nodes of its subgraphs ("12:3") under their own ids ("3")."""

    def unfold(value: Any) -> Any:
        is_link = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
        return [value[0].rsplit(":", 1)[-1], value[1]] if is_link else value

    return {
        key.rsplit(":", 1)[-1]: node | {"inputs": {name: unfold(value) for name, value in node["inputs"].items()}}
        for key, node in page_prompt.items()
    }


SHOWN_BY_THE_PAGE = {"PreviewAny": "preview"}
"""By node, what an older page queues beside the node's inputs."""


def differences(page_prompt: dict[str, Any], api_prompt: dict[str, Any]) -> list[str]:
    """Where the prompt that the page would queue differs from the API form: one sentence for each node or input."""
    page_prompt, api_prompt = unfolded(page_prompt), unfolded(api_prompt)
    found = [f"node {node} is only on the page" for node in sorted(set(page_prompt) - set(api_prompt))]
    found += [f"node {node} is only in the API form" for node in sorted(set(api_prompt) - set(page_prompt))]
    for node in sorted(set(page_prompt) & set(api_prompt)):
        ours, theirs = page_prompt[node], api_prompt[node]
        if ours["class_type"] != theirs["class_type"]:
            found.append(f"node {node} is {ours['class_type']} on the page, {theirs['class_type']} in the API form")
        missing = object()
        shown_by_the_page = {SHOWN_BY_THE_PAGE.get(theirs["class_type"])}
        for key in sorted((set(ours["inputs"]) | set(theirs["inputs"])) - shown_by_the_page):
            on_page, in_api = ours["inputs"].get(key, missing), theirs["inputs"].get(key, missing)
            if on_page != in_api:
                shown = ["absent" if value is missing else json.dumps(value) for value in (on_page, in_api)]
                found.append(f"node {node}, {key}: {shown[0]} on the page, {shown[1]} in the API form")
    return found


def pack_release() -> dict[str, str]:
    """The pack's id in the registry and its version, from pyproject.toml; a page workflow names both."""
    text = (environment.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = {key: re.search(rf'^{key} = "(.+)"$', text, re.MULTILINE) for key in ("name", "version")}
    name, version = (match.group(1) for match in found.values() if match)
    return {"id": name, "version": version}


def write_json(path: Path, value: Any, ascii_only: bool = False) -> None:
    """Write the whole file or nothing."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def build(page: Any, name: str, output_nodes: list[str]) -> None:
    """Lay the API form out on the page and write both forms."""
    prompt = json.loads(api_path(name).read_text(encoding="utf-8"))
    layout = read_layout(name, prompt)
    arguments = {
        "prompt": prompt,
        "layout": layout,
        "outputNodes": output_nodes,
        "name": name,
        "pack": pack_release(),
        "engineVersion": ENGINE_VERSION,
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"identity-edit/{name}")),
    }
    script = (Path(__file__).parent / "page_layout.js").read_text(encoding="utf-8")
    made = json.loads(page.evaluate(script, arguments))
    made["output"] = unfolded(made["output"])
    lost = [line for line in differences(made["output"], prompt) if "absent in the API form" not in line]
    if lost:
        raise environment.ScriptError(f"{name}: the page does not keep the API form: {'; '.join(lost)}")
    write_json(api_path(name), {key: made["output"][key] for key in prompt})
    workflow = with_fixed_ids(made["workflow"], name)
    write_json(page_path(name), workflow)
    for entry in entries_of(layout):
        if isinstance(entry, dict) and entry.get("blueprint"):
            write_blueprint(workflow, entry["fold"])


def write_blueprint(workflow: dict[str, Any], title: str) -> None:
    """Write one folded part of a page workflow as a blueprint: a workflow of that node alone, without its links."""
    [part] = [part for part in workflow["definitions"]["subgraphs"] if part["name"] == title]
    [node] = [copy.deepcopy(node) for node in workflow["nodes"] if node["type"] == part["id"]]
    for socket in node["inputs"]:
        socket["link"] = None
    for socket in node["outputs"]:
        socket["links"] = None
    blueprint = {key: workflow[key] for key in ("revision", "version", "config") if key in workflow} | {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"identity-edit/{title}")),
        "last_node_id": node["id"],
        "last_link_id": 0,
        "nodes": [node],
        "links": [],
        "groups": [],
        "definitions": {"subgraphs": [part]},
        "extra": {"identityEdit": workflow["extra"]["identityEdit"]},
    }
    BLUEPRINTS.mkdir(exist_ok=True)
    write_json(BLUEPRINTS / f"{title}.json", blueprint, ascii_only=True)  # ComfyUI reads it in the system's encoding


def with_fixed_ids(workflow: dict[str, Any], name: str) -> dict[str, Any]:
    """The workflow with the same ids each time it is built: the page draws those of subgraphs and their sockets."""
    text = json.dumps(workflow)
    for number, drawn in enumerate(dict.fromkeys(RANDOM_ID.findall(text))):
        text = text.replace(drawn, str(uuid.uuid5(uuid.NAMESPACE_URL, f"identity-edit/{name}/{number}")))
    return json.loads(text)


def check(page: Any, name: str) -> list[str]:
    """Open the page form and compare what the page would queue with the API form."""
    from page import load_workflow, to_prompt

    unknown = load_workflow(page, json.loads(page_path(name).read_text(encoding="utf-8")), name)
    if unknown:
        return [f"the page knows no node {', '.join(unknown)}"]
    return differences(to_prompt(page), json.loads(api_path(name).read_text(encoding="utf-8")))


def thumbnail(client: Any, name: str) -> None:
    """Run the workflow and put the images that its layout names into one square image."""
    from api_workflows import demo_values, with_demo_values
    from PIL import Image, ImageOps

    for needed in demo_values().get(name, {}).get("needs", []):
        client.run(with_demo_values(needed, json.loads(api_path(needed).read_text(encoding="utf-8"))))
    prompt = with_demo_values(name, json.loads(api_path(name).read_text(encoding="utf-8")))
    run = client.run(prompt)
    nodes = read_layout(name, prompt)["thumbnail"]
    images = [image.convert("RGB") for node in nodes for image in client.images(run, str(node))]
    if not images:  # it only saves files
        images = [Image.open(environment.ROOT / "images" / "icon.png").convert("RGB")]
    columns = math.ceil(math.sqrt(len(images)))
    cell = THUMBNAIL_SIZE // columns
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    sheet = Image.new("RGB", (THUMBNAIL_SIZE, THUMBNAIL_SIZE), THUMBNAIL_BACKGROUND)
    top = (THUMBNAIL_SIZE - len(rows) * cell) // 2
    for number, row in enumerate(rows):
        left = (THUMBNAIL_SIZE - len(row) * cell) // 2
        for place, image in enumerate(row):
            # Sheets are much wider than high, and cutting their ends off would lose what they show.
            is_sheet = max(image.size) > 1.4 * min(image.size)
            shape = ImageOps.contain if is_sheet else ImageOps.fit
            shaped = shape(image, (cell, cell))
            middle = (cell - shaped.width) // 2, (cell - shaped.height) // 2
            sheet.paste(shaped, (left + place * cell + middle[0], top + number * cell + middle[1]))
    path = WORKFLOWS / f"{name}.jpg"
    temporary = path.with_suffix(".tmp")
    sheet.save(temporary, format="JPEG", quality=88)
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["build", "thumbnail", "check"])
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    environment.enter()

    from api_client import Client
    from engine import Server
    from page import open_page

    names = arguments.names or sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
    failed = False
    with tempfile.TemporaryDirectory(prefix="identity-edit-") as base, Server(Path(base)) as server:
        failure = server.pack_failure()
        if failure:
            raise environment.ScriptError(f"ComfyUI could not load the pack: {failure}")
        client = Client(server.address)
        if arguments.command == "thumbnail":
            from demo_photos import draw_photos

            draw_photos(server.base / "input")
            for name in names:
                thumbnail(client, name)
                print(WORKFLOWS / f"{name}.jpg", flush=True)
            return 0
        output_nodes = [key for key, info in client.object_info().items() if info["output_node"]]
        with open_page(server) as page:
            for name in names:
                if arguments.command == "build":
                    build(page, name, output_nodes)
                    print(page_path(name), flush=True)
                for line in check(page, name):
                    failed = True
                    print(f"{name}: {line}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except environment.ScriptError as error:
        sys.exit(f"error: {error}")
