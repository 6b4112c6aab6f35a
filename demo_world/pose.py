"""Pose images of the demo world's portraits, similar to OpenPose: colored joints and limbs on black.

A pose shows the positions of shoulders, neck, eyes, nose and mouth, and so the direction of the head, but not the
identity or the expression. The demo world's ControlNet was trained with them.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .attributes import Attributes
from .renderer import SIZE, SUPERSAMPLING, layout_of, portrait_origin

# In coordinates of the head (x in the direction it faces, y down), as in renderer.paint_face.
JOINTS: dict[str, tuple[float, float]] = {
    "back shoulder": (-48.0, 46.0),
    "front shoulder": (48.0, 46.0),
    "neck": (0.0, 38.0),
    "nose": (13.0, 4.0),
    "back eye": (-4.8, -5.4),
    "front eye": (21.1, -5.4),
    "mouth": (10.2, 16.3),
}
LIMBS: dict[tuple[str, str], tuple[int, int, int]] = {
    ("back shoulder", "neck"): (255, 85, 0),
    ("front shoulder", "neck"): (255, 0, 0),
    ("neck", "nose"): (0, 0, 255),
    ("nose", "back eye"): (170, 0, 255),
    ("nose", "front eye"): (255, 0, 255),
    ("nose", "mouth"): (0, 255, 255),
}


def draw_pose(attributes: Attributes, seed: int) -> np.ndarray:
    """The pose of ``render(attributes, seed)``, uint8 [128, 128, 3].

    Raises:
        ValueError: when it is not a portrait.
    """
    if attributes.framing != "portrait":
        raise ValueError("only portraits have a pose image")
    x, y, scale, forward = portrait_origin(attributes, layout_of(seed))
    placed = {
        name: ((x + forward * scale * dx) * SUPERSAMPLING, (y + scale * dy) * SUPERSAMPLING)
        for name, (dx, dy) in JOINTS.items()
    }
    image = Image.new("RGB", (SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING))
    draw = ImageDraw.Draw(image)
    for (start, end), color in LIMBS.items():
        draw.line([placed[start], placed[end]], fill=color, width=3 * SUPERSAMPLING)
    radius = 3 * SUPERSAMPLING
    for (_, joint), color in LIMBS.items():
        cx, cy = placed[joint]
        draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=color)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))
