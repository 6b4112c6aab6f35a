"""Arithmetic of maps and masks [B, h, w]."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import adaptive_avg_pool2d, conv2d, interpolate, pad


def normalized(mask: torch.Tensor) -> torch.Tensor:
    """Each image's map [B, h, w] from 0 at its smallest value to 1 at its largest; 0 where all are equal."""
    low, high = mask.amin(dim=(1, 2), keepdim=True), mask.amax(dim=(1, 2), keepdim=True)
    return torch.where(high > low, (mask - low) / (high - low).clamp(min=1e-30), torch.zeros_like(mask))


def union(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """M_t, eq. 3: the union of two masks, so that the subject of neither image is cut."""
    return torch.maximum(first, second)


def feathered(mask: torch.Tensor, width: float) -> torch.Tensor:
    """A mask [B, H, W] whose border fades: blurred by a Gaussian of deviation `width` in cells; 0 leaves it as it is.

    The outermost cells are repeated at the border, so that a mask of ones stays one.
    """
    return mask if width <= 0 else blurred(mask, width, max(1, math.ceil(3 * width)), "replicate").clamp(0.0, 1.0)


def blurred(mask: torch.Tensor, deviation: float, radius: int, border: str) -> torch.Tensor:
    """A map [B, H, W] blurred by a Gaussian of a standard deviation and a radius in cells.

    Written out, because torchvision's blur only reflects at the border, and so refuses small latents.

    Args:
        border: how cells beyond the border are made, a mode of `torch.nn.functional.pad`.
    """
    distance = torch.arange(-radius, radius + 1, device=mask.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (distance / deviation) ** 2)
    kernel = kernel / kernel.sum()
    padded = pad(mask.unsqueeze(1), (radius, radius, radius, radius), mode=border)
    return conv2d(conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1)).squeeze(1)


def resized(mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A map [B, h, w] on another grid: bilinear where it grows, the mean of the cells where it shrinks (which is
    bilinear for a half, and leaves no cell out for less)."""
    if tuple(mask.shape[1:]) == tuple(grid):
        return mask
    if mask.shape[1] >= grid[0] and mask.shape[2] >= grid[1]:
        return adaptive_avg_pool2d(mask.unsqueeze(1), grid).squeeze(1)
    return interpolate(mask.unsqueeze(1), size=grid, mode="bilinear", align_corners=False).squeeze(1)
