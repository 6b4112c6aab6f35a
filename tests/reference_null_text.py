"""Null-text inversion as the reference implementation does it, for comparison in benchmarks and tests.

Written from the description of the method in the papers' own scale (z, alpha_bar, integer timesteps), with nothing of
this pack and nothing of ComfyUI: the network is a function of (z_t, timestep, text embedding). Plain on purpose: all
weights may require gradients, the conditional noise is computed again together with the unconditional one at the end
of each step, and nothing is reused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

PredictNoise = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]


@dataclass
class DdimScale:
    """alpha_bar of each training timestep [T], and the timesteps of a run, descending."""

    alphas_cumprod: torch.Tensor
    timesteps: list[int]

    @property
    def interval(self) -> int:
        return len(self.alphas_cumprod) // len(self.timesteps)

    def alpha_bar(self, timestep: int) -> torch.Tensor:
        """alpha_bar, that of timestep 0 for timesteps below it (`set_alpha_to_one=False`)."""
        return self.alphas_cumprod[max(timestep, 0)]

    def move(self, noise: torch.Tensor, z: torch.Tensor, timestep: int, timestep_to: int) -> torch.Tensor:
        """Deterministic DDIM from one timestep to another, in either direction."""
        here, there = self.alpha_bar(timestep), self.alpha_bar(timestep_to)
        z_0 = (z - (1 - here) ** 0.5 * noise) / here**0.5
        return there**0.5 * z_0 + (1 - there) ** 0.5 * noise


@dataclass
class ReferenceNullText:
    embeddings: list[torch.Tensor] = field(default_factory=list)
    inner_steps: list[int] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    z_0: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    evaluations: int = 0


@torch.no_grad()
def invert(predict_noise: PredictNoise, scale: DdimScale, z_0: torch.Tensor, cond: torch.Tensor) -> list[torch.Tensor]:
    """DDIM inversion with guidance 1: [z_0, ..., z_T], N + 1 latents."""
    z = z_0.clone()
    trajectory = [z]
    for timestep in reversed(scale.timesteps):
        noise = predict_noise(z, timestep, cond)
        z = scale.move(noise, z, timestep - scale.interval, timestep)
        trajectory.append(z)
    return trajectory


def null_text(
    predict_noise: PredictNoise,
    scale: DdimScale,
    trajectory: list[torch.Tensor],
    cond: torch.Tensor,
    uncond: torch.Tensor,
    guidance_scale: float = 7.5,
    inner_steps: int = 10,
    epsilon: float = 1e-5,
) -> ReferenceNullText:
    """Null-text optimization of one image; `cond` and `uncond` are [1, T, C]."""
    result = ReferenceNullText()
    z = trajectory[-1]
    for i, timestep in enumerate(scale.timesteps):
        uncond = uncond.clone().detach().requires_grad_(True)
        optimizer = torch.optim.Adam([uncond], lr=1e-2 * max(1.0 - i / 100.0, 0.01))
        target = trajectory[len(trajectory) - i - 2]
        with torch.no_grad():
            noise_cond = predict_noise(z, timestep, cond)
            result.evaluations += 1
        losses = []
        for _ in range(inner_steps):
            noise_uncond = predict_noise(z, timestep, uncond)
            result.evaluations += 1
            noise = noise_uncond + guidance_scale * (noise_cond - noise_uncond)
            z_previous = scale.move(noise, z, timestep, timestep - scale.interval)
            loss = torch.nn.functional.mse_loss(z_previous, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if losses[-1] < epsilon + i * 2e-5:
                break
        result.losses.append(losses)
        result.inner_steps.append(len(losses))
        result.embeddings.append(uncond.detach().clone())
        with torch.no_grad():
            both = predict_noise(torch.cat([z, z]), timestep, torch.cat([uncond, cond]))
            result.evaluations += 2
            noise_uncond, noise_cond = both.chunk(2)
            noise = noise_uncond + guidance_scale * (noise_cond - noise_uncond)
            z = scale.move(noise, z, timestep, timestep - scale.interval)
    result.z_0 = z
    return result
