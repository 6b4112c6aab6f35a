"""Pictures of every kind as networks take them: colours, floating point, 0 to 1."""

from __future__ import annotations

import torch

from .input_checks import check_pictures


def as_colour(pictures: torch.Tensor, name: str = "pictures") -> torch.Tensor:
    """Grey, colour or RGBA pictures as colour pictures.

    Args:
        pictures: [B, H, W, C] with 1 (grey), 2 (grey and alpha), 3 or 4 (RGBA) channels: floating point of 0 to 1, or
            whole numbers of 8 or 16 bits. Alpha is left out, as everywhere in ComfyUI.
        name: the input's name as the user sees it.

    Returns:
        [B, H, W, 3] float32 CPU, 0 to 1.

    Raises:
        IdentityEditError: for another shape, NaN, or values that are not 0 to 1.
    """
    check_pictures(pictures, name)
    values = pictures.detach().cpu()
    values = values.float() if values.is_floating_point() else values.float() / torch.iinfo(pictures.dtype).max
    if values.shape[-1] <= 2:
        values = values[..., :1].expand(*values.shape[:-1], 3)
    return values[..., :3].clamp(0.0, 1.0)
