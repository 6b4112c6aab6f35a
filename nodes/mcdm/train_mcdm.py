"""Nodes that train an MCDM on image pairs, and its less common settings."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui

from ...pipelines.mcdm import model as mcdms
from ...pipelines.mcdm import train as train_mcdm
from ...pipelines.mcdm.encoded_pairs import pairs_in_folder, remove_encoded, with_mirrored
from ...pipelines.mcdm.train import MCDMSettings
from ...pipelines.shared.errors import IdentityEditError
from ...pipelines.training.loop import TrainingRun
from ..saved_files import check_name, model_files, model_path, new_path, next_path
from ..sockets import checked, choice_of, fraction_input, schema, seed_input, show_text, steps_input
from ..training import (
    first_and_last,
    learning_rate_input,
    settings_input,
    settings_of,
    steps_of,
    training_outputs,
    training_progress,
)

RUN_FOLDER = "mcdm"
NEW = "new"
WHOLE, UNET_ALONE = "whole checkpoint", "UNet alone"
FILE_DTYPE = "float16"
EXAMPLE_PREFIX = "checkpoints/mcdm"
Settings = io.Custom("MCDM_TRAINING_SETTINGS")
"""Less common settings of `pipelines.mcdm.train.MCDMSettings` and of the saved file, by name."""


class MCDMTrainingSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditMCDMTrainingSettings",
            display_name="MCDM Training Settings",
            category="portrait",
            search_aliases=["condition dropout", "identity pairs", "image tokens", "UNet alone", "file precision"],
            description="Less common settings of Train MCDM: dropped conditions, image tokens, and what the file "
            "contains. Without this node the defaults shown here are used.",
            inputs=[
                fraction_input(
                    "identity_share",
                    MCDMSettings.identity_share,
                    "Share of the pairs whose source is also the target, so that the model learns to "
                    "reconstruct; masks need it. 0.05 in Chen et al. 2024 (section 3.3).",
                ),
                fraction_input(
                    "dropout",
                    MCDMSettings.dropout,
                    "Probability that one, two or all three conditions of a pair are dropped, for "
                    "classifier-free guidance. 0.2 in Chen et al. 2024 (section 3.3).",
                ),
                io.Int.Input(
                    "image_tokens",
                    default=mcdms.IMAGE_TOKENS,
                    min=0,
                    max=4096,
                    tooltip="Number of image embedding tokens. With 77, the length of a prompt, all guidance terms "
                    "fit into one model call. 0 uses all tokens of the image encoder, as Karras et al. 2023 do.",
                ),
                io.Combo.Input(
                    "conditions",
                    options=list(mcdms.CONDITIONS),
                    default=mcdms.ALL_CONDITIONS,
                    tooltip="Image conditions to train with, beside the prompt. 'image only' (embedding) and 'spatial "
                    "only' (latent) are the ablations of Chen et al. 2024 (section 4). MCDM Conditioner reads the "
                    "choice from the file.",
                ),
                io.Combo.Input(
                    "file_contents",
                    options=[WHOLE, UNET_ALONE],
                    default=WHOLE,
                    tooltip="Contents of the saved file. A whole checkpoint is for Load Checkpoint; the UNet alone "
                    "is for Load Diffusion Model: start the file name prefix in Train MCDM with diffusion_models.",
                ),
                io.Combo.Input(
                    "file_dtype",
                    options=list(mcdms.FILE_DTYPES),
                    default=FILE_DTYPE,
                    tooltip="Precision of the saved weights. float16, as in Stable Diffusion checkpoints.",
                ),
            ],
            outputs=[
                Settings.Output("mcdm_settings", display_name="MCDM settings", tooltip="The settings, for Train MCDM.")
            ],
        )

    @classmethod
    @checked
    def execute(cls, **settings: Any) -> io.NodeOutput:
        choice_of(mcdms.CONDITIONS, settings["conditions"], "conditions")
        choice_of(mcdms.FILE_DTYPES, settings["file_dtype"], "file_dtype")
        return io.NodeOutput(settings)


class TrainMCDM(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditTrainMCDM",
            display_name="Train MCDM",
            category="portrait",
            search_aliases=["multi-conditioned diffusion model", "InstructPix2Pix", "train edit model", "pairs"],
            advanced=["image_embedding"],
            description=(
                "Trains an image editing model on generated pairs: all weights of the UNet, which also "
                "receives the source image, and the image embedding (Chen et al. 2024, section 3.3). Load "
                "Checkpoint reads the file."
            ),
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The Stable Diffusion 1.x, 2.x or XL model that generated the pairs, or a previously "
                    "trained MCDM.",
                ),
                io.Clip.Input("clip", tooltip="The text encoders of the same checkpoint; they are not trained."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.ClipVision.Input(
                    "clip_vision", tooltip="CLIP image encoder, from Load CLIP Vision. Editing needs the same one."
                ),
                io.String.Input(
                    "folder",
                    default="pairs",
                    tooltip="Folder of the pairs: a path, or a name below the output or input folder. It must "
                    "contain the index that Generate Pairs writes.",
                ),
                steps_input(
                    MCDMSettings.steps,
                    10_000_000,
                    "Training steps. 200000 in Chen et al. 2024 (supplement 1.2): three days on an A100.",
                ),
                learning_rate_input(
                    MCDMSettings.learning_rate,
                    "AdamW's learning rate. 0.000005 in Chen et al. 2024 (supplement 1.2).",
                    step=1e-6,
                ),
                io.Boolean.Input(
                    "mirror",
                    default=False,
                    tooltip="Mirroring. Also trains on every pair mirrored: twice the pairs, for edits and prompts "
                    "without left and right. Chen et al. 2024 do not report it.",
                ),
                io.Combo.Input(
                    "image_embedding",
                    options=[NEW, *model_files()],
                    default=NEW,
                    tooltip="Initial weights of the image embedding: new, or those in the file of a previously "
                    "trained MCDM, to continue its training. Press R to refresh the list.",
                ),
                seed_input("Seed for all randomness: pair order, timesteps, noise and dropped conditions."),
                io.String.Input(
                    "filename_prefix",
                    default=EXAMPLE_PREFIX,
                    tooltip="Folder and start of the file name, below the output folder. Load Checkpoint lists the "
                    "files in 'checkpoints' there.",
                ),
                Settings.Input(
                    "mcdm_settings",
                    optional=True,
                    tooltip="Dropped conditions, image tokens, and contents and precision of the file, from MCDM "
                    "Training Settings. Not connected: the defaults.",
                ),
                settings_input(),
            ],
            outputs=[
                io.Model.Output("edit_model", display_name="model", tooltip="The trained model, for MCDM Guider."),
                *training_outputs("the model", "Sample edits in order, of the first validation pair if there is one."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        clip_vision: Any,
        folder: str,
        steps: int,
        learning_rate: float,
        mirror: bool,
        image_embedding: str,
        seed: int,
        filename_prefix: str,
        mcdm_settings: dict[str, Any] | None = None,
        training_settings: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        from comfy.utils import ProgressBar

        next_path(filename_prefix, EXAMPLE_PREFIX)  # fail before a long training rather than after it
        chosen = {"file_contents": WHOLE, "file_dtype": FILE_DTYPE, **(mcdm_settings or {})}
        file_contents, file_dtype = chosen.pop("file_contents"), chosen.pop("file_dtype")
        pairs, held_out = pairs_in_folder(find_folder(folder))
        if mirror:
            pairs = with_mirrored(pairs)
        run_folder = os.path.join(folder_paths.get_output_directory(), RUN_FOLDER)
        bar = ProgressBar(len(pairs))
        trained, run = train_mcdm.train_mcdm(
            model,
            clip,
            vae,
            clip_vision,
            pairs,
            MCDMSettings(
                steps=steps, learning_rate=learning_rate, seed=seed, **chosen, **settings_of(training_settings, 1000)
            ),
            run_folder,
            start=None if image_embedding == NEW else mcdms.load_mcdm(model_path(image_embedding)),
            sample_pair=held_out[0] if held_out else None,
            progress=training_progress(model, steps),
            encoding_progress=lambda done, total: bar.update_absolute(done, total),
        )
        of_clip, of_vae = (clip, vae) if file_contents == WHOLE else (None, None)
        with new_path(filename_prefix, EXAMPLE_PREFIX) as path:
            mcdms.save_mcdm(trained.mcdm, path, trained.model, of_clip, of_vae, trained.weights, file_dtype)
        with contextlib.suppress(OSError):  # the saved file replaces it
            os.remove(train_mcdm.checkpoint_path(run_folder, trained))
        remove_encoded(trained.encoded)
        samples = torch.cat([vae.decode(latent) for _, latent in run.samples])
        text = show_text(cls, _training_report(trained, run, path))
        return io.NodeOutput(
            trained.model, samples, {"loss": run.losses}, path, text, ui=ui.PreviewImage(samples, cls=cls)
        )


def find_folder(name: str) -> Path:
    """A folder by its absolute path, or by its name below the output or input folder.

    Raises:
        IdentityEditError: when it does not exist.
    """
    check_name(name, "folder")
    candidates = [Path(name)] if os.path.isabs(name) else []
    candidates += [
        Path(root) / name for root in (folder_paths.get_output_directory(), folder_paths.get_input_directory())
    ]
    for candidate in candidates:
        if name.strip() and candidate.is_dir():
            return candidate
    raise IdentityEditError(
        f"The folder '{name}' is neither a path nor below the output or input folder; write the folder of the pairs."
    )


def _training_report(trained: train_mcdm.TrainedMCDM, run: TrainingRun, path: str) -> str:
    count = sum(tensor.numel() for tensor in trained.weights.values())
    return (
        f"MCDM: {steps_of(run)} on {len(trained.encoded)} pairs, {count / 1e6:.1f} million weights.\n"
        f"Loss: {first_and_last(run.losses)}.\n"
        f"Saved as {path}"
    )


NODES: list[type[io.ComfyNode]] = [TrainMCDM, MCDMTrainingSettings]
