"""The DDIM schedule in ComfyUI's terms: integer timesteps and their sigmas.

ComfyUI's latents are x = z_0 + sigma * eps. The papers' z_t = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) eps is the same
point at another scale: x = z_t * sqrt(1 + sigma^2), with alpha_bar = 1 / (1 + sigma^2). Deterministic DDIM (Song et al.
2021, eq. 12 with eta 0) is then Euler's method on sigma.

The spacing is that of the reference implementations of DDIM inversion and null-text inversion (diffusers' "leading"
spacing with an offset of one): for 50 steps of 1000, the timesteps 981, 961, ..., 1, and then timestep 0
("set_alpha_to_one=False"). ComfyUI's `ddim_uniform` gives these timesteps only for step counts that divide 1000, and
always appends sigma 0.

A distilled model has only some of the training noise levels: ComfyUI's ModelSamplingDiscrete keeps 50 of 1000 for LCM.
The steps are then spread over these levels as in LCM's sampler (Luo et al. 2023). A timestep is always a training
timestep, never a row of a model's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ...shared.errors import IdentityEditError, check_steps
from .noise import NoisePath


class DiscreteSampling(Protocol):
    """The part of ComfyUI's ModelSamplingDiscrete used here: the model's noise levels (ascending), the number of
    training timesteps, and the conversion between the two."""

    sigmas: torch.Tensor
    num_timesteps: int

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor: ...

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor: ...


class HasSampling(Protocol):
    """A `base.Family`, for its noise levels."""

    sampling: DiscreteSampling


@dataclass(frozen=True)
class Schedule:
    """Noise levels of one sampling run.

    Attributes:
        timesteps: [N] int64, descending: the timestep at the start of each step.
        sigmas: [N + 1] float32 CPU, descending: sigmas[i] belongs to timesteps[i]; sampling ends at the last one.
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
    diffusers. Only N = T leaves no room for the offset: it gives T - 1, ..., 1, 0.

    Args:
        steps: N, from 1 to `training_timesteps`.
        training_timesteps: T, the model's number of training timesteps.

    Returns:
        [N] int64, descending.

    Raises:
        IdentityEditError: when `steps` is outside its range.
    """
    check_steps(steps, training_timesteps)
    ratio = training_timesteps // steps
    offset = 1 if (steps - 1) * ratio + 1 < training_timesteps else 0
    return torch.arange(steps - 1, -1, -1, dtype=torch.int64) * ratio + offset


def ddim_schedule(
    model_sampling: DiscreteSampling, steps: int, end_at_zero: bool = False, room_below: bool = False
) -> Schedule:
    """Timesteps and sigmas of a DDIM run on a model's noise schedule.

    Args:
        model_sampling: the model's sampling object (`Family.sampling`).
        steps: number of steps, from 1 to the number of training timesteps. Limited to the number of noise levels of a
            distilled model (`fewer_steps`).
        end_at_zero: False ends at the sigma of timestep 0 (0.029 for Stable Diffusion), as the reference
            implementations do; True ends at sigma 0, as ComfyUI's schedulers do. If the number of steps equals the
            number of training timesteps, no level is left below the last step and it ends at sigma 0 in either case.
        room_below: on a distilled model, keep a noise level below the last step, so that it does not end at sigma 0.

    Raises:
        IdentityEditError: when `steps` is outside its range.
    """
    table = noise_levels(model_sampling)
    levels = table.shape[0]
    if levels < model_sampling.num_timesteps:
        check_steps(steps, model_sampling.num_timesteps)
        steps = min(steps, levels - room_below)
        # LCM's spacing: linspace(0, levels, steps, endpoint=False), rounded down, starting at the noisiest level.
        rows = levels - 1 - torch.arange(steps) * levels // steps
        timesteps = model_sampling.timestep(model_sampling.sigmas[rows]).to(device="cpu", dtype=torch.int64)
    else:
        rows = timesteps = ddim_timesteps(steps, levels)
    end = torch.zeros(1) if end_at_zero or int(rows[-1]) == 0 else table[:1]
    return Schedule(timesteps=timesteps, sigmas=torch.cat([table[rows], end]))


def given_schedule(family: HasSampling, sigmas: torch.Tensor) -> torch.Tensor:
    """A SIGMAS input [N + 1] as float32 on the CPU, checked: descending, from at most the model's highest noise level.

    Raises:
        IdentityEditError: when an inversion cannot follow it.
    """
    levels = sigmas.detach().to(device="cpu", dtype=torch.float32).clone()
    highest = float(noise_levels(family.sampling)[-1])
    if not bool((levels[:-1] > levels[1:]).all()) or float(levels[0]) > highest * (1 + SAME_LEVEL):
        raise IdentityEditError(
            f"sigmas must descend from at most {highest:.4g}, the model's highest noise level, but run from "
            f"{float(levels[0]):.4g} to {float(levels[-1]):.4g}; connect Basic Scheduler with this model."
        )
    return levels


LARGEST_END = 0.1
"""Largest share of noise at the end of a schedule that starts or ends with an image."""


def check_ends_at_image(path: NoisePath, sigmas: torch.Tensor) -> None:
    """Raise `IdentityEditError` if the image would still be noisy at the end of a schedule [N + 1]."""
    end = sigmas[-1]
    if float(end / path.scale(end)) > LARGEST_END:
        raise IdentityEditError(
            f"sigmas end at {float(end):.4g}, where an image would still be noisy; let them end at 0 (Basic Scheduler, "
            f"or the low_sigmas of Split Sigmas)."
        )


def fewer_steps(requested: int, used: int) -> str | None:
    """The warning if a distilled model has fewer noise levels than the requested steps, or None."""
    if used >= requested:
        return None
    return (
        f"The model has only a few noise levels (LCM sampling), so {used} steps are used instead of {requested}; for "
        f"more, use the model without ModelSamplingDiscrete's lcm."
    )


def noise_levels(model_sampling: DiscreteSampling) -> torch.Tensor:
    """All noise levels of a model, ascending, float32 on the CPU: one per training timestep, or fewer if it is
    distilled."""
    return model_sampling.sigmas.detach().to(device="cpu", dtype=torch.float32)


def rows_of(model_sampling: DiscreteSampling, timesteps: Sequence[int]) -> torch.Tensor:
    """[N] int64: the rows of `noise_levels` nearest to the given training timesteps."""
    levels = model_sampling.sigma(torch.tensor(list(timesteps), dtype=torch.float32)).detach().cpu().float()
    return (noise_levels(model_sampling).log() - levels.log()[:, None]).abs().argmin(dim=1)


SAME_LEVEL = 1e-4
"""Relative tolerance within which two sigmas are the same noise level: adjacent timesteps of 1000 differ by 4e-3 or
more, and different computations of the same sigma by less than 2e-5."""


def step_at(sigmas: torch.Tensor, sigma: float) -> int:
    """The index of the step at a noise level: i with sigmas[i + 1] < sigma <= sigmas[i] (descending, [N + 1]); 0 above
    the first and N - 1 below the last."""
    return int((sigmas[1:-1] * (1.0 + SAME_LEVEL) >= sigma).sum())
