"""Shared parts of the training nodes: their settings, inputs, outputs, progress with samples, checkpoints, reports."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io

from ..pipelines import engine
from ..pipelines.shared.files import atomic_write
from ..pipelines.training.loop import BFLOAT16, CONSTANT, FLOAT32, OPTIMIZERS, SCHEDULES, Progress, TrainingRun
from ..pipelines.training.weights import MOST_RANK, RANK, WEIGHTS
from .idle import first_said
from .saved_files import FILE_ENDING, new_path
from .sockets import checked, checkpointing_input, schema, show_warnings

LossMap = io.Custom("LOSS_MAP")
"""ComfyUI's socket of Train LoRA and Plot Loss Graph: {"loss": the loss of every step}."""
CHECKPOINT_FOLDER = "checkpoints"
MARK_ENDING = ".finished"
"""Of the text file that marks the checkpoints of a finished training."""
SEED_TOOLTIP = "Seed for all randomness: image order, timesteps and noise."


def checkpoint_inputs() -> list[Any]:
    """MODEL, CLIP and VAE of a checkpoint."""
    return [
        io.Model.Input("model", tooltip="A Stable Diffusion 1.x, 2.x or XL model (noise or v-prediction)."),
        io.Clip.Input("clip", tooltip="The text encoders of the same checkpoint."),
        io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
    ]


def learning_rate_input(default: float, tooltip: str, most: float = 0.1, step: float = 1e-5) -> io.Float.Input:
    """AdamW's learning rate; the widget rounds to a hundredth of its step."""
    least = round(step / 100, 8)
    return io.Float.Input(
        "learning_rate", default=default, min=least, max=most, step=step, round=least, tooltip=tooltip
    )


Settings = io.Custom("TRAINING_SETTINGS")
"""Settings by their names in `pipelines.training.loop.TrainingSettings`; those left at their default are absent."""
_DEFAULT = "default"


def settings_input() -> Any:
    return Settings.Input(
        "training_settings",
        optional=True,
        tooltip="Less common settings, from Training Settings: learning rate schedule, batch size, precision, sample "
        "images, checkpoints. Not connected: the defaults.",
    )


def settings_of(chosen: dict[str, Any] | None, every: int = 100, **defaults: Any) -> dict[str, Any]:
    """Arguments for a technique's settings: the node's defaults, replaced by those of Training Settings.

    Args:
        chosen: the value of `settings_input`, or None.
        every: default number of steps between checkpoints and between sample images.
        defaults: further defaults of the node.
    """
    defaults |= {"precision": BFLOAT16, "checkpointing": True, "sample_every": every, "checkpoint_every": every}
    return defaults | (chosen or {})


class TrainingSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditTrainingSettings",
            display_name="Training Settings",
            category="subject",
            search_aliases=[
                "learning rate schedule",
                "scheduler",
                "warmup",
                "EMA",
                "optimizer",
                "gradient accumulation",
            ],
            description="Less common settings of all training nodes. A training that it is not connected to uses the "
            "defaults shown here.",
            inputs=[
                io.Combo.Input(
                    "learning_rate_schedule",
                    options=list(SCHEDULES),
                    default=CONSTANT,
                    tooltip="Learning rate schedule, as in diffusers: cosine and linear fall to 0, polynomial to "
                    "0.0000001. A resumed run continues it. In Train Subject Embedding it applies to the embeddings "
                    "shared by all steps. The papers name none.",
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="Steps in which the learning rate rises from 0, for every schedule but 'constant'.",
                ),
                io.Combo.Input(
                    "optimizer",
                    options=[_DEFAULT, *OPTIMIZERS],
                    default=_DEFAULT,
                    tooltip="Optimizer. Default: Adam in Train Subject Embedding and Imagic Fine-Tuning, AdamW in the "
                    "others.",
                ),
                io.Float.Input(
                    "weight_decay",
                    default=-1.0,
                    min=-1.0,
                    max=1.0,
                    step=0.001,
                    tooltip="AdamW's weight decay. -1: the default, 0.01, as in Gu et al. 2025 and in diffusers; 0 in "
                    "Train Identity Words.",
                ),
                io.Float.Input(
                    "ema_decay",
                    default=-1.0,
                    min=-1.0,
                    max=0.99999,
                    step=0.0001,
                    round=0.00001,
                    tooltip="EMA decay; the EMA weights are the ones saved. 0.99 to 0.999 for short runs, 0 disables "
                    "the EMA. -1: the default, 0.9999 in Train MCDM, as in the training of Stable Diffusion, and no "
                    "EMA in the others.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Images or pairs per batch, all of one size; in Train Identity Prior from each of the two "
                    "sets. 0: the default, 4 in Train MCDM (Chen et al. 2024), Train Style Attention (Gu et al. 2025) "
                    "and Train Identity Words (ELITE), 1 in the others.",
                ),
                io.Int.Input(
                    "gradient_accumulation",
                    default=1,
                    min=1,
                    max=1024,
                    tooltip="Batches per optimizer step; their gradients are averaged, for the effect of a larger "
                    "batch with the memory of a small one.",
                ),
                io.Combo.Input(
                    "precision",
                    options=[BFLOAT16, FLOAT32],
                    default=BFLOAT16,
                    tooltip="Compute precision; the trained weights are kept in float32 either way. Choose float32 on "
                    "a CPU without bfloat16 instructions, where bfloat16 is slower.",
                ),
                checkpointing_input(),
                io.Int.Input(
                    "sample_every",
                    default=-1,
                    min=-1,
                    max=1_000_000,
                    tooltip="Steps between sample images. One is always made at the end; 0 disables the rest. -1: the "
                    "default, 1000 in Train MCDM, 100 in the others. Train Identity Words and Imagic Fine-Tuning make "
                    "none.",
                ),
                io.String.Input(
                    "sample_prompt",
                    default="",
                    tooltip="Prompt of the sample images, with the subject's token in it. Empty: the subject's name; "
                    "in Train Style Attention the first template. Train MCDM edits a pair instead.",
                ),
                io.Int.Input(
                    "checkpoint_every",
                    default=-1,
                    min=-1,
                    max=1_000_000,
                    tooltip="Steps between checkpoints. Re-queue the node with the same settings to resume a canceled "
                    "or killed run. 0 disables checkpoints. -1: the default, 1000 in Train MCDM, where each is four "
                    "times the size of the UNet in float32, 200 in Train Identity Words, 100 in the others. "
                    "Imagic Fine-Tuning makes none.",
                ),
            ],
            outputs=[Settings.Output("training_settings", tooltip="The settings, for any training node.")],
        )

    @classmethod
    @checked
    def execute(
        cls,
        learning_rate_schedule: str,
        warmup_steps: int,
        optimizer: str,
        weight_decay: float,
        ema_decay: float,
        batch_size: int,
        gradient_accumulation: int,
        precision: str,
        checkpointing: bool,
        sample_every: int,
        sample_prompt: str,
        checkpoint_every: int,
    ) -> io.NodeOutput:
        chosen: dict[str, Any] = {
            "learning_rate_schedule": learning_rate_schedule,
            "warmup_steps": warmup_steps,
            "accumulation": gradient_accumulation,
            "precision": precision,
            "checkpointing": checkpointing,
        }
        numbers = {"sample_every": sample_every, "checkpoint_every": checkpoint_every, "ema_decay": ema_decay}
        chosen |= {name: value for name, value in (numbers | {"weight_decay": weight_decay}).items() if value >= 0}
        if optimizer != _DEFAULT:
            chosen["optimizer"] = optimizer
        if batch_size:
            chosen["batch_size"] = batch_size
        if sample_prompt.strip():
            chosen["sample_prompt"] = sample_prompt.strip()
        unused = first_said(
            (
                warmup_steps > 0 and learning_rate_schedule == CONSTANT,
                f"warmup_steps has no effect with the schedule {CONSTANT}; choose constant_with_warmup.",
            ),
            (
                weight_decay > 0.0 and optimizer not in (_DEFAULT, "AdamW"),
                f"weight_decay has no effect with {optimizer}; choose AdamW.",
            ),
        )
        show_warnings(cls, unused)
        return io.NodeOutput(chosen)


def weights_inputs(default: str, tooltip: str, optional: bool = True) -> list[Any]:
    """The inputs `weights` and `rank`: what a fine-tuning changes."""
    return [
        io.Combo.Input(
            "weights",
            options=list(WEIGHTS),
            default=default,
            optional=optional,
            tooltip=f"Trained weights. {tooltip} Low rank: changes of rank `rank` to the attention layers (LoRA), "
            "with a fraction of the memory.",
        ),
        io.Int.Input(
            "rank",
            default=RANK,
            min=1,
            max=MOST_RANK,
            optional=optional,
            tooltip="Rank of the changes when `weights` is low rank. 4 in diffusers' DreamBooth LoRA script; more "
            "learns more detail.",
        ),
    ]


def training_outputs(what: str, samples: str | None = "The sample images in order.") -> list[Any]:
    """Sample images (none when `samples` is None), losses, path of the saved `what`, and the report."""
    shown = [] if samples is None else [io.Image.Output("samples", tooltip=samples)]
    return [
        *shown,
        LossMap.Output("loss", tooltip="Loss of every step, for Plot Loss Graph."),
        io.String.Output("file", tooltip=f"Path where {what} was saved."),
        io.String.Output("report", tooltip="Training summary, with the losses at the start and at the end."),
    ]


class Checkpoints:
    """The checkpoint files of a training, in the output folder's `folder`."""

    def __init__(self, folder: str) -> None:
        self._folder = os.path.join(folder_paths.get_output_directory(), folder, CHECKPOINT_FOLDER)
        self._names: list[str] = []

    def path(self, run: str) -> str:
        """Path of a run's checkpoint; the same settings are the same run."""
        self._names.append(run + FILE_ENDING)
        return os.path.join(self._folder, self._names[-1])

    def save(self, run: TrainingRun, filename_prefix: str, example: str, write: Callable[[str], None]) -> str:
        """Save a finished run with `write` and return the path; a run that was saved before is not saved again.

        Its checkpoints stay, so that the same training is not repeated and more steps continue it. A text file with the
        file name prefix, the saved file and the checkpoints marks them; those of the folder's other finished runs are
        deleted.
        """
        mark = os.path.join(self._folder, run.name + MARK_ENDING)
        if run.resumed_at == len(run.losses) and os.path.exists(mark):
            prefix, path, *_ = self._lines(mark)
            if prefix == filename_prefix and os.path.isfile(path):
                return path
        with new_path(filename_prefix, example) as path:
            write(path)
        if os.path.isdir(self._folder):  # else checkpoints are off
            for name in os.listdir(self._folder):
                if name.endswith(MARK_ENDING):
                    self._forget(os.path.join(self._folder, name))
            with atomic_write(mark) as temporary, open(temporary, "w", encoding="utf-8") as file:
                file.write("\n".join([filename_prefix, path, *self._names]))
        return path

    def _lines(self, mark: str) -> list[str]:
        with open(mark, encoding="utf-8") as file:
            return file.read().split("\n")

    def _forget(self, mark: str) -> None:
        """Delete a finished run's checkpoints and its mark."""
        with contextlib.suppress(OSError):  # in use, on Windows: the next training deletes them
            for name in set(self._lines(mark)[2:]) - set(self._names):
                os.remove(os.path.join(self._folder, os.path.basename(name)))
            os.remove(mark)


def training_progress(model: Any, steps: int) -> Progress:
    """ComfyUI's progress bar, with each new sample as its preview, even when sampling previews are off."""
    import latent_preview  # modules of ComfyUI, not needed before a node runs
    from comfy.utils import ProgressBar

    bar = ProgressBar(steps)
    latent_format = model.model.latent_format
    previewer = latent_preview.get_previewer(model.load_device, latent_format)
    if previewer is None and latent_format.latent_rgb_factors is not None:
        previewer = latent_preview.Latent2RGBPreviewer(
            latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
        )

    def report(done: int, total: int, loss: float, sample: torch.Tensor | None) -> None:
        preview = None
        if sample is not None and previewer is not None:
            with torch.no_grad():
                latent = engine.to_model_scale(model, sample).to(model.load_device)
                preview = previewer.decode_latent_to_preview_image("JPEG", latent)
        bar.update_absolute(done, total, preview)

    return report


def steps_of(run: TrainingRun) -> str:
    """Number of steps of a run, for reports."""
    resumed = f", {run.resumed_at} of them from a checkpoint" if run.resumed_at else ""
    return f"{len(run.losses)} steps{resumed}"


def first_and_last(losses: list[float]) -> str:
    """Mean losses at the start and at the end, for reports."""
    few = max(1, min(50, len(losses) // 2))
    first, last = (sum(part) / len(part) for part in (losses[:few], losses[-few:]))
    return f"{first:.4f} over the first {few} steps, {last:.4f} over the last {few}"


def how_trained(facts: dict[str, Any]) -> str:
    """Training settings of a file for reports, from `training_record` of the training loop; "" if incomplete."""
    if not facts.keys() >= {"steps", "learning_rate", "images"}:
        return ""
    return f"; {facts['steps']} training steps, learning rate {facts['learning_rate']:g}, {facts['images']} images"


NODES: list[type[io.ComfyNode]] = [TrainingSettings]
