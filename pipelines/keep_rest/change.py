"""Where an edit changed its original, beyond the noise that a VAE and an editor leave everywhere.

The difference is compared with its noise at several scales. The noise of a scale grows with the local contrast of the
image, because softening and small shifts act on edges; both terms are estimated from the difference itself, by low
quantiles, so that the change may cover half of the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .structure import agreement, normalized

if TYPE_CHECKING:
    import numpy as np

SCALES = (0.7, 1.5, 3.0, 6.0)
"""[choice] Standard deviations in pixels at which differences are compared."""
FINE = 1
"""Scale that decides where a change ends, with the next one."""
WIDE = 2
"""Scale from which differences are compared at half of the size."""
BINS = 12
SAMPLES = 60_000
"""[choice] Pixels from which the noise is estimated."""
FLAT = 0.01
"""[choice] Gradient per pixel below which the image is flat."""
OF_QUANTILE = 1.4
"""Root mean square of a color difference with normal noise, in units of its 0.3 quantile."""
SEED_DEVIATIONS = 5.0
"""[choice] Deviations of the noise, in its logarithm, from which a pixel has certainly changed."""
GROW_DEVIATIONS = 2.6
"""[choice] The same for pixels connected with such a pixel."""
OBVIOUS = 0.1
"""[choice] Difference, 0 to 1, that is no noise."""
LEAST_NOISE = 1.0 / 255.0
"""Rounding to eight bits; smaller differences are none."""
SEED_LEAST, GROW_LEAST = 0.05, 0.025
"""[choice] The same as differences, 0 to 1, which no color correction is better than."""
BESIDE = 0.4
"""[choice] Smallest difference relative to the largest one beside it."""
REACH = 0.02
"""[choice] Distance of connected pixels from certain ones, in parts of the longest side."""
EVERYTHING = 0.85
"""[choice] Share of changed pixels from which nothing is left to keep."""
SMALLEST_ISLAND = 1e-4
"""[choice] Share of the image below which a change is noise."""
SMALL_ISLAND = 5e-3
"""[choice] The same below which a change must be certain in most places."""
SURE = 1 / 3
"""[choice] Certain share of a small change."""


@dataclass(frozen=True)
class Change:
    """The change of an edit.

    Attributes:
        mask: [H, W] bool.
        noise: typical difference of what was not changed, 0 to 1.
    """

    mask: torch.Tensor
    noise: float


def likely_unchanged(original: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
    """[H, W], 0 to 1: where the local structure of two images [H, W, 3] agrees; one half where there is none."""
    gray = torch.tensor([0.299, 0.587, 0.114])
    first, second = (normalized((each @ gray).numpy()) for each in (original, edited))
    local = torch.from_numpy(agreement(first, second)).clamp(0.0, 1.0)
    structure = torch.from_numpy(smooth(first * first, 4.0)).clamp(0.0, 1.0)
    return structure * local.square() + (1.0 - structure) * 0.5


def find_change(
    original: torch.Tensor,
    edited: torch.Tensor,
    covered: torch.Tensor,
    sensitivity: float = 0.0,
    guess: torch.Tensor | None = None,
) -> Change:
    """The change between an original and its registered edit.

    Args:
        original, edited: [H, W, 3] float32, 0 to 1, with the color cast undone.
        covered: [H, W] bool, where the edit shows the original's place at all.
        guess: [H, W] bool, a first idea of the mask, outside of which the noise is estimated.
        sensitivity: -1 finds only strong changes and keeps more of the original, 1 also weak ones.
    """
    import numpy as np
    from scipy import ndimage

    reached = covered.numpy()
    maps = list(_at_scales(original.numpy(), edited.numpy()))
    if guess is None:  # without obvious changes, of which there may be more than of everything else
        size = maps[FINE][1]
        unchanged = reached & (size < max(OBVIOUS, 5.0 * float(np.quantile(size[reached], 0.2))))
    else:
        unchanged = reached & ~guess.numpy()
    factor = 2.0**-sensitivity
    mask = np.zeros(reached.shape, bool)
    for time in range(2 if guess is None else 1):
        if time:  # the noise is estimated outside of the change
            unchanged = ~ndimage.binary_dilation(mask, iterations=3) & reached
            if unchanged.mean() < 0.1:
                break
        seeds, ends = np.zeros(reached.shape, bool), []
        for scale, size, contrast, beside in maps:
            is_half = size.shape != reached.shape
            here = _halved(unchanged.astype(np.float32)) == 1.0 if is_half else unchanged
            here = here if here.any() else np.ones_like(here)
            step = max(1, round((here.sum() / SAMPLES) ** 0.5))
            sizes, contrasts = (each[::step, ::step][here[::step, ::step]] for each in (size, contrast))
            flat, slope = _noise(sizes, contrasts)
            ratio = np.log((sizes**2 + LEAST_NOISE**2 / 4) / (flat**2 + (slope * contrasts) ** 2)) / 2
            low, middle = np.quantile(ratio, (0.15, 0.4))
            deviation = min(max((middle - low) / 0.783, 0.35), 0.5)  # of a normal distribution
            center = middle + 0.253 * deviation
            surely, perhaps = (
                np.exp(center + each * deviation) * factor for each in (SEED_DEVIATIONS, GROW_DEVIATIONS)
            )
            noise = np.sqrt(flat**2 + (slope * contrast) ** 2)
            seed = size > np.maximum(noise * surely, SEED_LEAST * factor)
            seeds |= _doubled(seed.astype(np.float32), reached.shape) > 0.5 if is_half else seed
            if beside is not None:
                end = size / np.maximum(np.maximum(noise * perhaps, GROW_LEAST * factor), beside)
                ends.append(_doubled(end, reached.shape) if is_half else end)
            if scale == SCALES[0]:
                level = float(np.median(sizes))
        if not (seeds & reached).any():
            return Change(torch.from_numpy(mask), level)
        near = distance_to(seeds & reached, REACH * max(seeds.shape)) <= REACH * max(seeds.shape)
        mask = _cleaned(seeds & reached, (np.maximum(*ends) > 1.0) & reached & near)
    return Change(torch.from_numpy(mask), level)


def _at_scales(
    first: np.ndarray, second: np.ndarray
) -> Iterator[tuple[float, np.ndarray, np.ndarray, np.ndarray | None]]:
    """Blurred differences of two images [H, W, 3], the wide scales at half of the size.

    Yields:
        standard deviation; size of the difference; contrast of the first image; the largest size beside, for the
        scales that decide where a change ends.
    """
    import numpy as np
    from scipy import ndimage

    difference, contrast = np.ascontiguousarray(np.moveaxis(first - second, -1, 0)), _contrast(first)
    for number, scale in enumerate(SCALES):
        if number == WIDE:
            difference, contrast = _halved(difference), _halved(contrast)
        # A mean of two pixels has a variance of 1/4.
        blur = scale if number < WIDE else ((scale**2 - 0.25) / 4) ** 0.5
        size = np.sqrt((smooth(difference, blur) ** 2).mean(axis=0))
        # Blurred differences reach beyond the change, but there they are weaker than beside it.
        decides = number in (FINE, FINE + 1)
        beside = ndimage.maximum_filter(size, 2 * round(2.5 * blur) + 1) * BESIDE if decides else None
        yield scale, size, smooth(contrast, blur), beside


def _halved(maps: np.ndarray) -> np.ndarray:
    """Maps [..., H, W] by means of two by two pixels; the last row and column count twice if they are odd."""
    import numpy as np

    odd = [(0, 0)] * (maps.ndim - 2) + [(0, side % 2) for side in maps.shape[-2:]]
    maps = np.pad(maps, odd, mode="edge")
    rows = maps[..., ::2, :] + maps[..., 1::2, :]
    return 0.25 * (rows[..., ::2] + rows[..., 1::2])


def _doubled(map_: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A halved map at its full shape."""
    full = torch.nn.functional.interpolate(torch.from_numpy(map_)[None, None], scale_factor=2.0, mode="bilinear")
    return full[0, 0, : shape[0], : shape[1]].numpy()


def distance_to(mask: np.ndarray, reach: float) -> np.ndarray:
    """Distance [H, W] in pixels to a mask [H, W] bool that is not empty, up to a reach; beyond it infinity."""
    import numpy as np
    from scipy.ndimage import distance_transform_edt

    box = []
    for axis in (1, 0):
        places = np.flatnonzero(mask.any(axis=axis))
        box.append(slice(max(0, places[0] - int(reach) - 1), places[-1] + int(reach) + 2))
    distance = np.full(mask.shape, np.inf, np.float32)
    distance[tuple(box)] = distance_transform_edt(~mask[tuple(box)])
    return distance


def _cleaned(seeds: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Candidates connected with seeds, without small islands and holes."""
    import numpy as np
    from scipy import ndimage

    least = max(4.0, SMALLEST_ISLAND * seeds.size)
    joined = ndimage.binary_closing(candidates, iterations=2) | candidates
    labels, count = ndimage.label(joined, np.ones((3, 3)))
    if not count:
        return joined
    areas, hits = (ndimage.sum_labels(each, labels, np.arange(count + 1)) for each in (joined, joined & seeds))
    is_sure = (hits >= areas * SURE) | (areas >= SMALL_ISLAND * seeds.size)
    kept = (areas >= least) & (hits >= least / 4) & is_sure
    kept[0] = False
    mask = kept[labels]
    holes, count = ndimage.label(~mask)
    areas = ndimage.sum_labels(~mask, holes, np.arange(count + 1))
    filled = areas < max(16.0, areas.sum() * 0.002)
    filled[0] = False
    return mask | filled[holes]


def _noise(sizes: np.ndarray, contrasts: np.ndarray) -> tuple[float, float]:
    """a and b of the expected difference sqrt(a^2 + b^2 contrast^2), from the quantiles of bins of equal contrast.

    Args:
        sizes, contrasts: [N], of pixels of which most are unchanged.
    """
    import numpy as np

    is_flat = contrasts < FLAT
    if is_flat.mean() < 0.1:
        is_flat = contrasts <= np.quantile(contrasts, 0.1)
    flat = max(LEAST_NOISE, float(np.quantile(sizes[is_flat], 0.3)) * OF_QUANTILE)
    sizes, contrasts = sizes[~is_flat], contrasts[~is_flat]
    order = np.argsort(contrasts)
    slopes = [0.0] if not len(order) else []
    for part in np.array_split(order, BINS):
        if len(part):
            level = float(np.quantile(sizes[part], 0.3)) * OF_QUANTILE
            slopes.append(max(level**2 - flat**2, 0.0) ** 0.5 / float(np.median(contrasts[part])))
    return flat, float(np.median(slopes))


def _contrast(image: np.ndarray) -> np.ndarray:
    """Root mean square gradient [H, W] of an image [H, W, 3], with its neighborhood."""
    import numpy as np

    along_y, along_x = np.gradient(np.ascontiguousarray(np.moveaxis(image, -1, 0)), axis=(1, 2))
    return np.sqrt(smooth((along_x**2 + along_y**2).mean(axis=0), 1.0).clip(0.0))


def smooth(maps: np.ndarray, deviation: float) -> np.ndarray:
    """Maps [..., H, W] blurred by a Gaussian of a standard deviation in pixels, border values replicated."""
    from scipy.ndimage import gaussian_filter

    blur = (0,) * (maps.ndim - 2) + (deviation, deviation)
    return gaussian_filter(maps, blur, mode="nearest", truncate=3.0)
