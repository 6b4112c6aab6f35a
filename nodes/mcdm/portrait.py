"""Nodes that edit with a trained MCDM: conditioning and guidance."""

from __future__ import annotations

import os
from typing import Any

import torch
from comfy_api.latest import io

from ...pipelines.mcdm import guidance as mcdm_guidance
from ...pipelines.mcdm import model as mcdms
from ...pipelines.shared.conditioning import Conditioning
from ...pipelines.shared.errors import for_console
from ...pipelines.shared.images import as_color
from ..idle import first_said, is_empty, same_prompt
from ..saved_files import model_files, model_path
from ..sockets import checked, mask_input, schema, show_text


class MCDMConditioner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditMCDMConditioner",
            display_name="MCDM Conditioner",
            category="portrait",
            search_aliases=[
                "multi-conditioned diffusion model",
                "InstructPix2Pix",
                "image embedding",
                "source image",
                "edit prompt",
            ],
            description=(
                "Prepares the source image and the prompts for an MCDM: the image's latent for the "
                "additional input channels, and the image embedding appended to the text (Chen et al. 2024, "
                "section 3.3)."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The trained model, from Load Checkpoint with the same file."),
                io.Clip.Input("clip", tooltip="The text encoders of the same checkpoint."),
                io.ClipVision.Input(
                    "clip_vision", tooltip="The image encoder used in training; another one is refused."
                ),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Image.Input("image", tooltip="Source image, or a batch of them."),
                io.Combo.Input(
                    "file",
                    options=model_files(),
                    tooltip="File of the trained model, which also contains the image embedding. Press R to refresh "
                    "the list.",
                ),
                io.String.Input(
                    "target_prompt",
                    default="",
                    multiline=True,
                    tooltip="Prompt for the edited image, worded like the training pairs: in Chen et al. 2024 for "
                    "example 'a woman, laughing'.",
                ),
                io.String.Input(
                    "source_prompt",
                    default="",
                    multiline=True,
                    tooltip="Prompt for the source image, worded like the training pairs: in Chen et al. 2024 for "
                    "example 'a woman, neutral expression'. Needed for masks.",
                ),
                io.Combo.Input(
                    "conditions",
                    options=list(mcdms.CONDITIONS),
                    default=mcdms.ALL_CONDITIONS,
                    optional=True,
                    tooltip="Image conditions to use. 'image only' replaces the spatial condition by zeros; 'spatial "
                    "only' leaves out the image embedding. Conditions the model was not trained with are never used.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="The target prompt with the source image."),
                io.Conditioning.Output("negative", tooltip="The empty prompt with the source image."),
                io.Conditioning.Output("source", tooltip="The source prompt with the source image."),
                io.Latent.Output("latent", tooltip="The source image's latent, for MCDM Edit Mask."),
                io.String.Output(
                    "report", tooltip="Training of the model, and whether it matches the connected model."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        if file is not None and file not in model_files():
            return for_console(f"file '{file}' no longer exists; choose another one, or train it again.")
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None, **_: Any) -> float:
        return os.path.getmtime(model_path(file)) if file is not None and file in model_files() else 0.0

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        clip: Any,
        clip_vision: Any,
        vae: Any,
        image: torch.Tensor,
        file: str,
        target_prompt: str,
        source_prompt: str,
        conditions: str = mcdms.ALL_CONDITIONS,
    ) -> io.NodeOutput:
        mcdm = mcdms.load_mcdm(model_path(file))
        warning = mcdms.check_mcdm(mcdm, model)
        seen = mcdms.see_images(mcdm, model, clip_vision, vae, as_color(image, "image"))
        positive, negative, source = (
            mcdms.only_with(
                mcdms.with_images(clip.encode_from_tokens_scheduled(clip.tokenize(text)), seen), mcdm, conditions
            )
            for text in (target_prompt, "", source_prompt)
        )
        training = mcdm.training
        text = f"MCDM: {training.get('steps', 0)} steps on {training.get('pairs', 0)} pairs."
        prompts = training.get("prompts") or []
        if mcdms.trained_with(mcdm) != mcdms.ALL_CONDITIONS:
            text += f" It was trained with '{mcdms.trained_with(mcdm)}'."
        if prompts:
            text += f" It was trained on {len(prompts)} prompts, such as '{prompts[0]}'."
        return io.NodeOutput(positive, negative, source, {"samples": seen.latent}, show_text(cls, text, warning))


class MCDMGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        scales = mcdm_guidance.GuidanceScales()
        scale: dict[str, Any] = {"min": 0.0, "max": 30.0, "step": 0.1}
        return schema(
            node_id="IdentityEditMCDMGuider",
            display_name="MCDM Guider",
            category="portrait",
            search_aliases=[
                "multi-conditioned diffusion model",
                "DualCFGGuider",
                "InstructPix2Pix",
                "mask-guided editing",
            ],
            description=(
                "Guidance of an MCDM with a scale for each of its three conditions; with a mask, toward "
                "the target prompt inside and the source prompt outside (Chen et al. 2024, eq. 1 and 3). For "
                "SamplerCustomAdvanced."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The trained model, from Load Checkpoint or Train MCDM."),
                io.Conditioning.Input("positive", tooltip="Target prompt, from MCDM Conditioner."),
                io.Conditioning.Input("negative", tooltip="Empty prompt, from MCDM Conditioner."),
                io.Float.Input(
                    "image_scale",
                    default=scales.image,
                    tooltip="Scale s1, of the image embedding. 3 in Chen et al. 2024 (supplement 1.3). While it "
                    "equals spatial_scale, a step needs one model call fewer.",
                    **scale,
                ),
                io.Float.Input(
                    "spatial_scale",
                    default=scales.spatial,
                    tooltip="Scale s2, of the source image's latent. Higher preserves more of the image. 3 in Chen "
                    "et al. 2024 (supplement 1.3).",
                    **scale,
                ),
                io.Float.Input(
                    "text_scale",
                    default=scales.text,
                    tooltip="Scale s3, of the prompt. Higher edits more. 5 in Chen et al. 2024 (supplement 1.3).",
                    **scale,
                ),
                io.Conditioning.Input(
                    "source", optional=True, tooltip="Source prompt, from MCDM Conditioner; used outside the mask."
                ),
                mask_input(
                    "mask",
                    "Mask of the region that may change, from MCDM Edit Mask or painted, of any size; needs "
                    "source. Without a mask the whole image may change.",
                    optional=True,
                ),
            ],
            outputs=[
                io.Guider.Output("guider", tooltip="Guider for SamplerCustomAdvanced."),
                io.String.Output("report", tooltip="Number of model calls per step."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        positive: Conditioning,
        negative: Conditioning,
        image_scale: float,
        spatial_scale: float,
        text_scale: float,
        source: Conditioning | None = None,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        scales = mcdm_guidance.GuidanceScales(image_scale, spatial_scale, text_scale)
        guider = mcdm_guidance.mcdm_guider(model, positive, negative, scales, source, mask)
        count = scales.evaluations(masked=mask is not None)
        unused = first_said(
            (
                max(image_scale, spatial_scale, text_scale) == 0.0,
                "All scales are 0, so neither the image nor a prompt has an effect; raise them.",
            ),
            (text_scale == 0.0, "text_scale is 0, so the target prompt has no effect; raise it."),
            (is_empty(mask), "The mask is empty, so nothing is edited; connect another, or none."),
            (
                source is not None and same_prompt(source, positive),
                "source and positive are the same prompt, so nothing is edited; write a different target prompt.",
            ),
        )
        return io.NodeOutput(guider, show_text(cls, f"{count} model calls per step.", unused))


NODES: list[type[io.ComfyNode]] = [MCDMConditioner, MCDMGuider]
