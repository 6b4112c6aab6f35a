"""The pack in a real ComfyUI: it loads, shows its nodes, help and templates, and reports errors as one sentence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from api_client import ExecutionError, ValidationError
from engine import PACK_FOLDER

if TYPE_CHECKING:
    from identity_edit_pack.tests.conftest import RunningServer

ROOT = Path(__file__).resolve().parents[2]
DEMO_CHECKPOINT = "identity-edit-demo.safetensors"


@pytest.fixture(scope="session")
def our_nodes(server: RunningServer) -> dict[str, Any]:
    """What the server says of the nodes that came from the pack."""
    module = f"custom_nodes.{PACK_FOLDER}"
    return {key: info for key, info in server.client.object_info().items() if info["python_module"] == module}


def test_the_pack_loads_without_a_complaint(server: RunningServer) -> None:
    assert server.process.pack_failure() is None
    start = server.process.log_text().split("Starting server")[0]
    about_us = [line for line in start.splitlines() if f"custom_nodes{os.sep}{PACK_FOLDER}" in line]
    # The one line that may name the pack is that of its import time.
    assert len(about_us) == 1 and " seconds: " in about_us[0], about_us


def test_every_node_reaches_the_server(our_nodes: dict[str, Any], node_classes: dict[str, Any]) -> None:
    # One bad schema makes ComfyUI drop every node after it with no more than a warning.
    assert sorted(our_nodes) == sorted(node_classes)


def test_every_node_explains_itself(our_nodes: dict[str, Any]) -> None:
    silent = []
    for key, info in our_nodes.items():
        assert key.startswith("IdentityEdit"), key
        assert info["category"].startswith("identity edit/"), key
        if not info["description"]:
            silent.append(f"{key}: description")
        for group in ("required", "optional"):
            for name, specification in info["input"].get(group, {}).items():
                options = specification[1] if len(specification) > 1 else {}
                if not options.get("tooltip"):
                    silent.append(f"{key}: input {name}")
        tooltips = info.get("output_tooltips") or [None] * len(info["output"])
        silent += [f"{key}: output {name}" for name, tip in zip(info["output_name"], tooltips, strict=True) if not tip]
    assert silent == []


def test_every_node_has_a_help_page(our_nodes: dict[str, Any], server: RunningServer) -> None:
    for key in our_nodes:
        text = server.client.get(f"/extensions/{PACK_FOLDER}/docs/{key}.md").text
        assert text.startswith("#"), key


def test_the_stock_loader_lists_the_demo_checkpoint(server: RunningServer) -> None:
    loader = server.client.get("/object_info/CheckpointLoaderSimple").json()["CheckpointLoaderSimple"]
    assert DEMO_CHECKPOINT in loader["input"]["required"]["ckpt_name"][0]


def test_the_template_browser_lists_the_workflows_with_thumbnails(server: RunningServer) -> None:
    shipped = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    assert sorted(server.client.get("/workflow_templates").json().get(PACK_FOLDER, [])) == shipped
    for name in shipped:
        image = server.client.get(f"/api/workflow_templates/{PACK_FOLDER}/{name}.jpg")
        assert image.content.startswith(b"\xff\xd8"), name


def test_a_refused_prompt_names_node_and_input(server: RunningServer) -> None:
    prompt = {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": -1, "height": 64, "batch_size": 1, "color": 0},
            "_meta": {"title": "Nothing"},
        },
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    with pytest.raises(ValidationError, match=r"^Nothing: .*width") as caught:
        server.run(prompt)
    assert caught.value.node_id == "1"


def replace_text(pattern: str) -> dict[str, Any]:
    inputs = {"string": "grass", "regex_pattern": pattern, "replace": "snow"}
    return {
        "1": {"class_type": "RegexReplace", "inputs": inputs, "_meta": {"title": "Change the place"}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }


def test_a_failed_node_is_named_and_the_next_prompt_served(server: RunningServer) -> None:
    with pytest.raises(ExecutionError, match="^Change the place: unterminated") as caught:
        server.run(replace_text("[g"))
    assert caught.value.node_id == "1"
    run = server.run(replace_text("g.*"))
    assert run.outputs["2"]["text"] == ["snow"]
    assert set(run.node_seconds) == {"1", "2"}


def test_images_come_back_as_they_were_made(server: RunningServer) -> None:
    prompt = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 48, "height": 32, "batch_size": 2, "color": 0x3264C8}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "color"}},
    }
    images = server.images(server.run(prompt), "2")
    assert [(image.size, image.getpixel((5, 5))) for image in images] == [((48, 32), (0x32, 0x64, 0xC8))] * 2
