"""The schedule of DDIM in ComfyUI's terms: integer timesteps and the sigmas that belong to them.

ComfyUI's latents are x = z_0 + sigma * eps. The papers' z_t = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) eps is the same
point at another scale: x = z_t * sqrt(1 + sigma^2), with alpha_bar = 1 / (1 + sigma^2). Deterministic DDIM (Song et al.
2021, eq. 12 with eta 0) is then Euler's method on sigma.

The spacing is the one that the reference implementations of DDIM inversion and null-text inversion use (diffusers'
"leading" spacing with an offset of one): for 50 steps of 1000 the timesteps 981, 961, ..., 1, and below them timestep
0 ("set_alpha_to_one=False"). ComfyUI's own `ddim_uniform` gives these timesteps only for counts that divide 1000, and
always appends sigma 0; hence this function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .errors import check_steps


class DiscreteSampling(Protocol):
    """The part of ComfyUI's ModelSamplingDiscrete that a schedule needs."""

    sigmas: torch.Tensor


@dataclass(frozen=True)
class Schedule:
    """Noise levels of one sampling run.

    Attributes:
        timesteps: [N] int64, descending: the timestep at the beginning of each step.
        sigmas: [N + 1] float32 CPU, descending: sigmas[i] belongs to timesteps[i], the last one is where sampling ends.
    """

    timesteps: torch.Tensor
    sigmas: torch.Tensor

    @property
    def steps(self) -> int:
        return int(self.timesteps.shape[0])


def ddim_timesteps(steps: int, training_timesteps: int = 1000) -> torch.Tensor:
    """Integer timesteps of DDIM, leading spacing with an offset of one.

    The distance between timesteps is r = floor(T / N); the timesteps are (N - 1) r + 1, ..., r + 1, 1. Where N does not
    divide T the highest timestep is therefore lower than T - r + 1 (30 steps of 1000: 958, ..., 34, 1), exactly as in
    diffusers. Only N = T has no room for the offset: it gives T - 1, ..., 1, 0.

    Args:
        steps: N, from 1 to `training_timesteps`.
        training_timesteps: T, the number of timesteps that the model was trained with.

    Returns:
        [N] int64, descending.

    Raises:
        IdentityEditError: when `steps` is outside its range.
    """
    check_steps(steps, training_timesteps)
    ratio = training_timesteps // steps
    offset = 1 if (steps - 1) * ratio + 1 < training_timesteps else 0
    return torch.arange(steps - 1, -1, -1, dtype=torch.int64) * ratio + offset


def ddim_schedule(model_sampling: DiscreteSampling, steps: int, end_at_zero: bool = False) -> Schedule:
    """Timesteps and sigmas of a DDIM run on a model's own noise schedule.

    Args:
        model_sampling: the model's sampling object (`engine.require_noise_prediction_model` gives it).
        steps: number of steps, from 1 to the number of training timesteps.
        end_at_zero: False ends at the sigma of timestep 0 (0.029 for Stable Diffusion), as the reference
            implementations do; True ends at sigma 0, as ComfyUI's schedulers do. With as many steps as training
            timesteps nothing lies below timestep 0, and the end is sigma 0 in either case.

    Raises:
        IdentityEditError: when `steps` is outside its range.
    """
    table = model_sampling.sigmas.detach().to(device="cpu", dtype=torch.float32)
    timesteps = ddim_timesteps(steps, table.shape[0])
    end = torch.zeros(1) if end_at_zero or int(timesteps[-1]) == 0 else table[:1]
    return Schedule(timesteps=timesteps, sigmas=torch.cat([table[timesteps], end]))


def alpha_bar(sigma: torch.Tensor) -> torch.Tensor:
    """alpha_bar = 1 / (1 + sigma^2), the papers' cumulative product of alphas."""
    return 1.0 / (1.0 + sigma * sigma)


def signal_scale(sigma: torch.Tensor) -> torch.Tensor:
    """sqrt(1 + sigma^2): ComfyUI's x is the papers' z_t times this."""
    return torch.sqrt(1.0 + sigma * sigma)


def euler_step(x: torch.Tensor, denoised: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
    """One deterministic DDIM step (Song et al. 2021, eq. 12, eta 0) from `sigma` to `sigma_next`.

    Args:
        x: latent at `sigma` [B, C, H, W].
        denoised: the model's estimate of z_0 at x [B, C, H, W].
        sigma: current noise level, > 0, a scalar tensor.
        sigma_next: next noise level, >= 0, a scalar tensor.
    """
    noise = (x - denoised) / sigma
    return x + (sigma_next - sigma) * noise
