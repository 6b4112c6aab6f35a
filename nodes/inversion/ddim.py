"""The node that inverts an image by DDIM."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...pipelines.engine.families.schedule import fewer_steps
from ...pipelines.inversion.inversion import ddim_inversion
from ...pipelines.shared.conditioning import Conditioning
from ..idle import noise_mask_left_out
from ..sockets import (
    Inversion,
    checked,
    guidance_scale_input,
    latent_samples,
    progress,
    schema,
    show_warnings,
    steps_input,
)


class DDIMInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditDDIMInversion",
            display_name="DDIM Inversion",
            category="inversion",
            search_aliases=["invert", "real image editing", "unsampler", "noise inversion"],
            advanced=["end_at_zero"],
            description=(
                "Inverts an image to the noise from which the model samples it again (Song et al. "
                "2021). The first step of every edit of a real image."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A Stable Diffusion 1.x, 2.x or XL model (noise or v-prediction)."),
                io.Conditioning.Input(
                    "source",
                    tooltip="Prompt that describes the original image. An empty prompt often preserves the "
                    "structure better ('NTI - w/o src' in Jung et al. 2024, section 5.4).",
                ),
                io.Latent.Input("latent", tooltip="Image to invert, from VAE Encode with the same checkpoint's VAE."),
                steps_input(
                    50,
                    1000,
                    "Number of steps for the inversion and for all sampling from it. 50 in Jung et al. "
                    "2024 (section 5.1).",
                ),
                guidance_scale_input(
                    1.0,
                    "Classifier-free guidance scale during inversion. 1 in the reference implementation of "
                    "null-text inversion. Jung et al. 2024 state 1 for plain DDIM, and 7.5 for inversion and "
                    "sampling with null-text inversion (section 5.1); higher values reconstruct worse (appendix B.1).",
                ),
                io.Boolean.Input(
                    "end_at_zero",
                    default=False,
                    tooltip="End of the schedule. Off: timestep 0 (sigma 0.029), as in the reference "
                    "implementation. On: sigma 0, as in KSampler's schedulers; with 20, 25, 40, 50 or 100 steps "
                    "the schedule is then KSampler's ddim_uniform.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Negative prompt. Needed only for a guidance scale other than 1."
                ),
            ],
            outputs=[
                Inversion.Output(
                    "inversion", display_name="inversion", tooltip="Latents of all steps, with their sigmas."
                ),
                io.Latent.Output(
                    "inverted_latent",
                    display_name="inverted latent",
                    tooltip="Noisiest latent, x_T. Sample from it WITHOUT adding noise: SamplerCustomAdvanced with "
                    "DisableNoise, or KSampler (Advanced) with add_noise off.",
                ),
                io.Sigmas.Output(
                    "sigmas",
                    display_name="sigmas",
                    tooltip="Schedule of the inversion, for SamplerCustomAdvanced with the euler or ddim sampler.",
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
        result = ddim_inversion(
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
        # Without the image's noise mask: a sampler would blend with x_T as if it were the image.
        return io.NodeOutput(result, {"samples": result.start_latent(model)}, result.sigmas.clone())


NODES: list[type[io.ComfyNode]] = [DDIMInversion]
