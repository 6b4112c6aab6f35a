"""Non-rigid image editing via identity-aware mask blend, NIMA (Liu et al. 2024, section 2.2, algorithm 1).

The target prompt is sampled from an inversion, and after each step everything outside the subject is reset to the
inversion's latent. The subject's masks in the source image and in the emerging target image come from the model's
attention to an identity prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...attention.capture import IdentityAttention
from ...attention.identity_mask import AUTOMATIC_POWER, AUTOMATIC_THRESHOLD, identity_mask
from ...attention.masks import feathered, union
from ...attention.sites import AUTOMATIC
from .. import engine
from ..inversion.edit_friendly import skipped_steps
from ..inversion.inversion import EDIT_FRIENDLY_DDPM, Inversion, check_inversion, negative_side, sampling_step
from ..inversion.methods import DDIM
from ..shared.comfy_types import Model
from ..shared.conditioning import Conditioning
from ..shared.errors import IdentityEditError
from ..shared.input_checks import check_choice, check_number
from ..shared.masks import masks_for
from ..text.step_embeddings import apply_step_embeddings
from .identity_prompt import IdentityPrompt, capture_identity

GUIDANCE_SCALES = {EDIT_FRIENDLY_DDPM: 15.0, DDIM: 7.5}
"""Default guidance scales of the target prompt: of edit-friendly DDPM inversion's reference implementation, and of
null-text inversion (Mokady et al. 2023), the usual value for editing from a DDIM inversion."""
FLOW_GUIDANCE_SCALE = 4.0
"""Of flow models, between the values of their own workflows (2.5 to 5); 1 with distilled guidance."""

REPLACE, UNITE = "replace", "unite"
GIVEN_MASKS = (REPLACE, UNITE)


@dataclass(frozen=True)
class IdentityMaskBlend:
    """The result of NIMA.

    Attributes:
        latent: the edited image, z_0 [B, C, H, W] in the scale of LATENT sockets.
        source_mask: M^s [B, H, W], the subject in the source image.
        target_mask: M^e [B, H, W] after the last step.
        step_masks: [n, B, H, W], M_t of each of the n blended steps.
        source_attention, target_attention: attention the masks were computed from, or None for connected masks.
        evaluations: model calls of both passes.
        warning: a sentence about a likely problem, else None.
    """

    latent: torch.Tensor
    source_mask: torch.Tensor
    target_mask: torch.Tensor
    step_masks: torch.Tensor
    source_attention: IdentityAttention | None
    target_attention: IdentityAttention | None
    evaluations: int
    warning: str | None


@dataclass(frozen=True)
class BlendSettings:
    """Settings of the attention masks and the blending.

    Attributes:
        threshold: threshold of the normalized map, 0 to 1; 0 is automatic.
        power: lambda of eq. 2; 0 uses only the cross-attention, -1 is automatic.
        layers: a choice of `attention.sites.choose_layers`.
        feathering: standard deviation, in latent pixels, of the Gaussian that feathers M_t; 0 in the paper.
        skip: fraction of the first steps to skip, 0 to 1; the last step is never skipped. 0 in the paper.
        blend_until: fraction of the remaining steps, from the first, in which latents are blended. 1 in the paper;
            smaller values let the last steps smooth the border but also change the background.
        given_masks: REPLACE uses connected masks instead of attention masks (and saves the reconstruction pass), UNITE
            uses their union.
    """

    threshold: float = AUTOMATIC_THRESHOLD
    power: int = AUTOMATIC_POWER
    layers: str = AUTOMATIC
    feathering: float = 0.0
    skip: float = 0.0
    blend_until: float = 1.0
    given_masks: str = REPLACE

    def __post_init__(self) -> None:
        check_number(self.threshold, "threshold", 0.0, 1.0)
        check_number(self.power, "self_attention_power", AUTOMATIC_POWER, None)
        check_number(self.feathering, "feathering", 0.0, None)
        check_number(self.blend_until, "blend_until", 0.0, 1.0)
        check_choice(self.given_masks, "given_masks", GIVEN_MASKS)


def identity_mask_blend(
    model: Model,
    inversion: Inversion,
    source: Conditioning,
    target: Conditioning,
    identity: IdentityPrompt | None,
    negative: Conditioning | None = None,
    *,
    guidance_scale: float | None = None,
    settings: BlendSettings | None = None,
    source_mask: torch.Tensor | None = None,
    target_mask: torch.Tensor | None = None,
    callback: engine.Callback | None = None,
) -> IdentityMaskBlend:
    """Edit an inverted image's subject and keep the rest (Liu et al. 2024, algorithm 1).

    Args:
        model: MODEL, the one that made the inversion (G* in the paper, with its identity prior, or any other).
        inversion: inversion of the source image, by DDIM (with or without null-text embeddings) or edit-friendly DDPM.
        source: P^s, the source prompt's CONDITIONING.
        target: P^g, the target prompt's CONDITIONING.
        identity: P^e, the identity prompt; None if both masks are connected: with the same mask for both this is the
            masked decoding of DiffEdit (Couairon et al. 2023, section 3.2, step 3).
        negative: CONDITIONING of the negative side; not needed with guidance scale 1 or with per-step embeddings.
        guidance_scale: guidance scale of the target prompt; None uses that of the per-step embeddings, or else that of
            `GUIDANCE_SCALES`, `FLOW_GUIDANCE_SCALE` or 1.
        settings: settings of masks and blending.
        source_mask, target_mask: optional masks [1 or B, h, w], 0 to 1, of any size.
        callback: progress with preview.

    Returns:
        the edit and its masks, in N model calls for the reconstruction and 2 N for the target (N for guidance scale 1).

    """
    settings = settings or BlendSettings()
    engine.require(model)
    check_inversion(inversion, model)
    table = inversion.embeddings
    if guidance_scale is None:
        guidance_scale = _default_guidance_scale(model, inversion)
    negative = negative_side(inversion, target, negative, guidance_scale)
    names = ("The source mask", "The target mask") if identity else ("The mask", "The mask")  # as DiffEdit has it
    source_mask = _on_grid(inversion, source_mask, names[0])
    target_mask = _on_grid(inversion, target_mask, names[1])
    source_model, source_attention = _recorded(model, identity, settings, source_mask)
    target_model = model if table is None else apply_step_embeddings(model, table, "negative")
    target_model, target_attention = _recorded(target_model, identity, settings, target_mask)

    steps, sigmas = inversion.steps, inversion.sigmas
    first = skipped_steps(steps, settings.skip)
    blended_until = first + round(settings.blend_until * (steps - first))
    x_first, levels = inversion.trajectory[first], sigmas[first:]
    passes = 1 if source_attention is None else 2

    def reconstruct(evaluator: engine.NetworkEvaluator, x: torch.Tensor) -> int:
        for i in range(first, steps):
            x = inversion.trajectory[i].to(x)
            denoised = evaluator.denoised(x, sigmas[i].to(x), "positive")
            evaluator.report(i - first, denoised, x, passes * (steps - first))
        return evaluator.evaluations

    # M^s, I^s' = Sampling(x_T, G*, P^s, P^e). The inversion contains every x_t of an exact reconstruction, so one model
    # call with the source prompt at each x_t gives its attention without sampling.
    evaluations = 0
    if source_attention is not None:
        evaluations = engine.run_loop(source_model, source, None, x_first, levels, reconstruct, callback=callback)
    fixed_source_mask = _mask(inversion, settings, source_attention, source_mask)  # used in all steps

    def denoise(evaluator: engine.NetworkEvaluator, x: torch.Tensor) -> IdentityMaskBlend:
        step_masks = []
        m_source = fixed_source_mask.to(x)
        m_target = torch.zeros_like(m_source)
        for i in range(first, steps):  # from x^_T = x_T
            # x^_{t-1}, M^e_t = Denoise(x^_t, G*, P^g, P^e)
            denoised = evaluator.guided(x, sigmas[i].to(x), guidance_scale)
            x_next = sampling_step(inversion, i, x, denoised)
            if i < blended_until or i == steps - 1:
                m_target = _mask(inversion, settings, target_attention, target_mask, x.device)
            if i < blended_until:
                mask = feathered(union(m_source, m_target), settings.feathering)  # M_t, eq. 3
                m = mask.view(len(mask), *[1] * (x.ndim - 3), *mask.shape[1:])
                # Eq. 4, with x_{t-1} of the inversion as in algorithm 1.
                x_next = m * x_next + (1 - m) * inversion.trajectory[i + 1].to(x)
                step_masks.append(mask.cpu())
            x = x_next
            evaluator.report((passes - 1) * (steps - first) + i - first, denoised, x, passes * (steps - first))
        return IdentityMaskBlend(
            latent=engine.to_socket_scale(model, (x / inversion.noise_path.image_scale(sigmas[-1].to(x))).cpu()),
            source_mask=fixed_source_mask,
            target_mask=m_target.cpu(),
            step_masks=torch.stack(step_masks) if step_masks else fixed_source_mask[None][:0],
            source_attention=source_attention,
            target_attention=target_attention,
            evaluations=evaluations + evaluator.evaluations,
            warning=_warning(inversion, guidance_scale, (fixed_source_mask, m_target) if identity else ()),
        )

    return engine.run_loop(target_model, target, negative, x_first, levels, denoise, callback=callback)


def _default_guidance_scale(model: Model, inversion: Inversion) -> float:
    if inversion.embeddings is not None and inversion.embeddings.guidance_scale:
        return inversion.embeddings.guidance_scale
    capabilities = engine.require(model).capabilities
    if engine.Capability.TRUE_GUIDANCE not in capabilities:
        return 1.0
    if engine.Capability.VELOCITY in capabilities:
        return FLOW_GUIDANCE_SCALE
    return GUIDANCE_SCALES[DDIM if inversion.noise_maps is None else EDIT_FRIENDLY_DDPM]


def _on_grid(inversion: Inversion, mask: torch.Tensor | None, name: str) -> torch.Tensor | None:
    """A connected mask at the latent's size [B, H, W]."""
    height, width = inversion.trajectory.shape[-2:]
    return None if mask is None else masks_for(mask, name, height, width, inversion.batch)


def _recorded(
    model: Model, identity: IdentityPrompt | None, settings: BlendSettings, given: torch.Tensor | None
) -> tuple[Model, IdentityAttention | None]:
    """A model that records its attention to the subject; unchanged if the connected mask is used instead."""
    if given is not None and settings.given_masks == REPLACE:
        return model, None
    if identity is None:
        raise IdentityEditError("There is no identity prompt; write one, or connect both masks.")
    return capture_identity(model, identity, settings.layers, settings.power != 0)


def _mask(
    inversion: Inversion,
    settings: BlendSettings,
    attention: IdentityAttention | None,
    given: torch.Tensor | None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The attention mask so far, the connected mask `given`, or their union [B, H, W]."""
    height, width = inversion.trajectory.shape[-2:]
    mask = torch.zeros(inversion.batch, height, width, device=device) if given is None else given.to(device)
    if attention is not None and attention.cross:
        mask = union(mask, identity_mask(attention, height, width, settings.threshold, settings.power))
    return mask


def _warning(inversion: Inversion, guidance_scale: float, masks: Sequence[torch.Tensor]) -> str | None:
    warning = None if inversion.embeddings is None else inversion.embeddings.guidance_warning(guidance_scale)
    if warning is not None:
        return warning
    for name, mask in zip(("source mask", "target mask"), masks, strict=False):
        shares = mask.mean(dim=(1, 2))
        if bool(((shares == 0) | (shares == 1)).any()):
            return (
                f"The {name} is empty or covers the whole image; check the identity prompt, the threshold and the "
                f"layers, or connect a mask."
            )
    return None
