"""Pictures of what was kept: the original, the edit, the result, and the mask over the result."""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

from ..shared.images import as_color

LONGEST_SIDE = 768
"""[choice] Of each image in the sheet."""
_RED = (1.0, 0.15, 0.1)


def overlay(image: torch.Tensor, mask: torch.Tensor, opacity: float = 0.5) -> torch.Tensor:
    """An image [H, W, 3] with its mask [H, W] in red."""
    share = (opacity * mask)[..., None]
    return image * (1.0 - share) + torch.tensor(_RED) * share


def sheet(original: torch.Tensor, registered: torch.Tensor, kept: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[H, 4 W, 3]: original, registered edit, result, and mask over the result, reduced."""
    images = [_reduced(as_color(each[None])[0]) for each in (original, registered, kept)]
    reduced_mask = _reduced(mask[..., None])[..., 0]
    return torch.cat([*images, overlay(images[2], reduced_mask)], dim=1)


def _reduced(image: torch.Tensor) -> torch.Tensor:
    factor = min(1.0, LONGEST_SIDE / max(image.shape[:2]))
    if factor == 1.0:
        return image
    size = [max(1, round(side * factor)) for side in image.shape[:2]]
    return interpolate(image.movedim(-1, 0)[None], size=size, mode="area")[0].movedim(0, -1)
