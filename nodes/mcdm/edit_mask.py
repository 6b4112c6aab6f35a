"""Nodes that find the region of an edit, and edit inside it (DiffEdit)."""

from __future__ import annotations

import math
from typing import Any

import torch
from comfy_api.latest import io

from ...attention.masks import blurred
from ...pipelines.inversion.inversion import Inversion as InversionData
from ...pipelines.lipe.identity_mask_blend import BlendSettings, identity_mask_blend
from ...pipelines.mcdm import edit_mask as edit_masks
from ...pipelines.shared.conditioning import Conditioning
from ..idle import first_said, joined, noise_mask_left_out
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
                io.Model.Input("model", tooltip="A trained MCDM, or any Stable Diffusion or flow model."),
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
                    "half of the schedule as in DiffEdit. On flow models, noise_steps / steps is the noise level.",
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
                    "mask",
                    tooltip="Mask. 1 where the edit may change the image, at image size; in between on a soft border.",
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
        mask = at_image_size(result.mask, model)
        if soft_border > 0.0:
            mask = blurred(mask, soft_border, math.ceil(3.0 * soft_border), "replicate")
        return io.NodeOutput(
            mask,
            at_image_size(result.contrast, model),
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


NODES: list[type[io.ComfyNode]] = [MCDMEditMask, DiffEdit]
