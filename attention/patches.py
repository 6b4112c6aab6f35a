"""What patches of attention share: what they get and give, and model options with and without some of them.

Read on ComfyUI 0.3.75: comfy/ldm/modules/attention.py (BasicTransformerBlock), comfy/samplers.py.
"""

from __future__ import annotations

from typing import Any

import torch

Patched = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""What a patch on the list `attn1_patch` gives back: queries, and keys and values where they are not the queries'."""

_GUIDANCE_FUNCTIONS = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function")


def keys_and_values(
    n: torch.Tensor, context: torch.Tensor | None, value: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a block projects to keys and to values, from what it hands to `attn1_patch`."""
    to_keys = n if context is None else context
    return to_keys, to_keys if value is None else value


def by_conditioning(extra: dict[str, Any], *tensors: torch.Tensor) -> list[tuple[Any, ...]]:
    """(uuid, its rows of each tensor) of a batch of conditionings."""
    uuids = extra["uuids"]
    return list(zip(uuids, *(tensor.chunk(len(uuids)) for tensor in tensors), strict=True))


def with_patches(model_options: dict[str, Any] | None, **patches: Any) -> dict[str, Any]:
    """Model options with further patches at the end of their lists, for one evaluation; the given ones stay as is."""
    options = dict(model_options or {})
    transformer = dict(options.get("transformer_options", {}))
    lists = dict(transformer.get("patches", {}))
    for name, patch in patches.items():
        lists[name] = [*lists.get(name, []), patch]
    return {**options, "transformer_options": {**transformer, "patches": lists}}


def without_guidance_functions(model_options: dict[str, Any] | None) -> dict[str, Any]:
    """Model options without other nodes' guidance functions, some of which evaluate the network once more."""
    return {name: value for name, value in (model_options or {}).items() if name not in _GUIDANCE_FUNCTIONS}
