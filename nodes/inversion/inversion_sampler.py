"""The nodes that sample from an inversion: its sampler, and that of RF-Inversion."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...pipelines.inversion import edit_friendly, rf_inversion
from ...pipelines.inversion.inversion import Inversion as InversionData
from ...pipelines.inversion.inversion import check_inversion
from ...pipelines.inversion.inverted_noise import InvertedNoise
from ...pipelines.inversion.methods import OWN_SAMPLERS, sampler_of
from ..sockets import Inversion, checked, schema, show_warnings


class InversionSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditInversionSampler",
            display_name="Inversion Sampler",
            category="inversion",
            search_aliases=["DDPM inversion", "noise maps", "skip", "sampler", "RF-Solver", "FireFlow"],
            description=(
                "The sampler that belongs to an inversion, with its noise, sigmas and start latent for "
                "SamplerCustomAdvanced. Connect CFGGuider (guidance scale 15 in the reference implementation of "
                "edit-friendly DDPM inversion). Without skipped steps and for an inversion by DDIM, fixed point or "
                "Uni-Inv, it is stock euler."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model used for the inversion."),
                Inversion.Input("inversion", tooltip="Inversion from Noise Inversion or Edit-Friendly DDPM Inversion."),
                io.Float.Input(
                    "skip",
                    default=edit_friendly.SKIP,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of the steps skipped at the start: larger keeps more of the image, smaller "
                    "changes more. 0.36, 36 of 100 steps, in the reference implementation of edit-friendly DDPM "
                    "inversion; often 0 for other inversions.",
                ),
            ],
            outputs=[
                io.Sampler.Output(
                    "sampler",
                    tooltip="Sampler that reverses the inversion: with noise maps, it uses them as the noise of each "
                    "step.",
                ),
                io.Sigmas.Output("sigmas", tooltip="Sigmas for the remaining steps."),
                io.Latent.Output(
                    "start_latent",
                    tooltip="Latent of the inversion at the first remaining step. Sample from it WITHOUT adding "
                    "noise (DisableNoise). On flow models it is the image's latent; connect the noise output with it.",
                ),
                io.Noise.Output(
                    "noise",
                    tooltip="Noise with which SamplerCustomAdvanced starts at the inversion's latent of the first "
                    "remaining step, whichever latent_image of the same size is connected.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls, model: Any, inversion: InversionData, skip: float) -> io.NodeOutput:
        import comfy.samplers

        check_inversion(inversion, model)
        if inversion.noise_maps is not None:
            sampler = comfy.samplers.KSAMPLER(edit_friendly.edit_friendly_sampler(model, inversion))
        elif inversion.method in OWN_SAMPLERS:
            sampler = comfy.samplers.KSAMPLER(sampler_of(inversion.method, inversion.noise_path))
        else:
            sampler = comfy.samplers.sampler_object("euler")
        first = edit_friendly.skipped_steps(inversion.steps, skip)
        show_warnings(
            cls,
            "The inversion was made by RF-Inversion, which euler does not reverse; connect RF-Inversion Sampler in the "
            "place of this sampler."
            if inversion.method == rf_inversion.RF_INVERSION
            else None,
            f"skip is {skip:g}, so all {inversion.steps} steps but the last are skipped and the image hardly changes; "
            f"choose a smaller value."
            if first < round(skip * inversion.steps)
            else None,
        )
        return io.NodeOutput(
            sampler,
            inversion.sigmas[first:].clone(),
            {"samples": inversion.start_latent(model, first)},
            InvertedNoise(model, inversion, first),
        )


class RFInversionSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditRFInversionSampler",
            display_name="RF-Inversion Sampler",
            category="inversion",
            search_aliases=["RF-Inversion", "controller", "rectified flow", "eta"],
            description=(
                "Samples an edit that is drawn toward the image in the first steps (Rout et al. 2025, algorithm 2). "
                "For SamplerCustomAdvanced with the image as latent_image, and the noise of Noise Inversion with the "
                "method RF-Inversion."
            ),
            inputs=[
                io.Float.Input(
                    "eta",
                    default=rf_inversion.ETA,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Strength of the pull toward the image. 0.9 for most edits in Rout et al. 2025; 0 is "
                    "euler.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of the steps before the pull begins.",
                ),
                io.Float.Input(
                    "stop",
                    default=rf_inversion.STOP,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of the steps after which the pull ends. 0.25 (7 of 28 steps) is common; larger "
                    "values keep more of the image.",
                ),
            ],
            outputs=[io.Sampler.Output("sampler", tooltip="Sampler for SamplerCustomAdvanced.")],
        )

    @classmethod
    @checked
    def execute(cls, eta: float, start: float, stop: float) -> io.NodeOutput:
        if eta == 0.0 or stop <= start:
            show_warnings(cls, "eta is 0 or stop is not above start, so the sampler is plain euler; raise them.")
        return io.NodeOutput(rf_inversion.rf_inversion_sampler(eta, start, stop))


NODES: list[type[io.ComfyNode]] = [InversionSampler, RFInversionSampler]
