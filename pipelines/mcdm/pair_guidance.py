"""Two images of one subject in one latent: composable guidance for pairs (Chen et al. 2024, section 3.2).

Source and target are the halves of a latent of double width, denoised together, so that self-attention gives both the
same subject. A shared prompt p describes both halves, the source prompt p_a the left one and the target prompt p_b the
right one (after Composable Diffusion, Liu et al. 2022).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import engine
from ..shared.conditioning import Conditioning
from ..shared.errors import IdentityEditError, check_conditioning

SHARED_WEIGHT = 0.1
SOURCE_WEIGHT = TARGET_WEIGHT = 0.9
GUIDANCE_SCALE = 7.5
STEPS = 20
"""Chen et al. 2024, supplement 1.1: s'_d, s'_a = s'_b, the guidance scale, and T."""

SHARED, SOURCE, TARGET = "positive", "source", "target"


def pair_estimate(
    shared: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    x: torch.Tensor,
    shared_weight: float = SHARED_WEIGHT,
    source_weight: float = SOURCE_WEIGHT,
    target_weight: float = TARGET_WEIGHT,
) -> torch.Tensor:
    """Equation 2, on estimates of z_0.

    The paper combines predicted noise. With x = z_0 + sigma eps, each estimate of z_0 is x - sigma eps, and so is the
    combined one; sigma cancels. If the weights of a half sum to 1, as in the paper, x cancels too.

    Args:
        shared, source, target: guided estimates for p, p_a and p_b [B, C, H, 2W].
        x: the noisy latent [B, C, H, 2W].
        shared_weight, source_weight, target_weight: s'_d, s'_a, s'_b.

    Returns:
        [B, C, H, 2W].
    """
    half = x.shape[-1] // 2
    m_a = torch.zeros_like(x)
    m_a[..., :half] = 1.0  # [1, 0]
    m_b = 1.0 - m_a  # [0, 1]
    # (x - z_0) is sigma eps:
    noise = shared_weight * (x - shared)
    noise = noise + source_weight * m_a * (x - source)
    noise = noise + target_weight * m_b * (x - target)  #                                                          eq. 2
    return x - noise


def pair_guider(
    model: Any,
    shared: Conditioning,
    source: Conditioning,
    target: Conditioning,
    negative: Conditioning,
    *,
    guidance_scale: float = GUIDANCE_SCALE,
    shared_weight: float = SHARED_WEIGHT,
    source_weight: float = SOURCE_WEIGHT,
    target_weight: float = TARGET_WEIGHT,
) -> engine.CombiningGuider:
    """A GUIDER for latents of double width, for any sampler.

    A step costs four model calls (the negative prompt, p, p_a and p_b, batched if memory allows), one less for a
    guidance scale of 1 and for each weight that is 0.

    Args:
        model: MODEL of any supported family.
        shared, source, target: CONDITIONING of p, p_a and p_b, with ControlNets, hooks and so on.
        negative: CONDITIONING of the negative prompt.
        guidance_scale: classifier-free guidance scale of each of the three prompts.
        shared_weight, source_weight, target_weight: s'_d, s'_a and s'_b of equation 2.

    Raises:
        IdentityEditError: when an input cannot be used; while sampling, for a latent of odd width.
    """
    engine.require(model)
    weights = {SHARED: shared_weight, SOURCE: source_weight, TARGET: target_weight}
    for name, value in {"guidance_scale": guidance_scale, **weights}.items():
        if not math.isfinite(value):
            raise IdentityEditError(f"The weight {name} is {value}; choose a finite number.")
    conditionings = {SHARED: shared, SOURCE: source, TARGET: target, "negative": negative}
    for name, conditioning in conditionings.items():
        check_conditioning(conditioning, f"The {'shared' if name == SHARED else name} prompt")
    used = {name: each for name, each in conditionings.items() if weights.get(name, 1.0) != 0.0}
    if set(used) == {"negative"}:
        raise IdentityEditError("All three weights are 0, so no prompt is used; set them to 0.1, 0.9 and 0.9.")
    if math.isclose(guidance_scale, 1.0) and not model.model_options.get("disable_cfg1_optimization", False):
        del used["negative"]

    def combine(guider: engine.CombiningGuider, estimates: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] % 2:
            raise IdentityEditError(
                f"The latent has odd width {x.shape[-1]} and cannot be split in half; choose a width that is a "
                f"multiple of {2 * engine.pixels_per_latent_pixel(model)} pixels."
            )
        guided = {
            name: guider.guided(estimates, name, x, guidance_scale).float()
            if name in estimates
            else torch.zeros_like(x)
            for name in (SHARED, SOURCE, TARGET)
        }
        return pair_estimate(
            guided[SHARED], guided[SOURCE], guided[TARGET], x, shared_weight, source_weight, target_weight
        )

    return engine.CombiningGuider(model, used, combine)


def doubled(images: torch.Tensor) -> torch.Tensor:
    """Images [B, H, W, C] repeated side by side [B, H, 2W, C]: the same pose for both halves."""
    return torch.cat([images, images], dim=2)


def halves(tensor: torch.Tensor, dimension: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a tensor into left and right halves along `dimension` (2 for images, -1 for latents).

    Raises:
        IdentityEditError: when it cannot be halved.
    """
    width = tensor.shape[dimension]
    if width % 2 or width < 2:
        raise IdentityEditError(f"{name} has odd width {width} and cannot be split in half; use an even width.")
    left, right = tensor.split(width // 2, dim=dimension)
    return left.contiguous(), right.contiguous()
