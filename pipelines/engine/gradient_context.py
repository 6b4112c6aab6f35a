"""Gradients inside ComfyUI: through a frozen model, loaded completely, whatever attention it runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import SpatialTransformer, get_attention_function
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

from ..gradients import checkpointed_blocks, differentiable_attention, modules_in, plain_frozen_tensors

_ATTENTION_WITHOUT_GRADIENT = ("attention_sage", "attention_flash", "attention_sub_quad")
"""The sub-quadratic one, ComfyUI's default on a CPU, computes in place as soon as memory is short; with gradients
PyTorch's is faster as well (on a CPU 0.67 to 0.77 of its time for self-attention, the same for cross-attention)."""


@contextlib.contextmanager
def gradient_context(
    patchers: Iterable[Any], *, load: bool = True, memory_required: float = 0, checkpointing: bool = False
) -> Iterator[None]:
    """Make gradients with respect to inputs of frozen models possible inside a ComfyUI node.

    ComfyUI runs every prompt in `torch.inference_mode`, and parameters made there can never be saved for a backward
    pass, not even after the mode is left. Inside this context gradients are on, every such parameter and buffer is
    replaced by an ordinary tensor over the same memory (nothing is copied), and no parameter requires a gradient. All
    of that is undone at the end. Tensors that come from elsewhere must be copied inside the context
    (`copy_outside_inference_mode`).

    Args:
        patchers: the ModelPatchers that the gradient passes through: of a MODEL, or `clip.patcher` of a CLIP.
        load: load them completely first (ComfyUI's `load_models_gpu`).
        memory_required: bytes that the computation needs beside the weights.
        checkpointing: recompute each transformer and residual block in the backward pass instead of keeping its
            activations: about a third more time for a fraction of the memory, the same gradients.
    """
    patchers = list(patchers)
    with torch.inference_mode(False), torch.enable_grad():
        if load:
            # With what other nodes have put beside a model, such as a style attention.
            beside = [added for patcher in patchers for added in patcher.get_nested_additional_models()]
            comfy.model_management.load_models_gpu(
                [*patchers, *beside], memory_required=memory_required, force_full_load=True
            )
        modules: list[torch.nn.Module] = []
        for patcher in patchers:
            modules.append(patcher.model)
            modules += modules_in(getattr(patcher, "model_options", None))
        with contextlib.ExitStack() as stack:
            stack.enter_context(plain_frozen_tensors(modules))
            if checkpointing:
                stack.enter_context(checkpointed_blocks(modules, (SpatialTransformer, ResBlock)))
            yield


def use_differentiable_attention(patcher: Any) -> None:
    """Exchange attention functions without a backward pass on a clone, only where there can be any."""
    options = patcher.model_options["transformer_options"]
    previous = options.get("optimized_attention_override")
    backend = getattr(get_attention_function("optimized"), "__name__", "")
    if previous is not None or backend in _ATTENTION_WITHOUT_GRADIENT:
        options["optimized_attention_override"] = differentiable_attention(
            get_attention_function("pytorch"), _ATTENTION_WITHOUT_GRADIENT, previous
        )


def gradient_memory(model: Any, latent_shape: list[int], checkpointing: bool) -> float:
    """Bytes that a forward and backward pass needs beside the weights, an estimate for ComfyUI's memory management.

    Measured by counting what autograd saves: for each position of the latent 89 thousand elements in SD1.5's UNet and
    155 thousand in SDXL's (320 model channels), a twentieth to a tenth of it with checkpointing and one block's own
    activations beside them. Attention that keeps its matrix adds 35 elements for each pair of positions.

    Args:
        model: MODEL.
        latent_shape: [B, C, H, W].
        checkpointing: whether blocks are recomputed in the backward pass.
    """
    dtype = model.get_model_object("manual_cast_dtype") or model.model_dtype()
    positions = math.prod(latent_shape[2:])
    elements = model.get_model_object("diffusion_model").model_channels * (100 if checkpointing else 500)
    backend = getattr(get_attention_function("optimized"), "__name__", "")
    if backend not in ("attention_pytorch", "attention_xformers", *_ATTENTION_WITHOUT_GRADIENT) and not checkpointing:
        elements += 35 * positions
    return float(latent_shape[0] * positions * elements * dtype.itemsize)
