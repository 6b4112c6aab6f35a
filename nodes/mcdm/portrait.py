"""Nodes that edit with a trained MCDM: conditioning, guidance and masks."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from comfy_api.latest import io

from ...attention.masks import blurred
from ...pipelines.inversion.inversion import Inversion as InversionData
from ...pipelines.lipe.identity_mask_blend import BlendSettings, identity_mask_blend
from ...pipelines.mcdm import edit_mask as edit_masks
from ...pipelines.mcdm import guidance as mcdm_guidance
from ...pipelines.mcdm import model as mcdms
from ...pipelines.shared.conditioning import Conditioning
from ...pipelines.shared.errors import for_console
from ...pipelines.shared.images import as_color
from ..idle import first_said, is_empty, joined, noise_mask_left_out, same_prompt
from ..saved_files import model_files, model_path
from ..sockets import (
    Inversion,
    at_image_size,
    checked,
    fraction_input,
    guidance_scale_input,
    latent_samples,
    mask_input,
    progress,
    schema,
    seed_input,
    show_text,
    steps_input,
)


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
    def validate_inputs(cls, file: str) -> bool | str:
        if file not in model_files():
            return for_console(f"file '{file}' no longer exists; choose another one, or train it again.")
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> float:
        return os.path.getmtime(model_path(file)) if file in model_files() else 0.0

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


class MCDMEditMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = edit_masks.EditMaskSettings()
        return schema(
            node_id="IdentityEditMCDMEditMask",
            display_name="MCDM Edit Mask",
            category="masks",
            search_aliases=["DiffEdit", "automatic mask", "find mask", "edit region"],
            advanced=["steps", "noise_steps", "seeds"],
            description=(
                "Finds the region that an edit changes: where the model's noise predictions for the "
                "target prompt and the source prompt differ (Chen et al. 2024, section 3.4). With an ordinary "
                "checkpoint this is DiffEdit's mask (Couairon et al. 2023)."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A trained MCDM, or any Stable Diffusion 1.x, 2.x or XL model."),
                io.Conditioning.Input(
                    "target", tooltip="Prompt for the edited image: positive of MCDM Conditioner, or CLIP Text Encode."
                ),
                io.Conditioning.Input(
                    "source", tooltip="Prompt for the source image: source of MCDM Conditioner, or CLIP Text Encode."
                ),
                io.Latent.Input("latent", tooltip="Latent of the source image, from MCDM Conditioner or VAE Encode."),
                steps_input(
                    default.steps,
                    1000,
                    "Steps of the schedule in which noise_steps counts. 20 in Chen et al. 2024 (supplement 1.3).",
                ),
                io.Int.Input(
                    "noise_steps",
                    default=default.noise_steps,
                    min=1,
                    max=1000,
                    tooltip="Steps of noise added to the image. 10 of 20 in Chen et al. 2024 (supplement 1.3), "
                    "half of the schedule as in DiffEdit.",
                ),
                io.Int.Input(
                    "seeds",
                    default=default.seeds,
                    min=1,
                    max=1000,
                    tooltip="Number of noise samples over which the difference is averaged; each takes two model "
                    "calls. 10 in Chen et al. 2024 and in DiffEdit.",
                ),
                io.Float.Input(
                    "outliers",
                    default=default.outliers,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Outlier limit: differences above this multiple of their mean are clipped. 0, as in Chen "
                    "et al. 2024, disables it; 3 in diffusers' DiffEdit.",
                ),
                io.Int.Input(
                    "kernel",
                    default=default.kernel,
                    min=1,
                    max=101,
                    tooltip="Gaussian blur kernel size in latent pixels, odd. 5 in Chen et al. 2024 (supplement "
                    "1.3); 1 disables the blur.",
                ),
                fraction_input(
                    "threshold",
                    default.threshold,
                    "Mask threshold. Higher gives a smaller mask. 0.35 for expressions and 0.2 for costumes "
                    "in Chen et al. 2024, 0.5 in DiffEdit.",
                ),
                seed_input("Seed of the first noise sample; the others use the following seeds."),
                io.Float.Input(
                    "soft_border",
                    default=0.0,
                    min=0.0,
                    max=256.0,
                    step=0.5,
                    optional=True,
                    tooltip="Soft border: standard deviation in pixels of a Gaussian blur of the mask, for pasting "
                    "without seams. 0 keeps the mask 0 or 1, as in Chen et al. 2024.",
                ),
            ],
            outputs=[
                io.Mask.Output(
                    "mask", tooltip="1 where the edit may change the image, at image size; in between on a soft border."
                ),
                io.Mask.Output(
                    "contrast", tooltip="The map before thresholding, 0 to 1; use it to choose a threshold."
                ),
                io.String.Output(
                    "report", tooltip="Model calls, share of the image covered by the mask, and warnings."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        target: Conditioning,
        source: Conditioning,
        latent: dict[str, Any],
        steps: int,
        noise_steps: int,
        seeds: int,
        outliers: float,
        kernel: int,
        threshold: float,
        seed: int,
        soft_border: float = 0.0,
    ) -> io.NodeOutput:
        result = edit_masks.edit_mask(
            model,
            target,
            source,
            latent_samples(latent, "The latent"),
            edit_masks.EditMaskSettings(steps, noise_steps, seeds, outliers, kernel, threshold),
            seed=seed,
            callback=progress(model, seeds),
        )
        shares = ", ".join(f"{share:.0%}" for share in result.mask.mean(dim=(1, 2)).tolist())
        text = f"{result.evaluations} model calls; the mask covers {shares} of the image."
        mask = at_image_size(result.mask)
        if soft_border > 0.0:
            mask = blurred(mask, soft_border, math.ceil(3.0 * soft_border), "replicate")
        return io.NodeOutput(
            mask,
            at_image_size(result.contrast),
            show_text(cls, text, joined(result.warning, noise_mask_left_out(latent))),
        )


class DiffEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditDiffEdit",
            display_name="DiffEdit",
            category="masks",
            search_aliases=["masked editing", "masked denoising", "inpaint from inversion"],
            description=(
                "Samples the target prompt from a DDIM inversion and restores the area outside the mask "
                "at every step (Couairon et al. 2023, section 3.2)."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model used for the inversion."),
                Inversion.Input(
                    "inversion",
                    tooltip="Inversion of the image, from Noise Inversion with an empty prompt and guidance scale 1.",
                ),
                io.Conditioning.Input("target", tooltip="Prompt that describes the edited image."),
                io.Conditioning.Input("negative", tooltip="Empty prompt, or a negative prompt."),
                mask_input("mask", "Mask of the region that may change, from MCDM Edit Mask or painted, of any size."),
                io.Float.Input(
                    "encoding_ratio",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of the inversion from which sampling starts. Higher edits more and preserves "
                    "less inside the mask. 0.5 in Couairon et al. 2023; 0.8 in diffusers.",
                ),
                guidance_scale_input(
                    7.5, least=1.0, tooltip="Guidance scale of the target prompt. 7.5 is usual for Stable Diffusion."
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "edited_latent", display_name="latent", tooltip="The edited latent; decode it with the VAE."
                ),
                io.String.Output("report", tooltip="Model calls and warnings."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        inversion: InversionData,
        target: Conditioning,
        negative: Conditioning,
        mask: torch.Tensor,
        encoding_ratio: float,
        guidance_scale: float,
    ) -> io.NodeOutput:
        result = identity_mask_blend(
            model,
            inversion,
            target,  # with masks, no source prompt is evaluated
            target,
            None,
            negative,
            guidance_scale=guidance_scale,
            settings=BlendSettings(skip=1.0 - encoding_ratio),
            source_mask=mask,
            target_mask=mask,
            callback=progress(model, inversion.steps),
        )
        share = float(result.source_mask.mean())
        text = f"{result.evaluations} model calls; the mask covers {share:.0%} of the image."
        shares = result.source_mask.mean(dim=(1, 2))
        unused = first_said(
            (
                bool((shares == 0).any()),
                "The mask is empty for an image, which is returned unchanged; connect one that is white where the "
                "image may change.",
            ),
            (
                bool((shares == 1).all()),
                "The mask covers the whole image, so nothing is restored; connect one that is black where the image "
                "must not change.",
            ),
        )
        return io.NodeOutput({"samples": result.latent}, show_text(cls, text, joined(unused, result.warning)))


NODES: list[type[io.ComfyNode]] = [MCDMConditioner, MCDMGuider, MCDMEditMask, DiffEdit]
