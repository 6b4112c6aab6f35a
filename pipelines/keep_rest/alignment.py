"""The steps of a registration: coarse by orientation correlation, fine by robust Gauss-Newton, and a dense flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import adaptive_avg_pool2d

from .structure import (
    AGREES,
    agreement,
    box_mean,
    correlation,
    energy_of,
    frame_weight,
    gradient_of,
    normalized,
    share_of_tiles,
    structure_of,
)
from .transform import Transform, corner_distance, moved_by, warp

if TYPE_CHECKING:
    import numpy as np

ZOOMS = 0.16
"""[choice] Largest zoom of the coarse step, as a logarithm, beyond what the sizes of the images say."""
ZOOM_STEP = 0.02
ROTATIONS = (-1.5, 0.0, 1.5)
"""[choice] Rotations of the coarse step in degrees."""
STARTS = 6
"""[choice] Transforms of the coarse step that are refined."""
STRETCH = 0.01
"""[choice] Typical difference of the zooms in x and y."""
CORRELATED = 25.0
"""[choice] Pixels of normalized brightness that count as one observation."""
POINTS = 200_000
"""[choice] Pixels from which a step is computed."""
EXTENDED = 3.5
"""[choice] So many times more the transforms of left and right, or of top and bottom, may differ, because each is
extended over the other half."""
LIKELY_DRIFT = 0.12
"""[choice] Movement of a corner, in parts of the longest side, that halves the belief in a transform."""
FLOW_SIDE = 48
"""[choice] Longest side of a flow."""
FLOW_WINDOW = 0.04
"""[choice] Standard deviation of the windows of the flow in parts of the longest side, at the largest level."""
FLOW_STEPS = 3
"""[choice] Steps of the flow at every level."""
FLOW_RIDGE = 0.02
"""[choice] Pull towards no movement, in parts of the mean structure."""
LARGEST_FLOW = 0.03
"""[choice] Largest movement of the flow in halves of the side; what moves farther was edited."""


def likelihood(drift: float) -> float:
    """Belief in the movement of a corner, in parts of the longest side."""
    return 1.0 / (1.0 + (drift / LIKELY_DRIFT) ** 2)


def coarse_transforms(
    original: torch.Tensor, edited: torch.Tensor, frames: list[tuple[float, float]]
) -> list[Transform]:
    """The transforms of the highest orientation correlation that differ from each other, and no movement at all."""
    import numpy as np
    from scipy.fft import fft2, ifft2, next_fast_len

    height, width = original.shape
    padded = [next_fast_len(side * 5 // 4) for side in (height, width)]

    def orientation(map_: torch.Tensor) -> torch.Tensor:
        """[2, H, W]: the doubled angle of the gradient, less where the gradient is weak or edges are dense."""
        along_x, along_y = gradient_of(map_.numpy())
        scale = along_x**2 + along_y**2 + 0.02**2
        parts = np.stack([(along_x**2 - along_y**2) / scale, 2.0 * along_x * along_y / scale])
        density = box_mean((parts**2).sum(axis=0), max(height, width) // 4)
        return torch.from_numpy((parts / (density + 0.02) ** 0.5 * frame_weight(height, width)).astype(np.float32))

    first, second = orientation(original).numpy(), orientation(edited)
    spectrum = np.conj(fft2(first[0] + 1j * first[1], padded))
    found = []
    for frame in frames:
        for log_zoom in np.arange(-ZOOMS, ZOOMS + 1e-6, ZOOM_STEP):
            for rotation in ROTATIONS:
                zoom = float(np.exp(log_zoom))
                matrix = Transform(frame[0] * zoom, frame[1] * zoom, rotation).matrix()
                moved = warp(second, matrix, (height, width), "bilinear")[0].numpy()
                score = ifft2(spectrum * fft2(moved[0] + 1j * moved[1], padded)).real
                peak = np.unravel_index(int(score.argmax()), score.shape)
                # The original at p is the warped edit at p + offset, and the edit at matrix (p + offset).
                offset = [at - side if at > side // 2 else at for at, side in zip(peak, padded, strict=True)]
                shift = matrix[:, :2] @ [offset[1], offset[0]]
                start = Transform(frame[0] * zoom, frame[1] * zoom, rotation, float(shift[0]), float(shift[1]))
                drift = corner_distance(start, Transform(*frame), width, height) / max(height, width)
                energy = float((moved**2).sum()) ** 0.5 + 1e-6
                found.append((float(score[peak]) / energy * likelihood(drift), start))
    found.sort(key=lambda each: -each[0])
    starts = [Transform(*frames[0])]
    for _, start in found:
        steps = [corner_distance(start, other, width, height) for other in starts[1:]]
        if min(steps, default=np.inf) > 0.06 * max(height, width):
            starts.append(start)
        if len(starts) > STARTS:
            break
    return starts


@dataclass(frozen=True)
class Fit:
    """A refined transform in pixels of the level's images.

    Attributes:
        ratio: zoom_x / zoom_y that the frames of the images suggest.
        votes: share of the image's tiles whose structure the warped edit shows too.
        doubt: corner distance of the transforms of two halves of the image, the largest of three divisions, or of the
            last step if that is longer.
        images: both images' normalized brightness, the edit's warped.
    """

    transform: Transform
    ratio: float
    votes: float
    doubt: float
    images: tuple[np.ndarray, np.ndarray]


def refine(original: torch.Tensor, edited: torch.Tensor, start: Transform, iterations: int, ratio: float) -> Fit:
    """Gauss-Newton from a start on normalized brightness, with the mean gradient of both images.

    Args:
        ratio: zoom_x / zoom_y that the frames of the images suggest.
    """
    import numpy as np

    height, width = original.shape
    first = normalized(original.numpy())
    gradient = gradient_of(first)
    second = torch.from_numpy(normalized(edited.numpy()))[None]
    energy, structure = energy_of(first), structure_of(first)
    tile = max(16, max(height, width) // 8)
    scale = np.array([width / 2.0, height / 2.0, max(width, height) / 2.0, 1.0, 1.0], dtype=np.float32)
    unequal = np.array([1.0, -1.0, 0.0, 0.0, 0.0]) / scale
    transform = start
    for _ in range(iterations):
        matrix = transform.matrix()
        warped_, inside = warp(second, matrix, (height, width))
        warped = warped_[0].numpy()
        local = correlation(first, warped, energy)
        weight = (local - 0.3).clip(0.0) ** 2 * structure * inside.numpy()
        points = np.flatnonzero(weight)
        stride = -(-len(points) // POINTS) or 1
        points = points[::stride]
        weight, residual = weight.reshape(-1)[points], (first - warped).reshape(-1)[points]
        used = np.abs(residual[weight > 0.05])
        spread = 1.5 * float(np.median(used)) + 0.05 if used.size else 1.0
        weight *= stride / (1.0 + (residual / spread) ** 2)
        back = np.linalg.inv(matrix[:, :2]).T.astype(np.float32)
        mean = [
            0.5 * (ours + theirs).reshape(-1)[points]
            for ours, theirs in zip(gradient, gradient_of(warped), strict=True)
        ]
        along_x, along_y = (back[i, 0] * mean[0] + back[i, 1] * mean[1] for i in (0, 1))
        unit_x, unit_y = (matrix[:, i].astype(np.float32) for i in (0, 1))
        row, column = np.divmod(points, width)
        x, y = ((each + 0.5 - side / 2.0).astype(np.float32) for each, side in ((column, width), (row, height)))
        derivatives = [
            (along_x * unit_x[0] + along_y * unit_x[1]) * x,  # log zoom_x
            (along_x * unit_y[0] + along_y * unit_y[1]) * y,  # log zoom_y
            (along_y * unit_x[0] - along_x * unit_x[1]) * x + (along_y * unit_y[0] - along_x * unit_y[1]) * y,
            along_x,
            along_y,
        ]
        columns = np.stack(derivatives) / scale[:, None]
        cell = (column // tile + row // tile) % 2 + 2 * (column >= width // 2) + 4 * (row >= height // 2)
        normals, rights = np.zeros((8, 5, 5)), np.zeros((8, 5))
        for number in range(8):
            chosen = cell == number
            part = columns[:, chosen]
            weighted = part * weight[chosen]
            normals[number], rights[number] = weighted @ part.T, weighted @ residual[chosen]
        # Editors hardly stretch, which decides the zooms where only one end of the image has structure.
        variance = float((weight * residual**2).sum()) / (float(weight.sum()) + 1e-6)
        belief = variance * CORRELATED / STRETCH**2
        missing = np.log(ratio * transform.zoom_y / transform.zoom_x)
        prior, pull = belief * np.outer(unequal, unequal), belief * missing * unequal
        step = _solve(normals.sum(axis=0) + prior, rights.sum(axis=0) + pull) / scale
        before, transform = transform, moved_by(transform, step)
        length = corner_distance(before, transform, width, height)
        if length < 0.005:
            break
    agreeing = structure * inside.numpy() * (local > AGREES)
    # Halves by rows, by columns, and by a checkerboard of tiles.
    distances = []
    for others in ((1, 2), (0, 2), (0, 1)):
        pair = normals.reshape(2, 2, 2, 5, 5).sum(axis=others), rights.reshape(2, 2, 2, 5).sum(axis=others)
        first_half, second_half = (
            moved_by(before, _solve(normal + prior, right + pull) / scale) for normal, right in zip(*pair, strict=True)
        )
        distances.append(corner_distance(first_half, second_half, width, height))
    doubt = max(distances[2], max(distances[:2]) / EXTENDED, length)
    return Fit(transform, ratio, share_of_tiles(structure, agreeing), doubt, (first, warped))


def _solve(normal: np.ndarray, side: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.linalg.solve(normal + np.eye(5) * (1e-6 * np.trace(normal) + 1e-9), side)


def dense_flow(pyramid: list[tuple[torch.Tensor, torch.Tensor]], transform: Transform) -> torch.Tensor:
    """Small smooth movements that a transform leaves, by Lucas and Kanade (1981) with Gaussian windows.

    From small images and wide windows to large images and narrower ones, so that edited parts, which do not correlate
    and have no weight, move with what surrounds them.

    Args:
        pyramid: brightness of both images at every level, the largest first.
        transform: in pixels of the largest.

    Returns:
        as `Registration.flow`.
    """
    import numpy as np
    from scipy.ndimage import gaussian_filter

    height, width = pyramid[0][0].shape
    size = tuple(max(1, round(FLOW_SIDE * side / max(height, width))) for side in (height, width))
    flow = torch.zeros(2, *size)
    for level in (2, 1, 0):
        original, edited = pyramid[min(level, len(pyramid) - 1)]
        height, width = original.shape
        matrix = transform.scaled(width / pyramid[0][0].shape[1]).matrix()
        back = np.linalg.inv(matrix[:, :2]).T.astype(np.float32)
        first, second = normalized(original.numpy()), torch.from_numpy(normalized(edited.numpy()))[None]
        gradient, structure = gradient_of(first), structure_of(first)
        window = FLOW_WINDOW * FLOW_SIDE * 2.0**level
        for _ in range(FLOW_STEPS):
            warped_, inside = warp(second, matrix, (height, width), flow=flow)
            warped = warped_[0].numpy()
            residual = first - warped
            weight = (agreement(first, warped) - 0.3).clip(0.0) ** 2 * structure * inside.numpy()
            weight /= 1.0 + (residual / 0.5) ** 2
            mean = [0.5 * (ours + theirs) for ours, theirs in zip(gradient, gradient_of(warped), strict=True)]
            x, y = (back[i, 0] * mean[0] + back[i, 1] * mean[1] for i in (0, 1))
            products = torch.from_numpy(np.stack([x * x, x * y, y * y, x * residual, y * residual]) * weight)
            xx, xy, yy, right_x, right_y = (
                gaussian_filter(each, window, mode="nearest")
                for each in adaptive_avg_pool2d(products[None], (size[0], size[1]))[0].double().numpy()
            )
            ridge = FLOW_RIDGE * float((xx + yy).mean()) + 1e-9
            xx, yy = xx + ridge, yy + ridge
            determinant = xx * yy - xy * xy
            step = np.stack([yy * right_x - xy * right_y, xx * right_y - xy * right_x]) / determinant
            step *= np.array([2.0 / width, 2.0 / height])[:, None, None]
            flow = (flow + torch.from_numpy(step).float()).clamp(-LARGEST_FLOW, LARGEST_FLOW)
    return flow
