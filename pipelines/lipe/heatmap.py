"""Attention maps and masks as pictures to look at: colours and outlines laid over a picture."""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate, max_pool2d

from ..shared.errors import IdentityEditError

# Black, purple, red, yellow, white: bright means much, also in greyscale and for the colour-blind. A few colours
# between which one blends need no plotting library, which ComfyUI does not bring.
_COLOURS = ((0.0, 0.0, 0.02), (0.34, 0.06, 0.43), (0.73, 0.21, 0.33), (0.98, 0.56, 0.04), (0.99, 1.0, 0.64))
_OUTLINE = (0.1, 1.0, 0.3)


def heat_colours(values: torch.Tensor) -> torch.Tensor:
    """Colours [..., 3] of values [...] in [0, 1]."""
    colours = torch.tensor(_COLOURS, device=values.device)
    position = values.clamp(0.0, 1.0) * (len(_COLOURS) - 1)
    below = position.floor().long().clamp(max=len(_COLOURS) - 2)
    share = (position - below).unsqueeze(-1)
    return colours[below] * (1 - share) + colours[below + 1] * share


def lay_over(picture: torch.Tensor, values: torch.Tensor, opacity: float = 0.6) -> torch.Tensor:
    """A map [1 or B, h, w] in [0, 1] as heat colours over an IMAGE [B, H, W, 3]; opacity 0 is the picture alone."""
    colours = heat_colours(enlarged(values.to(picture.device), picture))
    return picture[..., :3] * (1 - opacity) + colours * opacity


def outlined(picture: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The contour of a mask [1 or B, h, w], where it crosses one half, drawn on an IMAGE [B, H, W, 3]."""
    inside = (enlarged(mask.to(picture.device), picture) > 0.5).float().unsqueeze(1)
    width = 1 + 2 * max(1, min(picture.shape[1:3]) // 256)
    grown = max_pool2d(inside, width, stride=1, padding=width // 2)
    line = (grown - inside).squeeze(1).unsqueeze(-1)
    return picture[..., :3] * (1 - line) + torch.tensor(_OUTLINE, device=picture.device) * line


def enlarged(values: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """A map [1 or B, h, w] at an IMAGE's size [B, H, W], bilinear.

    Raises:
        IdentityEditError: when the map is of more or fewer pictures.
    """
    if values.shape[0] not in (1, picture.shape[0]):
        raise IdentityEditError(
            f"The map is of {values.shape[0]} pictures but {picture.shape[0]} are connected; connect those that were "
            f"sampled with it."
        )
    large = interpolate(values.float().unsqueeze(1), size=tuple(picture.shape[1:3]), mode="bilinear").squeeze(1)
    return large.expand(picture.shape[0], -1, -1)
