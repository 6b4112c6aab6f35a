"""Attention sites of Stable Diffusion UNets: transformer blocks by the keys of ComfyUI's patches, and helpers for such
patches.

Blocks are found by traversing the network, not from a table of numbers, because a patch with a wrong key would silently
never run. Read on ComfyUI 0.3.75: comfy/ldm/modules/diffusionmodules/openaimodel.py, comfy/ldm/modules/attention.py
(BasicTransformerBlock), comfy/samplers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel, Upsample

from .errors import IdentityEditError
from .sites import LayerKey, Site, on_one_gpu

Patched = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Return value of an `attn1_patch`: inputs of queries, keys and values; None for keys or values that share an input."""

_GUIDANCE_FUNCTIONS = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function")


@dataclass(frozen=True)
class AttentionLayer(Site):
    """One transformer block of a UNet; its key ("input", "middle" or "output", block number, transformer index) is that
    of `transformer_options`.

    Attributes:
        block: the BasicTransformerBlock, with its self-attention `attn1` and its cross-attention `attn2`.
    """

    block: Any

    @property
    def attends_to_itself(self) -> bool:
        return not self.block.disable_self_attn

    @property
    def attends_to_text(self) -> bool:
        return self.block.attn2 is not None and not self.block.switch_temporal_ca_to_sa


def attention_layers(network: Any) -> list[AttentionLayer]:
    """All transformer blocks of a UNetModel, in the order in which they run.

    Raises:
        IdentityEditError: when the network is not such a UNet or has no transformer block.
    """
    if not isinstance(network, UNetModel):
        raise IdentityEditError(
            f"The model's network is a {type(network).__name__}, whose attention cannot be read; load a Stable "
            f"Diffusion 1.x, 2.x or XL checkpoint."
        )
    layers: list[AttentionLayer] = []
    downsampling = 1
    middle = [] if network.middle_block is None else [network.middle_block]
    for name, blocks in (("input", network.input_blocks), ("middle", middle), ("output", network.output_blocks)):
        for number, block in enumerate(blocks):
            for module in block:
                if isinstance(module, SpatialTransformer):
                    for index, transformer in enumerate(module.transformer_blocks):
                        layers.append(AttentionLayer((name, number, index), downsampling, transformer))
                resampling = module.h_upd if isinstance(module, ResBlock) and module.updown else module
                if isinstance(resampling, Downsample):
                    downsampling *= 2
                elif isinstance(resampling, Upsample):
                    downsampling //= 2
    if not layers:
        raise IdentityEditError("The model has no attention layers; load a text-to-image checkpoint.")
    return layers


def layer_key(extra: Mapping[str, Any]) -> LayerKey:
    """The key of the block that calls a patch, from its `extra_options`; ("", -1, 0) outside a block."""
    block = extra.get("block") or ("", -1)
    return block[0], block[1], extra.get("block_index", 0)


def keys_and_values(
    n: torch.Tensor, context: torch.Tensor | None, value: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs of a block's key and value projections, from the arguments of an `attn1_patch`."""
    to_keys = n if context is None else context
    return to_keys, to_keys if value is None else value


def by_conditioning(extra: Mapping[str, Any], *tensors: torch.Tensor) -> list[tuple[Any, ...]]:
    """Split a batch of conditionings: (uuid, rows of each tensor)."""
    uuids = extra["uuids"]
    return list(zip(uuids, *(tensor.chunk(len(uuids)) for tensor in tensors), strict=True))


def with_patches(model_options: dict[str, Any] | None, **patches: Any) -> dict[str, Any]:
    """A copy of model options with patches appended to their lists."""
    options = on_one_gpu(model_options)
    transformer = dict(options.get("transformer_options", {}))
    lists = dict(transformer.get("patches", {}))
    for name, patch in patches.items():
        lists[name] = [*lists.get(name, []), patch]
    return {**options, "transformer_options": {**transformer, "patches": lists}}


def without_guidance_functions(model_options: dict[str, Any] | None) -> dict[str, Any]:
    """A copy of model options without other nodes' guidance functions, some of which evaluate the network again."""
    return {name: value for name, value in (model_options or {}).items() if name not in _GUIDANCE_FUNCTIONS}
