"""Every shipped workflow runs on a real ComfyUI, unchanged but for its cost, and gives pictures."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from identity_edit_pack.tests.conftest import RunningServer

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))

MOST_STEPS = 6
"""Sampling, inversion and optimisation steps are cut down to this number; all of a workflow's nodes alike."""


def cheaper(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with every number of steps or iterations cut down to MOST_STEPS."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        for name, value in node["inputs"].items():
            is_count = isinstance(value, int) and not isinstance(value, bool)
            if is_count and ("steps" in name or "iterations" in name):
                node["inputs"][name] = min(value, MOST_STEPS)
    return prompt


def test_workflows_are_shipped() -> None:
    assert NAMES, "workflows/api holds no workflow"


@pytest.mark.parametrize("name", NAMES)
def test_workflow_gives_pictures(name: str, server: RunningServer) -> None:
    prompt = cheaper(json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8")))
    run = server.run(prompt, timeout=900)
    pictures = {key: server.images(run, key) for key in run.outputs}
    assert any(pictures.values()), "no output node gave a picture"
    for key, images in pictures.items():
        for image in images:
            values = np.asarray(image.convert("RGB"), dtype=np.float64)
            assert values.std() > 5.0, f"node {key} gave a flat picture"
            assert values.mean() > 5.0, f"node {key} gave a black picture"
