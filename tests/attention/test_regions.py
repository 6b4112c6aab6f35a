"""Areas and masks of conditionings in the form of models whose latents have frames."""

from __future__ import annotations

import torch
from identity_edit_pack.attention.regions import region_of
from identity_edit_pack.pipelines.shared.conditioning import area_in_pixels

CPU = torch.device("cpu")


def test_an_area_with_frames_is_the_area_without() -> None:
    flat, framed = ({"area": area} for area in ((6, 8, 2, 4), (1, 6, 8, 0, 2, 4)))
    assert region_of(framed, 16, 12, (3, 4)) == region_of(flat, 16, 12, (3, 4))
    assert area_in_pixels(framed["area"], 16, 12) == area_in_pixels(flat["area"], 16, 12) == (6, 8, 2, 4)
    assert area_in_pixels(("percentage", 1.0, 0.5, 0.25, 0.0, 0.125, 0.5), 16, 12) == (8, 3, 2, 6)
    assert area_in_pixels(("percentage", 0.5, 0.25, 0.125, 0.5), 16, 12) == (8, 3, 2, 6)


def test_a_mask_with_frames_is_the_mask_without() -> None:
    mask = torch.rand(2, 16, 12, generator=torch.Generator().manual_seed(0))
    region = region_of({}, 16, 12, (8, 6))
    plain, framed = (region.weight({"mask": each, "mask_strength": 0.5}, CPU, 4) for each in (mask, mask[None]))
    assert torch.equal(plain, framed) and plain.shape == (4, 8, 6)
