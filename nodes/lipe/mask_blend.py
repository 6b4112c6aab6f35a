"""Nodes that blend an edit with its source image by the subject's masks."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ...attention.capture import IdentityAttention
from ...pipelines.inversion.inversion import Inversion as InversionData
from ...pipelines.lipe import identity_mask_blend
from ...pipelines.lipe.identity_prompt import contrast_for, encode_identity_prompt
from ...pipelines.shared.conditioning import Conditioning
from ..idle import first_said, joined, not_reversed_by_euler, same_prompt, takes_no_part
from ..sockets import (
    ClipOfAnyFamily,
    Inversion,
    at_image_size,
    checked,
    choice_of,
    fraction_input,
    guidance_scale_input,
    mask_input,
    progress,
    schema,
    show_text,
)
from ..sockets import IdentityAttention as IdentityAttentionSocket
from .identity_attention import (
    contrast_input,
    identity_prompt_input,
    identity_words_input,
    layers_input,
    power_input,
    threshold_input,
)

_GIVEN_MASKS = {
    "instead of attention masks": identity_mask_blend.REPLACE,
    "united with attention masks": identity_mask_blend.UNITE,
}
BlendSettings = io.Custom("MASK_BLEND_SETTINGS")
"""Less common settings of `identity_mask_blend.BlendSettings` by name, `identity_words` and `contrast`."""


class MaskBlendSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditMaskBlendSettings",
            display_name="Mask Blend Settings",
            category="masks",
            search_aliases=["NIMA", "LIPE", "feathering", "attention layers", "combine masks"],
            description="Less common settings of Identity-Aware Mask Blend. Without this node the defaults shown here "
            "are used.",
            inputs=[
                identity_words_input(),
                power_input(),
                layers_input(),
                io.Float.Input(
                    "feathering",
                    default=0.0,
                    min=0.0,
                    max=32.0,
                    step=0.1,
                    tooltip="Softness of the mask edges, in latent pixels (8 image pixels each). 0 in Liu et al. 2024.",
                ),
                io.Combo.Input(
                    "given_masks",
                    options=list(_GIVEN_MASKS),
                    default=next(iter(_GIVEN_MASKS)),
                    tooltip="Use of connected masks. Instead: the attention mask is skipped entirely. "
                    "United: both masks are combined. A mask that is not connected is unaffected.",
                ),
                contrast_input(),
            ],
            outputs=[BlendSettings.Output("blend_settings", tooltip="The settings, for Identity-Aware Mask Blend.")],
        )

    @classmethod
    @checked
    def execute(
        cls,
        identity_words: str,
        self_attention_power: int,
        layers: str,
        feathering: float,
        given_masks: str,
        contrast: str = "",
    ) -> io.NodeOutput:
        settings = {
            "identity_words": identity_words,
            "contrast": contrast,
            "power": self_attention_power,
            "layers": layers,
            "feathering": feathering,
            "given_masks": choice_of(_GIVEN_MASKS, given_masks, "given_masks"),
        }
        return io.NodeOutput(settings)


class IdentityAwareMaskBlend(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        scales = identity_mask_blend.GUIDANCE_SCALES
        return schema(
            node_id="IdentityEditIdentityAwareMaskBlend",
            display_name="Identity-Aware Mask Blend",
            category="masks",
            search_aliases=["NIMA", "LIPE", "non-rigid editing", "edit sampler", "local blend"],
            advanced=["blend_until"],
            description=(
                "Samples the edit of an inverted image and keeps everything outside the subject, which "
                "it locates by the model's attention (Liu et al. 2024, algorithm 1)."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model used for the inversion, with its identity prior if it has one."
                ),
                ClipOfAnyFamily("clip", tooltip="The text encoders of the same checkpoint, for the identity prompt."),
                Inversion.Input(
                    "inversion",
                    tooltip="Inversion from Edit-Friendly DDPM Inversion, as in the paper, or from Noise Inversion, "
                    "best with Null-Text Optimization.",
                ),
                io.Conditioning.Input("source", tooltip="Source prompt, the same as for the inversion."),
                io.Conditioning.Input("target", tooltip="Prompt that describes the edited image."),
                identity_prompt_input(),
                guidance_scale_input(
                    0.0,
                    "Guidance scale of the target prompt. 0 uses the inversion's default: "
                    f"{scales[identity_mask_blend.EDIT_FRIENDLY_DDPM]:g} for edit-friendly DDPM as in its reference "
                    "implementation, the scale that null-text embeddings were optimized for, else "
                    f"{scales[identity_mask_blend.DDIM]:g} (Mokady et al. 2023). Flow models: "
                    f"{identity_mask_blend.FLOW_GUIDANCE_SCALE:g}, or 1 where guidance is an input of the model "
                    "(Flux.1 dev); set 1 yourself for models of few steps (Klein, Turbo).",
                ),
                threshold_input(),
                io.Float.Input(
                    "skip",
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    tooltip="Fraction of the steps skipped at the start; larger keeps more of the image. 0 in Liu "
                    "et al. 2024, algorithm 1; 0.36 in the reference implementation of edit-friendly DDPM "
                    "inversion.",
                ),
                fraction_input(
                    "blend_until",
                    1.0,
                    "Fraction of the steps, from the first, in which the background is restored. 1 in Liu "
                    "et al. 2024, algorithm 1; slightly less smooths the border of the subject.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Negative prompt. Not needed with an inversion from Null-Text Optimization, which has "
                    "its own, or with guidance scale 1.",
                ),
                mask_input("source_mask", "Mask of the subject in the source image, if known.", optional=True),
                mask_input(
                    "target_mask", "Mask of the area where the subject may be in the edited image.", optional=True
                ),
                BlendSettings.Input(
                    "blend_settings",
                    optional=True,
                    tooltip="Layers, self-attention power and feathering of the masks, and the use of connected masks, "
                    "from Mask Blend Settings. Not connected: the defaults.",
                ),
            ],
            outputs=[
                io.Latent.Output("edited", tooltip="Edited image; decode it with the VAE."),
                io.Mask.Output(
                    "found_source_mask",
                    display_name="source mask",
                    tooltip="Mask of the subject in the source image, as used in all steps.",
                ),
                io.Mask.Output(
                    "found_target_mask",
                    display_name="target mask",
                    tooltip="Mask of the subject in the edited image, after the last step.",
                ),
                IdentityAttentionSocket.Output(
                    "source_attention", tooltip="Attention behind the source mask, for Attention Heatmap."
                ),
                IdentityAttentionSocket.Output(
                    "target_attention", tooltip="Attention behind the target mask, for Attention Heatmap."
                ),
                io.String.Output("report", tooltip="Model calls, sizes of the masks, and warnings."),
                io.Mask.Output(
                    "step_masks",
                    tooltip="Mask of the blend in every blended step, in order: the union of both masks at that step "
                    "(Liu et al. 2024, figure 3 and eq. 3), one pixel per latent pixel. For a batch of images, the "
                    "masks of one step are next to each other.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        clip: Any,
        inversion: InversionData,
        source: Conditioning,
        target: Conditioning,
        identity_prompt: str,
        guidance_scale: float,
        threshold: float,
        skip: float,
        blend_until: float,
        negative: Conditioning | None = None,
        source_mask: torch.Tensor | None = None,
        target_mask: torch.Tensor | None = None,
        blend_settings: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        chosen = {"identity_words": "", "contrast": "", **(blend_settings or {})}
        contrast = contrast_for(model, chosen.pop("contrast"))
        result = identity_mask_blend.identity_mask_blend(
            model,
            inversion,
            source,
            target,
            encode_identity_prompt(clip, identity_prompt, chosen.pop("identity_words"), contrast=contrast),
            negative,
            guidance_scale=guidance_scale or None,
            settings=identity_mask_blend.BlendSettings(
                threshold=threshold, skip=skip, blend_until=blend_until, **chosen
            ),
            source_mask=source_mask,
            target_mask=target_mask,
            callback=progress(model, 2 * inversion.steps),
        )
        shares = [
            ", ".join(f"{share:.0%}" for share in mask.mean(dim=(1, 2)).tolist())
            for mask in (result.source_mask, result.target_mask)
        ]
        text = (
            f"{result.evaluations} model calls; the source mask covers {shares[0]} of the image, the target "
            f"mask {shares[1]}."
        )
        unused = _idle(source, target, skip, blend_until, inversion.steps)
        return io.NodeOutput(
            {"samples": result.latent},
            at_image_size(result.source_mask, model),
            at_image_size(result.target_mask, model),
            result.source_attention or IdentityAttention(()),
            result.target_attention or IdentityAttention(()),
            show_text(cls, text, joined(unused, not_reversed_by_euler(inversion), result.warning)),
            result.step_masks.flatten(0, 1) if len(result.step_masks) else torch.zeros_like(result.target_mask),
        )


def _idle(source: Conditioning, target: Conditioning, skip: float, blend_until: float, steps: int) -> str | None:
    left = max(1, steps - round(skip * steps))
    return first_said(
        (
            same_prompt(source, target),
            "The source prompt and the target prompt are the same, so nothing is edited; change the target prompt.",
        ),
        (
            takes_no_part(blend_until, left),
            f"blend_until is {blend_until:g}, so none of the {left} steps is blended and nothing outside the subject "
            f"is kept; choose a larger value.",
        ),
    )


NODES: list[type[io.ComfyNode]] = [IdentityAwareMaskBlend, MaskBlendSettings]
