"""The area and mask of a conditioning on the grid of an attention layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d


@dataclass(frozen=True)
class Region:
    """A rectangle on a layer's grid.

    Attributes:
        grid: rows and columns of the grid over the whole latent.
        shape: rows and columns of the rectangle.
        top, left: its first row and column.
    """

    grid: tuple[int, int]
    shape: tuple[int, int]
    top: int = 0
    left: int = 0

    @property
    def rows(self) -> slice:
        return slice(self.top, self.top + self.shape[0])

    @property
    def columns(self) -> slice:
        return slice(self.left, self.left + self.shape[1])

    @property
    def is_whole(self) -> bool:
        return self.grid == self.shape

    def indices(self, device: torch.device) -> torch.Tensor:
        """Flat indices [n] of its positions in the grid."""
        indices = torch.arange(self.grid[0] * self.grid[1], device=device).unflatten(0, self.grid)
        return indices[self.rows, self.columns].flatten()

    def part_of(self, mask: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A latent mask [B, H, W] or with frames [1, B, H, W], averaged to the grid and cropped to the rectangle:
        [B, h, w] float32."""
        mask = mask.to(device=device, dtype=torch.float32).reshape(-1, 1, *mask.shape[-2:])
        return adaptive_avg_pool2d(mask, self.grid).squeeze(1)[:, self.rows, self.columns]

    def weight(self, entry: dict[str, Any], device: torch.device, batch: int) -> torch.Tensor:
        """Weight of a conditioning's prediction at each position [1 or B, h, w]: its strength times its mask.

        As in ComfyUI's `get_area_and_mult`, without the soft edge of areas, which is narrower than a grid position.

        Args:
            entry: a conditioning of a guider; its mask [1 or B, H, W] has the latent's size.
            device: device of the result.
            batch: B, the number of latents.
        """
        strength = max(0.0, float(entry.get("strength", 1.0)))
        mask = entry.get("mask")
        if mask is None:
            return torch.full((1, *self.shape), strength, device=device)
        inside = self.part_of(mask, device)[:batch]
        if inside.shape[0] > 1:
            inside = inside.repeat(batch // inside.shape[0], 1, 1)
        return (inside * (strength * float(entry.get("mask_strength", 1.0)))).clamp(min=0.0)


def flat_area(numbers: Sequence[float]) -> tuple[float, float, float, float]:
    """(height, width, top, left) of a conditioning's area; that of a video model has frames in front of each pair."""
    half = len(numbers) // 2
    (height, width), (top, left) = numbers[:half][-2:], numbers[half:][-2:]
    return height, width, top, left


def region_of(entry: dict[str, Any], height: int, width: int, shape: Sequence[int]) -> Region:
    """The region of a conditioning on a layer's grid.

    Args:
        entry: a conditioning of a guider; its area, if any, is (height, width, top, left) in latent pixels, of video
            models (frames, height, width, first frame, top, left).
        height, width: the latent's size.
        shape: rows and columns of the layer's activations for this conditioning.
    """
    rows, columns = int(shape[0]), int(shape[1])
    area = entry.get("area")
    if area is None:
        return Region((rows, columns), (rows, columns))
    given_height, given_width, top, left = map(int, flat_area(area))
    area_height, area_width = min(height - top, given_height), min(width - left, given_width)
    grid = max(rows, round(rows * height / area_height)), max(columns, round(columns * width / area_width))
    return Region(
        grid,
        (rows, columns),
        min(round(top * grid[0] / height), grid[0] - rows),
        min(round(left * grid[1] / width), grid[1] - columns),
    )
