"""Nodes that change what the model's attention looks at while it samples an edit."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ...attention.mutual_self_attention import AUTOMATIC
from ...pipelines.attention_control import mutual_self_attention
from ...pipelines.inversion.inversion import Inversion as InversionData
from ...pipelines.shared.conditioning import Conditioning
from ..idle import takes_all
from ..sockets import Inversion, checked, mask_input, schema, show_warnings


class MutualSelfAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditMutualSelfAttention",
            display_name="Mutual Self-Attention",
            category="attention control",
            search_aliases=["MasaCtrl", "non-rigid editing", "consistent editing", "reference attention"],
            description=(
                "While an edit is sampled, its self-attention looks into the inverted image (MasaCtrl, Cao et al. "
                "2023): the layout follows the target prompt, what fills it comes from the image. No training, "
                "about twice the time."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that made the inversion. Put nodes that change the prompt step by step before "
                    "this one.",
                ),
                Inversion.Input(
                    "inversion",
                    tooltip="The image's. Sample at its size with its own sigmas, and with a sampler that takes no "
                    "steps between them (euler, ddim, Edit-Friendly DDPM Sampler).",
                ),
                io.Conditioning.Input(
                    "source",
                    tooltip="The prompt that describes the image as it is, the same as for the inversion (Liu et al. "
                    "2024, appendix E.2.1); empty in the reference implementation.",
                ),
                io.Float.Input(
                    "start_step",
                    default=mutual_self_attention.START_STEP,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the inversion's steps without it at the beginning, in which the target finds its "
                    "layout: larger changes more. 0.08, 4 of 50 steps, in the reference implementation.",
                ),
                io.Int.Input(
                    "start_layer",
                    default=AUTOMATIC,
                    min=AUTOMATIC,
                    max=1000,
                    tooltip="First self-attention layer that looks into the image, counted from 0 in the order in "
                    "which they run. -1 is automatic: the decoder's layers above its coarsest grid, which are 10 of 16 "
                    "in SD1.x and 64 of 70 in SDXL, as in the reference implementation.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The negative prompt for the image; without it the sampler's own counts for both.",
                ),
                mask_input(
                    "source_mask",
                    "Mask of the subject in the image. With both masks the subject looks at the subject and the "
                    "background at the background (mask-guided MasaCtrl).",
                    optional=True,
                ),
                mask_input(
                    "target_mask",
                    "Mask of where the subject will be in the edit. Connect both masks or none.",
                    optional=True,
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model_with_attention",
                    display_name="model",
                    tooltip="The model that looks into the image, for any stock sampler and guider.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        inversion: InversionData,
        source: Conditioning,
        start_step: float,
        start_layer: int,
        negative: Conditioning | None = None,
        source_mask: torch.Tensor | None = None,
        target_mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        if takes_all(start_step, inversion.steps):
            show_warnings(
                cls,
                f"start_step is {start_step:g}, so that none of the {inversion.steps} steps looks into the image and "
                f"the model samples as it does without this node; choose a smaller one.",
            )
        return io.NodeOutput(
            mutual_self_attention.mutual_self_attention(
                model,
                inversion,
                source,
                negative,
                start_step=start_step,
                start_layer=start_layer,
                source_mask=source_mask,
                target_mask=target_mask,
            )
        )


NODES: list[type[io.ComfyNode]] = [MutualSelfAttention]
