"""Face alignment: FFHQ crops for W+ encoders, and ArcFace crops for identity scores.

Both use five facial landmarks in pixels, image left before image right: eyes, tip of the nose, corners of the mouth.
FFHQ's crop (Karras et al. 2019, its script `download_ffhq.py`) uses only the eyes and the corners of the mouth.
Everything is computed in floating point, to preserve 16-bit images; resampling is Pillow's, as in the script.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..shared.errors import IdentityEditError

if TYPE_CHECKING:
    import numpy as np

ARCFACE_SIZE = 112
ARCFACE_POINTS = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
"""Landmarks of ArcFace's 112x112 training images (Deng et al. 2019, their code)."""
OVERSAMPLING = 4
"""FFHQ's script samples 4096 pixels for an image of 1024 and then downscales."""
PROFILE = 0.5
"""Threshold of `turned_aside` for a profile view: the tip of the nose is beyond an eye."""


@dataclass(frozen=True)
class AlignedFace:
    """An aligned face crop.

    Attributes:
        image: [S, S, 3] float32, 0 to 1.
        mask: [S, S] float32: the input mask, or 1 without one; 0 outside the image.
        quad: [4, 2] float64, the crop's corners in pixels of the image: upper left, lower left, lower right, upper
            right.
    """

    image: torch.Tensor
    mask: torch.Tensor
    quad: np.ndarray


def ffhq_quad(points: Any) -> np.ndarray:
    """FFHQ's oriented crop square from five points of a face.

    x = eye to eye - rot90(eye to mouth), scaled to the larger of 2 |eye to eye| and 1.8 |eye to mouth|; the center lies
    a tenth of the way from the eyes to the mouth.

    Args:
        points: [5, 2] in pixels; see the top of this file.

    Returns:
        [4, 2] float64: upper left, lower left, lower right, upper right.

    Raises:
        IdentityEditError: when there are not five points, or they coincide.
    """
    import numpy as np

    left_eye, right_eye, _, left_mouth, right_mouth = check_points(points)
    eyes = (left_eye + right_eye) * 0.5
    eye_to_eye = right_eye - left_eye
    eye_to_mouth = (left_mouth + right_mouth) * 0.5 - eyes
    x = eye_to_eye - np.flipud(eye_to_mouth) * [-1, 1]
    length = np.hypot(*x)
    if length < 1e-9:
        raise IdentityEditError("The points of the face coincide; enter eyes, nose and corners of the mouth.")
    x = x / length * max(np.hypot(*eye_to_eye) * 2.0, np.hypot(*eye_to_mouth) * 1.8)
    y = np.flipud(x) * [-1, 1]
    center = eyes + eye_to_mouth * 0.1
    return np.stack([center - x - y, center - x + y, center + x + y, center + x - y])


def quad_side(quad: Any) -> float:
    """Side length of a quad in pixels of the image."""
    import numpy as np

    return float(np.hypot(*(quad[3] - quad[0])))


def turned_aside(points: Any) -> float:
    """Horizontal rotation of a face: 0 frontal, magnitude above `PROFILE` in profile; the sign is the direction.

    The offset of the nose tip from the midpoint of the eyes along their axis, as a fraction of the eye distance.
    """
    import numpy as np

    left_eye, right_eye, nose, _, _ = check_points(points)
    axis = right_eye - left_eye
    return float((nose - (left_eye + right_eye) / 2) @ axis / max(float(axis @ axis), 1e-9)) if np.any(axis) else np.inf


def check_points(points: Any) -> np.ndarray:
    """Five points as [5, 2] float64.

    Raises:
        IdentityEditError: when they are invalid.
    """
    import numpy as np

    try:
        array = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.shape != (5, 2) or not np.isfinite(array).all():
        raise IdentityEditError(
            "A face needs five points of two numbers: left eye, right eye, tip of the nose, left and right corner of "
            "the mouth, as seen in the image."
        )
    return array


def align_ffhq(image: torch.Tensor, points: Any, size: int, mask: torch.Tensor | None = None) -> AlignedFace:
    """An FFHQ crop of a face, by the steps of its script: quad, shrink, crop, pad, transform.

    Outside the image it is padded with the reflection, blurred and faded to the median color.

    Args:
        image: [H, W, 3] float, 0 to 1.
        points: [5, 2] in its pixels.
        size: pixels along a side of the result; 256 for e4e.
        mask: [H, W] of the subject, or None.
    """
    import numpy as np
    from PIL import Image

    quad = ffhq_quad(points)
    whole = quad.copy()
    side = quad_side(quad)
    given = torch.ones(image.shape[:2]) if mask is None else mask
    layers = torch.cat([image.float().cpu(), given.float().cpu()[..., None]], dim=2).numpy()

    # Shrink, where the image has far more pixels than the result.
    shrink = int(np.floor(side / size * 0.5))
    if shrink > 1:
        height, width = (max(1, int(np.rint(length / shrink))) for length in layers.shape[:2])
        layers = _resized(layers, (width, height))
        quad, side = quad / shrink, side / shrink

    # Crop to the quad and a border.
    height, width = layers.shape[:2]
    border = max(int(np.rint(side * 0.1)), 3)
    left, top, right, bottom = _bounds(quad)
    left, top = max(left - border, 0), max(top - border, 0)
    right, bottom = min(right + border, width), min(bottom + border, height)
    if left >= right or top >= bottom:
        raise IdentityEditError("The points of the face lie outside the image; specify them in its pixels.")
    layers, quad = layers[top:bottom, left:right], quad - [left, top]

    # Pad by reflection where the quad leaves the image.
    height, width = layers.shape[:2]
    left, top, right, bottom = _bounds(quad)
    pad = (
        max(-left + border, 0),
        max(-top + border, 0),
        max(right - width + border, 0),
        max(bottom - height + border, 0),
    )
    if max(pad) > border - 4:
        around = [max(amount, int(np.rint(side * 0.3))) for amount in pad]
        layers = _padded(layers, around, blur=side * 0.02)
        quad = quad + around[:2]

    # Transform: Pillow counts pixels from their corners, points from their centers.
    dense = size * OVERSAMPLING
    corners = tuple((quad + 0.5).flatten())
    sampled = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(layers[..., channel]))
            .transform((dense, dense), Image.Transform.QUAD, corners, Image.Resampling.BILINEAR)
            .resize((size, size), Image.Resampling.LANCZOS)
        )
        for channel in range(layers.shape[2])
    ]
    aligned = torch.from_numpy(np.stack(sampled, axis=2).clip(0.0, 1.0))
    return AlignedFace(aligned[..., :3].contiguous(), aligned[..., 3].contiguous(), whole)


def arcface_transform(points: Any) -> np.ndarray:
    """The similarity transform [2, 3] that best maps five points to `ARCFACE_POINTS` (Umeyama 1991).

    Args:
        points: [5, 2] in pixels.

    Raises:
        IdentityEditError: when there are not five points, or they coincide.
    """
    import numpy as np

    source, target = check_points(points), np.array(ARCFACE_POINTS)
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    centered, wanted = source - source_mean, target - target_mean
    variance = (centered**2).sum() / 5
    if variance < 1e-9:
        raise IdentityEditError("The points of the face coincide; enter eyes, nose and corners of the mouth.")
    left, values, right = np.linalg.svd(wanted.T @ centered / 5)
    signs = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right)) or 1.0])  # rotation without reflection
    rotation = left @ np.diag(signs) @ right
    scale = (values * signs).sum() / variance
    return np.concatenate([scale * rotation, (target_mean - scale * rotation @ source_mean)[:, None]], axis=1)


def align_arcface(image: torch.Tensor, points: Any) -> torch.Tensor:
    """An ArcFace crop of a face.

    Args:
        image: [H, W, 3] float, 0 to 1.
        points: [5, 2] in its pixels.

    Returns:
        [112, 112, 3] float32, 0 to 1; black outside the image, as in ArcFace's training.
    """
    import numpy as np
    from PIL import Image

    transform = arcface_transform(points)
    inverse = np.linalg.inv(np.concatenate([transform, [[0.0, 0.0, 1.0]]]))[:2]
    # From pixels of the result, counted from their corners, to pixels of the image counted likewise.
    inverse[:, 2] += 0.5 - inverse[:, :2] @ [0.5, 0.5]
    layers = image.float().cpu().numpy()
    channels = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(layers[..., channel])).transform(
                (ARCFACE_SIZE, ARCFACE_SIZE),
                Image.Transform.AFFINE,
                tuple(inverse.flatten()),
                Image.Resampling.BILINEAR,
            )
        )
        for channel in range(3)
    ]
    return torch.from_numpy(np.stack(channels, axis=2).clip(0.0, 1.0))


def _bounds(quad: np.ndarray) -> tuple[int, int, int, int]:
    import numpy as np

    low, high = np.floor(quad.min(axis=0)), np.ceil(quad.max(axis=0))
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _resized(layers: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import numpy as np
    from PIL import Image

    return np.stack(
        [
            np.asarray(Image.fromarray(np.ascontiguousarray(layer)).resize(size, Image.Resampling.LANCZOS))
            for layer in np.moveaxis(layers, 2, 0)
        ],
        axis=2,
    ).clip(0.0, 1.0)


def _padded(layers: np.ndarray, pad: list[int], blur: float) -> np.ndarray:
    """FFHQ's padding of an image with its mask as the fourth layer, which gets zeros instead."""
    import numpy as np
    from scipy.ndimage import gaussian_filter

    left, top, right, bottom = pad
    sides = ((top, bottom), (left, right))
    image = np.pad(layers[..., :3], (*sides, (0, 0)), "reflect")
    mask = np.pad(layers[..., 3], sides)
    height, width = image.shape[:2]
    y, x, _ = np.ogrid[:height, :width, :1]
    outside = np.maximum(
        1.0 - np.minimum(np.float32(x) / left, np.float32(width - 1 - x) / right),
        1.0 - np.minimum(np.float32(y) / top, np.float32(height - 1 - y) / bottom),
    )
    blurred = gaussian_filter(image, [blur, blur, 0])
    image = image + (blurred - image) * np.clip(outside * 3.0 + 1.0, 0.0, 1.0)
    image = image + (np.median(image, axis=(0, 1)) - image) * np.clip(outside, 0.0, 1.0)
    return np.concatenate([image, mask[..., None]], axis=2).astype(np.float32)
