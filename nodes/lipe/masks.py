"""Nodes that locate the subject by the model's attention, and blend an edit with its source image by the masks."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ...attention import identity_mask as masks
from ...attention.capture import IdentityAttention
from ...attention.sites import AUTOMATIC, LAYER_CHOICES
from ...pipelines.inversion.inversion import Inversion as InversionData
from ...pipelines.lipe import heatmap, identity_mask_blend
from ...pipelines.lipe.identity_prompt import (
    capture_identity,
    capture_tokens,
    contrast_for,
    encode_identity_prompt,
    token_positions,
)
from ...pipelines.shared.conditioning import Conditioning
from ...pipelines.shared.errors import IdentityEditError
from ...pipelines.shared.images import PIXELS_PER_LATENT_PIXEL, as_color
from ...pipelines.shared.masks import masks_for
from ...pipelines.shared.parsing import whole_numbers
from ..idle import first_said, joined, same_prompt, takes_no_part
from ..sockets import (
    ClipOfAnyFamily,
    Inversion,
    at_image_size,
    checked,
    choice_of,
    guidance_scale_input,
    mask_input,
    progress,
    schema,
    show_text,
)
from ..sockets import IdentityAttention as IdentityAttentionSocket

CROSS_ATTENTION, REFINED, MASK = "cross-attention (eq. 1)", "refined by self-attention (eq. 2)", "mask"
_GIVEN_MASKS = {
    "instead of attention masks": identity_mask_blend.REPLACE,
    "united with attention masks": identity_mask_blend.UNITE,
}
BlendSettings = io.Custom("MASK_BLEND_SETTINGS")
"""Less common settings of `identity_mask_blend.BlendSettings` by name, `identity_words` and `contrast`."""


def _identity_prompt_input() -> io.Input:
    return io.String.Input(
        "identity_prompt",
        default="",
        tooltip="Prompt of the subject: its class word, such as cat, preceded by the rare token of a "
        "trained identity prior, such as sks cat (Liu et al. 2024, section 2.2).",
    )


def _identity_words_input() -> io.Input:
    return io.String.Input(
        "identity_words",
        default="",
        tooltip="Words of the identity prompt whose attention is used, separated by spaces or commas. "
        "Empty: all words. Start, end and padding tokens are never used.",
    )


def _contrast_input() -> io.Input:
    return io.String.Input(
        "contrast",
        default="",
        optional=True,
        tooltip="Flow models (Flux, Stable Diffusion 3 and others): what is around the subject, such as grass, whose "
        "score is subtracted from the subject's. Empty: the first token of an empty prompt. Ignored by Stable "
        "Diffusion 1.x, 2.x and XL.",
    )


def _layers_input() -> io.Input:
    return io.Combo.Input(
        "layers",
        options=list(LAYER_CHOICES),
        default=AUTOMATIC,
        tooltip="Attention layers that are read. For Stable Diffusion 1.x, 2.x and XL, by the downsampling of their "
        "grid relative to the latent; automatic: 2 and 4 (32x32 and 16x16 of SD1.5 at 512x512, 64x64 and 32x32 of "
        "SDXL at 1024x1024), or the finest two for a latent below 32x32. For flow models, a third of the blocks; "
        "automatic: the middle third. Not specified in the paper; other layers outline the subject less well.",
    )


def _threshold_input() -> io.Input:
    return io.Float.Input(
        "threshold",
        default=masks.THRESHOLD,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="Fraction of the normalized attention above which a pixel belongs to the subject. "
        "Lower gives larger masks. Not given in the paper; 0.4 overlapped well with the true masks of "
        "the demo world (benchmarks/results/lipe_edit.md).",
    )


def _power_input() -> io.Input:
    return io.Int.Input(
        "self_attention_power",
        default=masks.SELF_ATTENTION_POWER,
        min=0,
        max=16,
        tooltip="Lambda in Liu et al. 2024, eq. 2: how many times the map is propagated along the "
        "self-attention. 0 uses the cross-attention alone. Not given in the paper; 1 overlapped best "
        "with the true masks of the demo world (benchmarks/results/lipe_edit.md), similar work uses up "
        "to 4.",
    )


def _opacity_input() -> io.Input:
    return io.Float.Input(
        "opacity",
        default=0.6,
        min=0.0,
        max=1.0,
        step=0.05,
        tooltip="Opacity of the map; 0.6 leaves shapes visible.",
    )


class IdentityAttentionNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditIdentityAttention",
            display_name="Identity Attention",
            category="masks",
            search_aliases=["attention map", "cross-attention", "DAAM", "attention capture"],
            advanced=["identity_words", "layers", "token_numbers"],
            description=(
                "Records the model's attention to the subject while any sampler runs it; the image "
                "stays bit-identical (Liu et al. 2024, figure 4). View it with Attention Heatmap."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Model whose attention is recorded, on a copy: Stable Diffusion, Flux, Chroma, "
                    "Qwen-Image, Lumina 2, Z-Image, AuraFlow or HiDream. Flow models are also evaluated with the "
                    "identity prompt, in four steps of a run (in all with by_step).",
                ),
                ClipOfAnyFamily("clip", tooltip="The text encoders of the same checkpoint."),
                _identity_prompt_input(),
                _identity_words_input(),
                _layers_input(),
                io.String.Input(
                    "token_numbers",
                    default="",
                    optional=True,
                    tooltip="Positions of tokens of the sampled prompt, whose attention is used in place of the "
                    "identity prompt's: 0 is the start token, -1 the last. The five tokens of a subject from Apply "
                    "Subject are 72-76, or -5, -4, -3, -2, -1 in a longer prompt. Empty: the identity prompt. On flow "
                    "models this attention has no contrast and hardly outlines a subject.",
                ),
                io.Boolean.Input(
                    "by_step",
                    default=False,
                    optional=True,
                    tooltip="Maps by step. On: also keeps the map of every token at every step, for Attention Maps by "
                    "Step.",
                ),
                _contrast_input(),
            ],
            outputs=[
                io.Model.Output(
                    "recording_model", display_name="model", tooltip="Model to sample with, using any sampler."
                ),
                IdentityAttentionSocket.Output(
                    "identity_attention",
                    display_name="identity attention",
                    tooltip="Recorded attention of that model's last run, for Attention Heatmap and Attention Maps by "
                    "Step.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        clip: Any,
        identity_prompt: str,
        identity_words: str,
        layers: str,
        token_numbers: str = "",
        by_step: bool = False,
        contrast: str = "",
    ) -> io.NodeOutput:
        if positions := token_positions(token_numbers):
            return io.NodeOutput(*capture_tokens(model, positions, layers, by_step))
        identity = encode_identity_prompt(clip, identity_prompt, identity_words, contrast=contrast_for(model, contrast))
        return io.NodeOutput(*capture_identity(model, identity, layers, by_step=by_step))


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
                _identity_words_input(),
                _power_input(),
                _layers_input(),
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
                _contrast_input(),
            ],
            outputs=[
                BlendSettings.Output(
                    "blend_settings",
                    display_name="blend settings",
                    tooltip="The settings, for Identity-Aware Mask Blend.",
                )
            ],
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
                    tooltip="Inversion from Edit-Friendly DDPM Inversion, as in the paper, or from DDIM Inversion, "
                    "best with Null-Text Optimization.",
                ),
                io.Conditioning.Input("source", tooltip="Source prompt, the same as for the inversion."),
                io.Conditioning.Input("target", tooltip="Prompt that describes the edited image."),
                _identity_prompt_input(),
                guidance_scale_input(
                    0.0,
                    "Guidance scale of the target prompt. 0 uses the inversion's default: "
                    f"{scales[identity_mask_blend.EDIT_FRIENDLY_DDPM]:g} for edit-friendly DDPM as in its reference "
                    "implementation, the scale that null-text embeddings were optimized for, else "
                    f"{scales[identity_mask_blend.DDIM]:g} (Mokady et al. 2023).",
                ),
                _threshold_input(),
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
                io.Float.Input(
                    "blend_until",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of the steps, from the first, in which the background is restored. 1 in Liu "
                    "et al. 2024, algorithm 1; slightly less smooths the border of the subject.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Negative prompt. Not needed with an inversion from Null-Text Optimization, which has "
                    "its own, or with guidance scale 1.",
                ),
                mask_input(
                    "source_mask",
                    "Mask of the subject in the source image, if known.",
                    optional=True,
                ),
                mask_input(
                    "target_mask",
                    "Mask of the area where the subject may be in the edited image.",
                    optional=True,
                ),
                BlendSettings.Input(
                    "blend_settings",
                    optional=True,
                    tooltip="Layers, self-attention power and feathering of the masks, and the use of connected masks, "
                    "from Mask Blend Settings. Not connected: the defaults.",
                ),
            ],
            outputs=[
                io.Latent.Output("edited", display_name="edited", tooltip="Edited image; decode it with the VAE."),
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
                    "source_attention",
                    display_name="source attention",
                    tooltip="Attention behind the source mask, for Attention Heatmap.",
                ),
                IdentityAttentionSocket.Output(
                    "target_attention",
                    display_name="target attention",
                    tooltip="Attention behind the target mask, for Attention Heatmap.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="Model calls, sizes of the masks, and warnings."
                ),
                io.Mask.Output(
                    "step_masks",
                    display_name="step masks",
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
        return io.NodeOutput(
            {"samples": result.latent},
            at_image_size(result.source_mask),
            at_image_size(result.target_mask),
            result.source_attention or IdentityAttention(()),
            result.target_attention or IdentityAttention(()),
            show_text(cls, text, joined(_idle(source, target, skip, blend_until, inversion.steps), result.warning)),
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


class AttentionHeatmap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditAttentionHeatmap",
            display_name="Attention Heatmap",
            category="masks",
            search_aliases=["attention map", "visualize attention", "mask preview", "mask overlay"],
            description=(
                "Overlays attention maps and masks on an image, to see what the model takes for the "
                "subject and to choose the threshold and the self-attention power."
            ),
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="Image to draw on. For attention that a sampler recorded, use the decoded result of "
                    "that sampler, so that this node runs after it.",
                ),
                io.Combo.Input(
                    "show",
                    options=[CROSS_ATTENTION, REFINED, MASK],
                    default=REFINED,
                    tooltip="Map to show: before or after eq. 2 of Liu et al. 2024, from black (least) to yellow "
                    "(most), or the outline of the mask that results from it.",
                ),
                _threshold_input(),
                _power_input(),
                _opacity_input(),
                IdentityAttentionSocket.Input(
                    "identity_attention",
                    optional=True,
                    tooltip="Attention from Identity Attention or Identity-Aware Mask Blend; without it only the mask "
                    "is drawn.",
                ),
                mask_input(
                    "mask",
                    "Mask whose outline is drawn on top, for comparison with the map.",
                    optional=True,
                ),
            ],
            outputs=[
                io.Image.Output("overlay", display_name="image", tooltip="Image with the map or outline."),
                io.Mask.Output(
                    "map",
                    display_name="map",
                    tooltip="Displayed map or mask, as a MASK of the image's size from 0 to 1.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        image: torch.Tensor,
        show: str,
        threshold: float,
        self_attention_power: int,
        opacity: float,
        identity_attention: IdentityAttention | None = None,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        if identity_attention is None and mask is None:
            raise IdentityEditError("There is nothing to draw; connect an identity attention, a mask, or both.")
        if identity_attention is not None and not identity_attention.cross:
            raise IdentityEditError(
                "No attention has been recorded in identity_attention; sample with the model of Identity Attention "
                "first, and connect its result to image."
            )
        drawn = as_color(image, "image")
        if mask is not None:
            mask = masks_for(mask, "mask", drawn.shape[1], drawn.shape[2], len(drawn))
        values = mask
        if identity_attention is not None:
            power = 0 if show == CROSS_ATTENTION else self_attention_power
            height, width = (max(1, size // PIXELS_PER_LATENT_PIXEL) for size in image.shape[1:3])
            if show == MASK:
                values = masks.identity_mask(identity_attention, height, width, threshold, power)
                drawn = heatmap.outlined(drawn, values)
            else:
                values = masks.identity_map(identity_attention, height, width, power)
                drawn = heatmap.lay_over(drawn, values, opacity)
        assert values is not None
        if mask is not None:
            drawn = heatmap.outlined(drawn, mask)
        return io.NodeOutput(drawn, heatmap.enlarged(values, drawn))


class AttentionMapsByStep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditAttentionMapsByStep",
            display_name="Attention Maps by Step",
            category="masks",
            search_aliases=["attention map", "token attention", "cross-attention", "DAAM", "timestep", "HiFi Tuner"],
            description=(
                "Shows where each token is attended to at chosen steps of a run, as one labeled image each "
                "(Wang et al. 2023, figure 3)."
            ),
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="Decoded result of the sampler that recorded the attention, so that this node runs after "
                    "it.",
                ),
                IdentityAttentionSocket.Input(
                    "identity_attention", tooltip="Attention from Identity Attention, with by_step on."
                ),
                io.String.Input(
                    "steps",
                    default="",
                    tooltip="Steps to show, separated by commas; 1 is the first, with the most noise (Wang et al. 2023 "
                    "count down from 50). Empty: up to five, from the first to the last.",
                ),
                _opacity_input(),
            ],
            outputs=[
                io.Image.Output(
                    "maps",
                    display_name="maps",
                    tooltip="Image with the map of one token at one step, for each step and token. Each map is divided "
                    "by its maximum, from black (none) to yellow (most).",
                ),
                io.String.Output(
                    "labels", display_name="labels", tooltip="Step and token of each image, one per line."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, image: torch.Tensor, identity_attention: IdentityAttention, steps: str, opacity: float
    ) -> io.NodeOutput:
        chosen = whole_numbers(steps)
        if chosen is None:
            raise IdentityEditError(f"steps is '{steps}'; write whole numbers, such as 1, 10, 20.")
        shown, labels = heatmap.maps_by_step(identity_attention, as_color(image, "image"), chosen, opacity)
        return io.NodeOutput(shown, "\n".join(labels))


NODES: list[type[io.ComfyNode]] = [
    IdentityAttentionNode,
    IdentityAwareMaskBlend,
    MaskBlendSettings,
    AttentionHeatmap,
    AttentionMapsByStep,
]
