"""Visualization of attention maps and masks: heat colors and outlines over an image."""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate, max_pool2d

from ..shared.errors import IdentityEditError

# Black, purple, red, yellow, white: brightness increases with the value, also in grayscale and for the color-blind.
_COLORS = ((0.0, 0.0, 0.02), (0.34, 0.06, 0.43), (0.73, 0.21, 0.33), (0.98, 0.56, 0.04), (0.99, 1.0, 0.64))
_OUTLINE = (0.1, 1.0, 0.3)


def heat_colors(values: torch.Tensor) -> torch.Tensor:
    """Colors [..., 3] of values [...] in [0, 1]."""
    colors = torch.tensor(_COLORS, device=values.device)
    position = values.clamp(0.0, 1.0) * (len(_COLORS) - 1)
    below = position.floor().long().clamp(max=len(_COLORS) - 2)
    share = (position - below).unsqueeze(-1)
    return colors[below] * (1 - share) + colors[below + 1] * share


def lay_over(image: torch.Tensor, values: torch.Tensor, opacity: float = 0.6) -> torch.Tensor:
    """Overlay a map [1 or B, h, w] in [0, 1] as heat colors on an IMAGE [B, H, W, 3]; opacity 0 is only the image."""
    colors = heat_colors(enlarged(values.to(image.device), image))
    return image[..., :3] * (1 - opacity) + colors * opacity


def outlined(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Draw the contour of a mask [1 or B, h, w], thresholded at one half, on an IMAGE [B, H, W, 3]."""
    inside = (enlarged(mask.to(image.device), image) > 0.5).float().unsqueeze(1)
    width = 1 + 2 * max(1, min(image.shape[1:3]) // 256)
    grown = max_pool2d(inside, width, stride=1, padding=width // 2)
    line = (grown - inside).squeeze(1).unsqueeze(-1)
    return image[..., :3] * (1 - line) + torch.tensor(_OUTLINE, device=image.device) * line


def enlarged(values: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Resize a map [1 or B, h, w] to an IMAGE's size [B, H, W], bilinear.

    Raises:
        IdentityEditError: when the numbers of maps and images differ.
    """
    if values.shape[0] not in (1, image.shape[0]):
        raise IdentityEditError(
            f"The map is of {values.shape[0]} images but {image.shape[0]} are connected; connect the images that were "
            f"sampled with it."
        )
    large = interpolate(values.float().unsqueeze(1), size=tuple(image.shape[1:3]), mode="bilinear").squeeze(1)
    return large.expand(image.shape[0], -1, -1)
