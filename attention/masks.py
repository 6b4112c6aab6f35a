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
    """M_t, eq. 3: the union of two masks, which includes the subjects of both images."""
    return torch.maximum(first, second)


def feathered(mask: torch.Tensor, width: float) -> torch.Tensor:
    """Feather a mask [B, H, W] with a Gaussian of standard deviation `width` in latent pixels; 0 returns it unchanged.

    Border values are replicated, so a mask of ones stays one.
    """
    return mask if width <= 0 else blurred(mask, width, max(1, math.ceil(3 * width)), "replicate").clamp(0.0, 1.0)


def blurred(mask: torch.Tensor, deviation: float, radius: int, border: str) -> torch.Tensor:
    """Blur a map [B, H, W] with a Gaussian; standard deviation and kernel radius in pixels of the map.

    Not torchvision's blur, because that always uses reflection padding, which fails on small latents.

    Args:
        border: padding mode of `torch.nn.functional.pad`.
    """
    distance = torch.arange(-radius, radius + 1, device=mask.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (distance / deviation) ** 2)
    kernel = kernel / kernel.sum()
    padded = pad(mask.unsqueeze(1), (radius, radius, radius, radius), mode=border)
    return conv2d(conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1)).squeeze(1)


def resized(mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Resize a map [B, h, w]: bilinear when enlarged, averaged when reduced (equal to bilinear at one half, and without
    skipping pixels below)."""
    if tuple(mask.shape[1:]) == tuple(grid):
        return mask
    if mask.shape[1] >= grid[0] and mask.shape[2] >= grid[1]:
        return adaptive_avg_pool2d(mask.unsqueeze(1), grid).squeeze(1)
    return interpolate(mask.unsqueeze(1), size=grid, mode="bilinear", align_corners=False).squeeze(1)
