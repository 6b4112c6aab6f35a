"""Score Edit as the graph calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from identity_edit_pack.nodes import scores as nodes
from identity_edit_pack.pipelines.scores import edit_scores
from identity_edit_pack.pipelines.scores import files as score_files
from identity_edit_pack.pipelines.scores import pixels as image_scores
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests import tiny_models, tiny_scorers, tiny_text_encoders, tiny_vision
from identity_edit_pack.tests.nodes.good_inputs import grouped

SOURCE = torch.rand(2, 64, 48, 3, generator=torch.Generator().manual_seed(0))
EDITED = (SOURCE + 0.1 * torch.randn(SOURCE.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
SETTINGS: dict[str, Any] = {
    item.id: item.default
    for node in (nodes.ScoreEdit, nodes.ScoreModels)
    for item in node.define_schema().inputs
    if not item.optional and item.id not in ("edited", "source")
}


def score(edited: torch.Tensor = EDITED, source: torch.Tensor = SOURCE, **inputs: Any) -> Any:
    return nodes.ScoreEdit.execute(edited, source, **grouped({**SETTINGS, **inputs}, models="ScoreModels"))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty folders of models for one test."""
    for name in (nodes.ENCODER_FOLDER, score_files.FOLDER):
        (tmp_path / name).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], set()))
    return tmp_path


def test_it_works_without_any_file() -> None:
    assert set(SETTINGS.values()) == {"", nodes.NONE, edit_scores.PLAIN}
    output = score()
    report, content, psnr, ssim, *others = output.args
    assert report.startswith("score") and "PSNR: Peak signal-to-noise ratio" in report and "Warning" not in report
    wanted = image_scores.ssim(EDITED, SOURCE)
    assert ssim == pytest.approx(float(wanted.mean())) and psnr > 15
    assert json.loads(content)["scores"]["SSIM"]["values"] == pytest.approx(wanted.tolist())
    assert output.ui.as_dict() == {"text": (report,)}
    from comfy_execution.graph_utils import ExecutionBlocker

    assert len(others) == 3 and all(isinstance(other, ExecutionBlocker) for other in others)
    assert all(other.message is None for other in others), "a message would fail the whole workflow"


def test_a_mask_and_the_rule_reach_the_scores() -> None:
    mask = torch.zeros(1, 64, 48)
    mask[:, 10:50, 10:30] = 1
    plain, theirs = (json.loads(score(mask=mask, rule=rule).args[1]) for rule in edit_scores.RULES)
    assert theirs["rule"] == edit_scores.PIE_BENCH
    assert theirs["scores"]["PSNR outside"]["mean"] > plain["scores"]["PSNR outside"]["mean"]
    report = score(mask=mask).args[0]
    assert "LPIPS" not in report and "SSIM outside" in report


def test_folders_and_files_of_models_are_offered_and_used(models: Path) -> None:
    network = tiny_scorers.save_clip(models / nodes.ENCODER_FOLDER / "author" / "clip ö")
    folder = models / score_files.FOLDER / "lpips ö"
    tiny_scorers.save_lpips(folder, "SqueezeNet", tiny_scorers.lpips_of_the_authors("SqueezeNet"))
    torch.save(torch.nn.Linear(network.config.projection_dim, 1).state_dict(), folder / "linear.pth")
    inputs = {item.id: item for item in nodes.ScoreModels.define_schema().inputs}
    assert inputs["clip_model"].options == [nodes.NONE, nodes.INPUTS, "author/clip ö"]
    assert "lpips ö/linear.pth" in inputs["aesthetic"].options
    chosen = dict(clip_model="author/clip ö", dinov2="author/clip ö", aesthetic="lpips ö/linear.pth")
    assert nodes.ScoreModels.validate_inputs(**chosen) is True
    prompts = dict(target_prompt="a dog jumping", source_prompt="a dog")
    _, content, _, _, lpips, clip_t, clip_d = score(lpips="SqueezeNet", **chosen, **prompts).args
    scores = json.loads(content)["scores"]
    assert lpips == scores["LPIPS"]["mean"] > 0 and clip_t == scores["CLIP-T"]["mean"]
    assert clip_d == scores["CLIP-D"]["mean"] and -1 <= clip_d <= 1
    assert {"aesthetic score", "DINOv2-I (source)", "CLIP-I (source)"} <= set(scores)
    assert "(linear.pth)" in scores["aesthetic score"]["definition"]


def test_comfyuis_own_clips_are_used() -> None:
    clip, vision = tiny_text_encoders.clip("sdxl"), tiny_vision.clip_vision(projection=tiny_models.POOLED)
    with torch.inference_mode():
        *_, clip_t, clip_d = score(
            clip_model=nodes.INPUTS, clip=clip, clip_vision=vision, target_prompt="a dog", source_prompt="a cat"
        ).args
    assert -1 <= clip_t <= 1 and -1 <= clip_d <= 1
    with pytest.raises(IdentityEditError, match="needs both clip and clip_vision; connect them"):
        score(clip_model=nodes.INPUTS, clip=clip)
    other = tiny_vision.clip_vision(projection=tiny_models.POOLED // 2)
    with pytest.raises(IdentityEditError, match="use two encoders that were trained together"):
        score(clip_model=nodes.INPUTS, clip=clip, clip_vision=other, target_prompt="a dog")


def test_references_are_other_images_of_any_size(models: Path) -> None:
    tiny_scorers.save_clip(models / nodes.ENCODER_FOLDER / "dino")
    content = score(dino="dino", references=torch.rand(3, 20, 30, 3)).args[1]
    assert {"DINO-I (source)", "DINO-I (references)"} <= set(json.loads(content)["scores"])


def test_too_few_images_for_a_set_are_warned_of(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Inception:
        name = "inception"

        def features(self, images: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack([image.mean(dim=(0, 1)) for image in images])

    import contextlib

    monkeypatch.setattr(edit_scores, "open_inception", lambda name: contextlib.nullcontext(Inception()))
    report = score(inception="any.pth").args[0]
    assert "FID and KID are skipped: they need 50 edited images" in report and "there are 2 and 2" in report
    many = torch.rand(50, 12, 12, 3)
    report, content, *_ = score(many, many.flip(2) * 0.9, inception="any.pth").args
    assert "FID of 50 and 50 images is biased upward" in report
    assert {"FID", "KID"} <= set(json.loads(content)["scores"])


def test_missing_models_are_named_before_anything_runs(models: Path) -> None:
    check = nodes.ScoreModels.validate_inputs
    assert check() is True and check(clip_model=nodes.INPUTS) is True
    assert "'clip' is not in" in str(check(clip_model="clip")) and "tokenizer" in str(check(clip_model="clip"))
    assert "DINO (ViT-S/16)" in str(check(dino="dino")) and "image_encoders" in str(check(structure="dino"))
    assert f"'{nodes.INPUTS}' is not in" in str(check(dino=nodes.INPUTS))
    assert f"'{nodes.INPUTS}' is not in" in str(check(clip_model=nodes.INPUTS, structure=nodes.INPUTS))
    assert "models/buffalo_l" in str(check(recognizer="arcface.onnx"))
    assert "The aesthetic score needs linear.pth" in str(check(aesthetic="linear.pth"))
    assert "FID needs pt.pth" in str(check(inception="pt.pth"))
    with pytest.raises(IdentityEditError, match="'dino' is not in .*image_encoders; put it there"):
        score(structure="dino")
    with pytest.raises(IdentityEditError, match="LPIPS on AlexNet needs alexnet-owt-7be5be79.pth"):
        score(lpips="AlexNet")


def test_every_node_is_listed() -> None:
    ids = [node.define_schema().node_id for node in nodes.NODES]
    assert ids == ["IdentityEditReconstructionCheck", "IdentityEditScoreModels", "IdentityEditScoreEdit"]
