"""Shared parts of the training nodes: inputs, outputs, progress with samples, checkpoints and reports."""

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
SEED_TOOLTIP = "Seed for all randomness: image order, timesteps and noise."


def checkpoint_inputs() -> list[Any]:
    """MODEL, CLIP and VAE of a checkpoint."""
    return [
        io.Model.Input("model", tooltip="A Stable Diffusion 1.x, 2.x or XL model (predicts noise or velocity)."),
        io.Clip.Input("clip", tooltip="The text encoders of the same checkpoint."),
        io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
    ]


def learning_rate_input(default: float, tooltip: str, most: float = 0.1, step: float = 1e-5) -> io.Float.Input:
    """AdamW's learning rate; the widget rounds to a hundredth of its step."""
    least = round(step / 100, 8)
    return io.Float.Input(
        "learning_rate", default=default, min=least, max=most, step=step, round=least, tooltip=tooltip
    )


def batch_size_input(default: int, most: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input("batch_size", default=default, min=1, max=most, tooltip=tooltip)


def gradient_accumulation_input() -> io.Int.Input:
    return io.Int.Input(
        "gradient_accumulation",
        default=1,
        min=1,
        max=256,
        tooltip="Batches per optimizer step; their gradients are averaged, for the effect of a larger batch "
        "with the memory of a small one.",
    )


def precision_input(trained: str) -> io.Combo.Input:
    return io.Combo.Input(
        "precision",
        options=[BFLOAT16, FLOAT32],
        default=BFLOAT16,
        tooltip=f"Compute precision; {trained} are kept in float32 either way. Choose float32 on a CPU without "
        "bfloat16 instructions, where bfloat16 is slower.",
    )


def sample_every_input(last: str, default: int = 100, most: int = 100_000, what: str = "sample images") -> io.Int.Input:
    return io.Int.Input(
        "sample_every",
        default=default,
        min=0,
        max=most,
        tooltip=f"Steps between {what}. One is always made at {last}; 0 disables the rest.",
    )


def checkpoint_every_input(default: int = 100, most: int = 100_000, more: str = "") -> io.Int.Input:
    return io.Int.Input(
        "checkpoint_every",
        default=default,
        min=0,
        max=most,
        tooltip="Steps between checkpoints. Re-queue the node with the same settings to resume a canceled or "
        f"killed run. {more}0 disables checkpoints.",
    )


def training_outputs(what: str, samples: str | None = "The sample images in order.") -> list[Any]:
    """Sample images (none when `samples` is None), losses, path of the saved `what`, and the report."""
    shown = [] if samples is None else [io.Image.Output("samples", display_name="samples", tooltip=samples)]
    return [
        *shown,
        LossMap.Output("loss", display_name="loss", tooltip="Loss of every step, for Plot Loss Graph."),
        io.String.Output("file", display_name="file", tooltip=f"Path where {what} was saved."),
        io.String.Output(
            "report", display_name="report", tooltip="Training summary, with the losses at the start and at the end."
        ),
    ]


class Checkpoints:
    """The checkpoint files of a training, in the output folder's `folder`."""

    def __init__(self, folder: str) -> None:
        self._folder = os.path.join(folder_paths.get_output_directory(), folder, CHECKPOINT_FOLDER)
        self._paths: list[str] = []

    def path(self, run: str) -> str:
        """Path of a run's checkpoint; the same settings are the same run."""
        self._paths.append(os.path.join(self._folder, run + FILE_ENDING))
        return self._paths[-1]

    def remove(self) -> None:
        """Delete the checkpoints, once the result is saved."""
        for path in self._paths:
            with contextlib.suppress(OSError):
                os.remove(path)


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
