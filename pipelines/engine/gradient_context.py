"""Gradients inside ComfyUI: through a frozen model, loaded completely, whatever attention it runs.

Read on ComfyUI 0.3.75 and 0.33.0: comfy/model_management.py, model_patcher.py (ModelPatcherDynamic), comfy/ops.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import SpatialTransformer, get_attention_function
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

from ..shared.errors import IdentityEditError
from ..shared.gradients import checkpointed_blocks, differentiable_attention, modules_in, plain_frozen_tensors


@contextlib.contextmanager
def gradient_context(
    patchers: Iterable[Any], *, load: bool = True, memory_required: float = 0, checkpointing: bool = False
) -> Iterator[None]:
    """Make gradients with respect to inputs of frozen models possible inside a ComfyUI node.

    ComfyUI runs every prompt in `torch.inference_mode`, and parameters made there can never be saved for a backward
    pass, not even after the mode is left. Inside this context gradients are on, every such parameter and buffer is
    replaced by an ordinary tensor over the same memory (nothing is copied), and no parameter requires a gradient. With
    dynamic VRAM the weights are on the device for the time of the context, see `weights_on_device`. All of that is
    undone at the end. Tensors that come from elsewhere must be copied inside the context
    (`copy_outside_inference_mode`).

    Args:
        patchers: the ModelPatchers that the gradient passes through: of a MODEL, or `clip.patcher` of a CLIP. Networks
            that nodes have put beside them, such as a style attention, are included.
        load: load them completely first (ComfyUI's `load_models_gpu`).
        memory_required: bytes that the computation needs beside the weights.
        checkpointing: recompute each transformer and residual block in the backward pass instead of keeping its
            activations: about a third more time for a fraction of the memory, the same gradients.

    Raises:
        IdentityEditError: when the device has too little memory for it.
    """
    patchers = list(patchers)
    patchers += [added for patcher in patchers for added in patcher.get_nested_additional_models()]
    patchers = list({id(patcher): patcher for patcher in patchers}.values())
    with memory_in_words():
        if load:
            load_completely(patchers, memory_required)
        with torch.inference_mode(False), torch.enable_grad(), contextlib.ExitStack() as stack:
            stack.enter_context(weights_on_device(patchers))
            modules: list[torch.nn.Module] = []
            for patcher in patchers:
                modules.append(patcher.model)
                modules += modules_in(getattr(patcher, "model_options", None))
            stack.enter_context(plain_frozen_tensors(modules))
            if checkpointing:
                stack.enter_context(checkpointed_blocks(modules, (SpatialTransformer, ResBlock)))
            yield


@contextlib.contextmanager
def memory_in_words() -> Iterator[None]:
    """Turn torch's error of a device that is out of memory into a sentence with what helps.

    Raises:
        IdentityEditError: in place of that error.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise IdentityEditError(
            "The device has too little memory to compute gradients through this model; turn checkpointing on, use a "
            "smaller image, or a smaller batch."
        ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    is_oom = getattr(comfy.model_management, "is_oom", None)  # newer than 0.3.75; it knows more kinds of errors
    return is_oom(error) if is_oom is not None else isinstance(error, torch.cuda.OutOfMemoryError)


def load_completely(patchers: list[Any], memory_required: float) -> None:
    """Load all weights and make room for what the computation needs beside them.

    Call it in ComfyUI's inference mode: quantized weights that have been moved outside of it cannot be moved in it.

    Args:
        patchers: ModelPatchers.
        memory_required: bytes beside the weights.
    """
    of_weights = sum(patcher.model_size() for patcher in patchers if _is_dynamic(patcher))
    comfy.model_management.load_models_gpu(patchers, memory_required=memory_required + of_weights, force_full_load=True)


@contextlib.contextmanager
def weights_on_device(patchers: Iterable[Any]) -> Iterator[None]:
    """With dynamic VRAM, keep every weight on the device for the time of this context.

    There ComfyUI brings a weight when its layer runs, and may overwrite its memory once the layer has run: before a
    backward pass that needs it. A weight that is not on the device is replaced by a copy there, in the type in which
    its layer keeps it and with its LoRAs, which the layer then computes with. Patchers without dynamic VRAM have
    loaded their weights already. Put back at the end.
    """
    replaced: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
    try:
        for patcher in patchers:
            if not _is_dynamic(patcher):
                continue
            for path, module in patcher.model.named_modules():
                for name, weight in list(module.named_parameters(recurse=False)):
                    if weight.device == patcher.load_device:
                        continue
                    key = f"{path}.{name}" if path else name
                    with torch.no_grad():
                        copy = _weight_in_use(patcher, key, weight)
                        kept_in = getattr(module, f"{name}_comfy_model_dtype", None) or copy.dtype
                        copy = copy.to(patcher.load_device, kept_in)
                    setattr(module, name, torch.nn.Parameter(copy, requires_grad=False))
                    replaced.append((module, name, weight))
        yield
    finally:
        for module, name, weight in replaced:
            setattr(module, name, weight)


def _weight_in_use(patcher: Any, key: str, weight: torch.Tensor) -> torch.Tensor:
    if weight.is_meta:  # ComfyUI's form of zeros that no file has
        return torch.zeros_like(weight, device=patcher.load_device)
    return patcher.patch_weight_to_device(key, device_to=patcher.load_device, return_weight=True)


def _is_dynamic(patcher: Any) -> bool:
    """Whether ComfyUI brings the patcher's weights layer by layer (dynamic VRAM, newer than 0.3.75)."""
    return bool(getattr(patcher, "is_dynamic", bool)())


def use_differentiable_attention(patcher: Any) -> None:
    """Let a clone compute with PyTorch's attention wherever a gradient is needed, whatever else is installed."""
    options = patcher.model_options["transformer_options"]
    options["optimized_attention_override"] = differentiable_attention(
        get_attention_function("pytorch"), options.get("optimized_attention_override")
    )


def gradient_memory(model: Any, latent_shape: list[int], checkpointing: bool) -> float:
    """Bytes that a forward and backward pass needs beside the weights, an estimate for ComfyUI's memory management.

    Measured by counting what autograd saves: for each position of the latent 89 thousand elements in SD1.5's UNet and
    155 thousand in SDXL's (320 model channels), a twentieth to a tenth of it with checkpointing and one block's own
    activations beside them.

    Args:
        model: MODEL.
        latent_shape: [B, C, H, W].
        checkpointing: whether blocks are recomputed in the backward pass.
    """
    dtype = model.get_model_object("manual_cast_dtype") or model.model_dtype()
    elements = model.get_model_object("diffusion_model").model_channels * (100 if checkpointing else 500)
    return float(latent_shape[0] * math.prod(latent_shape[2:]) * elements * dtype.itemsize)
