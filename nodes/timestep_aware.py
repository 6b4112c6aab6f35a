"""Nodes that optimize the target prompt's embedding, and that inject the source prompt into early steps."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..pipelines import engine
from ..pipelines.inversion.inversion import Inversion as InversionData
from ..pipelines.shared.conditioning import Conditioning, with_embedding
from ..pipelines.text.step_embeddings import apply_step_embeddings
from ..pipelines.timestep_aware import text_injection
from ..pipelines.timestep_aware import text_optimization as optimization
from ..pipelines.timestep_aware.model_fine_tuning import FineTuningSettings, fine_tune_model
from ..pipelines.training.weights import ALL, LOW_RANK
from .idle import first_said, joined, noise_mask_left_out, not_reversed_by_euler, same_prompt
from .sockets import (
    Inversion,
    any_model_input,
    checked,
    checkpointing_input,
    fraction_input,
    guidance_scale_input,
    latent_samples,
    progress,
    schema,
    seed_input,
    show_text,
    show_warnings,
    steps_input,
)
from .training import (
    LossMap,
    first_and_last,
    learning_rate_input,
    settings_input,
    settings_of,
    steps_of,
    training_progress,
    weights_inputs,
)

FOR_LOW_RANK, LOWEST_OF_LOW_RANK = 5e-4, 2e-5
"""A learning rate of Imagic's fine-tuning that suits low-rank weights, and one below which they hardly change: they
begin at 0, and Adam moves each by about the learning rate a step."""


class OptimizeTextEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditOptimizeTextEmbedding",
            display_name="Optimize Text Embedding",
            category="text",
            search_aliases=["Imagic", "text optimization", "textual inversion"],
            advanced=["learning_rate"],
            description=(
                "Optimizes the target prompt's embedding toward the image (Imagic, Kawar et al. 2023), "
                "so that interpolating back to the target prompt edits this image smoothly."
            ),
            inputs=[
                any_model_input(),
                io.Latent.Input("latent", tooltip="Image to edit, from VAE Encode."),
                io.Conditioning.Input(
                    "target",
                    tooltip="Prompt that describes the edited image; a single CLIP Text Encode, not combined with "
                    "others.",
                ),
                steps_input(
                    optimization.STEPS,
                    10000,
                    "Number of Adam steps. 200 in Jung et al. 2024 (appendix F), 500 in Imagic; more steps "
                    "do not preserve the image better (Jung et al. 2024, section 3).",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=optimization.LEARNING_RATE,
                    min=0.00001,
                    max=1.0,
                    step=0.0001,
                    round=0.00001,
                    tooltip="Adam's learning rate. 0.001 in Imagic (section 4.2).",
                ),
                seed_input("Seed for the timesteps and the noise. The same seed gives the same embedding."),
                checkpointing_input(default=False),
            ],
            outputs=[
                io.Conditioning.Output(
                    "optimized", tooltip="Optimized embedding e_opt, for the nodes of Timestep-Aware Text Injection."
                ),
                io.String.Output("report", tooltip="Model calls and losses."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        latent: dict[str, Any],
        target: Conditioning,
        steps: int,
        learning_rate: float,
        seed: int,
        checkpointing: bool,
    ) -> io.NodeOutput:
        found = optimization.optimize_text_embedding(
            model,
            latent_samples(latent, "The latent"),
            target,
            steps=steps,
            learning_rate=learning_rate,
            seed=seed,
            checkpointing=checkpointing,
            callback=progress(model, steps),
        )
        quarter = max(1, steps // 4)
        first, last = (float(part.mean()) for part in (found.losses[:quarter], found.losses[-quarter:]))
        text = (
            f"Text optimization: {steps} steps, {found.evaluations} model calls, mean loss {first:.4f} in the "
            f"first quarter and {last:.4f} in the last."
        )
        text = show_text(cls, text, noise_mask_left_out(latent))
        return io.NodeOutput(with_embedding(target, found.embedding), text)


class ImagicFineTuning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditImagicFineTuning",
            display_name="Imagic Fine-Tuning",
            category="text",
            search_aliases=["Imagic", "fine-tune", "single image", "overfit"],
            advanced=["learning_rate", "weights", "rank"],
            description=(
                "Fine-tunes the model to one image with its optimized embedding (Imagic, Kawar et al. 2023), so that "
                "it samples the image from that embedding, and edits of it from interpolated ones."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="A Stable Diffusion 1.x, 2.x or XL model (predicts noise or velocity)."
                ),
                io.Latent.Input("latent", tooltip="Image to edit, from VAE Encode; the same as for the embedding."),
                io.Conditioning.Input("optimized", tooltip="Optimized embedding, from Optimize Text Embedding."),
                steps_input(
                    FineTuningSettings.steps,
                    10000,
                    "Number of training steps. 1000 in diffusers' Imagic pipeline, 500 in Liu et al. 2024 (appendix "
                    "E.2.2).",
                ),
                learning_rate_input(
                    FineTuningSettings.learning_rate,
                    "Adam's learning rate. 0.000002 in diffusers' Imagic pipeline, 0.0005 in Liu et al. 2024 (appendix "
                    "E.2.2). Lower it when the result shows odd colors.",
                    step=1e-6,
                ),
                seed_input("Seed for the timesteps and the noise."),
                *weights_inputs(
                    ALL, "All weights of the UNet: Imagic; see the help page for the memory.", optional=False
                ),
                settings_input(),
            ],
            outputs=[
                io.Model.Output(
                    "fine_tuned", display_name="model", tooltip="Model fine-tuned to the image, for any sampler."
                ),
                LossMap.Output("loss", tooltip="Loss of every step, for Plot Loss Graph."),
                io.String.Output("report", tooltip="Number of steps, and the losses at the start and at the end."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        latent: dict[str, Any],
        optimized: Conditioning,
        steps: int,
        learning_rate: float,
        seed: int,
        weights: str,
        rank: int,
        training_settings: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        settings = FineTuningSettings(
            steps=steps,
            learning_rate=learning_rate,
            seed=seed,
            weights=weights,
            rank=rank,
            **settings_of(training_settings),
        )
        samples = latent_samples(latent, "The latent")
        patched, run = fine_tune_model(model, samples, optimized, settings, training_progress(model, steps))
        text = f"Imagic fine-tuning: {steps_of(run)}; loss {first_and_last(run.losses)}."
        slow = None
        if weights == LOW_RANK and learning_rate < LOWEST_OF_LOW_RANK:
            rate = f"{FOR_LOW_RANK:g}, as in Liu et al. 2024"
            slow = f"low rank hardly learns at learning_rate {learning_rate:g}; set {rate}."
        shown = show_text(cls, text, joined(noise_mask_left_out(latent), slow))
        return io.NodeOutput(patched, {"loss": run.losses}, shown)


def _prompt_inputs() -> list[io.Input]:
    """Inputs of eq. 3 and 5, shared by the three injection nodes."""
    return [
        io.Conditioning.Input("source", tooltip="Source prompt, the same as for the inversion."),
        io.Conditioning.Input("target", tooltip="Prompt that describes the edited image."),
        fraction_input(
            "ratio",
            text_injection.RATIO,
            "Fraction of the steps, from the first, that use the source prompt (rounded to whole "
            "steps). 0.1 for large structural changes, up to 0.4 for small ones (Jung et al. 2024, "
            "appendix E.1).",
        ),
        io.Float.Input(
            "eta",
            default=text_injection.ETA,
            min=0.0,
            max=2.0,
            step=0.01,
            tooltip="Interpolation between the optimized embedding (0, the image) and the target prompt "
            "(1, the edit): Jung et al. 2024, eq. 3. 0.6 to 0.8 in Imagic. No effect without an optimized "
            "embedding.",
        ),
    ]


def _idle(
    source: Conditioning, edit: Conditioning, optimized: Conditioning | None, ratio: float, eta: float, steps: int
) -> str | None:
    """Warning about settings without any effect, shared by the three injection nodes; None if there are none."""
    return joined(
        first_said(
            (
                same_prompt(source, edit),
                "The source prompt and the target prompt are the same, so nothing is edited; change the target prompt.",
            ),
            (
                text_injection.source_steps(steps, ratio) == steps,
                f"ratio is {ratio:g}, so all {steps} steps use the source prompt and nothing is edited; choose a "
                f"smaller value.",
            ),
            (
                text_injection.source_steps(steps, ratio) == 0,
                f"ratio is {ratio:g}, so none of the {steps} steps uses the source prompt; choose a larger value to "
                f"keep more of the image.",
            ),
        ),
        first_said(
            (
                optimized is not None and eta == 1.0,
                "eta is 1, so the optimized embedding has no effect; choose a smaller value.",
            )
        ),
    )


def _optimized_input() -> io.Input:
    return io.Conditioning.Input(
        "optimized",
        optional=True,
        tooltip="Embedding from Optimize Text Embedding with the same target prompt; without it, the "
        "target prompt is used unchanged.",
    )


class TimestepAwareTextInjection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditTimestepAwareTextInjection",
            display_name="Timestep-Aware Text Injection",
            category="text",
            search_aliases=["non-rigid editing", "prompt scheduling", "prompt travel", "source prompt injection"],
            description=(
                "Uses the source prompt in the first steps, which determine the image's layout, and "
                "the target prompt afterward (Jung et al. 2024, eq. 5), as one positive conditioning for any "
                "sampler."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that will sample; only its noise schedule is used."),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="Sigmas of the sampling run: from Noise Inversion, or from BasicScheduler with "
                    "KSampler's scheduler and steps.",
                ),
                *_prompt_inputs(),
                _optimized_input(),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive",
                    tooltip="Both prompts, each with its range of steps; the switch is exact for these sigmas.",
                )
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        sigmas: torch.Tensor,
        source: Conditioning,
        target: Conditioning,
        ratio: float,
        eta: float,
        optimized: Conditioning | None = None,
    ) -> io.NodeOutput:
        edit = text_injection.edit_conditioning(target, optimized, eta)
        positive = text_injection.injected_conditioning(model, sigmas, source, edit, ratio)
        show_warnings(cls, _idle(source, edit, optimized, ratio, eta, len(sigmas) - 1))
        return io.NodeOutput(positive)


class TimestepAwareTextInjectionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditTimestepAwareTextInjectionModel",
            display_name="Timestep-Aware Text Injection (Model)",
            category="text",
            search_aliases=["non-rigid editing", "per-step embeddings", "prompt scheduling", "source prompt injection"],
            description=(
                "The same as Timestep-Aware Text Injection, stored in the model: for sigmas outside "
                "the model's range, and where the positive conditioning must stay a single entry."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that will sample; the embeddings are stored in a copy of it."
                ),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="Sigmas of the sampling run: from Noise Inversion, or from BasicScheduler with "
                    "KSampler's scheduler and steps.",
                ),
                *_prompt_inputs(),
                _optimized_input(),
            ],
            outputs=[
                io.Model.Output(
                    "model_with_embeddings",
                    display_name="model",
                    tooltip="Model with the per-step embeddings as its positive conditioning.",
                ),
                io.Conditioning.Output(
                    "positive", tooltip="Conditioning for `positive` of the sampler that uses the output model."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        sigmas: torch.Tensor,
        source: Conditioning,
        target: Conditioning,
        ratio: float,
        eta: float,
        optimized: Conditioning | None = None,
    ) -> io.NodeOutput:
        edit = text_injection.edit_conditioning(target, optimized, eta)
        repeats = engine.Capability.CROSS_ATTENTION in engine.require(model).capabilities
        table = text_injection.injection_table(sigmas, source, edit, ratio, repeats_texts=repeats)
        show_warnings(cls, _idle(source, edit, optimized, ratio, eta, len(sigmas) - 1))
        return io.NodeOutput(apply_step_embeddings(model, table, "positive"), edit)


class TimestepAwareTextInjectionSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditTimestepAwareTextInjectionSampler",
            display_name="Timestep-Aware Text Injection Sampler",
            category="text",
            search_aliases=["non-rigid editing", "edit sampler", "source prompt injection"],
            advanced=["sampler"],
            description=(
                "Samples the edit from an inversion: the source prompt in the first steps, the target "
                "prompt afterward (Jung et al. 2024, stage C). The whole stage in one node, on the inversion's "
                "schedule."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model used for the inversion."),
                Inversion.Input(
                    "inversion",
                    tooltip="Inversion from Null-Text Optimization (guidance scale 7.5), or directly from Noise "
                    "Inversion (guidance scale 1).",
                ),
                *_prompt_inputs(),
                guidance_scale_input(
                    7.5,
                    "Guidance scale. 7.5 with Null-Text Optimization, which must use the same value; 1 "
                    "with Noise Inversion alone (Jung et al. 2024, section 5.1).",
                ),
                io.Combo.Input(
                    "sampler",
                    options=list(text_injection.SAMPLERS),
                    default=text_injection.SAMPLERS[0],
                    tooltip="Sampler of the edit. DDIM is what the inversion reverses (Jung et al. 2024). Heun "
                    "follows the same path more accurately, with two model calls per step.",
                ),
                _optimized_input(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Negative prompt. Not needed with an inversion from Null-Text Optimization, which has "
                    "its own, or with guidance scale 1.",
                ),
            ],
            outputs=[
                io.Latent.Output("edited", tooltip="Edited image; decode it with the VAE."),
                io.String.Output("report", tooltip="Number of steps with the source prompt, and model calls."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        inversion: InversionData,
        source: Conditioning,
        target: Conditioning,
        ratio: float,
        eta: float,
        guidance_scale: float,
        sampler: str,
        optimized: Conditioning | None = None,
        negative: Conditioning | None = None,
    ) -> io.NodeOutput:
        edit = text_injection.edit_conditioning(target, optimized, eta)
        result = text_injection.timestep_aware_sampling(
            model,
            inversion,
            source,
            edit,
            negative,
            ratio=ratio,
            guidance_scale=guidance_scale,
            sampler=sampler,
            callback=progress(model, inversion.steps),
        )
        text = (
            f"{result.source_steps} of {inversion.steps} steps with the source prompt, {result.evaluations} model "
            f"calls."
        )
        unused = _idle(source, edit, optimized, ratio, eta, inversion.steps)
        return io.NodeOutput(
            {"samples": result.latent},
            show_text(cls, text, joined(unused, not_reversed_by_euler(inversion), result.warning)),
        )


NODES: list[type[io.ComfyNode]] = [
    OptimizeTextEmbedding,
    ImagicFineTuning,
    TimestepAwareTextInjection,
    TimestepAwareTextInjectionModel,
    TimestepAwareTextInjectionSampler,
]
