"""Nodes of edit-friendly DDPM inversion: the inversion, and the sampler of an edit from its noise maps."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...pipelines.engine.families.schedule import fewer_steps
from ...pipelines.inversion import edit_friendly
from ...pipelines.shared.conditioning import Conditioning
from ..idle import noise_mask_left_out
from ..sockets import (
    Inversion,
    any_model_input,
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
            advanced=["eta", "zero_last_noise_map"],
            description=(
                "Computes a noise map for every sampling step, from which the model reproduces an "
                "image exactly (Huberman-Spiegelglas et al. 2024). Sample an edit from it with Inversion "
                "Sampler."
            ),
            inputs=[
                any_model_input(),
                io.Conditioning.Input("source", tooltip="Prompt that describes the original image."),
                io.Latent.Input("latent", tooltip="Image to invert, from VAE Encode with the same checkpoint's VAE."),
                steps_input(
                    edit_friendly.STEPS,
                    999,
                    "Number of steps for the inversion and for all sampling from it. 100 in the reference "
                    "implementation and in Liu et al. 2024.",
                ),
                guidance_scale_input(
                    edit_friendly.SOURCE_GUIDANCE_SCALE,
                    "Classifier-free guidance scale of the source prompt. 3.5 in the reference implementation.",
                ),
                io.Float.Input(
                    "eta",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Noise of each step, relative to DDPM. 1 (DDPM) in Huberman-Spiegelglas et al. 2024; "
                    "for 0, use Noise Inversion.",
                ),
                seed_input("Noise seed. Different seeds give different inversions, hence different edits."),
                io.Boolean.Input(
                    "zero_last_noise_map",
                    default=False,
                    tooltip="Noise map of the last step. Off: kept, so that sampling with the source prompt "
                    "reproduces the image exactly. On: zero, as in the reference implementation, so that sampling "
                    "ends on the model's own prediction.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Negative prompt, empty in the reference implementation. Not needed for guidance scale 1.",
                ),
            ],
            outputs=[Inversion.Output("inversion", tooltip="Latents and noise maps of all steps.")],
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


NODES: list[type[io.ComfyNode]] = [EditFriendlyDDPMInversion]
