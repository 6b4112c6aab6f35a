"""The node of mutual self-attention: an edit that attends to its source image."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ...attention.mutual_self_attention import AUTOMATIC
from ...pipelines.attention_control import mutual_self_attention
from ...pipelines.inversion.inversion import Inversion as InversionData
from ...pipelines.shared.conditioning import Conditioning
from ..idle import takes_all
from ..sockets import Inversion, checked, fraction_input, mask_input, schema, show_warnings


class MutualSelfAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditMutualSelfAttention",
            display_name="Mutual Self-Attention",
            category="attention control",
            search_aliases=["MasaCtrl", "non-rigid editing", "consistent editing", "reference attention"],
            advanced=["start_layer", "exchange", "end_layer"],
            description=(
                "Lets the self-attention of an edit attend to the inverted image (MasaCtrl, Cao et al. "
                "2023): the layout follows the target prompt, the appearance comes from the image. No "
                "training; takes about twice as long."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model used for the inversion. Apply nodes that change the prompt per step before "
                    "this one.",
                ),
                Inversion.Input(
                    "inversion",
                    tooltip="Inversion of the image. Sample at its size with its sigmas, using a sampler without "
                    "intermediate steps (euler, ddim, Inversion Sampler).",
                ),
                io.Conditioning.Input(
                    "source",
                    tooltip="Prompt that describes the original image, the same as for the inversion (Liu et al. "
                    "2024, appendix E.2.1); empty in the reference implementation.",
                ),
                fraction_input(
                    "start_step",
                    mutual_self_attention.START_STEP,
                    "Fraction of the inversion's steps before it starts, in which the target forms its "
                    "layout: larger changes more. 0.08, 4 of 50 steps, in the reference implementation.",
                ),
                io.Int.Input(
                    "start_layer",
                    default=AUTOMATIC,
                    min=AUTOMATIC,
                    max=1000,
                    tooltip="First self-attention layer that attends to the image, counted from 0 in execution "
                    "order. -1 is automatic: the decoder's layers above its coarsest grid, 10 of 16 in SD1.x and "
                    "64 of 70 in SDXL, as in the reference implementation; of flow models the last third of the "
                    "blocks. On the demo world's flow model it left a quarter of the edits undone "
                    "(benchmarks/results/flow_editing.md); a reference image (Kontext, Qwen-Image-Edit) is the better "
                    "tool.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Negative prompt for the image; without it, the sampler's negative is used for both.",
                ),
                mask_input(
                    "source_mask",
                    "Mask of the subject in the source image. With both masks, the subject attends to the "
                    "subject and the background to the background (mask-guided MasaCtrl).",
                    optional=True,
                ),
                mask_input(
                    "target_mask",
                    "Mask of the subject's area in the edit. Connect both masks or neither.",
                    optional=True,
                ),
                io.Combo.Input(
                    "exchange",
                    options=list(mutual_self_attention.EXCHANGES),
                    default=mutual_self_attention.IMAGE,
                    optional=True,
                    tooltip="Keys and values that come from the image. Background: outside target_mask alone, for flow "
                    "models (KV-Edit, Zhu et al. 2025); with start_step and start_layer 0, and Identity-Aware Mask "
                    "Blend as the sampler, which restores the background in each step.",
                ),
                io.Int.Input(
                    "end_layer",
                    default=AUTOMATIC,
                    min=AUTOMATIC,
                    max=1000,
                    optional=True,
                    tooltip="Last layer that attends to the image, counted like start_layer. -1 is the last one of "
                    "the model.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model_with_attention",
                    display_name="model",
                    tooltip="Model that attends to the image, for any stock sampler and guider.",
                )
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
        exchange: str = mutual_self_attention.IMAGE,
        end_layer: int = AUTOMATIC,
    ) -> io.NodeOutput:
        if takes_all(start_step, inversion.steps):
            show_warnings(
                cls,
                f"start_step is {start_step:g}, so none of the {inversion.steps} steps attends to the image and this "
                f"node has no effect; choose a smaller value.",
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
                exchange=exchange,
                end_layer=end_layer,
            )
        )


NODES: list[type[io.ComfyNode]] = [MutualSelfAttention]
