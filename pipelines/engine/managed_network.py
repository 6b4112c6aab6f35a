"""Networks of the pack's own, loaded and offloaded by ComfyUI's model management as its own models are."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import torch

from .weights import stored_weights


def managed(
    network: torch.nn.Module,
    *,
    load_device: torch.device | None = None,
    offload_device: torch.device | None = None,
    remake: Callable[[], torch.nn.Module] | None = None,
) -> Any:
    """A ModelPatcher around a network that lies on the CPU: ComfyUI moves it, and drops it when nobody uses it.

    It takes part in dynamic VRAM where ComfyUI uses that. Layers of `comfy.ops` then come to the device one by one, and
    those of plain torch all together.

    Args:
        network: the network.
        load_device, offload_device: where it computes and where it waits; None are ComfyUI's own choices.
        remake: makes a network of the same layers, whatever its weights and their dtype. With it ComfyUI can give a
            clone weights of its own, for a second GPU or a compiled model.
    """
    load_device = load_device or management.get_torch_device()
    offload_device = offload_device or management.vae_offload_device()

    def patcher_around(part: torch.nn.Module, disable_dynamic: bool = False) -> Any:
        plain = comfy.model_patcher.ModelPatcher
        kind = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
        return kind(part, load_device=load_device, offload_device=offload_device)

    patcher = patcher_around(network)
    if remake is not None:
        make, reference = remake, weakref.ref(patcher)  # clones keep the patcher alive as their parent

        def again(disable_dynamic: bool = False) -> Any:
            stored = stored_weights(reference(), "")
            weights = {key: weight.to("cpu", copy=True) for key, weight, _ in stored if weight is not None}
            copy = make()
            copy.load_state_dict(weights, strict=False, assign=True)
            return patcher_around(copy, disable_dynamic)

        patcher.cached_patcher_init = (again, ())
    return patcher


def load_whole(patcher: Any, memory: float = 0.0) -> torch.device:
    """Bring all of a managed network to its device, which makes room there if need be, and return the device.

    Layers of plain torch cannot be used while they are elsewhere, so it is loaded whole or not at all.

    Args:
        patcher: from `managed`.
        memory: bytes that it needs besides its weights.
    """
    management.load_models_gpu([patcher], memory_required=memory, force_full_load=True)
    return patcher.load_device
