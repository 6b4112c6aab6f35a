"""Gradients inside ComfyUI: through a frozen, fully loaded model with any attention backend.

Read on ComfyUI 0.3.75 and 0.33.0: comfy/model_management.py, model_patcher.py (ModelPatcherDynamic), comfy/ops.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from comfy.ldm.modules.attention import SpatialTransformer, get_attention_function
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel

from ...attention.joint import has_joint_attention, patch_side
from ..shared.comfy_types import Model
from ..shared.errors import IdentityEditError
from ..shared.gradients import (
    checkpointed_blocks,
    differentiable_attention,
    inputs_survive_changes_in_place,
    modules_in,
    plain_frozen_tensors,
)
from .families.registry import require

_TEXT_TOKENS = 512
"""Text tokens of a transformer, for estimates of memory."""


@contextlib.contextmanager
def gradient_context(
    patchers: Iterable[Model], *, load: bool = True, memory_required: float = 0, checkpointing: bool = False
) -> Iterator[None]:
    """Enable gradients with respect to inputs of frozen models inside a ComfyUI node.

    ComfyUI executes prompts in `torch.inference_mode`, and autograd can never save parameters created there, not even
    after leaving the mode. Inside this context gradients are enabled, such parameters and buffers are replaced by
    ordinary tensors that share their memory (nothing is copied), and no parameter requires a gradient. With dynamic
    VRAM the weights stay on the device, see `weights_on_device`. Everything is undone at the end. Other tensors must be
    copied inside the context (`copy_outside_inference_mode`).

    Args:
        patchers: the ModelPatchers in the graph: a MODEL, or `clip.patcher` of a CLIP. Additional models that nodes
            have attached to them, such as a style attention, are included.
        load: load them completely first (ComfyUI's `load_models_gpu`).
        memory_required: bytes needed in addition to the weights.
        checkpointing: recompute each transformer and residual block in the backward pass instead of storing its
            activations: about a third more time, a fraction of the memory, the same gradients.

    Raises:
        IdentityEditError: when the device runs out of memory.
    """
    patchers = list(patchers)
    patchers += [added for patcher in patchers for added in patcher.get_nested_additional_models()]
    patchers = list({id(patcher): patcher for patcher in patchers}.values())
    with readable_errors():
        if load:
            load_completely(patchers, memory_required)
        with torch.inference_mode(False), torch.enable_grad(), contextlib.ExitStack() as stack:
            stack.enter_context(weights_on_device(patchers))
            modules: list[torch.nn.Module] = []
            for patcher in patchers:
                modules.append(patcher.model)
                modules += modules_in(getattr(patcher, "model_options", None))
            stack.enter_context(plain_frozen_tensors(modules))
            stack.enter_context(_layers_in_full_precision(modules))
            transformers = [network for network in map(_diffusion_transformer, patchers) if network is not None]
            if transformers:
                stack.enter_context(_differentiable_kernels())
            for network in transformers:
                stack.enter_context(inputs_survive_changes_in_place(network))
                if checkpointing:
                    stack.enter_context(checkpointed_blocks(_blocks_of(network), change_inputs=True))
            if checkpointing:
                stack.enter_context(checkpointed_blocks(_unet_blocks(modules)))
            yield


def _diffusion_transformer(patcher: Model) -> torch.nn.Module | None:
    """The diffusion model of a MODEL if it is not a UNet."""
    network = getattr(patcher.model, "diffusion_model", None)
    return None if isinstance(network, UNetModel) else network


def _blocks_of(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer blocks: the entries of the network's own lists of modules."""
    lists = [child for child in network.children() if isinstance(child, torch.nn.ModuleList)]
    return [block for each in lists for block in each]


def _unet_blocks(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    parts = {id(part): part for root in modules for part in root.modules()}.values()
    return [part for part in parts if isinstance(part, (SpatialTransformer, ResBlock))]


@contextlib.contextmanager
def _differentiable_kernels() -> Iterator[None]:
    """Set the flag with which newer engines choose kernels that have a backward pass, as their own training nodes do.

    It is global, and is restored at the end; ComfyUI runs one prompt at a time.
    """
    before = getattr(comfy.model_management, "in_training", None)
    if before is None:
        yield
        return
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


@contextlib.contextmanager
def _layers_in_full_precision(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Let layers of quantized weights multiply in full precision where the engine quantizes their input by an
    operation without a backward pass (before its `QuantLinearFunc`); everything is undone at the end."""
    if hasattr(comfy.ops, "QuantLinearFunc"):
        yield
        return
    # The attributes with which ComfyUI itself asks for casts, in 0.3.75 and after.
    asks = ("comfy_cast_weights", "comfy_force_cast_weights")
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for layer in {id(part): part for root in modules for part in root.modules()}.values():
            if getattr(layer, "layout_type", None) is not None:
                attributes = vars(layer)
                before.append((attributes, {name: attributes[name] for name in asks if name in attributes}))
                attributes.update(dict.fromkeys(asks, True))
        yield
    finally:
        for attributes, found in before:
            for name in asks:
                attributes.pop(name, None)
            attributes.update(found)


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Convert torch's out-of-memory error, and that of layers without a gradient, to an `IdentityEditError` with a
    remedy."""
    try:
        yield
    except RuntimeError as error:
        if "support automatic differentiation" in str(error):
            raise IdentityEditError(
                "The model's float8 layers have no gradient in this ComfyUI; load it with another weight_dtype than "
                "fp8_e4m3fn_fast."
            ) from error
        if not _is_out_of_memory(error):
            raise
        raise IdentityEditError(
            "The device has too little memory to compute gradients through this model; turn on checkpointing, or use a "
            "smaller image or batch."
        ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    is_oom = getattr(comfy.model_management, "is_oom", None)  # newer than 0.3.75; recognizes more errors
    return is_oom(error) if is_oom is not None else isinstance(error, torch.cuda.OutOfMemoryError)


def load_completely(patchers: list[Model], memory_required: float) -> None:
    """Load all weights and free memory for the computation.

    Call it in ComfyUI's inference mode: quantized weights that were moved outside of it cannot be moved inside it.

    Args:
        patchers: ModelPatchers.
        memory_required: bytes needed in addition to the weights.
    """
    weights = sum(patcher.model_size() for patcher in patchers if _is_dynamic(patcher))
    comfy.model_management.load_models_gpu(patchers, memory_required=memory_required + weights, force_full_load=True)


@contextlib.contextmanager
def weights_on_device(patchers: Iterable[Model]) -> Iterator[None]:
    """With dynamic VRAM, keep every weight on the device within this context.

    Dynamic VRAM loads a weight when its layer runs, and may overwrite its memory afterwards, before the backward pass
    that needs it. Each weight that is not on the device is replaced by a copy there, in its layer's dtype and with its
    LoRAs, and restored at the end. Patchers without dynamic VRAM have already loaded their weights.
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


def _weight_in_use(patcher: Model, key: str, weight: torch.Tensor) -> torch.Tensor:
    if weight.is_meta:  # ComfyUI's placeholder for zeros missing from the file
        return torch.zeros_like(weight, device=patcher.load_device)
    return patcher.patch_weight_to_device(key, device_to=patcher.load_device, return_weight=True)


def _is_dynamic(patcher: Model) -> bool:
    """Whether ComfyUI loads the patcher's weights layer by layer (dynamic VRAM, newer than 0.3.75)."""
    return bool(getattr(patcher, "is_dynamic", bool)())


def use_differentiable_attention(patcher: Model) -> None:
    """Make a clone use PyTorch's attention whenever a gradient is needed, whatever other backend is active."""
    options = patcher.model_options["transformer_options"]
    options["optimized_attention_override"] = differentiable_attention(
        get_attention_function("pytorch"), options.get("optimized_attention_override")
    )


def gradient_memory(model: Model, latent_shape: list[int], checkpointing: bool) -> float:
    """Estimated bytes for a forward and backward pass in addition to the weights, for ComfyUI's memory management.

    Measured by counting the elements that autograd saves: per latent pixel 89 thousand in SD1.5's UNet and 155 thousand
    in SDXL's (320 model channels); with checkpointing a twentieth to a tenth of that, plus one block's activations. In
    a transformer about 40 times its width per block and token; with checkpointing 3, plus one block's.

    Args:
        model: MODEL.
        latent_shape: [B, C, H, W].
        checkpointing: whether blocks are recomputed in the backward pass.
    """
    dtype = model.get_model_object("manual_cast_dtype") or model.model_dtype()
    network = model.get_model_object("diffusion_model")
    pixels = latent_shape[0] * math.prod(latent_shape[2:])
    if isinstance(network, UNetModel):
        return float(pixels * network.model_channels * (100 if checkpointing else 500) * dtype.itemsize)
    blocks, width = len(_blocks_of(network)), require(model).width
    patch = patch_side(network) if has_joint_attention(network) else 2
    tokens = pixels / patch**2 + latent_shape[0] * _TEXT_TOKENS
    return float(tokens * width * (3 * blocks + 40 if checkpointing else 40 * blocks) * dtype.itemsize)
