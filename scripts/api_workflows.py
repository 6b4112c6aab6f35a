"""Workflows in ComfyUI's API form: reading the shipped ones and changing their inputs. Standard library only."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from user_comfyui import PACK, ScriptError

API_WORKFLOWS = PACK / "workflows" / "api"

DEMO_VALUES = PACK / "workflows" / "layout" / "demo_values.json"
"""For each workflow that begins with the user's photos: the values that it needs for the demo checkpoint and the photos
of `demo_photos`, and the workflows whose saved files it loads."""

Prompt = dict[str, dict[str, Any]]
"""Node id -> class_type, inputs and perhaps _meta."""


def node_title(prompt: Prompt, node_id: str) -> str:
    """The node's title on the page, or else its class name."""
    node = prompt.get(node_id, {})
    return node.get("_meta", {}).get("title") or node.get("class_type", f"node {node_id}")


def read_workflow(name: str) -> Prompt:
    """The API JSON of a shipped workflow, or of the file `name` when it ends in .json."""
    path = Path(name) if name.endswith(".json") else API_WORKFLOWS / f"{name}.json"
    if not path.is_file():
        raise ScriptError(f"There is no workflow '{name}': choose one of {', '.join(workflow_names())}.")
    return json.loads(path.read_text(encoding="utf-8"))


def workflow_names() -> list[str]:
    return sorted(path.stem for path in API_WORKFLOWS.glob("*.json"))


def demo_values() -> dict[str, dict[str, Any]]:
    """`DEMO_VALUES`, by workflow; a published pack has none."""
    return json.loads(DEMO_VALUES.read_text(encoding="utf-8")) if DEMO_VALUES.is_file() else {}


def with_demo_values(name: str, prompt: Prompt) -> Prompt:
    """The workflow for the demo checkpoint: NODE.INPUT is a value, NODE.class_type another node in its place."""
    prompt = copy.deepcopy(prompt)
    for target, value in demo_values().get(name, {}).get("values", {}).items():
        node, _, key = target.partition(".")
        if key == "class_type":
            prompt[node] |= {"class_type": value, "inputs": {}}
        else:
            prompt[node]["inputs"][key] = value
    return prompt


def change_inputs(prompt: Prompt, changes: list[str]) -> None:
    """Apply NODE.INPUT=VALUE changes in place; VALUE is read as JSON where it is JSON, else as text."""
    for change in changes:
        target, equals, text = change.partition("=")
        node, dot, name = target.rpartition(".")
        if not equals or not dot:
            raise ScriptError(f"--set {change}: write NODE.INPUT=VALUE, for example --set 'KSampler.seed=7'.")
        found = [node] if node in prompt else [key for key in prompt if node_title(prompt, key) == node]
        if len(found) != 1:
            raise ScriptError(f"--set {change}: {len(found)} nodes have the id or title '{node}', one is needed.")
        inputs = prompt[found[0]]["inputs"]
        if name not in inputs:
            raise ScriptError(f"--set {change}: '{node}' has the inputs {', '.join(inputs)}, but no '{name}'.")
        try:
            inputs[name] = json.loads(text)
        except ValueError:
            inputs[name] = text
