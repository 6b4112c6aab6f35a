"""This pack's own networks under ComfyUI's model management."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import torch

from ..shared.comfy_types import Model
from .weights import stored_weights


def managed(
    network: torch.nn.Module,
    *,
    load_device: torch.device | None = None,
    offload_device: torch.device | None = None,
    remake: Callable[[], torch.nn.Module] | None = None,
) -> Model:
    """Wrap a network on the CPU in a ModelPatcher, so that ComfyUI loads, offloads and frees it.

    It supports dynamic VRAM: `comfy.ops` layers are then loaded one by one, plain torch layers all together.

    Args:
        network: the network.
        load_device, offload_device: compute and storage device; None for ComfyUI's defaults.
        remake: creates a network with the same layers, with any weights and dtype. ComfyUI uses it to give a clone its
            own weights, for a second GPU or a compiled model.
    """
    load_device = load_device or management.get_torch_device()
    offload_device = offload_device or management.vae_offload_device()

    def patcher_around(part: torch.nn.Module, disable_dynamic: bool = False) -> Any:
        plain = comfy.model_patcher.ModelPatcher
        kind = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
        return kind(part, load_device=load_device, offload_device=offload_device)

    patcher = patcher_around(network)
    if remake is not None:
        make = remake
        reference: Callable[[], Any] = weakref.ref(patcher)  # clones keep the patcher alive as their parent

        def again(disable_dynamic: bool = False) -> Any:
            stored = stored_weights(reference(), "")
            weights = {key: weight.to("cpu", copy=True) for key, weight, _ in stored if weight is not None}
            copy = make()
            copy.load_state_dict(weights, strict=False, assign=True)
            return patcher_around(copy, disable_dynamic)

        patcher.cached_patcher_init = (again, ())
    return patcher


def load_whole(patcher: Model, memory: float = 0.0) -> torch.device:
    """Load a managed network completely, freeing memory if needed, and return its device.

    Plain torch layers cannot be loaded partially.

    Args:
        patcher: from `managed`.
        memory: bytes needed in addition to the weights.
    """
    management.load_models_gpu([patcher], memory_required=memory, force_full_load=True)
    return patcher.load_device
