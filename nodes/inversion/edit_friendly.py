"""Nodes of edit-friendly DDPM inversion: the inversion, and the sampler of an edit from its noise maps."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...pipelines.engine.families.schedule import fewer_steps
from ...pipelines.inversion import edit_friendly
from ...pipelines.inversion.inversion import Inversion as InversionData
from ...pipelines.shared.conditioning import Conditioning
from ..idle import noise_mask_left_out
from ..sockets import (
    Inversion,
    checked,
    guidance_scale_input,
    latent_samples,
    progress,
    schema,
    seed_input,
    show_warnings,
    steps_input,
)


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
                    edit_friendly.STEPS,
                    999,
                    "Steps of the inversion and of all sampling from it. 100 in the reference implementation "
                    "and in Liu et al. 2024.",
                ),
                guidance_scale_input(
                    edit_friendly.SOURCE_GUIDANCE_SCALE,
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
        result = edit_friendly.edit_friendly_ddpm_inversion(
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
                    default=edit_friendly.SKIP,
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
    def execute(cls, model: Any, inversion: InversionData, skip: float) -> io.NodeOutput:
        import comfy.samplers

        sampler = edit_friendly.edit_friendly_sampler(model, inversion)
        first = edit_friendly.skipped_steps(inversion.steps, skip)
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


NODES: list[type[io.ComfyNode]] = [EditFriendlyDDPMInversion, EditFriendlyDDPMSampler]
