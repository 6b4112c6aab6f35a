"""What is put beside a MODEL: networks of one's own that patches run, and wrappers around its evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from .managed_network import managed


def managed_beside(model: Any, network: torch.nn.Module, remake: Callable[[], torch.nn.Module]) -> Any:
    """A ModelPatcher around a network of one's own, on the devices of `model`; see `managed_network.managed`.

    Hand it to `set_additional_models` of a clone: ComfyUI then loads it with the model, offloads it when memory is
    needed, and keeps it through further clones. Its layers are best those of `comfy.ops.manual_cast`, which work where
    only a part of a network fits onto the device.
    """
    return managed(network, load_device=model.load_device, offload_device=model.offload_device, remake=remake)


def add_wrappers(clone: Any, key: str, *, predict_noise: Callable[..., Any], outer_sample: Callable[..., Any]) -> None:
    """Add wrappers to a clone of a MODEL, beside others of the same key: `predict_noise` around every evaluation by a
    guider, which it finds as `executor.class_obj`, `outer_sample` around every run."""
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, key, predict_noise)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, outer_sample)
