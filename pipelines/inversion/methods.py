"""Deterministic inversion of an image, and the samplers that some of its methods reverse.

Sampling follows the ODE dx/ds = v(x, s) from noise to an image: v is the predicted noise of Stable Diffusion, and the
velocity of a flow model. Inversion follows it from the image to noise. Stock euler (DDIM, Song et al. 2021) takes the
velocity at the noisier end of a step, where an inversion has not arrived yet; the methods differ in how they find it.

Each method is a generator over the steps of `sigmas`, in either direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch

from ..engine import Estimate, NoisePath

DDIM = "ddim"
FIXED_POINT = "fixed point"
UNI_INV = "uni-inv"
MIDPOINT = "midpoint"
FIREFLOW = "fireflow"
METHODS = (DDIM, FIXED_POINT, UNI_INV, MIDPOINT, FIREFLOW)
OWN_SAMPLERS = (MIDPOINT, FIREFLOW)
"""Methods that reverse themselves instead of euler."""

ITERATIONS = 5
"""Iterations of the fixed point. With 20 steps, 3 leave about 1e-3 of the image's size and 5 about 1e-5."""

LOWEST_LEVEL = 1e-3
"""Noise level at which the velocity at the image itself is taken, since (x - denoised) / s has no value at s = 0."""

Steps = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""After each step: x and the last estimate of z_0, both [B, C, H, W]."""


def fixed_point(
    path: NoisePath,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    estimate: Estimate,
    iterations: int = ITERATIONS,
    updates: list[float] | None = None,
) -> Steps:
    """Inverts euler: solves x' = x + (s' - s) v(x', s') by fixed-point iteration.

    One iteration is DDIM inversion (Song et al. 2021, section 4.3), with eps(z_t, t + 1) in the papers' scale as in the
    reference implementation of null-text inversion. More iterations converge to the exact inverse (Pan et al. 2023,
    AIDI; Garibi et al. 2024, ReNoise), as long as a step is short enough. `updates` gets the size of each step's last
    change of x', relative to x'.
    """
    for s, s_next in pairwise(sigmas):
        y = x * (path.network_scale(s_next) / path.network_scale(s))  # the papers' z_t as an x at s_next
        for _ in range(iterations):
            before, denoised = y, estimate(y, s_next)
            y = x + (s_next - s) * path.slope(y, denoised, s_next)
        if updates is not None:
            updates.append(float((y - before).norm() / y.norm()))
        x = y
        yield x, denoised


def uni_inv(path: NoisePath, x: torch.Tensor, sigmas: torch.Tensor, estimate: Estimate) -> Steps:
    """Inverts euler: one fixed-point iteration, which starts from the velocity of the step before (Jiao et al. 2025,
    UniEdit-Flow, algorithm 1: Uni-Inv)."""
    v, _ = velocity(path, x, sigmas[0], estimate)
    for s, s_next in pairwise(sigmas):
        v, denoised = velocity(path, x + (s_next - s) * v, s_next, estimate)
        x = x + (s_next - s) * v
        yield x, denoised


def midpoint(path: NoisePath, x: torch.Tensor, sigmas: torch.Tensor, estimate: Estimate) -> Steps:
    """Explicit midpoint method, two evaluations per step. RF-Solver (Wang et al. 2025, algorithm 1), whose
    second-order Taylor step with a finite difference is the same."""
    for s, s_next in pairwise(sigmas):
        v, _ = velocity(path, x, s, estimate)
        v, denoised = velocity(path, x + (s_next - s) / 2 * v, s + (s_next - s) / 2, estimate)
        x = x + (s_next - s) * v
        yield x, denoised


def fireflow(path: NoisePath, x: torch.Tensor, sigmas: torch.Tensor, estimate: Estimate) -> Steps:
    """The midpoint method with one evaluation per step: the first half follows the previous step's velocity (Deng et
    al. 2024, FireFlow, algorithm 1)."""
    v, _ = velocity(path, x, sigmas[0], estimate)
    for s, s_next in pairwise(sigmas):
        v, denoised = velocity(path, x + (s_next - s) / 2 * v, s + (s_next - s) / 2, estimate)
        x = x + (s_next - s) * v
        yield x, denoised


def steps_of(
    method: str,
    path: NoisePath,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    estimate: Estimate,
    iterations: int = ITERATIONS,
    updates: list[float] | None = None,
) -> Steps:
    """The steps of a method of `METHODS` from x at sigmas[0]; `iterations` and `updates` are those of the fixed
    point."""
    if method == DDIM:
        return fixed_point(path, x, sigmas, estimate, 1)
    if method == FIXED_POINT:
        return fixed_point(path, x, sigmas, estimate, iterations, updates)
    return {UNI_INV: uni_inv, MIDPOINT: midpoint, FIREFLOW: fireflow}[method](path, x, sigmas, estimate)


def sampler_of(method: str, path: NoisePath) -> Callable[..., torch.Tensor]:
    """The sampling of a method of `OWN_SAMPLERS` as a sampler function for ComfyUI's KSAMPLER."""

    @torch.no_grad()
    def sample(
        model: Any,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
    ) -> torch.Tensor:
        from tqdm.auto import tqdm

        per_latent = x.new_ones([x.shape[0]])

        def estimate(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return model(x, sigma * per_latent, **(extra_args or {}))

        steps = steps_of(method, path, x, sigmas, estimate)
        for i, (after, denoised) in enumerate(tqdm(steps, total=len(sigmas) - 1, disable=disable)):
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
            x = after
        return x

    return sample


def velocity(
    path: NoisePath, x: torch.Tensor, sigma: torch.Tensor, estimate: Estimate
) -> tuple[torch.Tensor, torch.Tensor]:
    """v(x, s) and the estimate of z_0; at the image itself, taken at `LOWEST_LEVEL`."""
    sigma = sigma.clamp(min=LOWEST_LEVEL)
    denoised = estimate(x, sigma)
    return path.slope(x, denoised, sigma), denoised
