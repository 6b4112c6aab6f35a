"""Edit-friendly DDPM inversion (Huberman-Spiegelglas et al. 2024): noise maps that sample an image exactly.

Each latent on the way to noise is drawn with noise of its own, independent of the others (section 3.2, eq. 6), and the
noise map of a step is what sampling needs to get from one to the next (eq. 5). Sampling the maps with another prompt
edits the image. Leaving out the first steps ("skip") keeps more of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import engine
from ..shared.conditioning import Conditioning
from ..shared.errors import IN_FLOAT32, IdentityEditError, check_finite
from .inversion import EDIT_FRIENDLY_DDPM, Inversion, check_inversion, check_method, check_negative, sampling_step

STEPS = 100
SOURCE_GUIDANCE_SCALE = 3.5
TARGET_GUIDANCE_SCALE = 15.0
SKIP = 0.36
"""The reference implementation's 36 of 100 steps, as a share of the steps."""


def skipped_steps(steps: int, skip: float = SKIP) -> int:
    """How many of `steps` are left out for a share `skip` (0 to 1) of them: rounded, at least one step remains.

    Raises:
        IdentityEditError: when the share is outside its range.
    """
    if not 0.0 <= skip <= 1.0:
        raise IdentityEditError(f"skip is {skip:g}; choose a share of the steps from 0 to 1.")
    return min(round(skip * steps), steps - 1)


def edit_friendly_ddpm_inversion(
    model: Any,
    latent: torch.Tensor,
    source: Conditioning,
    negative: Conditioning | None = None,
    steps: int = STEPS,
    guidance_scale: float = SOURCE_GUIDANCE_SCALE,
    eta: float = 1.0,
    seed: int = 0,
    zero_last_noise_map: bool = False,
    callback: engine.Callback | None = None,
) -> Inversion:
    """Find the noise maps of an image (Huberman-Spiegelglas et al. 2024, algorithm 1).

    Args:
        model: MODEL that predicts noise or velocity.
        latent: the image [B, C, H, W] in the scale of LATENT sockets.
        source: the source prompt's CONDITIONING.
        negative: CONDITIONING of the negative side, the empty prompt in the paper; not needed for guidance scale 1.
        steps: N, 1 to one less than the model's training timesteps; fewer on a distilled model (`ddim_schedule`). 100
            in the reference implementation.
        guidance_scale: of the source prompt, 3.5 in the reference implementation.
        eta: share of each step's noise, above 0 up to 1. 1 (DDPM) in the paper; 0 has no noise maps.
        seed: of the noise. An image's noise depends on the seed and its place in the batch alone; the first image of
            a batch is inverted as it is alone.
        zero_last_noise_map: False is exact: sampling with the same prompts and guidance scale returns the image to
            rounding. True sets the last step's noise map to zero, as the reference implementation does; sampling then
            ends on the network's own estimate, near the image.
        callback: progress with preview.

    Returns:
        the inversion, of 2 N (guidance scale 1: N) model calls. Its trajectory holds the latents that were
        drawn, and ends on the image.

    Raises:
        IdentityEditError: when an input cannot be used.
    """
    family = engine.require(model)
    schedule = family.schedule(steps, room_below=True)
    if float(schedule.sigmas[-1]) == 0.0:
        # As many steps as timesteps end at sigma 0, where the last step has no noise that could carry the image.
        raise IdentityEditError(
            f"steps is {steps}, as many as the model has timesteps; choose a number from 1 to {steps - 1}."
        )
    steps = schedule.steps
    if not 0.0 < eta <= 1.0:
        raise IdentityEditError(
            f"eta is {eta:g}; choose a value above 0 up to 1, or DDIM Inversion, which is the method for eta 0."
        )
    check_negative(negative, guidance_scale)

    def loop(evaluator: engine.NetworkEvaluator, z_0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sigmas = schedule.sigmas.to(evaluator.device)
        noise = family.noise
        eps = _independent_noise(steps, z_0, seed)
        # Eq. 6: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps_t, each t with an eps of its own. The image itself
        # takes the place of the last one.
        latents = [noise.noised(z_0, eps[i].to(z_0), sigmas[i]) for i in range(steps)]
        latents.append(z_0 * noise.scale(sigmas[-1]))
        noise_maps = []
        for i in range(steps):
            denoised = evaluator.guided(latents[i], sigmas[i], guidance_scale)
            sigma, sigma_next = schedule.sigmas[i : i + 2].tolist()
            mean, deviation = noise.distribution(latents[i], denoised, sigma, sigma_next, eta)
            # Eq. 5: z_t = (x_{t-1} - mu_t(x_t)) / sigma_t
            noise_map = (latents[i + 1] - mean) / deviation
            # The next latent as sampling will compute it, so that rounding does not add up over the steps.
            latents[i + 1] = mean + deviation * noise_map
            noise_maps.append(noise_map)
            evaluator.report(i, denoised, latents[i + 1], steps)
        if zero_last_noise_map:
            noise_maps[-1] = torch.zeros_like(noise_maps[-1])
        return torch.stack([x.cpu() for x in latents]), torch.stack([z.cpu() for z in noise_maps])

    z_0 = engine.model_latent(model, latent)
    trajectory, maps = engine.run_loop(
        model, source, negative, z_0, schedule.sigmas, loop, callback=callback, seed=seed
    )
    check_finite(trajectory, "The inversion's trajectory", IN_FLOAT32)
    check_finite(maps, "The inversion's noise maps", IN_FLOAT32)
    return Inversion(
        trajectory=trajectory,
        sigmas=schedule.sigmas,
        timesteps=schedule.timesteps,
        method=EDIT_FRIENDLY_DDPM,
        guidance_scale=float(guidance_scale),
        model=engine.model_tag(model),
        noise_maps=maps,
        eta=float(eta),
    )


def edit_friendly_sampler(model: Any, inversion: Inversion) -> Callable[..., torch.Tensor]:
    """A sampler function for ComfyUI's KSAMPLER that takes every step's noise from the inversion's maps.

    It follows the sigmas it is given, which must be adjoining ones of the inversion (all of them, or those after the
    skipped steps), and starts from the latent it is given (`Inversion.start_latent`) without added noise. Where the
    sigmas end with the inversion's, it returns z_0 as `sample_inversion` does.

    Raises:
        IdentityEditError: when the inversion is another model's or has no noise maps; in sampling, for other sigmas or
            another latent.
    """
    check_inversion(inversion, model)
    check_method(inversion, EDIT_FRIENDLY_DDPM, "connect one from Edit-Friendly DDPM Inversion")

    def sample_edit_friendly_ddpm(
        model: Any,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
    ) -> torch.Tensor:
        from tqdm.auto import trange

        first = inversion.row(float(sigmas[0]))
        rows = [inversion.row(float(sigma)) for sigma in sigmas]
        if rows != list(range(first, first + len(rows))):
            raise IdentityEditError(
                "The sigmas leave out noise levels of the inversion; connect those of Edit-Friendly DDPM Sampler."
            )
        x = _without_rounding(x, inversion.trajectory[first].to(x))
        per_latent = x.new_ones([x.shape[0]])
        for i in trange(len(rows) - 1, disable=disable):
            denoised = model(x, sigmas[i] * per_latent, **(extra_args or {}))
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
            x = sampling_step(inversion, rows[i], x, denoised)
        return x / inversion.noise.scale(sigmas[-1]) if rows[-1] == inversion.steps else x

    return sample_edit_friendly_ddpm


def _without_rounding(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The inversion's own latent where `x` is the same but for the rounding on its way through a LATENT socket.

    The noise maps belong to that latent to the last bit, and many steps can make much of a bit.
    """
    same = x.shape == kept.shape and bool((x - kept).norm() <= 1e-5 * kept.norm())
    return kept if same else x


def _independent_noise(steps: int, z_0: torch.Tensor, seed: int) -> torch.Tensor:
    """[steps, B, C, H, W] on the CPU, drawn image by image: a longer batch does not change its first ones."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    rows = [torch.randn((steps, *z_0.shape[1:]), generator=generator) for _ in range(z_0.shape[0])]
    return torch.stack(rows, dim=1)
