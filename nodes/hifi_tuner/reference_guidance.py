"""The node that guides a generated subject by a reference image."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ...pipelines.engine.host import empty_latent
from ...pipelines.hifi_tuner import reference_guidance as guidance
from ...pipelines.inversion.inversion import Inversion as InversionData
from ...pipelines.inversion.inversion import check_step_count
from ...pipelines.shared.conditioning import Conditioning
from ...pipelines.shared.errors import IdentityEditError
from ..idle import first_said, joined, not_reversed_by_euler
from ..sockets import (
    EmptyLatent,
    Inversion,
    checked,
    checkpointing_input,
    fraction_input,
    guidance_scale_input,
    mask_input,
    progress,
    schema,
    seed_input,
    show_text,
    steps_input,
)


class ReferenceGuidedNullTextOptimizer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditReferenceGuidedNullTextOptimizer",
            display_name="Reference-Guided Null-Text Optimizer",
            category="subject",
            search_aliases=["HiFi Tuner", "reference guidance", "subject details", "null-text", "second pass"],
            advanced=["learning_rate", "early_stop", "steps", "blending"],
            description=(
                "Samples an image again from the same noise and guides its subject along the inversion "
                "of a reference image (HiFi Tuner, Wang et al. 2023, algorithm 2): the same place and pose, "
                "with the reference's details. On models with distilled guidance it blends the reference in instead of "
                "optimizing."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Model of the first pass: from Apply Subject, with an identity prior, or plain. Make "
                    "the inversion without Apply Subject, whose embeddings would replace the caption.",
                ),
                io.Conditioning.Input("positive", tooltip="Prompt of the first pass."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="Negative prompt of the first pass, from which the optimization starts; empty in Wang "
                    "et al. 2023.",
                ),
                EmptyLatent(
                    "latent",
                    tooltip="Latent input of the first pass: Empty Latent Image, with the same size and batch.",
                ),
                Inversion.Input(
                    "inversion",
                    tooltip="Inversion of the aligned reference, from Noise Inversion with guidance scale 1; its "
                    "number of steps is used.",
                ),
                mask_input("mask", "Mask of the subject in the aligned reference, from Align Reference; of any size."),
                seed_input(
                    "Seed of the first pass: the same seed gives the same noise as in KSampler and "
                    "RandomNoise. Set it to fixed in both."
                ),
                guidance_scale_input(
                    guidance.GUIDANCE_SCALE,
                    "Guidance scale (cfg) of the first pass, above 1. 7.5 as in Mokady et al. 2023; Wang "
                    "et al. 2023 do not report theirs. 1 for flow models with distilled guidance.",
                ),
                fraction_input(
                    "start_percent",
                    guidance.START_PERCENT,
                    "Fraction of the steps before guidance starts. 0.2 in Wang et al. 2023 (t_s = 40 of 50 "
                    "steps remain); an earlier start changes the image's structure. 1 disables guidance.",
                ),
                fraction_input(
                    "end_percent",
                    guidance.END_PERCENT,
                    "Fraction of the steps after which guidance ends. 0.8 in Wang et al. 2023 (t_e = 10 of "
                    "50 steps remain).",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=guidance.INNER_STEPS,
                    min=0,
                    max=1000,
                    tooltip="Optimizer updates per guided step: the strength of the reference. 10 in Wang et al. "
                    "2023; more gives a closer resemblance. 0 only pastes the reference into the first guided step, "
                    "and on flow models blends it in by the share of blending.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=guidance.LEARNING_RATE,
                    min=0.00001,
                    max=1.0,
                    step=0.0001,
                    round=0.00001,
                    tooltip="Adam's learning rate. 0.01 in Wang et al. 2023; on flow models the step size adapts.",
                ),
                io.Float.Input(
                    "early_stop",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.00001,
                    round=0.0000001,
                    tooltip="Loss below which a step makes no further updates, which saves time. 0 always makes "
                    "all updates, as in Wang et al. 2023; null-text optimization uses 0.00001.",
                ),
                steps_input(
                    0,
                    1000,
                    "Number of steps of the first pass: an inversion with another number is refused. 0 "
                    "accepts any number.",
                    least=0,
                ),
                checkpointing_input(default=False),
                fraction_input(
                    "blending",
                    guidance.BLENDING,
                    "Share of the reference blended into each guided step on flow models where no embedding can be "
                    "optimized: with distilled guidance, at guidance scale 1, or with inner_steps 0. 0 only pastes the "
                    "reference into the first guided step, 1 follows it exactly.",
                    optional=True,
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "guided_latent", display_name="latent", tooltip="Guided image; decode it with the VAE."
                ),
                io.String.Output("report", tooltip="Guided steps, model calls, losses inside the mask, and warnings."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        positive: Conditioning,
        negative: Conditioning,
        latent: dict[str, Any],
        inversion: InversionData,
        mask: torch.Tensor,
        seed: int,
        guidance_scale: float,
        start_percent: float,
        end_percent: float,
        inner_steps: int,
        learning_rate: float,
        early_stop: float,
        steps: int,
        checkpointing: bool,
        blending: float = guidance.BLENDING,
    ) -> io.NodeOutput:
        check_step_count(inversion, steps or None)
        empty = empty_latent(model, latent)
        if latent.get("noise_mask") is not None:
            raise IdentityEditError(
                "The latent has a noise mask, which limits the first pass to a part of the image; connect Empty Latent "
                "Image."
            )
        guided = guidance.guided_steps(inversion.steps, start_percent, end_percent)
        optimized = guidance.optimizes(model, guidance_scale, inner_steps)
        updates = inner_steps if optimized else 0
        found = guidance.reference_guided_sampling(
            model,
            guidance.first_pass_latent(model, empty, inversion.sigmas, seed, latent.get("batch_index")),
            inversion,
            mask,
            positive,
            negative,
            guidance_scale=guidance_scale,
            start_percent=start_percent,
            end_percent=end_percent,
            inner_steps=inner_steps,
            learning_rate=learning_rate,
            early_stop=early_stop,
            checkpointing=checkpointing,
            callback=progress(model, guidance.progress_total(inversion.steps, guided, updates)),
            blending=blending,
        )
        unused = first_said(
            (
                optimized and inner_steps == 0,
                "inner_steps is 0, so the reference is pasted once and no step is guided; choose 1 or more.",
            ),
            (
                not optimized and blending == 0.0,
                "blending is 0, so the reference is pasted once and no step is guided; choose a larger share.",
            ),
            (not bool(found.mask.any()), "The mask is empty, so this repeats the first pass; connect another mask."),
            (
                bool(found.losses) and all(bool(rows.isnan().all()) for rows in found.losses),
                "No step was guided because every loss started below early_stop; lower it.",
            ),
        )
        text = show_text(
            cls,
            _report(found, inversion.steps, None if optimized else blending),
            joined(unused, not_reversed_by_euler(inversion), found.warning),
        )
        return io.NodeOutput({**latent, "samples": found.latent}, text)


def _report(found: guidance.ReferenceGuidance, steps: int, blending: float | None) -> str:
    share = float(found.mask.mean()) * 100
    updates = sum(int((~rows.isnan()).sum()) for rows in found.losses)
    how = f"{updates} updates" if blending is None else f"{blending:.0%} blended in"
    lines = [
        f"Reference guidance: {len(found.steps)} of {steps} steps guided in {share:.0f} % of the image, {how}, "
        f"{found.evaluations} model calls."
    ]
    if found.losses:
        pairs = zip(found.unguided_losses.mean(dim=1).tolist(), found.final_losses.mean(dim=1).tolist(), strict=True)
        lines.append(
            "Loss inside the mask at each guided step, without and with guidance: "
            + ", ".join(f"{without:.1e} / {with_it:.1e}" for without, with_it in pairs)
        )
    return "\n".join(lines)


NODES: list[type[io.ComfyNode]] = [ReferenceGuidedNullTextOptimizer]
