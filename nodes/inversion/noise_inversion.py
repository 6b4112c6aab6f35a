"""The node that inverts an image to noise by a deterministic method."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ...pipelines import engine
from ...pipelines.engine.families.schedule import fewer_steps
from ...pipelines.inversion import methods
from ...pipelines.inversion.inversion import invert_image
from ...pipelines.inversion.inverted_noise import InvertedNoise
from ...pipelines.inversion.rf_inversion import GAMMA, RF_INVERSION, rf_inversion
from ...pipelines.shared.conditioning import Conditioning
from ..idle import noise_mask_left_out, not_converged
from ..sockets import (
    Inversion,
    any_model_input,
    checked,
    choice_of,
    guidance_scale_input,
    latent_samples,
    progress,
    schema,
    seed_input,
    show_warnings,
    steps_input,
)

AUTOMATIC = "automatic"
_METHODS = {
    AUTOMATIC: AUTOMATIC,
    "DDIM": methods.DDIM,
    "fixed point": methods.FIXED_POINT,
    "Uni-Inv": methods.UNI_INV,
    "midpoint (RF-Solver)": methods.MIDPOINT,
    "FireFlow": methods.FIREFLOW,
    "RF-Inversion": RF_INVERSION,
}


class NoiseInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditNoiseInversion",
            display_name="Noise Inversion",
            category="inversion",
            search_aliases=[
                "DDIM inversion",
                "invert",
                "real image editing",
                "unsampler",
                "RF-Solver",
                "FireFlow",
                "RF-Inversion",
                "fixed point",
            ],
            advanced=["end_at_zero", "iterations", "gamma", "seed"],
            description=(
                "Inverts an image to the noise from which the model samples it again. The first step of most edits of "
                "a real image."
            ),
            inputs=[
                any_model_input(),
                io.Conditioning.Input(
                    "source",
                    tooltip="Prompt that describes the original image. An empty prompt often preserves the "
                    "structure better ('NTI - w/o src' in Jung et al. 2024, section 5.4).",
                ),
                io.Latent.Input("latent", tooltip="Image to invert, from VAE Encode with the same checkpoint's VAE."),
                io.Combo.Input(
                    "method",
                    options=list(_METHODS),
                    default=AUTOMATIC,
                    tooltip="Method. Automatic is DDIM for Stable Diffusion, as in the papers, and fixed point for "
                    "flow models. DDIM takes one model call per step. Fixed point is exact for the euler sampler. "
                    "Uni-Inv (Jiao et al. 2025) comes close with one call. Midpoint (RF-Solver, Wang et al. 2025; two "
                    "calls) and FireFlow (Deng et al. 2024; one call) need the sampler of Inversion Sampler. "
                    "RF-Inversion (Rout et al. 2025) ends in noise that is easier to edit; flow models only.",
                ),
                steps_input(
                    50,
                    1000,
                    "Number of steps for the inversion and for all sampling from it. 50 in Jung et al. "
                    "2024 (section 5.1); 28 is common for Flux.",
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
                    "the schedule is then KSampler's ddim_uniform. Flow models end near 0 in either case.",
                ),
                io.Int.Input(
                    "iterations",
                    default=methods.ITERATIONS,
                    min=1,
                    max=50,
                    tooltip="Model calls per step of the fixed point. More are more exact.",
                ),
                io.Float.Input(
                    "gamma",
                    default=GAMMA,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Strength of RF-Inversion's control toward noise. 0.5 in Rout et al. 2025.",
                ),
                seed_input("Seed of RF-Inversion's noise. It has no effect on the other methods."),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Negative prompt. Needed only for a guidance scale other than 1."
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Schedule, such as from BasicScheduler or Flux2Scheduler. When connected, steps and "
                    "end_at_zero have no effect. Without it, the schedule is the model's own: DDIM's for Stable "
                    "Diffusion, 'simple' with the model's shift for flow models.",
                ),
            ],
            outputs=[
                Inversion.Output("inversion", tooltip="Latents of all steps, with their sigmas."),
                io.Latent.Output(
                    "inverted_latent",
                    tooltip="Noisiest latent, x_T. Sample from it WITHOUT adding noise: SamplerCustomAdvanced with "
                    "DisableNoise, or KSampler (Advanced) with add_noise off. On flow models it is the image's "
                    "latent, and the inversion is in the noise output.",
                ),
                io.Sigmas.Output(
                    "schedule",
                    display_name="sigmas",
                    tooltip="Schedule of the inversion, for SamplerCustomAdvanced with the euler or ddim sampler.",
                ),
                io.Noise.Output(
                    "noise",
                    tooltip="Noise with which SamplerCustomAdvanced starts at the inversion's noisiest latent, "
                    "whichever latent_image of the same size is connected. The only form that works on flow models.",
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
        method: str,
        steps: int,
        guidance_scale: float,
        end_at_zero: bool,
        iterations: int,
        gamma: float,
        seed: int,
        negative: Conditioning | None = None,
        sigmas: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        chosen = choice_of(_METHODS, method, "method")
        if chosen == AUTOMATIC:
            is_flow = engine.require(model).noise_path is engine.FLOW
            chosen = methods.FIXED_POINT if is_flow else methods.DDIM
        total = steps if sigmas is None else len(sigmas) - 1
        invert, settings = (
            (rf_inversion, {"gamma": gamma, "seed": seed})
            if chosen == RF_INVERSION
            else (invert_image, {"method": chosen, "iterations": iterations})
        )
        result = invert(
            model,
            latent_samples(latent, "The latent"),
            source,
            negative,
            steps=steps,
            guidance_scale=guidance_scale,
            end_at_zero=end_at_zero,
            callback=progress(model, total),
            sigmas=sigmas,
            **settings,
        )
        show_warnings(cls, fewer_steps(total, result.steps), not_converged(result), noise_mask_left_out(latent))
        # Without the image's noise mask: a sampler would blend with x_T as if it were the image.
        start = {"samples": result.start_latent(model)}
        return io.NodeOutput(result, start, result.sigmas.clone(), InvertedNoise(model, result))


NODES: list[type[io.ComfyNode]] = [NoiseInversion]
