"""Select Reference and Align Reference as the graph calls them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from identity_edit_pack.demo_world.attributes import Attributes
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.nodes.hifi_tuner import reference as nodes
from identity_edit_pack.pipelines.hifi_tuner import reference_alignment as alignment
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.subjects import images as subject_images

CAT = Attributes(color="orange", pattern="striped")
SETTINGS: dict[str, Any] = {
    "surroundings": alignment.REFLECT,
    "symmetric": True,
    "optimizer": alignment.LEAST_SQUARES,
    "scale_limit": 1.5,
    "rotation_limit": 45.0,
    "parts": alignment.LARGEST_PART,
}


def drawn(attributes: Attributes, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.from_numpy(np.array(part)).float() / 255 for part in render(attributes, seed))


SOURCES = [drawn(CAT.replace(pose=pose), i) for i, pose in enumerate(("standing", "lying", "jumping"))]
IMAGES, MASKS = (torch.stack(part) for part in zip(*SOURCES, strict=True))
GENERATED, GENERATED_MASK = (part.unsqueeze(0) for part in drawn(CAT.replace(pose="lying", place="snow"), 40))


def select(**inputs: Any) -> tuple[Any, ...]:
    settings = {"generated": GENERATED, "encoder": nodes.BUILT_IN, "subject_only": True, **inputs}
    return nodes.SelectReference.execute(**settings).args


def test_the_image_of_the_same_pose_is_chosen_from_a_batch() -> None:
    image, mask, caption, index, scores = select(images=IMAGES, masks=MASKS, generated_mask=GENERATED_MASK)
    assert index == 1 and caption == ""
    assert torch.equal(image, IMAGES[1:2]) and torch.equal(mask, MASKS[1:2])
    lines = scores.splitlines()
    assert [line[0] for line in lines] == [" ", ">", " "] and lines[1].endswith("1  image 2")


def test_a_subject_brings_captions_masks_and_sizes_of_its_own() -> None:
    images = [
        IMAGES[0],
        torch.nn.functional.interpolate(IMAGES[1:2].movedim(-1, 1), scale_factor=2).movedim(1, -1)[0],
    ]
    subject = subject_images.SubjectImages(images, ["one", "two"], [None, None], ["a.png", "b.png"], "cat", "")
    image, mask, caption, index, scores = select(subject=subject)
    assert index == 1 and caption == "two" and image.shape == (1, 256, 256, 3) and "b.png" in scores
    from comfy_execution.graph_utils import ExecutionBlocker

    assert isinstance(mask, ExecutionBlocker) and "b.png, has no mask" in str(mask.message)


def test_masks_of_one_side_alone_are_warned_of() -> None:
    assert "Only one side has masks" in select(images=IMAGES, masks=MASKS)[4]
    assert "Only one side has masks" in select(images=IMAGES, generated_mask=GENERATED_MASK)[4]
    assert "Warning" not in select(images=IMAGES)[4]
    assert "Warning" not in select(images=IMAGES, masks=MASKS, subject_only=False)[4]


def test_select_reference_names_bad_input() -> None:
    with pytest.raises(IdentityEditError, match="exactly one of subject or images"):
        select()
    with pytest.raises(IdentityEditError, match="masks holds 2 masks for 3 images"):
        select(images=IMAGES, masks=MASKS[:2])
    with pytest.raises(IdentityEditError, match="generated_mask holds 3 masks for 1 image;"):
        select(images=IMAGES, generated_mask=MASKS)
    with pytest.raises(IdentityEditError, match="connect Load CLIP Vision"):
        select(images=IMAGES, encoder=nodes.CLIP_VISION)
    with pytest.raises(IdentityEditError, match="'dino' is not in .*image_encoders; put it there"):
        select(images=IMAGES, encoder="dino")
    assert "image_encoders" in str(nodes.SelectReference.validate_inputs("dino"))
    assert nodes.SelectReference.validate_inputs(nodes.BUILT_IN) is True


def test_a_reference_is_laid_on_the_generated_subject() -> None:
    given = (IMAGES[:1], MASKS[:1], GENERATED_MASK)
    image, mask, scale, rotation, x, y, report = nodes.AlignReference.execute(*given, **SETTINGS).args
    expected = alignment.align_reference(IMAGES[0], MASKS[0], GENERATED_MASK[0])
    assert torch.equal(image[0], expected.image) and torch.equal(mask[0], expected.mask)
    found = expected.similarity
    assert (scale, rotation, x, y) == (found.scale, found.rotation, found.translation_x, found.translation_y)
    assert report.startswith(f"scale {scale:.3f}, rotation {rotation:.1f} degrees") and "overlap by" in report


def test_batches_are_aligned_one_by_one() -> None:
    image, mask, *_, report = nodes.AlignReference.execute(
        IMAGES[:2], MASKS[:2], GENERATED_MASK, **{**SETTINGS, "surroundings": alignment.GENERATED}, generated=GENERATED
    ).args
    assert image.shape == (2, 128, 128, 3) and len(report.splitlines()) == 2
    outside = mask == 0
    assert torch.equal(image[outside], GENERATED.expand(2, -1, -1, -1)[outside])
    with pytest.raises(IdentityEditError, match="reference_mask has 3 entries for 2 alignments"):
        nodes.AlignReference.execute(IMAGES[:2], MASKS, GENERATED_MASK, **SETTINGS)


def test_align_reference_names_an_empty_mask_and_warns_of_several_subjects() -> None:
    with pytest.raises(IdentityEditError, match="The generated mask is empty"):
        nodes.AlignReference.execute(IMAGES[:1], MASKS[:1], torch.zeros(1, 128, 128), **SETTINGS)
    two = GENERATED_MASK.clone()
    two[:, :20, :20] = 1
    report = nodes.AlignReference.execute(IMAGES[:1], MASKS[:1], two, **SETTINGS).args[-1]
    assert "Warning: The generated mask has 2 separate parts; only the largest is used." in report


def test_every_node_is_listed() -> None:
    ids = [node.define_schema().node_id for node in nodes.NODES]
    assert ids == ["IdentityEditSelectReference", "IdentityEditAlignReference"]
