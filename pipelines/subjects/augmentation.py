"""Augmentation of a few photos by crops and homographies (Chen et al. 2024, section 4)."""

from __future__ import annotations

import torch

from ..shared.errors import IdentityEditError
from ..training.loop import generator_of

SMALLEST_CROP, PERSPECTIVE = 0.7, 0.1
"""Our defaults; the paper gives no sizes."""
MOST_PERSPECTIVE = 0.2
"""With more, four moved corners may no longer be a convex quadrilateral."""


def augmented(
    images: torch.Tensor,
    count: int,
    *,
    smallest_crop: float = SMALLEST_CROP,
    perspective: float = PERSPECTIVE,
    seed: int = 0,
    masks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Every image, followed by count - 1 crops of it that are seen from other directions.

    Args:
        images: [B, H, W, 3] float32, 0 to 1.
        count: images made of each, the first of them unchanged.
        smallest_crop: smallest side of a crop as a share of the image's, above 0 to 1.
        perspective: largest shift of a crop's corner along each side, as a share of the crop's, 0 to MOST_PERSPECTIVE.
        seed: of all crops and corners.
        masks: [B, H, W] float32, warped with the images.

    Returns:
        images [B count, H, W, 3], and their masks [B count, H, W] or None.

    Raises:
        IdentityEditError: when a number is out of range.
    """
    if count < 1 or not 0.0 < smallest_crop <= 1.0 or not 0.0 <= perspective <= MOST_PERSPECTIVE:
        raise IdentityEditError(
            f"count is {count}, smallest_crop {smallest_crop:g} and perspective {perspective:g}; choose 1 or more, "
            f"above 0 to 1, and 0 to {MOST_PERSPECTIVE:g}."
        )
    from kornia.geometry.transform import get_perspective_transform, warp_perspective  # comes with every ComfyUI

    height, width = images.shape[1:3]
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    size = torch.tensor([width - 1.0, height - 1.0])
    layers = images if masks is None else torch.cat([images, masks[..., None]], dim=-1)
    made = []
    for index, layer in enumerate(layers.permute(0, 3, 1, 2)):
        made.append(layer[None])
        if count > 1:
            quads = torch.stack(
                [
                    source_corners(
                        generator_of(seed, index * count + number, "augmentation"), smallest_crop, perspective
                    )
                    for number in range(1, count)
                ]
            )
            homographies = get_perspective_transform(quads * size, (corners * size).expand_as(quads))
            several = layer.expand(count - 1, -1, -1, -1)
            made.append(
                warp_perspective(several, homographies, (height, width), padding_mode="border", align_corners=True)
            )
    result = torch.cat(made).permute(0, 2, 3, 1).clamp(0.0, 1.0)
    return result[..., :3].contiguous(), None if masks is None else result[..., 3].contiguous()


def source_corners(generator: torch.Generator, smallest_crop: float, perspective: float) -> torch.Tensor:
    """Corners [4, 2] (x, y), clockwise from the top left, of the part of an image that becomes a new one; 0 to 1."""
    side = smallest_crop + (1.0 - smallest_crop) * torch.rand((), generator=generator)
    start = (1.0 - side) * torch.rand(2, generator=generator)
    corners = start + side * torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    shifts = perspective * side * (2.0 * torch.rand(4, 2, generator=generator) - 1.0)
    return (corners + shifts).clamp(0.0, 1.0)
