"""Nodes that turn an image into the noise it can be sampled from, and keep it in a file."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ...pipelines.engine.families.schedule import fewer_steps
from ...pipelines.inversion import edit_friendly as edit_friendly_inversion
from ...pipelines.inversion import inversion as ddim
from ...pipelines.inversion import null_text
from ...pipelines.shared.conditioning import Conditioning, with_embedding
from ...pipelines.text.step_embeddings import apply_step_embeddings
from ..idle import noise_mask_left_out
from ..saved_files import changed_at, check_file, file_input, new_path, saved_path
from ..sockets import (
    Inversion,
    checked,
    choice_of,
    guidance_scale_input,
    latent_samples,
    progress,
    schema,
    seed_input,
    show_text,
    show_warnings,
    steps_input,
)

NULL_TEXT_OPTIMIZATION = "null-text optimization"
ADAPTIVE_NULL_TEXT_OPTIMIZATION = "null-text optimization (adaptive)"
NEGATIVE_PROMPT_INVERSION = "negative-prompt inversion (fast)"
_METHODS = {
    NULL_TEXT_OPTIMIZATION: null_text.PAPER,
    ADAPTIVE_NULL_TEXT_OPTIMIZATION: null_text.ADAPTIVE,
    NEGATIVE_PROMPT_INVERSION: None,  # optimizes nothing
}
FILE_FOLDER = "inversions"


class DDIMInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditDDIMInversion",
            display_name="DDIM Inversion",
            category="inversion",
            search_aliases=["invert", "real image editing", "unsampler", "noise inversion"],
            description=(
                "Follows an image to the noise from which the model samples it again (Song et al. 2021). The first "
                "step of every edit of a real image."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="A Stable Diffusion 1.x, 2.x or XL model (predicts noise or velocity)."
                ),
                io.Conditioning.Input(
                    "source",
                    tooltip="The prompt that describes the image as it is. An empty prompt often keeps the structure "
                    "better (Jung et al. 2024, section 5.4).",
                ),
                io.Latent.Input("latent", tooltip="The image, from VAE Encode with the same checkpoint's VAE."),
                steps_input(
                    50,
                    1000,
                    "Steps of the inversion and of all sampling from it. 50 in Jung et al. 2024 (section 5.1).",
                ),
                guidance_scale_input(
                    1.0,
                    "Classifier-free guidance while inverting. 1 in the reference implementation of null-text "
                    "inversion; larger values reconstruct worse (Jung et al. 2024, appendix B.1).",
                ),
                io.Boolean.Input(
                    "end_at_zero",
                    default=False,
                    tooltip="Off: the schedule ends at timestep 0 (sigma 0.029), as in the reference implementation. "
                    "On: it ends at sigma 0, as KSampler's schedulers do; with 20, 25, 40, 50 or 100 steps it is then "
                    "KSampler's ddim_uniform.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The negative prompt; needed only for a guidance scale other than 1.",
                ),
            ],
            outputs=[
                Inversion.Output(
                    "inversion", display_name="inversion", tooltip="All latents on the way, with their noise levels."
                ),
                io.Latent.Output(
                    "inverted_latent",
                    display_name="inverted latent",
                    tooltip="The noisiest latent x_T. Sample from it WITHOUT adding noise: SamplerCustomAdvanced with "
                    "DisableNoise, or KSampler (Advanced) with add_noise off.",
                ),
                io.Sigmas.Output(
                    "sigmas",
                    display_name="sigmas",
                    tooltip="The inversion's schedule, for SamplerCustomAdvanced with the euler or ddim sampler.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        source: Conditioning,
        latent: dict[str, Any],
        steps: int,
        guidance_scale: float,
        end_at_zero: bool,
        negative: Conditioning | None = None,
    ) -> io.NodeOutput:
        result = ddim.ddim_inversion(
            model,
            latent_samples(latent, "The latent"),
            source,
            negative,
            steps=steps,
            guidance_scale=guidance_scale,
            end_at_zero=end_at_zero,
            callback=progress(model, steps),
        )
        show_warnings(cls, fewer_steps(steps, result.steps), noise_mask_left_out(latent))
        # A noise mask of the image stays behind: a sampler would blend with x_T as if it were the image.
        return io.NodeOutput(result, {"samples": result.start_latent(model)}, result.sigmas.clone())


class EditFriendlyDDPMInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditEditFriendlyDDPMInversion",
            display_name="Edit-Friendly DDPM Inversion",
            category="inversion",
            search_aliases=["invert", "DDPM inversion", "real image editing", "LEDITS", "noise maps"],
            description=(
                "Finds the noise of every sampling step from which the model samples an image exactly "
                "(Huberman-Spiegelglas et al. 2024). Sample an edit from it with Edit-Friendly DDPM Sampler."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="A Stable Diffusion 1.x, 2.x or XL model (predicts noise or velocity)."
                ),
                io.Conditioning.Input("source", tooltip="The prompt that describes the image as it is."),
                io.Latent.Input("latent", tooltip="The image, from VAE Encode with the same checkpoint's VAE."),
                steps_input(
                    edit_friendly_inversion.STEPS,
                    999,
                    "Steps of the inversion and of all sampling from it. 100 in the reference implementation "
                    "and in Liu et al. 2024.",
                ),
                guidance_scale_input(
                    edit_friendly_inversion.SOURCE_GUIDANCE_SCALE,
                    "Classifier-free guidance of the source prompt. 3.5 in the reference implementation.",
                ),
                io.Float.Input(
                    "eta",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of each step's noise. 1 (DDPM) in Huberman-Spiegelglas et al. 2024; for 0 use DDIM "
                    "Inversion.",
                ),
                seed_input("Of the noise. Another seed gives another inversion, and so another variant of the edit."),
                io.Boolean.Input(
                    "zero_last_noise_map",
                    default=False,
                    tooltip="Off: sampling with the source prompt gives the image back exactly. On: the last step "
                    "has no noise, as in the reference implementation, and ends on what the model itself estimates.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The negative prompt, empty in the reference implementation; not needed for guidance "
                    "scale 1.",
                ),
            ],
            outputs=[
                Inversion.Output(
                    "inversion", display_name="inversion", tooltip="All latents on the way, and each step's noise map."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        source: Conditioning,
        latent: dict[str, Any],
        steps: int,
        guidance_scale: float,
        eta: float,
        seed: int,
        zero_last_noise_map: bool,
        negative: Conditioning | None = None,
    ) -> io.NodeOutput:
        result = edit_friendly_inversion.edit_friendly_ddpm_inversion(
            model,
            latent_samples(latent, "The latent"),
            source,
            negative,
            steps=steps,
            guidance_scale=guidance_scale,
            eta=eta,
            seed=seed,
            zero_last_noise_map=zero_last_noise_map,
            callback=progress(model, steps),
        )
        show_warnings(cls, fewer_steps(steps, result.steps), noise_mask_left_out(latent))
        return io.NodeOutput(result)


class EditFriendlyDDPMSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditEditFriendlyDDPMSampler",
            display_name="Edit-Friendly DDPM Sampler",
            category="inversion",
            search_aliases=["DDPM inversion", "noise maps", "skip", "sampler"],
            description=(
                "Sampler, sigmas and start latent for SamplerCustomAdvanced, which sample an edit from the noise maps "
                "of Edit-Friendly DDPM Inversion. Use them with DisableNoise and CFGGuider (guidance scale 15 in the "
                "reference implementation)."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that made the inversion."),
                Inversion.Input("inversion", tooltip="From Edit-Friendly DDPM Inversion."),
                io.Float.Input(
                    "skip",
                    default=edit_friendly_inversion.SKIP,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the first steps that are left out: larger keeps more of the image, smaller "
                    "changes more. 0.36, 36 of 100 steps, in the reference implementation.",
                ),
            ],
            outputs=[
                io.Sampler.Output(
                    "sampler", display_name="sampler", tooltip="Takes the noise of every step from the inversion."
                ),
                io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="Those of the steps that remain."),
                io.Latent.Output(
                    "start_latent",
                    display_name="start latent",
                    tooltip="The inversion's latent where the remaining steps begin. Sample from it WITHOUT adding "
                    "noise (DisableNoise).",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls, model: Any, inversion: ddim.Inversion, skip: float) -> io.NodeOutput:
        import comfy.samplers

        sampler = edit_friendly_inversion.edit_friendly_sampler(model, inversion)
        first = edit_friendly_inversion.skipped_steps(inversion.steps, skip)
        if first < round(skip * inversion.steps):
            show_warnings(
                cls,
                f"skip is {skip:g}, which leaves out all {inversion.steps} steps: only the last one is sampled, and "
                f"the image comes back nearly as it is; choose a smaller one.",
            )
        return io.NodeOutput(
            comfy.samplers.KSAMPLER(sampler),
            inversion.sigmas[first:].clone(),
            {"samples": inversion.start_latent(model, first)},
        )


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
        inversion: ddim.Inversion,
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
            latent = ddim.sample_inversion(model, inversion, source, callback=progress(model, steps))
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


class SaveInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditSaveInversion",
            display_name="Save Inversion",
            category="inversion",
            search_aliases=["store inversion", "export inversion"],
            description="Keeps an inversion, with its null-text embeddings, in a .safetensors file in the output "
            "folder.",
            is_output_node=True,
            inputs=[
                Inversion.Input(
                    "inversion", tooltip="From DDIM Inversion, Null-Text Optimization or Edit-Friendly DDPM Inversion."
                ),
                io.String.Input(
                    "filename_prefix",
                    default=f"{FILE_FOLDER}/inversion",
                    tooltip=f"Folder and beginning of the file name, below the output folder. Load Inversion lists "
                    f"what is in '{FILE_FOLDER}'.",
                ),
            ],
            outputs=[
                io.String.Output("file", display_name="file", tooltip="Where the inversion was saved."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, inversion: ddim.Inversion, filename_prefix: str) -> io.NodeOutput:
        with new_path(filename_prefix, f"{FILE_FOLDER}/inversion") as path:
            ddim.save_inversion(inversion, path)
        return io.NodeOutput(path, ui=ui.PreviewText(show_text(cls, path)))


class LoadInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditLoadInversion",
            display_name="Load Inversion",
            category="inversion",
            search_aliases=["open inversion", "import inversion"],
            description="Reads a saved inversion and refuses it when another model made it, so that one inversion can "
            "serve many edits.",
            inputs=[
                io.Model.Input("model", tooltip="The model that made the inversion; another one is refused."),
                file_input("Save Inversion", FILE_FOLDER),
                steps_input(
                    0,
                    1000,
                    least=0,
                    tooltip="Refuse an inversion with another number of steps; 0 accepts every number.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Refuse an inversion of another size or batch than this latent's.",
                ),
            ],
            outputs=[
                Inversion.Output("inversion", display_name="inversion", tooltip="As it was saved."),
                io.Latent.Output(
                    "inverted_latent",
                    display_name="inverted latent",
                    tooltip="The noisiest latent x_T. Sample from it without adding noise.",
                ),
                io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="The inversion's schedule."),
                io.Model.Output(
                    "model_with_embeddings",
                    display_name="model",
                    tooltip="The model, with the embeddings of Null-Text Optimization on its negative side where the "
                    "file has them.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        return check_file(file, "save the inversion again")

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> float:
        return changed_at(saved_path(file))

    @classmethod
    @checked
    def execute(cls, model: Any, file: str, steps: int, latent: dict[str, Any] | None = None) -> io.NodeOutput:
        inversion = ddim.load_inversion(saved_path(file))
        shape = None if latent is None else tuple(latent_samples(latent, "The latent").shape)
        ddim.check_inversion(inversion, model, steps=steps or None, latent_shape=shape)
        if inversion.embeddings is not None:
            model = apply_step_embeddings(model, inversion.embeddings, "negative")
        start = {"samples": inversion.start_latent(model)}
        return io.NodeOutput(inversion, start, inversion.sigmas.clone(), model)


NODES: list[type[io.ComfyNode]] = [
    DDIMInversion,
    EditFriendlyDDPMInversion,
    EditFriendlyDDPMSampler,
    NullTextOptimization,
    SaveInversion,
    LoadInversion,
]
