"""What pipelines ask of ComfyUI beside its models: device and memory for networks that it does not manage, its Cancel
button, its noise and its scaling of images."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import comfy.model_management as management
import comfy.sample
import comfy.utils
import torch


def device_with_room(size: float) -> torch.device:
    """The device on which ComfyUI computes, with so many bytes free if that can be had."""
    device = management.get_torch_device()
    management.free_memory(size, device)
    return device


def give_memory_back() -> None:
    """Return to the system what no tensor uses any more."""
    gc.collect()
    management.soft_empty_cache()


def supports_bfloat16(device: torch.device) -> bool:
    return bool(management.should_use_bf16(device))


def stop_if_interrupted() -> None:
    """Raise ComfyUI's own exception when the user has pressed Cancel."""
    management.throw_exception_if_processing_interrupted()


def stock_noise(latent: torch.Tensor, seed: int, batch_index: Iterable[int] | None = None) -> torch.Tensor:
    """The noise [B, C, H, W] that ComfyUI's samplers draw for a latent.

    Args:
        batch_index: as LATENT sockets have it.
    """
    return comfy.sample.prepare_noise(latent, seed, None if batch_index is None else list(batch_index))


def cut_and_scaled(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The middle of an image [h, w, 3] at another size, as Upscale Image gives it with lanczos and crop "center"."""
    upscaled = comfy.utils.common_upscale(image[None].movedim(-1, 1), width, height, "lanczos", "center")
    return upscaled.movedim(1, -1)[0]
