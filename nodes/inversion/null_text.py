"""The node of null-text optimization and negative-prompt inversion."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...pipelines import engine
from ...pipelines.inversion import null_text
from ...pipelines.inversion.inversion import Inversion as InversionData
from ...pipelines.inversion.inversion import sample_inversion
from ...pipelines.shared.conditioning import Conditioning, with_embedding
from ...pipelines.text.step_embeddings import apply_step_embeddings
from ..sockets import (
    Inversion,
    checked,
    checkpointing_input,
    choice_of,
    guidance_scale_input,
    progress,
    schema,
    show_text,
)

AUTOMATIC = "automatic"
NULL_TEXT_OPTIMIZATION = "null-text optimization"
ADAPTIVE_NULL_TEXT_OPTIMIZATION = "null-text optimization (adaptive)"
NEGATIVE_PROMPT_INVERSION = "negative-prompt inversion (fast)"
_METHODS = {
    AUTOMATIC: null_text.AUTOMATIC,
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
            advanced=["inner_steps", "learning_rate", "early_stop"],
            description=(
                "Keeps sampling with guidance on the inversion: optimizes an unconditional embedding "
                "for every step (Mokady et al. 2023), or uses the source prompt as the unconditional embedding "
                "(Miyake et al. 2023)."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model used for the inversion."),
                Inversion.Input("inversion", tooltip="Inversion from Noise Inversion with guidance scale 1."),
                io.Conditioning.Input("source", tooltip="Source prompt, the same as for the inversion."),
                io.Conditioning.Input(
                    "negative", tooltip="Empty prompt, from which the optimization starts (Mokady et al. 2023)."
                ),
                io.Combo.Input(
                    "method",
                    options=list(_METHODS),
                    default=AUTOMATIC,
                    tooltip="Method that computes the unconditional embeddings. Null-text optimization "
                    "follows the reference implementation update by update. The adaptive form takes about half of the "
                    "model calls and reconstructs at least as closely (benchmarks/results/null_text_speed.md). "
                    "Automatic: the adaptive form for flow models, whose gradients the reference "
                    "implementation's learning rate does not fit; else null-text optimization. "
                    "Negative-prompt inversion optimizes nothing and reconstructs as well as DDIM without guidance "
                    "(Miyake et al. 2023).",
                ),
                guidance_scale_input(
                    null_text.GUIDANCE_SCALE,
                    "Guidance scale that you will sample with. 7.5 in Jung et al. 2024 (section 5.1). "
                    "Ignored by negative-prompt inversion.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Maximum number of optimizer updates per sampling step. 0 uses the method's default: "
                    f"{null_text.INNER_STEPS} as in Jung et al. 2024 (appendix B.2) and the reference "
                    f"implementation, {null_text.ADAPTIVE_INNER_STEPS} for the adaptive form.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=null_text.LEARNING_RATE,
                    min=0.00001,
                    max=1.0,
                    step=0.0001,
                    round=0.00001,
                    tooltip="Adam's learning rate at the first step; it decays by 1% of its initial value per "
                    "step. 0.01 in the reference implementation.",
                ),
                io.Float.Input(
                    "early_stop",
                    default=null_text.EARLY_STOP,
                    min=0.0,
                    max=1.0,
                    step=0.00001,
                    round=0.0000001,
                    tooltip="Loss below which a sampling step stops early (plus 0.00002 for each step before it). "
                    "0.00001 in the reference implementation.",
                ),
                checkpointing_input(default=False),
            ],
            outputs=[
                io.Model.Output(
                    "model_with_embeddings",
                    display_name="model",
                    tooltip="Model with the per-step embeddings as its negative conditioning, for any stock sampler.",
                ),
                io.Conditioning.Output(
                    "null_text",
                    display_name="negative",
                    tooltip="Conditioning for `negative` of the sampler that uses the output model.",
                ),
                Inversion.Output(
                    "optimized_inversion",
                    display_name="inversion",
                    tooltip="The inversion with the per-step embeddings, for Timestep-Aware Text Injection Sampler "
                    "and Save Inversion.",
                ),
                io.Latent.Output(
                    "reconstruction",
                    tooltip="Image reconstructed with the source prompt. Decode it and check it: details lost here "
                    "are lost in every edit.",
                ),
                io.String.Output("report", tooltip="Model calls, losses, and steps that failed to converge."),
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
            engine.require(model, engine.Capability.TRUE_GUIDANCE)
            table = null_text.negative_prompt_inversion(inversion, source)
            null_conditioning = with_embedding(negative, table.embeddings[0], table.pooled_row(0))
            # Positive and negative are both the source prompt: every guidance scale gives the result of scale 1.
            steps = inversion.steps
            latent = sample_inversion(model, inversion, source, callback=progress(model, steps))
            text = show_text(
                cls, f"Negative-prompt inversion: no optimization, {steps} model calls for the reconstruction."
            )
        else:
            form = null_text.method_for(model, form)
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
            text = show_text(cls, _report(found, form), found.warning)
        return io.NodeOutput(
            apply_step_embeddings(model, table, "negative"),
            null_conditioning,
            inversion.with_embeddings(table),
            {"samples": latent},
            text,
        )


def _report(found: null_text.NullText, form: str) -> str:
    converged = int(found.converged.all(dim=1).sum())
    steps = int(found.converged.shape[0])
    name = ADAPTIVE_NULL_TEXT_OPTIMIZATION if form == null_text.ADAPTIVE else NULL_TEXT_OPTIMIZATION
    lines = [
        f"{name.capitalize()}: {converged} of {steps} steps converged, {int(found.inner_steps.sum())} updates, "
        f"{found.evaluations} model calls.",
        "Loss after each step: " + ", ".join(f"{value:.1e}" for value in found.final_losses.amax(dim=1).tolist()),
    ]
    return "\n".join(lines)


NODES: list[type[io.ComfyNode]] = [NullTextOptimization]
