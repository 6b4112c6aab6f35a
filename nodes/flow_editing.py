"""Nodes of edits that follow the difference between a source and a target prompt."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..pipelines import engine
from ..pipelines.flow_editing import flow_edit, uni_edit
from ..pipelines.flow_editing.direct_inversion import direct_inversion_sampler
from ..pipelines.inversion.inversion import Inversion as InversionData
from ..pipelines.inversion.inversion import check_negative
from ..pipelines.inversion.inverted_noise import InvertedNoise
from ..pipelines.shared.conditioning import Conditioning
from .idle import same_prompt
from .sockets import Inversion, checked, schema, show_warnings

_CATEGORY = "editing without inversion"
_SAMPLER = "For SamplerCustomAdvanced, with the guider of Source and Target Guider and the image as latent_image."


class SourceTargetGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditSourceTargetGuider",
            display_name="Source and Target Guider",
            category=_CATEGORY,
            search_aliases=["FlowEdit", "Uni-Edit", "guider", "source prompt"],
            description=(
                "Guider with a source and a target prompt, for FlowEdit Sampler, Uni-Edit Sampler and Direct Inversion "
                "Sampler. Other samplers see classifier-free guidance of the target prompt."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A flow model (Flux, Chroma, Stable Diffusion 3, Qwen-Image, Z-Image and similar), or "
                    "Stable Diffusion 1.x, 2.x or XL.",
                ),
                io.Conditioning.Input("source", tooltip="Prompt that describes the original image."),
                io.Conditioning.Input("target", tooltip="Prompt that describes the edited image."),
                io.Float.Input(
                    "source_guidance_scale",
                    default=1.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Classifier-free guidance scale of the source prompt. FlowEdit with Stable Diffusion 3: "
                    "3.5. Keep 1 for models with distilled guidance (Flux.1 dev), and set FluxGuidance of the source "
                    "prompt to 1.5.",
                ),
                io.Float.Input(
                    "target_guidance_scale",
                    default=1.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Classifier-free guidance scale of the target prompt. FlowEdit with Stable Diffusion 3: "
                    "13.5. Keep 1 for models with distilled guidance (Flux.1 dev), and set FluxGuidance of the target "
                    "prompt to 5.5.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Negative prompt. Needed only for a guidance scale other than 1."
                ),
            ],
            outputs=[io.Guider.Output("guider", tooltip="Guider for SamplerCustomAdvanced.")],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        source: Conditioning,
        target: Conditioning,
        source_guidance_scale: float,
        target_guidance_scale: float,
        negative: Conditioning | None = None,
    ) -> io.NodeOutput:
        for scale in (source_guidance_scale, target_guidance_scale):
            check_negative(negative, scale)
        if same_prompt(source, target) and source_guidance_scale == target_guidance_scale:
            show_warnings(cls, "source and target are the same prompt, so the image does not change; edit target.")
        guider = engine.EditGuider(model, source, target, negative, source_guidance_scale, target_guidance_scale)
        return io.NodeOutput(guider)


class FlowEditSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditFlowEditSampler",
            display_name="FlowEdit Sampler",
            category=_CATEGORY,
            search_aliases=["FlowEdit", "inversion-free editing", "rectified flow"],
            advanced=["last_steps", "averages"],
            description=(
                "Edits an image without inversion (Kulikov et al. 2025): the image moves along the difference between "
                "the target and the source prompt. 28 steps with Flux and 50 with Stable Diffusion 3 in the paper."
            ),
            inputs=[
                io.Float.Input(
                    "skip",
                    default=flow_edit.SKIP,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of the steps skipped at the start: larger keeps more of the image, smaller "
                    "changes more. In the paper 0.14 with Flux (n_max 24 of 28) and 0.34 with Stable Diffusion 3 "
                    "(n_max 33 of 50).",
                ),
                io.Float.Input(
                    "last_steps",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of the steps at the end that sample the target prompt as usual (n_min), for "
                    "larger changes of style. 0 in the paper's main experiments.",
                ),
                io.Int.Input(
                    "averages",
                    default=1,
                    min=1,
                    max=16,
                    tooltip="Noise samples per step (n_avg). 1 in the paper; more are smoother and slower.",
                ),
            ],
            outputs=[io.Sampler.Output("sampler", tooltip=_SAMPLER)],
        )

    @classmethod
    @checked
    def execute(cls, skip: float, last_steps: float, averages: int) -> io.NodeOutput:
        return io.NodeOutput(flow_edit.flow_edit_sampler(skip, last_steps, averages))


class UniEditSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditUniEditSampler",
            display_name="Uni-Edit Sampler",
            category=_CATEGORY,
            search_aliases=["UniEdit-Flow", "Uni-Inv", "rectified flow", "velocity fusion"],
            description=(
                "Edits an image where the target prompt differs from the source prompt (Jiao et al. 2025): inverts a "
                "part of the steps, then samples with a velocity fused from both prompts. 15 steps in the published "
                "code, for flow models and Stable Diffusion XL."
            ),
            inputs=[
                io.Float.Input(
                    "alpha",
                    default=uni_edit.ALPHA,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of the steps that are inverted and sampled: larger changes more. 0.6 in the "
                    "published code.",
                ),
                io.Float.Input(
                    "omega",
                    default=uni_edit.OMEGA,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Strength of the edit. 5 in the published code.",
                ),
            ],
            outputs=[io.Sampler.Output("sampler", tooltip=_SAMPLER)],
        )

    @classmethod
    @checked
    def execute(cls, alpha: float, omega: float) -> io.NodeOutput:
        return io.NodeOutput(uni_edit.uni_edit_sampler(alpha, omega))


class DirectInversionSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditDirectInversionSampler",
            display_name="Direct Inversion Sampler",
            category="inversion",
            search_aliases=["PnP inversion", "direct inversion", "exact reconstruction"],
            description=(
                "Samples an edit from an inversion and adds, at each step, how far the source prompt drifts from it "
                "(after Ju et al. 2024). The source prompt returns the image exactly at any guidance scale, without "
                "optimization; also on models with distilled guidance."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model used for the inversion."),
                Inversion.Input("inversion", tooltip="Inversion from Noise Inversion."),
            ],
            outputs=[
                io.Sampler.Output("sampler", tooltip=_SAMPLER),
                io.Sigmas.Output("sigmas", tooltip="Sigmas of the inversion."),
                io.Noise.Output("noise", tooltip="Noise of the inversion."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, model: Any, inversion: InversionData) -> io.NodeOutput:
        sampler = direct_inversion_sampler(model, inversion)
        return io.NodeOutput(sampler, inversion.sigmas.clone(), InvertedNoise(model, inversion))


NODES: list[type[io.ComfyNode]] = [SourceTargetGuider, FlowEditSampler, UniEditSampler, DirectInversionSampler]
