"""A small network of the pack's own, loaded and offloaded by ComfyUI's model management as a CLIP vision is."""

from __future__ import annotations

from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import torch


def managed(network: torch.nn.Module) -> Any:
    """A ModelPatcher around a network that lies on the CPU: ComfyUI moves it, and drops it when nobody uses it."""
    return comfy.model_patcher.ModelPatcher(
        network, load_device=management.get_torch_device(), offload_device=management.vae_offload_device()
    )


def load_whole(patcher: Any, memory: float = 0.0) -> torch.device:
    """Bring all of a managed network to its device, which makes room there if need be, and return the device.

    Layers of plain torch cannot be used while they are elsewhere, so it is loaded whole or not at all.

    Args:
        patcher: from `managed`.
        memory: bytes that it needs besides its weights.
    """
    management.load_models_gpu([patcher], memory_required=memory, force_full_load=True)
    return patcher.load_device
