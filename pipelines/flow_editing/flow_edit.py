"""FlowEdit (Kulikov et al. 2025): an edit without inversion.

The image moves along the difference between the velocities of the target and the source prompt, both taken at the same
fresh noise. "FlowEdit: Inversion-Free Text-Based Editing Using Pre-Trained Flow Models", algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from .. import engine
from ..inversion.edit_friendly import independent_noise, skipped_steps
from ..shared.input_checks import check_number

SKIP = 0.14
"""4 of 28 steps with Flux in the paper; 17 of 50, 0.34, with Stable Diffusion 3."""
SOURCE_GUIDANCE_SCALE = 1.5
TARGET_GUIDANCE_SCALE = 5.5
"""With Flux in the paper; 3.5 and 13.5 with Stable Diffusion 3."""


def flow_edit_sampler(skip: float = SKIP, last_steps: float = 0.0, averages: int = 1) -> engine.EditSampler:
    """A SAMPLER of the edit; it needs an `engine.EditGuider` and the image as LATENT.

    Args:
        skip: fraction of the steps skipped at the start (1 - n_max / N): larger keeps more of the image.
        last_steps: fraction of the steps at the end that sample the target prompt as usual (n_min / N). 0 in the paper.
        averages: noise samples per step (n_avg). 1 in the paper.
    """
    check_number(last_steps, "last_steps", 0.0, 1.0)
    check_number(averages, "averages", 1, None)

    def edit(run: engine.EditRun) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        first = skipped_steps(run.steps, skip)
        last = max(first, run.steps - round(last_steps * run.steps))
        noise = run.noise_scale * independent_noise(run.steps * averages, run.image, run.seed)
        path, x_src = run.path, run.image
        z = x_src  # Z^FE at the first step
        for i in range(first, last):
            t, t_next = run.sigmas[i : i + 2]
            v_delta = torch.zeros_like(z)
            for eps in noise[i * averages : (i + 1) * averages]:
                z_src = path.noised(x_src, eps.to(z), t)  # Z^src = (1 - t) X^src + t N
                z_tar = z + z_src - x_src  # Z^tar = Z^FE + Z^src - X^src
                v_tar = path.slope(z_tar, run.target(z_tar, t), t)
                v_src = path.slope(z_src, run.source(z_src, t), t)
                v_delta = v_delta + (v_tar - v_src) / averages
            z = run.within_mask(z + (t_next - t) * v_delta, x_src, t)
            yield z, z
        if last < run.steps:
            yield from _ordinary_sampling(run, last, z, noise[last * averages].to(z))

    return engine.EditSampler(edit)


def _ordinary_sampling(
    run: engine.EditRun, first: int, z: torch.Tensor, eps: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The last steps of algorithm 1: the edit with noise, sampled with the target prompt."""
    levels = run.sigmas[first:]
    x = z + run.path.noised(run.image, eps, levels[0]) - run.image
    for t, t_next in pairwise(levels):
        denoised = run.target(x, t)
        x = run.path.step(x, denoised, t, t_next)
        x = run.within_mask(x, run.path.noised(run.image, eps, t_next), t)
        yield x / run.path.alpha(t_next), denoised
