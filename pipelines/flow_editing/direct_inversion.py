"""Direct inversion: the source prompt's deviation from the inversion, added to the edit (after Ju et al. 2024).

Sampling the source prompt from an inversion drifts away from the image, more with guidance. The deviation is known at
every step, since the inversion's latents are. Added to each step of the target prompt, it makes the edit with the
source prompt return the image exactly, at any guidance scale and without optimization.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import engine
from ..inversion.inversion import Inversion, check_deterministic, check_inversion, check_sampled_latent
from ..shared.comfy_types import Model


def direct_inversion_sampler(model: Model, inversion: Inversion) -> engine.EditSampler:
    """A SAMPLER of the edit; it needs an `engine.EditGuider`, and starts at the inversion's latent whatever the NOISE.

    Its sigmas must be consecutive ones of the inversion.

    Raises:
        IdentityEditError: for another model's inversion or one with noise maps; while sampling, for other sigmas or
            another latent.
    """
    check_inversion(inversion, model)
    check_deterministic(inversion, "connect one from Noise Inversion")

    def edit(run: engine.EditRun) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        check_sampled_latent(inversion, run.image)
        rows = inversion.rows(run.sigmas)
        x = inversion.trajectory[rows[0]].to(run.image).expand_as(run.image)
        for i in range(run.steps):
            s, s_next = run.sigmas[i : i + 2]
            pivot, pivot_next = inversion.trajectory[rows[i] : rows[i] + 2].to(x)
            denoised = run.target(x, s)
            deviation = pivot_next - run.path.step(pivot, run.source(pivot, s), s, s_next)
            x = run.path.step(x, denoised, s, s_next) + deviation
            x = run.within_mask(x, pivot_next, s)
            yield (x / run.path.image_scale(s_next) if i == run.steps - 1 else x), denoised

    return engine.EditSampler(edit)
