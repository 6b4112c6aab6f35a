"""Edit-friendly DDPM inversion (Huberman-Spiegelglas et al. 2024): noise maps that reconstruct an image exactly.

The latent at each noise level is drawn with independent noise (section 3.2, eq. 6), and a step's noise map is the noise
with which sampling gets from one latent to the next (eq. 5). Sampling with these maps and another prompt edits the
image; skipping the first steps ("skip") preserves more of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import engine
from ..shared.comfy_types import Model
from ..shared.conditioning import Conditioning
from ..shared.errors import IN_FLOAT32, IdentityEditError, check_finite
from ..shared.input_checks import check_number
from .inversion import EDIT_FRIENDLY_DDPM, Inversion, check_inversion, check_negative, sampling_step

STEPS = 100
SOURCE_GUIDANCE_SCALE = 3.5
SKIP = 0.36
"""36 of 100 steps in the reference implementation, as a fraction."""


def skipped_steps(steps: int, skip: float = SKIP) -> int:
    """The number of skipped steps for a fraction `skip` (0 to 1), rounded; at least one step remains."""
    check_number(skip, "skip", 0.0, 1.0)
    return min(round(skip * steps), steps - 1)


def edit_friendly_ddpm_inversion(
    model: Model,
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
    """Compute the noise maps of an image (Huberman-Spiegelglas et al. 2024, algorithm 1).

    Args:
        model: MODEL of any supported family.
        latent: the image [B, C, H, W] in the scale of LATENT sockets.
        source: the source prompt's CONDITIONING.
        negative: CONDITIONING of the negative side, the empty prompt in the paper; not needed for guidance scale 1.
        steps: N, 1 to one less than the model's training timesteps; fewer on a distilled model (`ddim_schedule`). 100
            in the reference implementation.
        guidance_scale: guidance scale of the source prompt, 3.5 in the reference implementation.
        eta: fraction of each step's noise, above 0 up to 1. 1 (DDPM) in the paper; there are no noise maps for 0.
        seed: noise seed. An image's noise depends only on the seed and its index in the batch, so the first image of a
            batch gets the same inversion as alone.
        zero_last_noise_map: False is exact: sampling with the same prompts and guidance scale returns the image up to
            rounding. True sets the last step's noise map to zero, as the reference implementation does; sampling then
            ends on the network's estimate, close to the image.
        callback: progress with preview.

    Returns:
        the inversion, in 2 N model calls (N for guidance scale 1). Its trajectory consists of the drawn latents and
        ends with the image.
    """
    family = engine.require(model)
    schedule = family.schedule(steps, room_below=True)
    if float(schedule.sigmas[-1]) == 0.0:
        # With as many steps as timesteps the schedule ends at sigma 0, where the last step has no noise map.
        raise IdentityEditError(
            f"steps is {steps}, as many as the model has timesteps; choose a number from 1 to {steps - 1}."
        )
    steps = schedule.steps
    if not 0.0 < eta <= 1.0:
        raise IdentityEditError(
            f"eta is {eta:g}; choose a value above 0 up to 1, or use Noise Inversion, which is the method for eta 0."
        )
    check_negative(negative, guidance_scale)

    def loop(evaluator: engine.NetworkEvaluator, z_0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sigmas = schedule.sigmas.to(evaluator.device)
        path = family.noise_path
        eps = family.noise_scale * independent_noise(steps, z_0, seed)
        # Eq. 6: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps_t with independent eps_t. The last latent is the image.
        latents = [path.noised(z_0, eps[i].to(z_0), sigmas[i]) for i in range(steps)]
        latents.append(z_0 * path.image_scale(sigmas[-1]))
        noise_maps = []
        for i in range(steps):
            denoised = evaluator.guided(latents[i], sigmas[i], guidance_scale)
            sigma, sigma_next = schedule.sigmas[i : i + 2].tolist()
            mean, deviation = path.distribution(latents[i], denoised, sigma, sigma_next, eta)
            # Eq. 5: z_t = (x_{t-1} - mu_t(x_t)) / sigma_t
            noise_map = (latents[i + 1] - mean) / deviation
            # The next latent exactly as sampling will compute it, to avoid accumulating rounding errors.
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
        method=EDIT_FRIENDLY_DDPM,
        guidance_scale=float(guidance_scale),
        model=engine.model_tag(model),
        noise_maps=maps,
        eta=float(eta),
    )


def edit_friendly_sampler(model: Model, inversion: Inversion) -> Callable[..., torch.Tensor]:
    """A sampler function for ComfyUI's KSAMPLER that uses the inversion's noise maps.

    Its sigmas must be consecutive ones of the inversion (all, or those after the skipped steps). It starts from the
    input latent (`Inversion.start_latent`) without added noise. If the sigmas end with the inversion's, it returns z_0
    like `sample_inversion`.

    Raises:
        IdentityEditError: for another model's inversion or one without noise maps; while sampling, for other sigmas or
            another latent.
    """
    check_inversion(inversion, model)
    if inversion.noise_maps is None:
        raise IdentityEditError(
            f"The inversion was made by {inversion.method} inversion, not by {EDIT_FRIENDLY_DDPM}; connect one from "
            f"Edit-Friendly DDPM Inversion."
        )

    @torch.no_grad()
    def sample_edit_friendly_ddpm(
        model: Any,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
    ) -> torch.Tensor:
        from tqdm.auto import trange

        rows = inversion.rows(sigmas)
        x = _without_rounding(x, inversion.trajectory[rows[0]].to(x))
        per_latent = x.new_ones([x.shape[0]])
        for i in trange(len(rows) - 1, disable=disable):
            denoised = model(x, sigmas[i] * per_latent, **(extra_args or {}))
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
            x = sampling_step(inversion, rows[i], x, denoised)
        if rows[-1] < inversion.steps or inversion.noise_path is engine.FLOW:
            return x  # ComfyUI itself divides a flow model's last latent by 1 - sigma
        return x / inversion.noise_path.image_scale(sigmas[-1])

    return sample_edit_friendly_ddpm


def _without_rounding(x: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """The inversion's original latent if `x` equals it up to the rounding of a LATENT's scale, else `x`.

    The noise maps match the original latent exactly, and rounding errors can grow over many steps.
    """
    same = x.shape == original.shape and bool((x - original).norm() <= 1e-5 * original.norm())
    return original if same else x


def independent_noise(steps: int, z_0: torch.Tensor, seed: int) -> torch.Tensor:
    """Noise [steps, B, C, H, W] on the CPU, drawn image by image, so that it does not depend on the batch size."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    rows = [torch.randn((steps, *z_0.shape[1:]), generator=generator) for _ in range(z_0.shape[0])]
    return torch.stack(rows, dim=1)
