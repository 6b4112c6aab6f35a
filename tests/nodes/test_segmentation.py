"""The segmentation nodes as the graph calls them: by attention on the demo checkpoint, with SAM on tiny networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
import tiny_segmentation_models as tiny
import torch
from identity_edit_pack.demo_world.attributes import Attributes
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.nodes.hifi_tuner import segmentation as nodes
from identity_edit_pack.pipelines.hifi_tuner import reference_alignment as alignment
from identity_edit_pack.pipelines.shared.errors import IdentityEditError

WEIGHTS = Path(__file__).resolve().parents[2] / "demo_world" / "weights"


def defaults(node: Any) -> dict[str, Any]:
    return {item.id: item.default for item in node.define_schema().inputs if getattr(item, "default", None) is not None}


SETTINGS = defaults(nodes.SegmentSubject)
SAM_SETTINGS = {"grounding_dino": nodes.NO_MODEL, **defaults(nodes.SegmentSubjectWithSAM)}
CATS = [Attributes(species="cat", color="blue", pose=pose) for pose in ("standing", "sitting")]
DRAWN = [tuple(torch.from_numpy(np.array(part)).float() / 255 for part in render(cat, 5)) for cat in CATS]
IMAGES, MASKS = (torch.stack(part) for part in zip(*DRAWN, strict=True))


def segment(images: torch.Tensor = IMAGES, **inputs: Any) -> tuple[Any, ...]:
    return nodes.SegmentSubject.execute(images, **{**SETTINGS, **inputs}).args


def segment_with_sam(images: torch.Tensor = IMAGES, **inputs: Any) -> tuple[Any, ...]:
    return nodes.SegmentSubjectWithSAM.execute(images, **{**SAM_SETTINGS, **inputs}).args


def loaded(name: str) -> dict[str, Any]:
    import comfy.sd
    from identity_edit_pack.demo_world import family

    family.register()
    parts = comfy.sd.load_checkpoint_guess_config(str(WEIGHTS / f"{name}.safetensors"))[:3]
    return dict(zip(("model", "clip", "vae"), parts, strict=True))


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Any]:
    return loaded("identity-edit-demo")


@pytest.fixture(scope="module")
def flow_checkpoint() -> dict[str, Any]:
    return loaded("identity-edit-demo-flow")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    for name in ("sams", "grounding-dino"):
        (tmp_path / name).mkdir()
        monkeypatch.delitem(folder_paths.folder_names_and_paths, name, raising=False)
    return tmp_path


def overlap(found: torch.Tensor, true: torch.Tensor) -> float:
    return float(((found > 0) & (true > 0.5)).sum() / ((found > 0) | (true > 0.5)).sum())


def test_attention_finds_the_subject_of_the_demo_world(checkpoint: dict[str, Any]) -> None:
    mask, overlay, report = segment(subject="cat", **checkpoint)
    assert mask.shape == (2, 128, 128) and overlay.shape == IMAGES.shape
    assert min(overlap(found, true) for found, true in zip(mask, MASKS, strict=True)) > 0.7
    assert report.startswith("The mask covers ") and "Warning" not in report
    assert torch.equal(segment(subject="cat", **checkpoint)[0], mask), "the same seed gives another mask"


def test_automatic_settings_are_those_that_were_measured(
    checkpoint: dict[str, Any], flow_checkpoint: dict[str, Any]
) -> None:
    words = {"subject": "cat", "caption": "a blue cat standing on the beach"}
    measured = [
        (checkpoint, {"timesteps": "1, 101, 201", "threshold": 0.45, "self_attention_power": 2}),
        (flow_checkpoint, {"timesteps": "201, 301, 401", "threshold": 0.55, "self_attention_power": 8}),
    ]
    for given, settings in measured:
        assert torch.equal(segment(**words, **given)[0], segment(**words, **settings, **given)[0])
    crossed = segment(**words, **measured[0][1], **flow_checkpoint)[0]
    assert not torch.equal(segment(**words, **flow_checkpoint)[0], crossed)


def test_attention_takes_images_of_any_size(checkpoint: dict[str, Any]) -> None:
    large = torch.nn.functional.interpolate(IMAGES[:1].movedim(-1, 1), size=(301, 299)).movedim(1, -1)
    with torch.inference_mode():  # as ComfyUI runs nodes
        mask = segment(large, subject="cat", longest_side=128, **checkpoint)[0]
    true = torch.nn.functional.interpolate(MASKS[:1, None], size=(301, 299))[0]
    assert mask.shape == (1, 301, 299) and overlap(mask, true) > 0.7


def test_attention_needs_a_subject_and_timesteps(checkpoint: dict[str, Any]) -> None:
    with pytest.raises(IdentityEditError, match="subject is empty"):
        segment(**checkpoint)
    with pytest.raises(IdentityEditError, match="timesteps is 'early'"):
        segment(subject="cat", timesteps="early", **checkpoint)
    report = segment(IMAGES[:1], subject="cat", threshold=1.0, **checkpoint)[2]
    assert "of image 1 is empty or covers everything" in report


def test_segment_anything_from_a_folder(models: Path) -> None:
    tiny.save_sam(models / "sams" / "tiny")
    mask, _, _ = segment_with_sam(sam="tiny", points="64, 64")
    assert mask.shape == (2, 128, 128) and set(mask.unique().tolist()) <= {0.0, 1.0}
    assert "tiny" in nodes.SegmentSubjectWithSAM.define_schema().inputs[1].options
    with pytest.raises(IdentityEditError, match="lies outside the image"):
        segment_with_sam(sam="tiny", points="640, 64")


def test_grounding_dino_and_segment_anything_by_name(models: Path) -> None:
    tiny.save_sam(models / "sams" / "author" / "tiny")
    tiny.save_grounding_dino(models / "grounding-dino" / "tiny")
    chosen = dict(sam="author/tiny", grounding_dino="tiny", subject="cat")
    mask = segment_with_sam(**chosen, box_threshold=0.0)[0]
    assert mask.shape == (2, 128, 128)
    with pytest.raises(IdentityEditError, match="subject is empty"):
        segment_with_sam(**{**chosen, "subject": ""})
    report = segment_with_sam(**chosen, box_threshold=1.0)[2]
    assert "of image 1, 2 is empty or covers everything" in report


def test_missing_models_are_named_with_their_folder(models: Path) -> None:
    validate = nodes.SegmentSubjectWithSAM.validate_inputs
    message = str(validate("sam_vit_b.pth", nodes.NO_MODEL))
    assert str(models / "sams") in message and "sam_vit_b_01ec64.pth" in message
    tiny.save_sam(models / "sams" / "tiny")
    assert validate("tiny", nodes.NO_MODEL) is True
    assert str(models / "grounding-dino") in str(validate("tiny", "other"))
    with pytest.raises(IdentityEditError, match="'other' is not in"):
        segment_with_sam(sam="other")


def test_only_the_largest_part_is_kept_where_asked(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = torch.zeros(128, 128)
    two[10:60, 10:60] = 1
    two[90:110, 90:110] = 1
    tiny.save_sam(models / "sams" / "tiny")
    monkeypatch.setattr(nodes.pipeline, "segment_anything", lambda *_: two.clone())
    assert torch.equal(segment_with_sam(sam="tiny")[0], two.expand(2, -1, -1))
    mask, _, report = segment_with_sam(sam="tiny", parts=alignment.LARGEST_PART)
    assert float(mask.sum()) == 2 * 50 * 50 and "The mask of image 2 has 2 separate parts" in report


def test_every_node_is_listed() -> None:
    assert [node.define_schema().node_id for node in nodes.NODES] == [
        "IdentityEditSegmentSubject",
        "IdentityEditSegmentSubjectWithSAM",
    ]
