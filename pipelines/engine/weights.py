"""Weights of a ModelPatcher, as in the checkpoint and as Save Checkpoint writes them.

Read on ComfyUI 0.3.75 and 0.33.0: comfy/model_patcher.py, comfy/ops.py, comfy/sd.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import comfy.model_management
import torch

from ..shared.comfy_types import Clip, Model, Vae

_SAMPLES = 64


def weight_shapes(network: torch.nn.Module) -> dict[str, torch.Size]:
    """The logical shape of every parameter, by key.

    Linear and embedding layers know it, even if their weight is stored in another shape (packed, or as bytes).
    """
    shapes = {}
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            shape = parameter.shape
            if name == "weight" and isinstance(module, torch.nn.Linear):
                shape = torch.Size((module.out_features, module.in_features))
            elif name == "weight" and isinstance(module, torch.nn.Embedding):
                shape = torch.Size((module.num_embeddings, module.embedding_dim))
            shapes[f"{path}.{name}" if path else name] = shape
    return shapes


def plain_weight(module: torch.nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor | None:
    """A layer's weight, dequantized if needed; None if only the layer can read it."""
    if weight.is_meta or not weight.is_floating_point():
        return None
    convert = getattr(module, f"convert_{name}", None)
    with torch.no_grad():
        if type(weight.data) is not torch.Tensor:
            return weight.dequantize()
        if convert is not None:  # applies the scale of scaled float8; other weights are returned unchanged
            return convert(weight, inplace=False)
    return weight


def stored_weights(patcher: Model, prefix: str) -> Iterator[tuple[str, torch.Tensor | None, bool]]:
    """The parameters of a network as in its checkpoint, without LoRAs and other patches.

    Args:
        patcher: ModelPatcher.
        prefix: prefix of the keys.

    Yields:
        key, weight (dequantized; None if only the layer can read it, such as GGUF), and whether it is quantized; sorted
        by key.
    """
    for key in sorted(key for key, _ in patcher.model.named_parameters() if key.startswith(prefix)):
        path, _, name = key.rpartition(".")
        module = patcher.model.get_submodule(path)
        weight = getattr(module, name)
        if key in patcher.backup:  # the current weight contains a LoRA
            weight = patcher.backup[key].weight
        if key in patcher.hook_backup:
            weight = patcher.hook_backup[key][0]
        plain = plain_weight(module, name, weight)
        yield key, None if plain is None else plain.detach(), plain is not weight


def samples_of_weights(patcher: Model, prefix: str) -> tuple[list[float], bool]:
    """Up to `_SAMPLES` values of every matrix and kernel with a key prefix, as a checkpoint's fingerprint.

    Returns:
        the values, NaN for unreadable ones, and whether any weight is quantized.
    """
    shapes = weight_shapes(patcher.model)
    samples: list[float] = []
    any_quantized = False
    for key, weight, is_quantized in stored_weights(patcher, prefix):
        if not key.endswith("weight") or len(shapes[key]) < 2:
            continue
        any_quantized |= is_quantized
        count = math.prod(shapes[key])
        step = max(1, count // _SAMPLES)
        if weight is None:
            samples += [math.nan] * len(range(0, count, step)[:_SAMPLES])
        else:
            samples += weight.reshape(-1)[::step][:_SAMPLES].to(device="cpu", dtype=torch.float32).tolist()
    return samples, any_quantized


def first_numbers(patcher: Model, prefix: str, chosen: Callable[[str], object]) -> dict[str, list[float]]:
    """The first value of every stored weight whose key has a prefix and is chosen, as a checkpoint's fingerprint; [] if
    only the layer can read it."""
    return {
        key: [] if weight is None else weight.flatten()[:1].float().cpu().tolist()
        for key, weight, _ in stored_weights(patcher, prefix)
        if chosen(key)
    }


def checkpoint_weights(model: Model, clip: Clip | None = None, vae: Vae | None = None) -> dict[str, torch.Tensor]:
    """All weights including LoRAs, with the names of a checkpoint file, like ComfyUI's Save Checkpoint.

    Args:
        model: MODEL.
        clip, vae: CLIP and VAE to include, or None.

    Returns:
        CPU tensors by name, each in its stored dtype.
    """
    vae_weights = None if vae is None else vae.get_sd()
    if hasattr(model, "state_dict_for_saving"):  # newer than 0.3.75: lazy entries that apply LoRAs when moved
        comfy.model_management.unload_all_models()  # otherwise LoRAs would be applied twice
        clip_weights = None if clip is None else clip.state_dict_for_saving()
        saved = model.state_dict_for_saving(clip_weights, vae_weights)
    else:
        patchers = [model] if clip is None else [model, clip.patcher]
        comfy.model_management.load_models_gpu(patchers, force_patch_weights=True)
        saved = model.model.state_dict_for_saving(None if clip is None else clip.get_sd(), vae_weights)
    return {name: entry.to("cpu").detach() for name, entry in saved.items() if isinstance(entry, torch.Tensor)}
