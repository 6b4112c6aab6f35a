"""Pictures of every kind as faces are looked for in them (colours, floating point, 0 to 1), and faces drawn on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .errors import IdentityEditError
from .face_alignment import ffhq_quad
from .faces import Face

_BRIGHTEST = 2.0
"""Above this a picture is not 0 to 1 with some overshoot, but counts in other units."""


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
    if pictures.ndim != 4 or min(pictures.shape) < 1 or pictures.shape[-1] > 4:
        raise IdentityEditError(
            f"{name} must be pictures [batch, height, width, channels] with 1 to 4 channels, not "
            f"{tuple(pictures.shape)}; connect a Load Image node."
        )
    values = pictures.detach().cpu()
    if values.is_floating_point():
        values = values.float()
        if not bool(torch.isfinite(values).all()):
            raise IdentityEditError(f"{name} contains NaN or infinite values; load or decode the picture again.")
        if float(values.max()) > _BRIGHTEST:
            raise IdentityEditError(
                f"{name} holds values up to {float(values.max()):g}, and pictures go from 0 to 1; divide it by its "
                f"largest possible value before (255, or 65535 for 16 bits)."
            )
    elif pictures.dtype in (torch.uint8, torch.uint16):
        values = values.float() / torch.iinfo(pictures.dtype).max
    else:
        raise IdentityEditError(f"{name} holds numbers of the type {pictures.dtype}; give floating point from 0 to 1.")
    if values.shape[-1] <= 2:
        values = values[..., :1].expand(*values.shape[:-1], 3)
    return values[..., :3].clamp(0.0, 1.0)


def drawn_faces(pictures: torch.Tensor, found: Sequence[Sequence[Face]]) -> torch.Tensor:
    """Pictures [B, H, W, 3] with the points and the FFHQ crops of their faces drawn on them."""
    import numpy as np
    from PIL import Image, ImageDraw

    drawn = []
    for picture, faces in zip(pictures, found, strict=True):
        image = Image.fromarray((picture * 255.0).round().to(torch.uint8).numpy())
        pen = ImageDraw.Draw(image)
        width = max(1, max(image.size) // 400)
        for face in faces:
            corners = [tuple(corner) for corner in ffhq_quad(face.points).tolist()]
            pen.line([*corners, corners[0]], fill=(0, 220, 90), width=width)
            for x, y in face.points.tolist():
                pen.ellipse((x - 2 * width, y - 2 * width, x + 2 * width, y + 2 * width), fill=(255, 60, 60))
        drawn.append(torch.from_numpy(np.array(image)).float() / 255.0)
    return torch.stack(drawn)
