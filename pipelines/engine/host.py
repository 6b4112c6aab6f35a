"""Other ComfyUI services: device and memory for networks that it does not manage, the Cancel button, sampling noise and
image scaling."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterable
from typing import Any

import comfy.model_management as management
import comfy.sample
import comfy.utils
import torch

from ..shared.comfy_types import Model


def device_with_room(size: float) -> torch.device:
    """ComfyUI's compute device, after trying to free `size` bytes on it."""
    device = management.get_torch_device()
    management.free_memory(size, device)
    return device


def give_memory_back() -> None:
    """Collect garbage and return unused cached memory to the system."""
    gc.collect()
    management.soft_empty_cache()


def supports_bfloat16(device: torch.device) -> bool:
    return bool(management.should_use_bf16(device))


def stop_if_interrupted() -> None:
    """Raise ComfyUI's InterruptProcessingException if the user has pressed Cancel."""
    management.throw_exception_if_processing_interrupted()


def empty_latent(model: Model, latent: dict[str, Any]) -> torch.Tensor:
    """The samples of a LATENT as ComfyUI's samplers take them: of an empty one, the model's channels and size."""
    fix = comfy.sample.fix_empty_latent_channels
    ratio = "downscale_ratio_spacial"  # newer than 0.3.75
    known = {ratio: latent.get(ratio)} if ratio in inspect.signature(fix).parameters else {}
    return fix(model, latent["samples"], **known)


def stock_noise(latent: torch.Tensor, seed: int, batch_index: Iterable[int] | None = None) -> torch.Tensor:
    """The noise [B, C, H, W] that ComfyUI's samplers use for a latent; `batch_index` as in a LATENT."""
    return comfy.sample.prepare_noise(latent, seed, None if batch_index is None else list(batch_index))


def cut_and_scaled(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """An image [h, w, 3] center-cropped and scaled, like Upscale Image with "lanczos" and crop "center"."""
    upscaled = comfy.utils.common_upscale(image[None].movedim(-1, 1), width, height, "lanczos", "center")
    return upscaled.movedim(1, -1)[0]
