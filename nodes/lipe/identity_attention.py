"""Nodes that record the attention to a subject, and show it."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ...attention import identity_mask as masks
from ...attention.capture import IdentityAttention
from ...attention.sites import AUTOMATIC, LAYER_CHOICES
from ...pipelines.lipe import heatmap
from ...pipelines.lipe.identity_prompt import (
    capture_identity,
    capture_tokens,
    contrast_for,
    encode_identity_prompt,
    token_positions,
)
from ...pipelines.shared.errors import IdentityEditError
from ...pipelines.shared.images import as_color
from ...pipelines.shared.masks import masks_for
from ...pipelines.shared.parsing import whole_numbers
from ..sockets import ClipOfAnyFamily, checked, fraction_input, mask_input, schema
from ..sockets import IdentityAttention as IdentityAttentionSocket

CROSS_ATTENTION, REFINED, MASK = "cross-attention (eq. 1)", "refined by self-attention (eq. 2)", "mask"


def identity_prompt_input() -> io.Input:
    return io.String.Input(
        "identity_prompt",
        default="",
        tooltip="Prompt of the subject: its class word, such as cat, preceded by the rare token of a "
        "trained identity prior, such as sks cat (Liu et al. 2024, section 2.2).",
    )


def identity_words_input() -> io.Input:
    return io.String.Input(
        "identity_words",
        default="",
        tooltip="Words of the identity prompt whose attention is used, separated by spaces or commas. "
        "Empty: all words. Start, end and padding tokens are never used.",
    )


def contrast_input() -> io.Input:
    return io.String.Input(
        "contrast",
        default="",
        optional=True,
        tooltip="Contrast for flow models (Flux, Stable Diffusion 3 and others): the surroundings of the subject, "
        "such as grass; their score is subtracted from the subject's. Empty: the first token of an empty prompt. "
        "Ignored by Stable Diffusion 1.x, 2.x and XL.",
    )


def layers_input() -> io.Input:
    return io.Combo.Input(
        "layers",
        options=list(LAYER_CHOICES),
        default=AUTOMATIC,
        tooltip="Attention layers that are read. For Stable Diffusion 1.x, 2.x and XL, by the downsampling of their "
        "grid relative to the latent; automatic: 2 and 4 (32x32 and 16x16 of SD1.5 at 512x512, 64x64 and 32x32 of "
        "SDXL at 1024x1024), or the finest two for a latent below 32x32. For flow models, a third of the blocks; "
        "automatic: all of them, with the self-attention of the last third. Not specified in the paper; other layers "
        "outline the subject less well.",
    )


def threshold_input() -> io.Input:
    return fraction_input(
        "threshold",
        masks.AUTOMATIC_THRESHOLD,
        "Fraction of the normalized attention above which a pixel belongs to the subject. Lower gives larger masks. "
        f"0 is automatic: {masks.THRESHOLD:g}, of flow models {masks.JOINT_THRESHOLD:g}, which overlapped well with "
        "the true masks of the demo world (benchmarks/results/lipe_edit.md, segment_subject_flow.md). Not given "
        "in the paper.",
    )


def power_input() -> io.Input:
    return io.Int.Input(
        "self_attention_power",
        default=masks.AUTOMATIC_POWER,
        min=masks.AUTOMATIC_POWER,
        max=16,
        tooltip="Lambda in Liu et al. 2024, eq. 2: how many times the map is propagated along the self-attention. 0 "
        f"uses the cross-attention alone. -1 is automatic: {masks.SELF_ATTENTION_POWER}, of flow models "
        f"{masks.JOINT_POWER}, which overlapped best with the true masks of the demo world "
        "(benchmarks/results/lipe_edit.md, segment_subject_flow.md). Not given in the paper; similar work uses up to "
        "4.",
    )


def _opacity_input() -> io.Input:
    return io.Float.Input(
        "opacity", default=0.6, min=0.0, max=1.0, step=0.05, tooltip="Opacity of the map; 0.6 leaves shapes visible."
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
                identity_prompt_input(),
                identity_words_input(),
                layers_input(),
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
                contrast_input(),
            ],
            outputs=[
                io.Model.Output(
                    "recording_model", display_name="model", tooltip="Model to sample with, using any sampler."
                ),
                IdentityAttentionSocket.Output(
                    "identity_attention",
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
                threshold_input(),
                power_input(),
                _opacity_input(),
                IdentityAttentionSocket.Input(
                    "identity_attention",
                    optional=True,
                    tooltip="Attention from Identity Attention or Identity-Aware Mask Blend; without it only the mask "
                    "is drawn.",
                ),
                mask_input("mask", "Mask whose outline is drawn on top, for comparison with the map.", optional=True),
            ],
            outputs=[
                io.Image.Output("overlay", display_name="image", tooltip="Image with the map or outline."),
                io.Mask.Output("map", tooltip="Displayed map or mask, as a MASK of the image's size from 0 to 1."),
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
            height, width = identity_attention.latent_size  # as the masks of the run were made
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
                    tooltip="Image with the map of one token at one step, for each step and token. Each map is divided "
                    "by its maximum, from black (none) to yellow (most).",
                ),
                io.String.Output("labels", tooltip="Step and token of each image, one per line."),
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


NODES: list[type[io.ComfyNode]] = [IdentityAttentionNode, AttentionHeatmap, AttentionMapsByStep]
