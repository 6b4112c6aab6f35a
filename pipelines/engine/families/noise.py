"""The noise path (from an image to noise) in ComfyUI's scale, and steps along it.

A latent at noise level s is x = alpha(s) z_0 + s eps. Models that predict noise or v have alpha = 1; the papers' z_t is
x / sqrt(1 + s^2), with alpha_bar = 1 / (1 + s^2). Flow models have alpha = 1 - s; their s is the papers' t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

EPS, V, VELOCITY = "eps", "v", "flow"
"""Prediction types: the noise; v = (eps - s z_0) / sqrt(1 + s^2); the velocity eps - z_0 of a flow model."""


@dataclass(frozen=True)
class NoisePath:
    """A noise path. Latents are [B, C, H, W] or [B, C, 1, H, W]; noise levels are tensors that broadcast to them, or
    floats.

    Attributes:
        alpha: the weight of the image at a noise level.
        alpha_slope: its derivative, constant.
        network_scale: x divided by it is what the network receives.
        image_scale: x at the last level of a schedule divided by it is the image. For models that predict noise or v,
            the papers take z_t of timestep 0 as the image; for flow models, x is alpha z_0 there.
    """

    alpha: Callable[[Any], Any]
    alpha_slope: float
    network_scale: Callable[[torch.Tensor], torch.Tensor]
    image_scale: Callable[[torch.Tensor], torch.Tensor]

    def scale(self, sigma: torch.Tensor) -> torch.Tensor:
        """sqrt(alpha^2 + s^2), the size of x at a noise level; x divided by it is the papers' z."""
        alpha = self.alpha(sigma)
        return torch.sqrt(alpha * alpha + sigma * sigma)

    def noised(self, z_0: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """x = alpha z_0 + s eps."""
        return self.alpha(sigma) * z_0 + sigma * eps

    def slope(self, x: torch.Tensor, denoised: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """dx/ds at x toward the estimate `denoised` of z_0: the predicted noise for alpha = 1, the predicted velocity
        for alpha = 1 - s."""
        return (x - denoised) / sigma

    def slope_error(
        self, x: torch.Tensor, denoised: torch.Tensor, sigma: torch.Tensor, z_0: torch.Tensor, eps: torch.Tensor
    ) -> torch.Tensor:
        """dx/ds toward the estimate minus alpha' z_0 + eps, that of the image and the noise of which x is made."""
        return self.slope(x, denoised, sigma) - (eps + self.alpha_slope * z_0)

    def step(
        self, x: torch.Tensor, denoised: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor
    ) -> torch.Tensor:
        """One deterministic DDIM step (Song et al. 2021, eq. 12, eta 0) from `sigma` > 0 to `sigma_next` >= 0. It is
        Euler's step, since x is linear in s for a constant estimate."""
        return x + (sigma_next - sigma) * self.slope(x, denoised, sigma)

    def estimate_between(
        self, x: torch.Tensor, x_next: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor
    ) -> torch.Tensor:
        """The estimate of z_0 with which `step` leads from x at `sigma` to x_next at `sigma_next`."""
        return x - sigma * (x - x_next) / (sigma - sigma_next)

    def distribution(
        self, x: torch.Tensor, denoised: torch.Tensor, sigma: float, sigma_next: float, eta: float
    ) -> tuple[torch.Tensor, float]:
        """Mean [B, C, H, W] and standard deviation of one stochastic step; eta 0 is `step`, 1 is DDPM.

        Song et al. 2021, eq. 12 and 16, in the papers' scale, with p the timestep after t:

            var = (1 - abar_p) / (1 - abar_t) * (1 - abar_t / abar_p)
            mu  = sqrt(abar_p) x0_hat + sqrt(1 - abar_p - eta var) eps_hat,    z_p = mu + eta sqrt(var) noise

        Divided by sqrt(abar_p), with abar = alpha^2 / (alpha^2 + s^2) and r = (s_p / alpha_p) / (s_t / alpha_t):

            var = s_p^2 (1 - r^2)
            mu  = alpha_p x0_hat + sqrt(s_p^2 - eta var) eps_hat,              x_p = mu + eta sqrt(var) noise

        mu has eta instead of eta^2, as in Huberman-Spiegelglas et al. 2024; both agree for eta 0 and 1.
        """
        alpha, alpha_next = self.alpha(sigma), self.alpha(sigma_next)
        ratio = sigma_next * alpha / (alpha_next * sigma)
        # sqrt(s_p^2 - eta var), written to avoid cancellation where s_p is far below s_t.
        direction = sigma_next * math.sqrt(1.0 - eta + eta * ratio * ratio)
        deviation = eta * sigma_next * math.sqrt(1.0 - ratio * ratio)
        return alpha_next * denoised + direction * self.predicted_noise(x, denoised, sigma), deviation

    def predicted_noise(self, x: torch.Tensor, denoised: torch.Tensor, sigma: Any) -> torch.Tensor:
        """eps_hat = (x - alpha x0_hat) / s."""
        return (x - self.alpha(sigma) * denoised) / sigma


def _unit_scale(sigma: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(1.0 + sigma * sigma)


DIFFUSION = NoisePath(lambda sigma: 1.0, 0.0, network_scale=_unit_scale, image_scale=_unit_scale)
FLOW = NoisePath(lambda sigma: 1.0 - sigma, -1.0, network_scale=torch.ones_like, image_scale=lambda sigma: 1.0 - sigma)
PATH_OF = {EPS: DIFFUSION, V: DIFFUSION, VELOCITY: FLOW}
"""Noise path by prediction type."""


def training_error(
    prediction: str, z_0: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor, denoised: torch.Tensor
) -> torch.Tensor:
    """The network's output minus its training target [B, C, H, W].

    Args:
        prediction: EPS, V or VELOCITY.
        z_0, eps: image and noise [B, C, H, W]; the network's input was `NoisePath.noised(z_0, eps, sigma)`.
        sigma: noise levels that broadcast to them.
        denoised: the network's estimate of z_0.
    """
    path = PATH_OF[prediction]
    error = path.slope_error(path.noised(z_0, eps, sigma), denoised, sigma, z_0, eps)
    return error * path.scale(sigma) if prediction == V else error
