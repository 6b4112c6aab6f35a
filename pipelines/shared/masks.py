"""Masks in every form that users have, brought to one: [B, H, W], 0 to 1, of the size that is needed.

Every MASK input of every node goes through here, so that what one takes all of them take.
"""

from __future__ import annotations

import torch

from ...attention.masks import resized
from .errors import IdentityEditError
from .images import PIXELS_OF_A_CELL, middle
from .input_checks import check_mask

_NO_MASK = (64, 64)
"""Load Image's MASK of an image without transparency: zeros of this size, whatever the image's."""
_A_LEVEL = 1.0 / 255.0

CUT_OUT = "Load Image's MASK of a cut-out is 1 where it is transparent: put Invert Mask between."
"""The end of the tooltip of every MASK input."""


def as_masks(mask: torch.Tensor, name: str) -> torch.Tensor:
    """A copy of a MASK [B, H, W], [H, W] or [B, 1, H, W] as [B, H, W] float32 CPU, 0 to 1.

    Raises:
        IdentityEditError: for another form, NaN, or values that are no shares.
    """
    check_mask(mask, name)
    values = mask.detach().to(device="cpu", dtype=torch.float32)
    if values.ndim == 2:
        values = values[None]
    elif values.ndim == 4:
        values = values[:, 0]
    return values.clamp(0.0, 1.0)


def cut_to(masks: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Masks [B, h, w] without what VAE Encode cuts off their image, where that leaves this size of an image, or of
    a latent; others as they are."""
    cut = middle(masks)
    is_of_it = any(tuple(cut.shape[1:]) == (height * cell, width * cell) for cell in (1, PIXELS_OF_A_CELL))
    return cut if is_of_it and tuple(masks.shape[1:]) != (height, width) else masks


def of_size(masks: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Masks [B, h, w] at the size of an image or of its latent.

    What VAE Encode cuts off an image is cut off its mask; any other size is stretched, as ComfyUI does it: bilinear
    where it grows, the mean where it shrinks.
    """
    return resized(cut_to(masks, height, width), (height, width))


def masks_for(mask: torch.Tensor, name: str, height: int, width: int, count: int) -> torch.Tensor:
    """A MASK in any form as [count, height, width] float32 CPU, 0 to 1: one for all, or one for each.

    Raises:
        IdentityEditError: as `as_masks`, and when there are neither one nor `count` of them.
    """
    masks = as_masks(mask, name)
    if len(masks) not in (1, count):
        raise IdentityEditError(
            f"{name} holds {len(masks)} masks for {count} image{'s' if count > 1 else ''}; give one for all, or one "
            f"for each."
        )
    return of_size(masks, height, width).expand(count, -1, -1).clone()


def is_no_mask(mask: torch.Tensor) -> bool:
    """Whether masks [B, H, W] are what Load Image gives for images without transparency."""
    return tuple(mask.shape[1:]) == _NO_MASK and not bool(mask.any())


def is_transparency(mask: torch.Tensor, images: torch.Tensor) -> bool:
    """Whether masks [B, H, W] are exactly the transparent part of images [B, H, W, 4], which has one."""
    if images.shape[-1] != 4 or mask.shape[1:] != images.shape[1:3] or len(mask) not in (1, len(images)):
        return False
    whole = 1.0 if images.is_floating_point() else torch.iinfo(images.dtype).max
    clear = 1.0 - images[..., 3].detach().cpu().float() / whole
    return float(clear.max()) > _A_LEVEL and bool(((mask - clear).abs() <= _A_LEVEL).all())
