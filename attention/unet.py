"""A Stable Diffusion UNet's attention sites: its transformer blocks by the key that ComfyUI's patches see, and what
such patches are given and give.

Blocks are found by walking the network, never by a table of numbers: a key that no block has would be a patch that
never runs. Read on ComfyUI 0.3.75: comfy/ldm/modules/diffusionmodules/openaimodel.py, comfy/ldm/modules/attention.py
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
from .sites import LayerKey, Site

Patched = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""What a patch on the list `attn1_patch` gives back: queries, and keys and values where they are not the queries'."""

_GUIDANCE_FUNCTIONS = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function")


@dataclass(frozen=True)
class AttentionLayer(Site):
    """One transformer block of a UNet; its key is (block name, "input", "middle" or "output", its number, the
    transformer's index in it), as patches read it from `transformer_options`.

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
        IdentityEditError: when the network is no such UNet or has no transformer block.
    """
    if not isinstance(network, UNetModel):
        raise IdentityEditError(
            f"The model's network is a {type(network).__name__}, whose attention cannot be read; load a Stable "
            f"Diffusion 1.x, 2.x or XL checkpoint."
        )
    found: list[AttentionLayer] = []
    downsampling = 1
    middle = [] if network.middle_block is None else [network.middle_block]
    for name, blocks in (("input", network.input_blocks), ("middle", middle), ("output", network.output_blocks)):
        for number, block in enumerate(blocks):
            for module in block:
                if isinstance(module, SpatialTransformer):
                    for index, transformer in enumerate(module.transformer_blocks):
                        found.append(AttentionLayer((name, number, index), downsampling, transformer))
                resampling = module.h_upd if isinstance(module, ResBlock) and module.updown else module
                if isinstance(resampling, Downsample):
                    downsampling *= 2
                elif isinstance(resampling, Upsample):
                    downsampling //= 2
    if not found:
        raise IdentityEditError("The model has no attention layers; load a text-to-image checkpoint.")
    return found


def layer_key(extra: Mapping[str, Any]) -> LayerKey:
    """Where a patch is called, from the `extra_options` it gets; ("", -1, 0) outside of a block."""
    block = extra.get("block") or ("", -1)
    return block[0], block[1], extra.get("block_index", 0)


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
