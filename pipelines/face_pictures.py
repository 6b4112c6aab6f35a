"""Faces drawn on pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .face_alignment import ffhq_quad
from .faces import Face


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
