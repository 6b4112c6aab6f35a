"""What the nodes that train a subject share: inputs, progress with samples, checkpoints, and what is said of losses."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io

from ..pipelines import engine
from ..pipelines.training.loop import BFLOAT16, FLOAT32, Progress, TrainingRun
from .saved_files import FILE_ENDING

LossMap = io.Custom("LOSS_MAP")
"""ComfyUI's socket of Train LoRA and Plot Loss Graph: {"loss": the loss of every step}."""
CHECKPOINT_FOLDER = "checkpoints"
SEED_TOOLTIP = "Of all draws: the order of the images, timesteps and noise."


def checkpoint_inputs() -> list[Any]:
    """MODEL, CLIP and VAE of a checkpoint."""
    return [
        io.Model.Input("model", tooltip="A Stable Diffusion 1.x, 2.x or XL model (predicts noise or velocity)."),
        io.Clip.Input("clip", tooltip="The text encoders of the same checkpoint."),
        io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
    ]


def learning_rate_input(default: float, tooltip: str, most: float = 0.1, step: float = 1e-5) -> io.Float.Input:
    """The widget rounds to a hundredth of its step."""
    least = round(step / 100, 8)
    return io.Float.Input(
        "learning_rate", default=default, min=least, max=most, step=step, round=least, tooltip=tooltip
    )


def batch_size_input(default: int, most: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input("batch_size", default=default, min=1, max=most, tooltip=tooltip)


def filename_prefix_input(default: str, loader: str, folder: str) -> io.String.Input:
    return io.String.Input(
        "filename_prefix",
        default=default,
        tooltip=f"Folder and beginning of the file name, below the output folder. {loader} lists what is in "
        f"'{folder}'.",
    )


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


def sample_every_input(last: str, default: int = 100, most: int = 100_000, what: str = "sample images") -> io.Int.Input:
    return io.Int.Input(
        "sample_every",
        default=default,
        min=0,
        max=most,
        tooltip=f"Steps between the {what} that show how far it is. There is one at {last} in any case; 0 makes no "
        f"others.",
    )


def checkpoint_every_input(default: int = 100, most: int = 100_000, more: str = "") -> io.Int.Input:
    return io.Int.Input(
        "checkpoint_every",
        default=default,
        min=0,
        max=most,
        tooltip=f"Steps between checkpoints, from which a canceled or killed run goes on when it is queued again with "
        f"the same settings. {more}0 writes none.",
    )


def training_outputs(what: str, samples: str | None = "The sample images in their order.") -> list[Any]:
    """Samples where there are any, losses, the file of `what` was trained, and the report."""
    shown = [] if samples is None else [io.Image.Output("samples", display_name="samples", tooltip=samples)]
    return [
        *shown,
        LossMap.Output("loss", display_name="loss", tooltip="The loss of every step, for Plot Loss Graph."),
        io.String.Output("file", display_name="file", tooltip=f"Where {what} was saved."),
        io.String.Output(
            "report", display_name="report", tooltip="What was trained, and the losses it began and ended with."
        ),
    ]


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
    """How a file was trained, for reports, from `training_facts` of the training loop; "" where it does not say."""
    if not facts.keys() >= {"steps", "learning_rate", "images"}:
        return ""
    return f"; {facts['steps']} training steps, learning rate {facts['learning_rate']:g}, {facts['images']} images"
