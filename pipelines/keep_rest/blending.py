"""Edited pixels inside of a mask, the original's everywhere else, without a seam.

The difference of both images just outside of the mask is continued smoothly into it (a membrane, as Poisson blending
has it, Perez et al. 2003; solved by a pull-push pyramid, Gortler et al. 1996) and added to the edit. Where the mask
reaches the frame there is no outside: the membrane takes no value there, so nothing is pulled towards the frame.
"""

from __future__ import annotations

import torch
from torch.nn.functional import avg_pool2d, interpolate, pad

from .change import distance_to

ROWS = 512
"""[choice] Rows that are blended at a time, which bounds the memory of large images."""
LARGEST_STEP = 0.25
"""[choice] Largest difference of an unchanged pixel, 0 to 1; larger ones belong to the change."""


def soft_mask(mask: torch.Tensor, grow: float, feather: float) -> torch.Tensor:
    """A mask [H, W] bool, grown and feathered outward: 1 inside, 0 from `grow` + `feather` pixels on."""
    if not bool(mask.any()):
        return torch.zeros(mask.shape)
    distance = torch.from_numpy(distance_to(mask.numpy(), grow + feather + 1.0))
    ramp = ((grow + feather + 1.0 - distance) / (feather + 1.0)).clamp(0.0, 1.0)
    return ramp * ramp * (3.0 - 2.0 * ramp)


def membrane(difference: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Continue a map from where it is known.

    Args:
        difference: [C, H, W].
        known: [H, W], 0 to 1.

    Returns:
        [C, H, W], smooth.
    """
    values, weight = difference[None], known[None, None].float()
    levels = []
    values = values * weight
    while True:
        levels.append((values, weight))
        if max(values.shape[2:]) <= 1:
            break
        odd = (0, values.shape[3] % 2, 0, values.shape[2] % 2)
        values, weight = (avg_pool2d(pad(each, odd), 2) for each in (values, weight))
        # More than a quarter of a block is as good as all of it.
        boost = (4.0 * weight).clamp(max=1.0) / weight.clamp(min=1e-12)
        values, weight = values * boost, weight * boost
    filled = levels[-1][0] / levels[-1][1].clamp(min=1e-12)
    for values, weight in reversed(levels[:-1]):
        size = values.shape[2:]
        doubled = interpolate(filled, size=(2 * filled.shape[2], 2 * filled.shape[3]), mode="bilinear")
        filled = values + (1.0 - weight) * doubled[..., : size[0], : size[1]]
    return filled[0]
