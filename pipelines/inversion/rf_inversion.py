"""RF-Inversion (Rout et al. 2025): inversion of a flow model drawn toward noise, and sampling drawn toward the image.

Both add to the velocity a pull along the straight line to a target. In the inversion the target is a sample of noise
(strength gamma), so that the inversion ends in noise that is typical of the model and easier to edit; in the first
steps of sampling it is the image (strength eta). "Semantic Image Inversion and Editing using Rectified Stochastic
Differential Equations", algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch

from .. import engine
from ..shared.comfy_types import Model
from ..shared.conditioning import Conditioning
from ..shared.errors import IN_FLOAT32, check_finite
from ..shared.input_checks import check_number
from .edit_friendly import independent_noise
from .inversion import Inversion, check_negative, levels_of
from .methods import Estimate, Steps, velocity

RF_INVERSION = "rf-inversion"
GAMMA = 0.5
ETA = 0.9
STOP = 0.25
"""Fraction of the steps with control: 7 of 28 in the paper's edits with Flux."""


def rf_inversion(
    model: Model,
    latent: torch.Tensor,
    positive: Conditioning,
    negative: Conditioning | None = None,
    steps: int = 28,
    guidance_scale: float = 1.0,
    end_at_zero: bool = True,
    callback: engine.Callback | None = None,
    *,
    gamma: float = GAMMA,
    seed: int = 0,
    sigmas: torch.Tensor | None = None,
) -> Inversion:
    """Invert an image under control toward a sample of noise (algorithm 1).

    Args:
        model: MODEL of a flow family.
        latent: the image [B, C, H, W] in the scale of LATENT sockets.
        positive: CONDITIONING during the inversion, the empty prompt in the paper.
        negative: CONDITIONING of the negative side; required for a guidance scale other than 1.
        steps: N, 28 in the paper.
        guidance_scale: guidance scale of the inversion.
        end_at_zero, sigmas: as for `inversion.invert_image`.
        callback: progress with preview.
        gamma: strength of the control, 0 (plain inversion) to 1 (ends exactly in the sample of noise).
        seed: seed of the noise.

    Returns:
        the inversion, in N model calls (2 N unless guidance scale is 1).
    """
    family = engine.require(model, engine.Capability.VELOCITY)
    check_number(gamma, "gamma", 0.0, 1.0)
    check_negative(negative, guidance_scale)
    levels = levels_of(model, steps, end_at_zero, sigmas)

    def loop(evaluator: engine.NetworkEvaluator, z_0: torch.Tensor) -> torch.Tensor:
        ascending = levels.flip(0).to(evaluator.device)
        estimate = partial(evaluator.guided, guidance_scale=guidance_scale)
        start = z_0 * engine.FLOW.image_scale(ascending[0])
        noise = family.noise_scale * independent_noise(1, z_0, seed)[0].to(z_0)
        trajectory = [start.cpu()]
        for i, (y, denoised) in enumerate(controlled_inversion(start, noise, ascending, estimate, gamma)):
            trajectory.append(y.cpu())
            evaluator.report(i, denoised, y, len(levels) - 1)
        return torch.stack(trajectory[::-1])

    z_0 = engine.model_latent(model, latent)
    trajectory = engine.run_loop(model, positive, negative, z_0, levels, loop, callback=callback, seed=seed)
    check_finite(trajectory, "The inversion's trajectory", IN_FLOAT32)
    return Inversion(trajectory, levels, RF_INVERSION, float(guidance_scale), engine.model_tag(model))


def controlled_inversion(
    y: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor, estimate: Estimate, gamma: float
) -> Steps:
    """Algorithm 1 over ascending `sigmas`: after each step, the latent and the last estimate of z_0."""
    for t, t_next in pairwise(sigmas):
        u, denoised = velocity(engine.FLOW, y, t, estimate)
        u_noise = (noise - y) / (1.0 - t)  # along the straight line to the noise
        y = y + (t_next - t) * (u + gamma * (u_noise - u))
        yield y, denoised


def rf_inversion_sampler(eta: float = ETA, start: float = 0.0, stop: float = STOP) -> engine.EditSampler:
    """A SAMPLER controlled toward the image of its LATENT in some of the steps (algorithm 2).

    Args:
        eta: strength of the control, 0 (none) to 1 (the image).
        start, stop: fractions of the steps between which it acts.
    """
    check_number(eta, "eta", 0.0, 1.0)
    check_number(start, "start", 0.0, 1.0)
    check_number(stop, "stop", 0.0, 1.0)

    def sample(run: engine.EditRun) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        first, end = round(start * run.steps), round(stop * run.steps)
        x = run.start
        for i, (s, s_next) in enumerate(pairwise(run.sigmas)):
            denoised = run.target(x, s)
            if first <= i < end:
                # The velocity along the straight line to the image is (x - z_0) / s: the same mixture of estimates.
                denoised = denoised + eta * (run.image - denoised)
            x = run.path.step(x, denoised, s, s_next)
            x = run.within_mask(x, run.path.noised(run.image, run.noise, s_next), s)
            if i == run.steps - 1:
                x = x / run.path.image_scale(s_next)
            yield x, denoised

    return engine.EditSampler(sample)
