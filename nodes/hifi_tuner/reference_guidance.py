"""The node that holds a generated subject's details by a reference image."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ...pipelines.hifi_tuner import reference_guidance as guidance
from ...pipelines.inversion.inversion import Inversion as DDIMInversion
from ...pipelines.inversion.inversion import check_step_count
from ...pipelines.shared.conditioning import Conditioning
from ...pipelines.shared.errors import IdentityEditError
from ..idle import first_said, joined
from ..sockets import Inversion, checked, latent_samples, mask_input, progress, schema, seed_input, show_text


class ReferenceGuidedNullTextOptimizer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditReferenceGuidedNullTextOptimizer",
            display_name="Reference-Guided Null-Text Optimizer",
            category="subject",
            search_aliases=["HiFi Tuner", "reference guidance", "subject details", "null-text", "second pass"],
            description=(
                "Samples an image again from the same noise, with the subject in it led along the inversion of a "
                "reference image (HiFi Tuner, Wang et al. 2023, algorithm 2): the same place and pose, the "
                "reference's details."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model of the first pass: from Apply Subject, with an identity prior, or plain. Make "
                    "the inversion without Apply Subject, whose embeddings would take the place of the caption.",
                ),
                io.Conditioning.Input("positive", tooltip="The prompt of the first pass."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="The negative prompt of the first pass, empty in Wang et al. 2023; the optimization starts "
                    "from it.",
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="The latent that the first pass was given: Empty Latent Image, with the same size and "
                    "batch.",
                ),
                Inversion.Input(
                    "inversion",
                    tooltip="Of the aligned reference, from DDIM Inversion with guidance scale 1; its steps are those "
                    "of this node.",
                ),
                mask_input(
                    "mask",
                    "Mask of the subject in the aligned reference, from Align Reference; of any size.",
                ),
                seed_input(
                    "That of the first pass: the same seed gives the same noise as in KSampler and "
                    "RandomNoise. Set it to fixed in both."
                ),
                io.Float.Input(
                    "guidance_scale",
                    default=guidance.GUIDANCE_SCALE,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="That of the first pass (cfg), above 1. 7.5 as in Mokady et al. 2023; Wang et al. 2023 "
                    "name none.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=guidance.START_PERCENT,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps before guidance begins. 0.2 in Wang et al. 2023 (t_s = 40 of 50 steps "
                    "remain); earlier changes the structure of the image. 1 is no guidance.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=guidance.END_PERCENT,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps after which guidance ends. 0.8 in Wang et al. 2023 (t_e = 10 of 50 "
                    "steps remain).",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=guidance.INNER_STEPS,
                    min=0,
                    max=1000,
                    tooltip="Updates for each guided step: the weight of the reference. 10 in Wang et al. 2023; more "
                    "for a closer resemblance. 0 puts the reference in place once and guides no further.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=guidance.LEARNING_RATE,
                    min=0.00001,
                    max=1.0,
                    step=0.0001,
                    round=0.00001,
                    tooltip="Adam's learning rate. 0.01 in Wang et al. 2023.",
                ),
                io.Float.Input(
                    "early_stop",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.00001,
                    round=0.0000001,
                    tooltip="A step makes no further update once its loss is below this, which saves time. 0, as in "
                    "Wang et al. 2023, always makes all of them; 0.00001 is what null-text optimization uses.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Of the first pass: an inversion with another number of steps is refused. 0 accepts every "
                    "number.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=False,
                    tooltip="On needs a fraction of the memory and about a third more time, for the same result. "
                    "Switch it on when memory runs out.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "guided_latent", display_name="latent", tooltip="The guided image; decode it with the VAE."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="The guided steps, model calls, losses inside the mask, and what looks wrong.",
                ),
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
        inversion: DDIMInversion,
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
    ) -> io.NodeOutput:
        check_step_count(inversion, steps or None)
        empty = latent_samples(latent, "The latent")
        if latent.get("noise_mask") is not None:
            raise IdentityEditError(
                "The latent has a noise mask, with which a first pass changes a part of an image only; connect an "
                "Empty Latent Image."
            )
        guided = guidance.guided_steps(inversion.steps, start_percent, end_percent)
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
            callback=progress(model, guidance.progress_total(inversion.steps, guided, inner_steps)),
        )
        unused = first_said(
            (inner_steps == 0, "inner_steps is 0, so that this is the first pass again; choose 1 or more."),
            (not bool(found.mask.any()), "The mask is empty, so that this is the first pass again; connect another."),
            (
                bool(found.losses) and all(bool(rows.isnan().all()) for rows in found.losses),
                "No step was guided, as each loss was below early_stop from the first; lower it.",
            ),
        )
        text = show_text(cls, _report(found, inversion.steps), joined(unused, found.warning))
        return io.NodeOutput({**latent, "samples": found.latent}, text)


def _report(found: guidance.ReferenceGuidance, steps: int) -> str:
    share = float(found.mask.mean()) * 100
    updates = sum(int((~rows.isnan()).sum()) for rows in found.losses)
    lines = [
        f"Reference guidance: {len(found.steps)} of {steps} steps guided in {share:.0f} % of the image, {updates} "
        f"updates, {found.evaluations} model calls."
    ]
    if found.losses:
        pairs = zip(found.unguided_losses.mean(dim=1).tolist(), found.final_losses.mean(dim=1).tolist(), strict=True)
        lines.append(
            "Loss inside the mask at each guided step, without and with guidance: "
            + ", ".join(f"{without:.1e} / {with_it:.1e}" for without, with_it in pairs)
        )
    return "\n".join(lines)


NODES: list[type[io.ComfyNode]] = [ReferenceGuidedNullTextOptimizer]
