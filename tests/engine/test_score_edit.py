"""Score Edit in a real ComfyUI, without any file and with LPIPS from the models folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from api_client import ExecutionError, ValidationError
from identity_edit_pack.demo_world.attributes import Attributes
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.nodes import scores as measure
from identity_edit_pack.pipelines.scores import edit_scores
from identity_edit_pack.tests import tiny_scorers

if TYPE_CHECKING:
    from identity_edit_pack.tests.conftest import RunningServer

POSES = ("standing", "jumping")
SEED = 5


def prompt_with(**inputs: Any) -> dict[str, Any]:
    """Two drawn images, their scores, and a node behind every output."""
    drawn = {
        pose: {
            "class_type": "IdentityEditDrawDemoImage",
            "inputs": {**Attributes().replace(pose=pose).__dict__, "wording": 0, "seed": SEED},
        }
        for pose in POSES
    }
    settings = {
        item.id: item.default
        for node in (measure.ScoreEdit, measure.ScoreModels)
        for item in node.define_schema().inputs
        if not item.optional and item.id not in ("edited", "source")
    }
    links = {"edited": ["jumping", 0], "source": ["standing", 0], "mask": ["jumping", 1], "models": ["models", 0]}
    given = {**settings, **links, **inputs}
    models = {item.id: given.pop(item.id) for item in measure.ScoreModels.define_schema().inputs if item.id in given}
    scores = {"class_type": "IdentityEditScoreEdit", "inputs": given}
    shown = {
        f"output {number}": {"class_type": "PreviewAny", "inputs": {"source": ["scores", number]}}
        for number in range(7)
    }
    return {**drawn, "models": {"class_type": "IdentityEditScoreModels", "inputs": models}, "scores": scores, **shown}


def expected(**options: Any) -> dict[str, list[float]]:
    """The same images scored here."""
    images = [render(Attributes().replace(pose=pose), SEED) for pose in POSES]
    source, edited = (torch.from_numpy(np.array(image)).float()[None] / 255 for image, _ in images)
    mask = torch.from_numpy(np.array(images[1][1])).float()[None] / 255
    scores = edit_scores.score_edit(edited, source, mask=mask, **options)
    return {score.name: pytest.approx(score.values.tolist(), rel=1e-4) for score in scores}


def found(outputs: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    content = json.loads(outputs["output 1"]["text"][0])
    return {name: score["values"] for name, score in content["scores"].items()}


def test_it_scores_without_any_file(server: RunningServer) -> None:
    run = server.run(prompt_with())
    wanted = expected()
    assert found(run.outputs) == wanted and "PSNR outside" in wanted
    assert run.outputs["scores"]["text"][0] == run.outputs["output 0"]["text"][0]
    assert [float(run.outputs["output 2"]["text"][0])] == wanted["PSNR"]
    # What stands behind a score that was not computed does not run, and nothing fails.
    assert "text" not in run.outputs.get("output 4", {})


def test_missing_files_are_named_on_the_node(server: RunningServer) -> None:
    with pytest.raises(ExecutionError, match="LPIPS on AlexNet needs alexnet-owt-7be5be79.pth .*image_scores"):
        server.run(prompt_with(lpips="AlexNet"))
    with pytest.raises(ValidationError, match="FID needs pt_inception.pth"):
        server.run(prompt_with(inception="pt_inception.pth"))


def test_files_below_the_models_folder_are_found(
    start_server: Callable[..., AbstractContextManager[RunningServer]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_scorers.lpips_of_the_authors("SqueezeNet")
    folder = tiny_scorers.score_folder(tmp_path / "models" / "image_scores", monkeypatch)
    tiny_scorers.save_lpips(folder, "SqueezeNet", network)
    with start_server(tmp_path) as server:
        run = server.run(prompt_with(lpips="SqueezeNet"))
    with edit_scores.open_networks(lpips="SqueezeNet") as networks:
        wanted = expected(networks=networks)
    assert found(run.outputs) == wanted and "LPIPS inside" in wanted
    assert [float(run.outputs["output 4"]["text"][0])] == wanted["LPIPS"]
