"""Uni-Edit (Jiao et al. 2025): sampling with the target prompt where it differs from the source prompt.

"UniEdit-Flow: Unleashing Inversion and Editing in the Era of Flow Models", algorithm 2. The image is inverted by
Uni-Inv for a part of the steps only, and then sampled with a velocity that combines both prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from .. import engine
from ..engine.families.schedule import check_ends_at_image
from ..inversion.methods import uni_inv
from ..shared.input_checks import check_number

ALPHA = 0.6
OMEGA = 5.0
"""The published code's settings, with 15 steps."""


def uni_edit_sampler(alpha: float = ALPHA, omega: float = OMEGA) -> engine.EditSampler:
    """A SAMPLER of the edit; it needs an `engine.EditGuider` (guidance scales 1) and the image as LATENT.

    Args:
        alpha: fraction of the steps that are inverted and sampled: larger changes more.
        omega: strength of the edit.
    """
    check_number(alpha, "alpha", 0.0, 1.0)

    def edit(run: engine.EditRun) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        check_ends_at_image(run.path, run.sigmas)
        levels = run.sigmas[run.steps - max(1, round(alpha * run.steps)) :]
        path = run.path
        inverted = run.image * path.image_scale(levels[-1])
        for inverted, denoised in uni_inv(path, inverted, levels.flip(0), run.source):  # noqa: B007, B020
            yield run.image, denoised
        x = inverted
        for t, t_next in pairwise(levels):
            v_tar = path.slope(x, run.target(x, t), t)
            v_src = path.slope(x, run.source(x, t), t)
            difference = v_tar - v_src
            mask = _normalized(difference.abs().mean(dim=1, keepdim=True))
            fused = mask * v_tar + (1 - mask) * v_src  # velocity fusion
            v = fused + omega * (1 + mask) * difference  # and correction
            x = x + (t_next - t) * v
            unchanged = path.noised(run.image, path.predicted_noise(inverted, run.image, levels[0]), t_next)
            x = run.within_mask(x, unchanged, t)
            yield x / path.image_scale(t_next), x - t * v

    return engine.EditSampler(edit)


def _normalized(mask: torch.Tensor) -> torch.Tensor:
    """Each image's values from 0 to 1."""
    low, high = mask.flatten(1).amin(dim=1), mask.flatten(1).amax(dim=1)
    low, high = (each.view(-1, *[1] * (mask.ndim - 1)) for each in (low, high))
    return (mask - low) / (high - low).clamp(min=1e-7)
