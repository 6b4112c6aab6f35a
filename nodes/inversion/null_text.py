"""The node that finds unconditional embeddings with which guidance stays on an inversion."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...pipelines.inversion import null_text
from ...pipelines.inversion.inversion import Inversion as InversionData
from ...pipelines.inversion.inversion import sample_inversion
from ...pipelines.shared.conditioning import Conditioning, with_embedding
from ...pipelines.text.step_embeddings import apply_step_embeddings
from ..sockets import (
    Inversion,
    checked,
    choice_of,
    guidance_scale_input,
    progress,
    schema,
    show_text,
)

NULL_TEXT_OPTIMIZATION = "null-text optimization"
ADAPTIVE_NULL_TEXT_OPTIMIZATION = "null-text optimization (adaptive)"
NEGATIVE_PROMPT_INVERSION = "negative-prompt inversion (fast)"
_METHODS = {
    NULL_TEXT_OPTIMIZATION: null_text.PAPER,
    ADAPTIVE_NULL_TEXT_OPTIMIZATION: null_text.ADAPTIVE,
    NEGATIVE_PROMPT_INVERSION: None,  # optimizes nothing
}


class NullTextOptimization(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditNullTextOptimization",
            display_name="Null-Text Optimization",
            category="inversion",
            search_aliases=["null-text inversion", "NTI", "negative-prompt inversion", "NPI", "invert"],
            description=(
                "Makes sampling with guidance stay on the inversion: finds an unconditional embedding for every step "
                "(Mokady et al. 2023), or takes the source prompt itself for it (Miyake et al. 2023)."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that made the inversion."),
                Inversion.Input("inversion", tooltip="From DDIM Inversion with guidance scale 1."),
                io.Conditioning.Input("source", tooltip="The source prompt, the same as for the inversion."),
                io.Conditioning.Input(
                    "negative", tooltip="The empty prompt, from which the optimization starts (Mokady et al. 2023)."
                ),
                io.Combo.Input(
                    "method",
                    options=list(_METHODS),
                    default=NULL_TEXT_OPTIMIZATION,
                    tooltip="Null-text optimization follows the image most closely (Jung et al. 2024, figure 7), "
                    "update by update as its reference implementation does. The adaptive form aims at the same "
                    "reconstruction with fewer model calls. Negative-prompt inversion optimizes nothing and "
                    "reconstructs as well as DDIM without guidance (Miyake et al. 2023).",
                ),
                guidance_scale_input(
                    null_text.GUIDANCE_SCALE,
                    "The guidance scale with which you will sample. 7.5 in Jung et al. 2024 (section 5.1). "
                    "Not used by negative-prompt inversion.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Updates for each sampling step at most. 0 is the method's own number: "
                    f"{null_text.INNER_STEPS} as in Jung et al. 2024 (appendix B.2) and the reference implementation, "
                    f"{null_text.ADAPTIVE_INNER_STEPS} for the adaptive form.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=null_text.LEARNING_RATE,
                    min=0.00001,
                    max=1.0,
                    step=0.0001,
                    round=0.00001,
                    tooltip="Adam's learning rate at the first step; it falls by a hundredth of it each step. 0.01 in "
                    "the reference implementation.",
                ),
                io.Float.Input(
                    "early_stop",
                    default=null_text.EARLY_STOP,
                    min=0.0,
                    max=1.0,
                    step=0.00001,
                    round=0.0000001,
                    tooltip="A sampling step is done when its loss is below this (plus 0.00002 for each step before "
                    "it). 0.00001 in the reference implementation.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=False,
                    tooltip="On needs a fraction of the memory and about a third more time, for the same result. "
                    "Switch it on when memory runs out.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model_with_embeddings",
                    display_name="model",
                    tooltip="The model with the embedding of each step on its negative side, for any stock sampler.",
                ),
                io.Conditioning.Output(
                    "null_text",
                    display_name="negative",
                    tooltip="Connect it as negative beside that model.",
                ),
                Inversion.Output(
                    "optimized_inversion",
                    display_name="inversion",
                    tooltip="The inversion with its table of embeddings, for Timestep-Aware Text Injection Sampler and "
                    "Save Inversion.",
                ),
                io.Latent.Output(
                    "reconstruction",
                    display_name="reconstruction",
                    tooltip="The image sampled back with the source prompt. Decode it and look: what is lost here is "
                    "lost in every edit.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Model calls, losses, and where it did not converge.",
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
        negative: Conditioning,
        method: str,
        guidance_scale: float,
        inner_steps: int,
        learning_rate: float,
        early_stop: float,
        checkpointing: bool,
    ) -> io.NodeOutput:
        form = choice_of(_METHODS, method, "method")
        if form is None:
            table = null_text.negative_prompt_inversion(inversion, source)
            null_conditioning = with_embedding(negative, table.embeddings[0], table.pooled_row(0))
            # Both sides of the guidance are the source prompt: any guidance scale gives what scale 1 gives.
            steps = inversion.steps
            latent = sample_inversion(model, inversion, source, callback=progress(model, steps))
            text = show_text(cls, f"Negative-prompt inversion: no optimization, {steps} evaluations to reconstruct.")
        else:
            updates = inner_steps or null_text.DEFAULT_INNER_STEPS[form]
            found = null_text.null_text_optimization(
                model,
                inversion,
                source,
                negative,
                guidance_scale=guidance_scale,
                inner_steps=updates,
                learning_rate=learning_rate,
                early_stop=early_stop,
                method=form,
                checkpointing=checkpointing,
                callback=progress(model, inversion.steps * (updates + 1)),
            )
            table, latent, null_conditioning = found.embeddings, found.reconstruction, negative
            text = show_text(cls, _report(found), found.warning)
        return io.NodeOutput(
            apply_step_embeddings(model, table, "negative"),
            null_conditioning,
            inversion.with_embeddings(table),
            {"samples": latent},
            text,
        )


def _report(found: null_text.NullText) -> str:
    converged = int(found.converged.all(dim=1).sum())
    steps = int(found.converged.shape[0])
    lines = [
        f"Null-text optimization: {converged} of {steps} steps converged, {int(found.inner_steps.sum())} updates, "
        f"{found.evaluations} model calls.",
        "Loss after each step: " + ", ".join(f"{value:.1e}" for value in found.final_losses.amax(dim=1).tolist()),
    ]
    return "\n".join(lines)


NODES: list[type[io.ComfyNode]] = [NullTextOptimization]
