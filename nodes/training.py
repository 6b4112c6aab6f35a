"""What the nodes that train a subject share: inputs, progress with samples, checkpoints, and what is said of losses."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io

from ..pipelines import engine
from ..pipelines.engine.trainable import BFLOAT16, FLOAT32
from ..pipelines.errors import IdentityEditError
from ..pipelines.subject_pictures import SubjectPictures
from ..pipelines.training import Progress, TrainingRun
from .saved_files import FILE_ENDING

LossMap = io.Custom("LOSS_MAP")
"""ComfyUI's socket of Train LoRA and Plot Loss Graph: {"loss": the loss of every step}."""
CHECKPOINT_FOLDER = "checkpoints"


def gradient_accumulation_input() -> io.Int.Input:
    return io.Int.Input(
        "gradient_accumulation",
        default=1,
        min=1,
        max=256,
        tooltip="Batches whose gradients are averaged for one step: a larger batch for the memory of a small one.",
    )


def precision_input(trained: str) -> io.Combo.Input:
    return io.Combo.Input(
        "precision",
        options=[BFLOAT16, FLOAT32],
        default=BFLOAT16,
        tooltip=f"In what the networks compute; {trained} are kept in float32 either way. Choose float32 on a CPU "
        f"without bfloat16 instructions, where it is slower.",
    )


def checkpointing_input() -> io.Boolean.Input:
    return io.Boolean.Input(
        "checkpointing",
        default=True,
        tooltip="Gradient checkpointing: on needs a fraction of the memory and about a third more time, for the same "
        "result.",
    )


def seed_input() -> io.Int.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip="Of all draws: the order of the pictures, timesteps and noise.",
    )


def sample_every_input(last: str) -> io.Int.Input:
    return io.Int.Input(
        "sample_every",
        default=100,
        min=0,
        max=100000,
        tooltip=f"Steps between the sample pictures that show how far it is. There is one at {last} in any case; 0 "
        f"makes no others.",
    )


def checkpoint_every_input() -> io.Int.Input:
    return io.Int.Input(
        "checkpoint_every",
        default=100,
        min=0,
        max=100000,
        tooltip="Steps between checkpoints, from which a cancelled or killed run goes on when it is queued again with "
        "the same settings. 0 writes none.",
    )


def check_masked_loss(masked_loss: bool, subject: SubjectPictures) -> None:
    """Raise `IdentityEditError` when the loss is to be counted inside masks and there is none."""
    if masked_loss and all(mask is None for mask in subject.masks):
        raise IdentityEditError(
            "masked_loss is on but no picture of the subject has a mask; add masks, or switch masked_loss off."
        )


class Checkpoints:
    """The checkpoint files of a training, in the output folder's `folder`."""

    def __init__(self, folder: str) -> None:
        self._folder = os.path.join(folder_paths.get_output_directory(), folder, CHECKPOINT_FOLDER)
        self._paths: list[str] = []

    def path(self, run: str) -> str:
        """Where a run's checkpoint is; the same settings are the same run."""
        self._paths.append(os.path.join(self._folder, run + FILE_ENDING))
        return self._paths[-1]

    def remove(self) -> None:
        """Once the result is saved."""
        for path in self._paths:
            with contextlib.suppress(OSError):
                os.remove(path)


def training_progress(model: Any, steps: int) -> Progress:
    """ComfyUI's progress bar, with each new sample as its preview, even where previews of sampling are switched off."""
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
    """How many steps a run has made, for reports."""
    resumed = f", of which {run.resumed_at} were read from a checkpoint" if run.resumed_at else ""
    return f"{len(run.losses)} steps{resumed}"


def first_and_last(losses: list[float]) -> str:
    """The mean losses of the beginning and the end, for reports."""
    few = max(1, min(50, len(losses) // 2))
    first, last = (sum(part) / len(part) for part in (losses[:few], losses[-few:]))
    return f"{first:.4f} over the first {few} steps, {last:.4f} over the last {few}"


def how_trained(facts: dict[str, Any]) -> str:
    """What follows a file's description in reports, from `pipelines.training.training_facts`; "" where it has none."""
    if not facts.keys() >= {"steps", "learning_rate", "pictures"}:
        return ""
    return f"; {facts['steps']} training steps, learning rate {facts['learning_rate']:g}, {facts['pictures']} pictures"
