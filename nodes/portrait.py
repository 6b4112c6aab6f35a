"""Nodes of portrait editing: a model that learns edits from pairs, what it is told, its guidance and its masks."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..pipelines import edit_mask as edit_masks
from ..pipelines import mcdm as mcdms
from ..pipelines import mcdm_guidance, train_mcdm
from ..pipelines.conditioning import Conditioning
from ..pipelines.encoded_pairs import pairs_in_folder, remove_encoded
from ..pipelines.engine.trainable import BFLOAT16, FLOAT32
from ..pipelines.errors import IdentityEditError
from ..pipelines.identity_mask_blend import identity_mask_blend
from ..pipelines.inversion import Inversion as InversionData
from ..pipelines.training import TrainingRun, TrainingSettings
from .saved_files import next_path
from .sockets import Inversion, at_picture_size, latent_samples, progress, schema, show_text
from .training import LossMap, training_progress

RUN_FOLDER = "mcdm"
WHOLE, UNET_ALONE = "whole checkpoint", "UNet alone"
EXAMPLE_PREFIX = "checkpoints/mcdm"
_DIFFUSION_MODELS = "diffusion_models"
_FOLDER_MARK = f" [{_DIFFUSION_MODELS}]"


class TrainMCDM(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditTrainMCDM",
            display_name="Train MCDM",
            category="portrait",
            search_aliases=["InstructPix2Pix", "train edit model", "multi-conditioned diffusion model", "pairs"],
            description=(
                "Learns edits from generated pairs: all weights of the UNet, which then also sees the source picture, "
                "and the image embedding (Chen et al. 2024, section 3.3). Load Checkpoint reads the file."
            ),
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The Stable Diffusion 1.x, 2.x or XL model that made the pairs, or one trained before.",
                ),
                io.Clip.Input("clip", tooltip="The text encoders of the same checkpoint; they are not trained."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.ClipVision.Input(
                    "clip_vision", tooltip="CLIP's image encoder, from Load CLIP Vision; the edits need the same one."
                ),
                io.String.Input(
                    "folder",
                    default="pairs",
                    tooltip="The folder of the pairs: a path, or a name below the output or the input folder. It holds "
                    "the index that Generate Pairs writes.",
                ),
                io.Int.Input(
                    "steps",
                    default=train_mcdm.STEPS,
                    min=1,
                    max=10_000_000,
                    tooltip="Training steps. 200000 in Chen et al. 2024 (supplement, 1.2): three days on an A100.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=train_mcdm.LEARNING_RATE,
                    min=0.00000001,
                    max=0.1,
                    step=0.000001,
                    round=0.00000001,
                    tooltip="AdamW's learning rate. 0.000005 in Chen et al. 2024 (supplement, 1.2).",
                ),
                io.Int.Input(
                    "batch_size",
                    default=train_mcdm.BATCH_SIZE,
                    min=1,
                    max=1024,
                    tooltip="Pairs of a batch. 4 in Chen et al. 2024 (supplement, 1.2).",
                ),
                io.Int.Input(
                    "gradient_accumulation",
                    default=1,
                    min=1,
                    max=1024,
                    tooltip="Batches whose gradients are averaged for one step: a larger batch for the memory of a "
                    "small one. Chen et al. 2024 name none.",
                ),
                io.Float.Input(
                    "identity_share",
                    default=train_mcdm.IDENTITY_SHARE,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the pairs in which the source is also the target, so that the model learns to "
                    "reconstruct; masks need it. 0.05 in Chen et al. 2024 (section 3.3).",
                ),
                io.Float.Input(
                    "dropout",
                    default=train_mcdm.DROPOUT,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Probability with which a pair loses one, two or all three of its conditions, for the "
                    "guidance. 0.2 in Chen et al. 2024 (section 3.3).",
                ),
                io.Int.Input(
                    "image_tokens",
                    default=mcdms.IMAGE_TOKENS,
                    min=0,
                    max=4096,
                    tooltip="Tokens of the image embedding. 77, a text's length: all terms of the guidance then fit "
                    "into one call. 0 takes as many as CLIP vision gives, as Karras et al. 2023 do.",
                ),
                io.Float.Input(
                    "ema_decay",
                    default=train_mcdm.EMA_DECAY,
                    min=0.0,
                    max=0.99999,
                    step=0.0001,
                    round=0.00001,
                    tooltip="Decay of the weights' moving average, which is what is saved. 0.9999 as Stable Diffusion "
                    "was trained; 0.99 to 0.999 for short runs, 0 for none.",
                ),
                io.Combo.Input(
                    "precision",
                    options=[BFLOAT16, FLOAT32],
                    default=BFLOAT16,
                    tooltip="In what the networks compute; the trained weights are kept in float32 either way. Choose "
                    "float32 on a CPU, where bfloat16 is no faster.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=True,
                    tooltip="Gradient checkpointing: on needs a fraction of the memory and about a third more time, "
                    "for the same result.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of all draws: the order of the pairs, timesteps, noise and what is dropped.",
                ),
                io.Int.Input(
                    "sample_every",
                    default=1000,
                    min=0,
                    max=1_000_000,
                    tooltip="Steps between the sample edits that show how far it is. There is one at the end in any "
                    "case; 0 makes no others.",
                ),
                io.Int.Input(
                    "checkpoint_every",
                    default=1000,
                    min=0,
                    max=1_000_000,
                    tooltip="Steps between checkpoints, from which a cancelled or killed run goes on when it is queued "
                    "again with the same settings. Each is four times as large as the UNet in float32. 0 writes none.",
                ),
                io.Combo.Input(
                    "file_contents",
                    options=[WHOLE, UNET_ALONE],
                    default=WHOLE,
                    tooltip="A whole checkpoint is for Load Checkpoint; the UNet alone is for Load Diffusion Model, "
                    "with a filename_prefix that begins with diffusion_models.",
                ),
                io.Combo.Input(
                    "file_dtype",
                    options=list(mcdms.FILE_DTYPES),
                    default="float16",
                    tooltip="In what the file keeps the weights. float16, as checkpoints of Stable Diffusion do.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default=EXAMPLE_PREFIX,
                    tooltip="Folder and beginning of the file name, below the output folder. Load Checkpoint lists "
                    "what is in 'checkpoints' there.",
                ),
            ],
            outputs=[
                io.Model.Output("edit_model", display_name="model", tooltip="The trained model, for MCDM Guider."),
                io.Image.Output(
                    "samples",
                    display_name="samples",
                    tooltip="The sample edits in their order: of the first pair that is not trained on, where there is "
                    "one.",
                ),
                LossMap.Output("loss", display_name="loss", tooltip="The loss of every step, for Plot Loss Graph."),
                io.String.Output("file", display_name="file", tooltip="Where the model was saved."),
                io.String.Output(
                    "report", display_name="report", tooltip="What was trained, and the losses it began and ended with."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        clip_vision: Any,
        folder: str,
        steps: int,
        learning_rate: float,
        batch_size: int,
        gradient_accumulation: int,
        identity_share: float,
        dropout: float,
        image_tokens: int,
        ema_decay: float,
        precision: str,
        checkpointing: bool,
        seed: int,
        sample_every: int,
        checkpoint_every: int,
        file_contents: str,
        file_dtype: str,
        filename_prefix: str,
    ) -> io.NodeOutput:
        from comfy.utils import ProgressBar

        next_path(filename_prefix, EXAMPLE_PREFIX)  # better before a long training than after it
        pairs, held_out = pairs_in_folder(find_folder(folder))
        run_folder = os.path.join(folder_paths.get_output_directory(), RUN_FOLDER)
        bar = ProgressBar(len(pairs))
        trained, run = train_mcdm.train_mcdm(
            model,
            clip,
            vae,
            clip_vision,
            pairs,
            train_mcdm.MCDMSettings(
                batch_size=batch_size,
                identity_share=identity_share,
                dropout=dropout,
                image_tokens=image_tokens,
                precision=precision,
                checkpointing=checkpointing,
            ),
            TrainingSettings(
                steps=steps,
                learning_rate=learning_rate,
                weight_decay=train_mcdm.WEIGHT_DECAY,
                accumulation=gradient_accumulation,
                ema_decay=ema_decay,
                seed=seed,
                checkpoint_every=checkpoint_every,
                sample_every=sample_every,
            ),
            run_folder,
            sample_pair=held_out[0] if held_out else None,
            progress=training_progress(model, steps),
            encoding_progress=lambda done, total: bar.update_absolute(done, total),
        )
        path = next_path(filename_prefix, EXAMPLE_PREFIX)
        of_clip, of_vae = (clip, vae) if file_contents == WHOLE else (None, None)
        mcdms.save_mcdm(trained.mcdm, path, trained.model, of_clip, of_vae, trained.weights, file_dtype)
        with contextlib.suppress(OSError):  # the file holds its result now
            os.remove(train_mcdm.checkpoint_path(run_folder, trained))
        remove_encoded(trained.encoded)
        samples = torch.cat([vae.decode(latent) for _, latent in run.samples])
        text = show_text(cls, _training_report(trained, run, path))
        return io.NodeOutput(
            trained.model, samples, {"loss": run.losses}, path, text, ui=ui.PreviewImage(samples, cls=cls)
        )


def find_folder(name: str) -> Path:
    """A folder that a user names: a path, or a name below the output or the input folder.

    Raises:
        IdentityEditError: when there is none.
    """
    candidates = [Path(name)] if os.path.isabs(name) else []
    candidates += [
        Path(root) / name for root in (folder_paths.get_output_directory(), folder_paths.get_input_directory())
    ]
    for candidate in candidates:
        if name.strip() and candidate.is_dir():
            return candidate
    raise IdentityEditError(
        f"The folder '{name}' is neither a path nor below the output or the input folder; write that of the pairs."
    )


def _training_report(trained: train_mcdm.TrainedMCDM, run: TrainingRun, path: str) -> str:
    count = sum(tensor.numel() for tensor in trained.weights.values())
    few = max(1, min(50, len(run.losses) // 2))
    began = f", of which {run.resumed_at} were read from a checkpoint" if run.resumed_at else ""
    first, last = (sum(part) / len(part) for part in (run.losses[:few], run.losses[-few:]))
    return (
        f"MCDM: {len(run.losses)} steps{began} on {len(trained.encoded)} pairs, {count / 1e6:.1f} million weights.\n"
        f"Loss: {first:.4f} over the first {few} steps, {last:.4f} over the last {few}.\n"
        f"Saved as {path}"
    )


class MCDMConditioner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditMCDMConditioner",
            display_name="MCDM Conditioner",
            category="portrait",
            search_aliases=["InstructPix2Pix conditioning", "image embedding", "source picture", "edit prompt"],
            description=(
                "Shows an MCDM the source picture and the prompts: the picture's latent for the further input "
                "channels, the image embedding behind the words (Chen et al. 2024, section 3.3)."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The trained model, from Load Checkpoint with the same file."),
                io.Clip.Input("clip", tooltip="The text encoders of the same checkpoint."),
                io.ClipVision.Input(
                    "clip_vision", tooltip="The CLIP vision with which the model was trained; another one is refused."
                ),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Image.Input("picture", tooltip="The source picture, or a batch of them."),
                io.Combo.Input(
                    "file",
                    options=_model_files(),
                    tooltip="The file that the model comes from; it also holds the image embedding. Press R to list "
                    "new ones.",
                ),
                io.String.Input(
                    "target_prompt",
                    default="",
                    multiline=True,
                    tooltip="What the edited picture shows, in the words of the pairs: in Chen et al. 2024 such as "
                    "'a woman, laughing'.",
                ),
                io.String.Input(
                    "source_prompt",
                    default="",
                    multiline=True,
                    tooltip="What the source picture shows, in the words of the pairs: in Chen et al. 2024 such as "
                    "'a woman, neutral expression'. Masks need it.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="The target prompt with the source picture."
                ),
                io.Conditioning.Output(
                    "negative", display_name="negative", tooltip="The empty prompt with the source picture."
                ),
                io.Conditioning.Output(
                    "source", display_name="source", tooltip="The source prompt with the source picture."
                ),
                io.Latent.Output(
                    "latent", display_name="latent", tooltip="The source picture's latent, for MCDM Edit Mask."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="How the model was trained, and whether it fits."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        if file not in _model_files():
            return f"file '{file}' is not there any more; choose another one, or train it again."
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> float:
        return os.path.getmtime(_model_path(file)) if file in _model_files() else 0.0

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        clip_vision: Any,
        vae: Any,
        picture: torch.Tensor,
        file: str,
        target_prompt: str,
        source_prompt: str,
    ) -> io.NodeOutput:
        made = mcdms.load_mcdm(_model_path(file))
        warning = mcdms.check_mcdm(made, model)
        seen = mcdms.see_pictures(made, model, clip_vision, vae, picture)
        positive, negative, source = (
            mcdms.with_pictures(clip.encode_from_tokens_scheduled(clip.tokenize(text)), seen)
            for text in (target_prompt, "", source_prompt)
        )
        facts = made.training
        text = f"MCDM: {facts.get('steps', 0)} steps on {facts.get('pairs', 0)} pairs."
        known = facts.get("prompts") or []
        if known:
            text += f" It knows {len(known)} prompts, such as '{known[0]}'."
        return io.NodeOutput(positive, negative, source, {"samples": seen.latent}, show_text(cls, text, warning))


def _model_files() -> list[str]:
    """Names of all checkpoints, and of all diffusion models with a mark behind them."""
    models = [f"{name}{_FOLDER_MARK}" for name in folder_paths.get_filename_list(_DIFFUSION_MODELS)]
    return [name for name in folder_paths.get_filename_list("checkpoints") + models if ".safetensors" in name]


def _model_path(file: str) -> str:
    if file.endswith(_FOLDER_MARK):
        return folder_paths.get_full_path_or_raise(_DIFFUSION_MODELS, file.removesuffix(_FOLDER_MARK))
    return folder_paths.get_full_path_or_raise("checkpoints", file)


class MCDMGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        scales = mcdm_guidance.GuidanceScales()
        scale: dict[str, Any] = {"min": 0.0, "max": 30.0, "step": 0.1}
        return schema(
            node_id="IdentityEditMCDMGuider",
            display_name="MCDM Guider",
            category="portrait",
            search_aliases=["guider", "DualCFGGuider", "InstructPix2Pix guidance", "mask-guided editing"],
            description=(
                "Guidance of an MCDM by its three conditions, and with a mask towards the target prompt inside of it "
                "and the source prompt outside (Chen et al. 2024, eqs. 1 and 3), for SamplerCustomAdvanced."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The trained model, from Load Checkpoint or Train MCDM."),
                io.Conditioning.Input("positive", tooltip="From MCDM Conditioner: the target prompt."),
                io.Conditioning.Input("negative", tooltip="From MCDM Conditioner: the empty prompt."),
                io.Float.Input(
                    "image_scale",
                    default=scales.image,
                    tooltip="Scale s1, of the image embedding. 3 in Chen et al. 2024 (supplement, 1.3). As long as it "
                    "equals spatial_scale, a step needs an evaluation less.",
                    **scale,
                ),
                io.Float.Input(
                    "spatial_scale",
                    default=scales.spatial,
                    tooltip="Scale s2, of the source picture's latent: more keeps more of the picture. 3 in Chen et "
                    "al. 2024 (supplement, 1.3).",
                    **scale,
                ),
                io.Float.Input(
                    "text_scale",
                    default=scales.text,
                    tooltip="Scale s3, of the prompt: more edits more. 5 in Chen et al. 2024 (supplement, 1.3).",
                    **scale,
                ),
                io.Conditioning.Input(
                    "source",
                    optional=True,
                    tooltip="From MCDM Conditioner: the source prompt, which holds outside of the mask.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the edit may be, from MCDM Edit Mask or painted; it needs source. Without one the "
                    "edit may be everywhere.",
                ),
            ],
            outputs=[
                io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced."),
                io.String.Output("report", display_name="report", tooltip="Network evaluations of a step."),
            ],
        )

    @classmethod
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
        return io.NodeOutput(guider, show_text(cls, f"{count} network evaluations a step."))


class MCDMEditMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = edit_masks.EditMaskSettings()
        return schema(
            node_id="IdentityEditMCDMEditMask",
            display_name="MCDM Edit Mask",
            category="portrait",
            search_aliases=["DiffEdit", "automatic mask", "find mask", "edit region"],
            description=(
                "Finds what an edit changes: where the model says something else for the target prompt than for the "
                "source prompt (Chen et al. 2024, section 3.4). With an ordinary checkpoint it is DiffEdit's mask "
                "(Couairon et al. 2023)."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A trained MCDM, or any Stable Diffusion 1.x, 2.x or XL model."),
                io.Conditioning.Input(
                    "target", tooltip="The edited picture: positive of MCDM Conditioner, or CLIP Text Encode."
                ),
                io.Conditioning.Input(
                    "source", tooltip="The picture as it is: source of MCDM Conditioner, or CLIP Text Encode."
                ),
                io.Latent.Input("latent", tooltip="The picture, from MCDM Conditioner or VAE Encode."),
                io.Int.Input(
                    "steps",
                    default=default.steps,
                    min=1,
                    max=1000,
                    tooltip="Of the schedule that noise_steps counts in. 20 in Chen et al. 2024 (supplement, 1.3).",
                ),
                io.Int.Input(
                    "noise_steps",
                    default=default.noise_steps,
                    min=1,
                    max=1000,
                    tooltip="Steps of noise on the picture. 10 of 20 in Chen et al. 2024 (supplement, 1.3), half the "
                    "way as in DiffEdit.",
                ),
                io.Int.Input(
                    "seeds",
                    default=default.seeds,
                    min=1,
                    max=1000,
                    tooltip="Draws of noise, over which the difference is averaged; each costs two network "
                    "evaluations. 10 in Chen et al. 2024 and in DiffEdit.",
                ),
                io.Float.Input(
                    "outliers",
                    default=default.outliers,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Differences above this many times their mean are cut. 0, as in Chen et al. 2024, cuts "
                    "none; 3 in diffusers' DiffEdit.",
                ),
                io.Int.Input(
                    "kernel",
                    default=default.kernel,
                    min=1,
                    max=101,
                    tooltip="Size of the Gaussian blur in cells of the latent, odd. 5 in Chen et al. 2024 "
                    "(supplement, 1.3); 1 does not blur.",
                ),
                io.Float.Input(
                    "threshold",
                    default=default.threshold,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Above it the edit may be: a larger one gives a smaller mask. 0.35 for expressions and 0.2 "
                    "for costumes in Chen et al. 2024, 0.5 in DiffEdit.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the first draw of noise; the others are the following ones.",
                ),
            ],
            outputs=[
                io.Mask.Output("mask", display_name="mask", tooltip="1 where the edit may be, of the picture's size."),
                io.Mask.Output(
                    "contrast",
                    display_name="contrast",
                    tooltip="What the threshold cuts, 0 to 1: look at it to choose a threshold.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="Network evaluations, the mask's share, and a warning."
                ),
            ],
        )

    @classmethod
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
    ) -> io.NodeOutput:
        found = edit_masks.edit_mask(
            model,
            target,
            source,
            latent_samples(latent, "The latent"),
            edit_masks.EditMaskSettings(steps, noise_steps, seeds, outliers, kernel, threshold),
            seed=seed,
            callback=progress(model, seeds),
        )
        shares = ", ".join(f"{share:.0%}" for share in found.mask.mean(dim=(1, 2)).tolist())
        text = f"{found.evaluations} network evaluations; the mask covers {shares} of the picture."
        return io.NodeOutput(
            at_picture_size(found.mask), at_picture_size(found.contrast), show_text(cls, text, found.warning)
        )


class DiffEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditDiffEdit",
            display_name="DiffEdit",
            category="portrait",
            search_aliases=["masked editing", "masked denoising", "inpaint from inversion"],
            description=(
                "Samples the target prompt from a DDIM inversion, and in every step puts back what is outside of the "
                "mask (Couairon et al. 2023, section 3.2)."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that made the inversion."),
                Inversion.Input(
                    "inversion", tooltip="Of the picture, from DDIM Inversion: an empty prompt, guidance scale 1."
                ),
                io.Conditioning.Input("target", tooltip="The prompt that describes the edited picture."),
                io.Conditioning.Input("negative", tooltip="The empty prompt, or what is not to be seen."),
                io.Mask.Input("mask", tooltip="Where the edit may be, from MCDM Edit Mask or painted."),
                io.Float.Input(
                    "encoding_ratio",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="How far into the inversion it goes back before it samples: more edits more and keeps less "
                    "of the masked part. 0.5 in Couairon et al. 2023; 0.8 in diffusers.",
                ),
                io.Float.Input(
                    "guidance_scale",
                    default=7.5,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Of the target prompt. 7.5, Stable Diffusion's usual one.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "edited_latent", display_name="latent", tooltip="The edited picture; decode it with the VAE."
                ),
                io.String.Output("report", display_name="report", tooltip="Network evaluations, and a warning."),
            ],
        )

    @classmethod
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
            target,  # with given masks no source prompt is evaluated
            target,
            None,
            negative,
            guidance_scale=guidance_scale,
            skip=1.0 - encoding_ratio,
            source_mask=mask,
            target_mask=mask,
            callback=progress(model, inversion.steps),
        )
        share = float(result.source_mask.mean())
        text = f"{result.evaluations} network evaluations; the mask covers {share:.0%} of the picture."
        return io.NodeOutput({"samples": result.latent}, show_text(cls, text, result.warning))


NODES: list[type[io.ComfyNode]] = [TrainMCDM, MCDMConditioner, MCDMGuider, MCDMEditMask, DiffEdit]
