"""Non-rigid image editing via identity-aware mask blend, NIMA (Liu et al. 2024, section 2.2, algorithm 1).

The target prompt is sampled from an inversion, and in each step everything outside of the subject is put back to what
the inversion had there. Where the subject is, in the source image and in the target image that is not there yet,
the model's own attention to an identity prompt says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...attention.capture import IdentityAttention
from ...attention.identity_mask import SELF_ATTENTION_POWER, THRESHOLD, identity_mask
from ...attention.masks import feathered, union
from ...attention.sites import AUTOMATIC
from .. import engine
from ..inversion.inversion import DDIM, EDIT_FRIENDLY_DDPM, Inversion, check_inversion, negative_side, sampling_step
from ..shared.conditioning import Conditioning
from ..shared.errors import IdentityEditError
from ..shared.masks import masks_for
from ..text.step_embeddings import apply_step_embeddings
from .identity_prompt import IdentityPrompt, capture_identity

GUIDANCE_SCALES = {EDIT_FRIENDLY_DDPM: 15.0, DDIM: 7.5}
"""Of the target prompt: that of edit-friendly DDPM inversion's reference implementation, and that of null-text
inversion (Mokady et al. 2023), which editing from a DDIM inversion commonly uses."""

REPLACE, UNITE = "replace", "unite"
GIVEN_MASKS = (REPLACE, UNITE)


@dataclass(frozen=True)
class IdentityMaskBlend:
    """What NIMA made.

    Attributes:
        latent: the edited image, z_0 [B, C, H, W] in the scale of LATENT sockets.
        source_mask: M^s [B, H, W], the subject of the source image.
        target_mask: M^e [B, H, W] as it was after the last step.
        step_masks: [n, B, H, W], M_t of each step that was blended, where they were asked for.
        source_attention, target_attention: what the masks were made of, or None where a given mask replaced it.
        evaluations: model calls of both passes.
        warning: one sentence where something is likely to go wrong, else None.
    """

    latent: torch.Tensor
    source_mask: torch.Tensor
    target_mask: torch.Tensor
    step_masks: torch.Tensor | None
    source_attention: IdentityAttention | None
    target_attention: IdentityAttention | None
    evaluations: int
    warning: str | None


@dataclass(frozen=True)
class BlendSettings:
    """How masks are made of attention, and where latents are blended.

    Attributes:
        threshold: of the normalized map, 0 to 1.
        power: lambda of eq. 2; 0 uses the cross-attention alone.
        layers: a choice of `attention.sites.choose_layers`.
        feathering: deviation in latent cells of the Gaussian that softens the border of M_t; 0 is the paper's.
        skip: share of the first steps that are left out, 0 to below 1. The paper starts at T.
        blend_until: share of the remaining steps, from the first, in which latents are blended. 1 is the paper's; less
            lets the last steps smooth the border, and change the background.
        given_masks: REPLACE takes given masks instead of the ones found (and saves the reconstruction pass), UNITE with
            them.
    """

    threshold: float = THRESHOLD
    power: int = SELF_ATTENTION_POWER
    layers: str = AUTOMATIC
    feathering: float = 0.0
    skip: float = 0.0
    blend_until: float = 1.0
    given_masks: str = REPLACE


def identity_mask_blend(
    model: Any,
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
    keep_step_masks: bool = False,
    callback: engine.Callback | None = None,
) -> IdentityMaskBlend:
    """Edit an inverted image's subject and keep the rest (Liu et al. 2024, algorithm 1).

    Args:
        model: MODEL, the one that made the inversion (G* of the paper, with its identity prior, or any other).
        inversion: of the source image, by DDIM (with or without null-text embeddings) or edit-friendly DDPM.
        source: P^s, the source prompt's CONDITIONING.
        target: P^g, the target prompt's CONDITIONING.
        identity: P^e, the identity prompt; None where both masks are given and nothing is to be found: with one mask
            for both that is the masked decoding of DiffEdit (Couairon et al. 2023, section 3.2, step 3).
        negative: CONDITIONING of the negative side; not needed with guidance scale 1 or with per-step embeddings.
        guidance_scale: of the target prompt; None is the per-step embeddings's own, or else that of `GUIDANCE_SCALES`.
        settings: how masks are made, and where latents are blended.
        source_mask, target_mask: masks [1 or B, h, w] of one's own, 0 to 1, of any size.
        keep_step_masks: return the mask of every step.
        callback: progress with preview.

    Returns:
        the edit and its masks. N model calls of reconstruction, and 2 N of the target (guidance scale 1: N).

    Raises:
        IdentityEditError: when an input cannot be used.
    """
    settings = settings or BlendSettings()
    check_inversion(inversion, model)
    _check_settings(settings)
    table = inversion.embeddings
    if guidance_scale is None:
        own = None if table is None else table.guidance_scale
        guidance_scale = own or GUIDANCE_SCALES.get(inversion.method, GUIDANCE_SCALES[DDIM])
    negative = negative_side(inversion, target, negative, guidance_scale)
    names = ("The source mask", "The target mask") if identity else ("The mask", "The mask")  # as DiffEdit has it
    source_mask = _on_grid(inversion, source_mask, names[0])
    target_mask = _on_grid(inversion, target_mask, names[1])
    finds_source = source_mask is None or settings.given_masks == UNITE
    finds_target = target_mask is None or settings.given_masks == UNITE
    if identity is None and (finds_source or finds_target):
        raise IdentityEditError("Without an identity prompt both masks must be given; connect them, or write a prompt.")

    steps, sigmas = inversion.steps, inversion.sigmas
    first = min(round(settings.skip * steps), steps - 1)
    blended_until = first + round(settings.blend_until * (steps - first))
    x_first, levels = inversion.trajectory[first], sigmas[first:]
    passes = 1 + finds_source

    # M^s, I^s' = Sampling(x_T, G*, P^s, P^e). The inversion holds every x_t of an exact reconstruction, so nothing is
    # sampled: one evaluation of the source prompt at each x_t gives its attention.
    source_attention: IdentityAttention | None = None
    evaluations = 0
    if finds_source and identity is not None:
        source_model, source_attention = capture_identity(model, identity, settings.layers, settings.power > 0)

        def reconstruct(evaluator: engine.NetworkEvaluator, x: torch.Tensor) -> int:
            for i in range(first, steps):
                x = inversion.trajectory[i].to(x)
                denoised = evaluator.denoised(x, sigmas[i].to(x), "positive")
                evaluator.report(i - first, denoised, x, passes * (steps - first))
            return evaluator.evaluations

        evaluations = engine.run_loop(source_model, source, None, x_first, levels, reconstruct, callback=callback)
    # The mask accumulated at the last step; from here on it is fixed.
    fixed_source_mask = _mask(inversion, settings, source_attention, source_mask)

    target_model = model if table is None else apply_step_embeddings(model, table, "negative")
    target_attention: IdentityAttention | None = None
    if finds_target and identity is not None:
        target_model, target_attention = capture_identity(target_model, identity, settings.layers, settings.power > 0)

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
                m = feathered(union(m_source, m_target), settings.feathering)  # M_t, eq. 3
                # Eq. 4, with x_{t-1} of the inversion as algorithm 1 has it: what the step arrives at.
                outside = inversion.trajectory[i + 1].to(x)
                x_next = m.unsqueeze(1) * x_next + (1 - m.unsqueeze(1)) * outside
                if keep_step_masks:
                    step_masks.append(m.cpu())
            x = x_next
            evaluator.report((passes - 1) * (steps - first) + i - first, denoised, x, passes * (steps - first))
        masks = {"source mask": fixed_source_mask, "target mask": m_target.cpu()}
        return IdentityMaskBlend(
            latent=engine.to_socket_scale(model, (x / inversion.noise.scale(sigmas[-1].to(x))).cpu()),
            source_mask=masks["source mask"],
            target_mask=masks["target mask"],
            step_masks=torch.stack(step_masks) if step_masks else None,
            source_attention=source_attention,
            target_attention=target_attention,
            evaluations=evaluations + evaluator.evaluations,
            warning=_warning(inversion, guidance_scale, masks if identity else {}),
        )

    return engine.run_loop(target_model, target, negative, x_first, levels, denoise, callback=callback)


def _on_grid(inversion: Inversion, mask: torch.Tensor | None, name: str) -> torch.Tensor | None:
    """A given mask on the latent's grid [B, H, W]."""
    height, width = inversion.trajectory.shape[-2:]
    return None if mask is None else masks_for(mask, name, height, width, inversion.batch)


def _mask(
    inversion: Inversion,
    settings: BlendSettings,
    attention: IdentityAttention | None,
    given: torch.Tensor | None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The mask found so far, the given one, or their union [B, H, W]."""
    height, width = inversion.trajectory.shape[-2:]
    mask = torch.zeros(inversion.batch, height, width, device=device) if given is None else given.to(device)
    if attention is not None and attention.cross:
        mask = union(mask, identity_mask(attention, height, width, settings.threshold, settings.power))
    return mask


def _check_settings(settings: BlendSettings) -> None:
    skip, blend_until, given_masks = settings.skip, settings.blend_until, settings.given_masks
    if not 0.0 <= settings.threshold <= 1.0:
        raise IdentityEditError(f"threshold is {settings.threshold:g}; choose a value from 0 to 1 (0.4).")
    if settings.power < 0 or settings.feathering < 0:
        raise IdentityEditError(
            f"self_attention_power is {settings.power} and feathering {settings.feathering:g}; choose 0 or more."
        )
    if not 0.0 <= skip < 1.0 or not 0.0 <= blend_until <= 1.0:
        raise IdentityEditError(
            f"skip is {skip:g} and blend_until {blend_until:g}; choose shares of the steps, skip from 0 to below 1, "
            f"blend_until from 0 to 1."
        )
    if given_masks not in GIVEN_MASKS:
        raise IdentityEditError(f"given_masks is {given_masks!r}; choose one of {', '.join(GIVEN_MASKS)}.")


def _warning(inversion: Inversion, guidance_scale: float, found: Mapping[str, torch.Tensor]) -> str | None:
    warning = None if inversion.embeddings is None else inversion.embeddings.guidance_warning(guidance_scale)
    if warning is not None:
        return warning
    for name, mask in found.items():
        shares = mask.mean(dim=(1, 2))
        if bool(((shares == 0) | (shares == 1)).any()):
            return (
                f"The {name} holds nothing or everything of an image; check the identity prompt, the threshold "
                f"and the layers, or connect a mask."
            )
    return None
