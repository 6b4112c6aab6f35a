"""What two images are compared by: locally normalized brightness, where it has texture, and whether it agrees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from ..shared.images import as_color
from .transform import ROWS

if TYPE_CHECKING:
    import numpy as np

AGREES = 0.6
"""[choice] Local correlation from which the images show the same."""
TILES = 12
"""[choice] Tiles along a side."""
FIRST_SIDE = 256
"""[choice] The same for the first level of the fine step."""


def planes(image: torch.Tensor) -> torch.Tensor:
    """Colors [3, H, W] of an image [H, W, C], transparent parts in gray."""
    maps = torch.empty(3, *image.shape[:2])
    for start in range(0, len(image), ROWS):
        strip = image[start : start + ROWS]
        colors = as_color(strip[None])[0]
        if image.shape[-1] in (2, 4):
            opacity = strip[..., -1:].float().clamp(0.0, 1.0)
            colors = colors * opacity + 0.5 * (1.0 - opacity)
        maps[:, start : start + ROWS] = colors.movedim(-1, 0)
    return maps


def brightness(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Brightness [height, width] float32 of an image [H, W, C] at a size, transparent parts in gray."""
    return resized(torch.tensordot(torch.tensor([0.299, 0.587, 0.114]), planes(image), 1), size)


def at_size(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """An image [H, W, C] stretched to a size."""
    maps = interpolate(image.movedim(-1, 0)[None], size=size, mode="bicubic", antialias=True)
    return maps[0].movedim(0, -1).clamp(0.0, 1.0)


def resized(map_: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    if tuple(map_.shape) == tuple(size):
        return map_
    return interpolate(map_[None, None], size=size, mode="bicubic", antialias=True)[0, 0]


def box_mean(map_: np.ndarray, window: int) -> np.ndarray:
    from scipy.ndimage import uniform_filter

    return uniform_filter(map_, window, mode="nearest")


def gradient_of(map_: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    along_y, along_x = np.gradient(map_)
    return along_x, along_y


def _window(shape: tuple[int, ...]) -> int:
    """Side of the windows of local statistics."""
    return max(9, min(33, max(shape) // 24)) | 1


def normalized(map_: np.ndarray) -> np.ndarray:
    """Brightness with local mean 0 and local deviation 1, less in flat parts."""
    window = _window(map_.shape)
    centered = map_ - box_mean(map_, window)
    return centered / ((box_mean(centered * centered, window).clip(0.0)) ** 0.5 + 0.02)


def agreement(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Local correlation of normalized brightness, -1 to 1."""
    return correlation(first, second, energy_of(first))


def correlation(first: np.ndarray, second: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """`agreement` with the local energy of the first image known."""
    product = box_mean(first * second, _window(first.shape))
    return product / (energy.clip(1e-6) * energy_of(second).clip(1e-6)) ** 0.5


def energy_of(normalized_: np.ndarray) -> np.ndarray:
    return box_mean(normalized_ * normalized_, _window(normalized_.shape))


def structure_of(normalized_: np.ndarray) -> np.ndarray:
    """1 where there is enough texture to compare, else 0."""
    return (energy_of(normalized_) > 0.25).astype("float32")


def frame_weight(height: int, width: int) -> np.ndarray:
    """[height, width]: 1 in the middle, 3 at the frame, where there is less of a subject that moved by itself."""
    import numpy as np

    across, along = (np.abs(np.linspace(-1.0, 1.0, side)) for side in (width, height))
    return 1.0 + 2.0 * np.maximum(across[None, :], along[:, None]) ** 2


def share_of_tiles(structure: np.ndarray, agreeing: np.ndarray) -> float:
    """Share of the tiles with structure in which more than half of it agrees."""
    sums = [adaptive_avg_pool2d(torch.from_numpy(each)[None], (TILES, TILES))[0] for each in (structure, agreeing)]
    has = (sums[0] > 0.03) * torch.from_numpy(frame_weight(TILES, TILES))
    return float(((sums[1] > 0.5 * sums[0]) * has).sum()) / (float(has.sum()) + 1e-6)


def share_by_chance(first: np.ndarray, second: np.ndarray) -> float:
    """Share of the tiles that agree when the images are displaced, and so by chance."""
    import numpy as np

    step = max(1, round(max(first.shape) / (2 * FIRST_SIDE)))
    first, second = first[::step, ::step], second[::step, ::step]
    structure, distance = structure_of(first), _window(first.shape) * 3 // 2
    votes = [
        share_of_tiles(structure, structure * (agreement(first, np.roll(second, move, axis)) > AGREES))
        for axis in (0, 1)
        for move in (-distance, distance)
    ]
    return float(np.mean(votes))


def matching(original: torch.Tensor, edited: torch.Tensor, where: torch.Tensor) -> float:
    """Share of the tiles, with structure inside of a mask, in which two registered images agree.

    Args:
        original, edited: [H, W, 3], 0 to 1.
        where: [H, W] bool.

    Returns:
        0 to 1; 1 where there is no structure to compare.
    """
    gray = torch.tensor([0.299, 0.587, 0.114])
    first, second = (normalized((each @ gray).numpy()) for each in (original, edited))
    structure = structure_of(first) * where.numpy()
    if not structure.any():
        return 1.0
    return share_of_tiles(structure, structure * (agreement(first, second) > AGREES))
