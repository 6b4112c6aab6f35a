"""The movement of an image's content by an editor, and moving it back.

Coordinates are pixels of the original relative to its center, x to the right and y down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import grid_sample, interpolate

from ..shared.images import as_color

if TYPE_CHECKING:
    import numpy as np

ROWS = 512
"""[choice] Rows that are warped at a time, which bounds the memory of large images."""


@dataclass(frozen=True)
class Transform:
    """The movement of the image content by an editor: p to rotation(zoom p) + shift.

    Attributes:
        zoom_x, zoom_y: 1 for none.
        rotation: degrees, clockwise on the screen.
        shift_x, shift_y: pixels of the original, right and down.
    """

    zoom_x: float = 1.0
    zoom_y: float = 1.0
    rotation: float = 0.0
    shift_x: float = 0.0
    shift_y: float = 0.0

    def matrix(self) -> np.ndarray:
        """[2, 3] float64: from centered pixels of the original to centered pixels of the edit at that size."""
        import numpy as np

        angle = np.deg2rad(self.rotation)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        return np.column_stack([turn * [self.zoom_x, self.zoom_y], [self.shift_x, self.shift_y]])

    def scaled(self, factor: float) -> Transform:
        """The same in pixels of images enlarged by a factor."""
        return Transform(self.zoom_x, self.zoom_y, self.rotation, self.shift_x * factor, self.shift_y * factor)

    def __str__(self) -> str:
        return (
            f"shift {self.shift_x:+.2f}, {self.shift_y:+.2f} pixels, zoom {self.zoom_x:.4f} x {self.zoom_y:.4f}, "
            f"rotation {self.rotation:+.2f} degrees"
        )


def corner_distance(first: Transform, second: Transform, width: int, height: int) -> float:
    """Largest distance in pixels between where two transforms move a corner."""
    import numpy as np

    corners = np.array([[x, y, 1.0] for x in (-width / 2, width / 2) for y in (-height / 2, height / 2)])
    return float(np.linalg.norm(corners @ (first.matrix() - second.matrix()).T, axis=1).max())


def moved_by(transform: Transform, step: np.ndarray) -> Transform:
    """A transform changed by a step of log zoom_x, log zoom_y, rotation in radians, shift_x and shift_y."""
    zoom_x, zoom_y, turn, shift_x, shift_y = (float(value) for value in step)
    return Transform(
        transform.zoom_x * math.exp(max(-0.2, min(0.2, zoom_x))),
        transform.zoom_y * math.exp(max(-0.2, min(0.2, zoom_y))),
        transform.rotation + math.degrees(max(-0.2, min(0.2, turn))),
        transform.shift_x + shift_x,
        transform.shift_y + shift_y,
    )


def sampling_grid(
    matrix: np.ndarray, size: tuple[int, int], rows: tuple[int, int], flow: torch.Tensor | None = None
) -> torch.Tensor:
    """Places [rows, width, 2] for `grid_sample`, of rows of the original in the edit's frame of -1 to 1."""
    height, width = size
    half = torch.tensor([width / 2.0, height / 2.0])
    x = torch.arange(width, dtype=torch.float32) + 0.5 - half[0]
    y = torch.arange(*rows, dtype=torch.float32)[:, None] + 0.5 - half[1]
    a = torch.from_numpy(matrix).float()
    places = [a[i, 0] * x + a[i, 1] * y + a[i, 2] for i in (0, 1)]
    grid = torch.stack([places[0] / half[0], places[1] / half[1]], dim=-1)
    if flow is None:
        return grid
    own = torch.stack(torch.broadcast_tensors(x / half[0], y / half[1]), dim=-1)
    moved = grid_sample(flow[None], own[None], mode="bicubic", padding_mode="border", align_corners=False)[0]
    return grid + moved.movedim(0, -1)


def reached(grid: torch.Tensor) -> torch.Tensor:
    """Where a sampling grid lies inside of the edit's frame."""
    return (grid.abs() <= 1.0).all(dim=-1)


def warp(
    maps: torch.Tensor,
    matrix: np.ndarray,
    size: tuple[int, int],
    mode: str = "bicubic",
    flow: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps [C, h, w], a whole frame at any size, seen through a transform.

    Args:
        matrix: `Transform.matrix` in pixels of `size`.
        size: height and width of the result.
        flow: as in `Registration`.

    Returns:
        [C, height, width], and [height, width] bool where the maps reach.
    """
    grid = sampling_grid(matrix, size, (0, size[0]), flow)
    warped = grid_sample(maps[None], grid[None], mode=mode, padding_mode="border", align_corners=False)[0]
    return warped, reached(grid)


def moved_back(
    transform: Transform, original: torch.Tensor, edited: torch.Tensor, flow: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move an edit back onto its original, at the original's size.

    Args:
        transform, flow: from `register`.
        original: [H, W, C], 0 to 1.
        edited: [h, w, C], likewise, of any size.

    Returns:
        the registered edit [H, W, 3] float32, with the original's pixels where the edit does not reach, and
        [H, W] float32, 1 where it reaches.
    """
    height, width = original.shape[:2]
    maps = as_color(edited[None])[0].movedim(-1, 0)
    # An edit with more pixels than the original is reduced first, so that the warp skips none.
    size = [min(side, max(1, round(wanted))) for side, wanted in zip(edited.shape[:2], (height, width), strict=True)]
    if list(maps.shape[1:]) != size:
        maps = interpolate(maps[None], size=size, mode="bicubic", antialias=True)[0]
    registered = torch.empty(height, width, 3)
    covered = torch.empty(height, width)
    for start in range(0, height, ROWS):
        rows = (start, min(height, start + ROWS))
        grid = sampling_grid(transform.matrix(), (height, width), rows, flow)
        strip = grid_sample(maps[None], grid[None], mode="bicubic", padding_mode="border", align_corners=False)[0]
        inside = reached(grid)
        base = as_color(original[None, rows[0] : rows[1]])[0]
        registered[rows[0] : rows[1]] = torch.where(inside[..., None], strip.movedim(0, -1).clamp(0.0, 1.0), base)
        covered[rows[0] : rows[1]] = inside.float()
    return registered, covered
