"""Nodes that generate one pair with any sampler, and split it into its halves."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ...pipelines.mcdm import pair_guidance as guidance
from ...pipelines.shared.conditioning import Conditioning
from ...pipelines.shared.errors import IdentityEditError
from ..idle import first_said, same_prompt
from ..sockets import any_model_input, blocked, checked, schema, show_warnings


def guidance_inputs() -> list[Any]:
    """The guidance scale, and the weights of the three prompts."""

    def weight(name: str, default: float, tooltip: str) -> io.Float.Input:
        text = f"Weight of the {tooltip} {default:g} in Chen et al. 2024."
        return io.Float.Input(name, default=default, min=0.0, max=10.0, step=0.01, tooltip=text)

    return [
        io.Float.Input(
            "guidance_scale",
            default=guidance.GUIDANCE_SCALE,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Classifier-free guidance scale of each prompt. 7.5 in Chen et al. 2024.",
        ),
        weight("shared_weight", guidance.SHARED_WEIGHT, "shared prompt on both halves, s'_d."),
        weight(
            "source_weight",
            guidance.SOURCE_WEIGHT,
            "source prompt on the left half, s'_a. Should sum to 1 with shared_weight.",
        ),
        weight(
            "target_weight",
            guidance.TARGET_WEIGHT,
            "target prompt on the right half, s'_b. Should sum to 1 with shared_weight.",
        ),
    ]


class PairGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditPairGuider",
            display_name="Pair Guider",
            category="portrait",
            search_aliases=["composable diffusion", "paired data", "MCDM", "before and after"],
            description=(
                "Generates one subject before and after an edit, side by side in a latent of double "
                "width: composable guidance with a shared, a source and a target prompt (Chen et al. 2024, eq. 2)."
            ),
            inputs=[
                any_model_input(),
                io.Conditioning.Input(
                    "shared", tooltip="Prompt for both halves, p: 'the same woman on the left and right'."
                ),
                io.Conditioning.Input("source", tooltip="Prompt for the left half, p_a: 'a woman, normal costume'."),
                io.Conditioning.Input(
                    "target", tooltip="Prompt for the right half, p_b: 'a woman, Santa Claus costume'."
                ),
                io.Conditioning.Input(
                    "negative", tooltip="Negative prompt for all three prompts; empty in Chen et al. 2024."
                ),
                *guidance_inputs(),
            ],
            outputs=[
                io.Guider.Output(
                    "guider",
                    tooltip="Guider for SamplerCustomAdvanced; use an empty latent twice as wide as one image.",
                )
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        shared: Conditioning,
        source: Conditioning,
        target: Conditioning,
        negative: Conditioning,
        **scales: float,
    ) -> io.NodeOutput:
        guider = guidance.pair_guider(model, shared, source, target, negative, **scales)
        show_warnings(
            cls,
            first_said(
                (
                    same_prompt(source, target),
                    "The source prompt and the target prompt are identical, so both halves show the same; write "
                    "a different target prompt.",
                )
            )
            or idle(**scales),
        )
        return io.NodeOutput(guider)


def idle(guidance_scale: float, shared_weight: float, source_weight: float, target_weight: float) -> str | None:
    return first_said(
        (
            guidance_scale == 0.0 or max(shared_weight, source_weight, target_weight) == 0.0,
            "guidance_scale or all three weights are 0, so no prompt has an effect; raise them.",
        ),
        (
            max(source_weight, target_weight) == 0.0,
            "source_weight and target_weight are 0, so both halves follow only the shared prompt; raise them.",
        ),
    )


class SplitPair(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditSplitPair",
            display_name="Split Pair",
            category="portrait",
            search_aliases=["halves", "left and right", "crop", "side by side"],
            description="Splits double-width images or latents into their left and right halves.",
            inputs=[
                io.Image.Input(
                    "images", optional=True, tooltip="Images with the source on the left and the target on the right."
                ),
                io.Latent.Input(
                    "latent", optional=True, tooltip="Latents with the source on the left and the target on the right."
                ),
            ],
            outputs=[
                io.Image.Output("source", tooltip="The left halves of the images."),
                io.Image.Output("target", tooltip="The right halves of the images."),
                io.Latent.Output("source_latent", tooltip="The left halves of the latents."),
                io.Latent.Output("target_latent", tooltip="The right halves of the latents."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, images: torch.Tensor | None = None, latent: dict[str, Any] | None = None) -> io.NodeOutput:
        def missing(name: str) -> tuple[Any, Any]:
            return (blocked(f"Split Pair has no {name} to split; connect {name}."),) * 2

        if images is None and latent is None:
            raise IdentityEditError("Split Pair has no input; connect images or a latent.")
        halves = missing("images") if images is None else guidance.halves(images, 2, "The images")
        latents = missing("latent") if latent is None else _latent_halves(latent)
        return io.NodeOutput(*halves, *latents)


def _latent_halves(latent: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A latent with its noise mask, which may have another size, split into halves."""
    left, right = dict(latent), dict(latent)
    for name in ("samples", "noise_mask"):
        if latent.get(name) is not None:
            left[name], right[name] = guidance.halves(latent[name], -1, "The latent")
    return left, right


NODES: list[type[io.ComfyNode]] = [PairGuider, SplitPair]
