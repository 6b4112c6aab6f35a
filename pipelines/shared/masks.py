"""Mask conversion: any MASK to [B, H, W], 0 to 1, at the needed size.

The MASK inputs of all nodes use these functions, so they all accept the same forms.
"""

from __future__ import annotations

import torch

from ...attention.masks import resized
from .errors import IdentityEditError
from .images import CROPS, middle
from .input_checks import check_mask

_NO_MASK = (64, 64)
"""Size of the zero MASK that Load Image outputs for an image without transparency, whatever the image's size."""
_A_LEVEL = 1.0 / 255.0

CUT_OUT = "Load Image's mask marks the transparent part; for a cut-out, insert Invert Mask."
"""End of the tooltip of every MASK input."""


def as_masks(mask: torch.Tensor, name: str) -> torch.Tensor:
    """A copy of a MASK [B, H, W], [H, W] or [B, 1, H, W] as [B, H, W] float32 CPU, 0 to 1.

    Raises:
        IdentityEditError: for another shape, NaN, or values out of range.
    """
    check_mask(mask, name)
    values = mask.detach().to(device="cpu", dtype=torch.float32)
    if values.ndim == 2:
        values = values[None]
    elif values.ndim == 4:
        values = values[:, 0]
    return values.clamp(0.0, 1.0)


def cut_to(masks: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Masks [B, h, w] with VAE Encode's center crop, if that gives the size of this image or of the image of this
    latent; otherwise unchanged."""
    if tuple(masks.shape[1:]) == (height, width):
        return masks
    for multiple in CROPS:
        cut = middle(masks, multiple)
        if tuple(cut.shape[1:]) in ((height, width), (height * multiple, width * multiple)):
            return cut
    return masks


def of_size(masks: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Masks [B, h, w] at the size of an image or of its latent.

    VAE Encode's crop is applied to the mask as well; other sizes are stretched as in ComfyUI: bilinear when enlarged,
    averaged when reduced.
    """
    return resized(cut_to(masks, height, width), (height, width))


def masks_for(mask: torch.Tensor, name: str, height: int, width: int, count: int) -> torch.Tensor:
    """A MASK in any form as [count, height, width] float32 CPU, 0 to 1; a single mask is repeated.

    Raises:
        IdentityEditError: as `as_masks`, and when the number of masks is neither one nor `count`.
    """
    masks = as_masks(mask, name)
    if len(masks) not in (1, count):
        raise IdentityEditError(
            f"{name} holds {len(masks)} masks for {count} image{'s' if count > 1 else ''}; connect one mask, or one "
            f"per image."
        )
    return of_size(masks, height, width).expand(count, -1, -1).clone()


def is_placeholder_mask(mask: torch.Tensor) -> bool:
    """Whether masks [B, H, W] are Load Image's placeholder for images without transparency."""
    return tuple(mask.shape[1:]) == _NO_MASK and not bool(mask.any())


def is_transparency(mask: torch.Tensor, images: torch.Tensor) -> bool:
    """Whether masks [B, H, W] equal the transparency of images [B, H, W, 4], of which some is transparent."""
    if images.shape[-1] != 4 or mask.shape[1:] != images.shape[1:3] or len(mask) not in (1, len(images)):
        return False
    whole = 1.0 if images.is_floating_point() else torch.iinfo(images.dtype).max
    clear = 1.0 - images[..., 3].detach().cpu().float() / whole
    return float(clear.max()) > _A_LEVEL and bool(((mask - clear).abs() <= _A_LEVEL).all())
