"""Subject masks from the diffusion model's attention: the identity-aware attention of Liu et al. 2024 on noised images,
without a segmentation network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...attention.capture import IdentityAttention
from ...attention.identity_mask import JOINT_POWER, JOINT_THRESHOLD, identity_mask
from ...attention.sites import AUTOMATIC
from .. import engine
from ..engine.families.schedule import noise_levels, rows_of
from ..shared.comfy_types import Model
from ..shared.conditioning import Conditioning
from ..shared.errors import IdentityEditError
from ..shared.input_checks import check_number
from .identity_prompt import IdentityPrompt, capture_identity

FLOW_TIMESTEPS = 1000


@dataclass(frozen=True)
class MaskSettings:
    """How a mask is made of attention.

    Attributes:
        timesteps: of 1000, at which attention is recorded, one model call each.
        threshold: value of the normalized map above which a pixel belongs to the subject.
        power: lambda of eq. 2; 0 uses only the cross-attention.
    """

    timesteps: tuple[int, ...]
    threshold: float
    power: int


CROSS_ATTENTION = MaskSettings((1, 101, 201), 0.45, 2)
JOINT_ATTENTION = MaskSettings((201, 301, 401), JOINT_THRESHOLD, JOINT_POWER)
"""These overlapped best with the true masks of the demo world; a single timestep is little worse, see
benchmarks/results/segment_subject.md and segment_subject_flow.md. Liu et al. 2024 give no values."""


def default_settings(model: Model) -> MaskSettings:
    """The settings of the model's kind of attention."""
    return JOINT_ATTENTION if engine.is_joint(model) else CROSS_ATTENTION


def attention_masks(
    model: Model,
    latent: torch.Tensor,
    identity: IdentityPrompt,
    conditioning: Conditioning,
    size: tuple[int, int],
    *,
    settings: MaskSettings | None = None,
    layers: str = AUTOMATIC,
    seed: int = 0,
    callback: engine.Callback | None = None,
) -> torch.Tensor:
    """Segment the subject in images with a diffusion model's attention.

    The latents are noised to a few timesteps, as in training, and evaluated once each while the identity prompt's
    cross-attention is recorded (Liu et al. 2024, eq. 1). Its mean over the timesteps is refined with the self-attention
    (eq. 2), normalized and thresholded.

    Args:
        model, latent, identity, conditioning, layers, seed, callback: as for `record_attention`.
        size: height and width of the masks (and images).
        settings: None for `default_settings`.

    Returns:
        [B, height, width] float32, 0 or 1.
    """
    settings = settings or default_settings(model)
    check_number(settings.threshold, "threshold", 0.0, 1.0)
    check_number(settings.power, "self_attention_power", 0, None)
    attention = record_attention(
        model,
        latent,
        identity,
        conditioning,
        timesteps=settings.timesteps,
        self_attention=settings.power > 0,
        layers=layers,
        seed=seed,
        callback=callback,
    )
    return identity_mask(attention, *size, settings.threshold, settings.power)


def record_attention(
    model: Model,
    latent: torch.Tensor,
    identity: IdentityPrompt,
    conditioning: Conditioning,
    *,
    timesteps: Sequence[int],
    self_attention: bool = True,
    layers: str = AUTOMATIC,
    seed: int = 0,
    callback: engine.Callback | None = None,
) -> IdentityAttention:
    """Record a diffusion model's attention to the subject in noised images.

    Args:
        model: MODEL.
        latent: [B, C, h, w] of the images, in the scale of LATENT sockets.
        identity: the subject's prompt, such as "cat".
        conditioning: CONDITIONING of the model calls: a caption, or the identity prompt itself. Joint attention is
            always evaluated with the identity prompt.
        timesteps: training timesteps, from 0; one model call each, at the model's nearest noise level. Of flow models,
            thousandths of the noise levels.
        self_attention: also record the self-attention, for eq. 2 of Liu et al. 2024.
        layers: a choice of `attention.sites.choose_layers`.
        seed: noise seed.
        callback: progress with preview.
    """
    family = engine.require(model, engine.Capability.TEXT_ATTENTION)
    sigmas = _noise_levels(family, timesteps)
    capturing, attention = capture_identity(model, identity, layers, self_attention=self_attention, sampled=True)
    if engine.is_joint(model):
        conditioning = identity.conditioning
    noise = family.noise_scale * torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))

    def evaluate(evaluator: engine.NetworkEvaluator, z_0: torch.Tensor) -> None:
        for i, sigma in enumerate(sigmas.to(evaluator.device)):
            x = family.noise_path.noised(z_0, noise.to(z_0).view_as(z_0), sigma)
            denoised = evaluator.denoised(x, sigma, "positive")
            evaluator.report(i, denoised, x, len(sigmas))

    z_image = engine.model_latent(model, latent)
    engine.run_loop(capturing, conditioning, None, z_image, sigmas, evaluate, callback=callback)
    return attention


def _noise_levels(family: engine.Family, timesteps: Sequence[int]) -> torch.Tensor:
    """Descending noise levels of timesteps."""
    is_discrete = engine.Capability.DISCRETE_TIMESTEPS in family.capabilities
    most = int(family.sampling.num_timesteps) - 1 if is_discrete else FLOW_TIMESTEPS - 1
    if len(timesteps) == 0 or not all(0 <= timestep <= most for timestep in timesteps):
        raise IdentityEditError(f"timesteps is {list(timesteps)}; write one or more whole numbers from 0 to {most}.")
    descending = sorted(timesteps, reverse=True)
    if is_discrete:
        return noise_levels(family.sampling)[rows_of(family.sampling, descending)]
    return (torch.tensor(descending) + 1) / FLOW_TIMESTEPS
