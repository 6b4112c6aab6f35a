"""Where a Stable Diffusion UNet attends: its transformer blocks, by the key that ComfyUI's patches see.

Blocks are found by walking the network, never by a table of numbers: a key that no block has would be a patch that
never runs. Read on ComfyUI 0.3.75: comfy/ldm/modules/diffusionmodules/openaimodel.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel, Upsample

from .errors import IdentityEditError

AUTOMATIC, ALL = "automatic", "all"
LAYER_CHOICES = (AUTOMATIC, "1", "2", "4", "8", "1, 2", "2, 4", "4, 8", "1, 2, 4", ALL)
"""What a user can choose: `automatic_factors`, some factors by which the latent is downsampled, or all layers."""

SMALLEST_AUTOMATIC_GRID = 16
"""Cells along the long side below which a grid is too coarse to outline a subject."""

LayerKey = tuple[str, int, int]
"""Block name ("input", "middle" or "output"), its number, and the transformer's index in it."""


def layer_key(extra: Mapping[str, Any]) -> LayerKey:
    """Where a patch is called, from the `extra_options` it gets; ("", -1, 0) outside of a block."""
    block = extra.get("block") or ("", -1)
    return block[0], block[1], extra.get("block_index", 0)


@dataclass(frozen=True)
class AttentionLayer:
    """One transformer block of a UNet.

    Attributes:
        key: where it is, as patches read it from `transformer_options`.
        downsampling: how many times smaller than the latent its grid is along each side: 1, 2, 4 or 8.
        block: the BasicTransformerBlock, with its self-attention `attn1` and its cross-attention `attn2`.
    """

    key: LayerKey
    downsampling: int
    block: Any

    @property
    def attends_to_itself(self) -> bool:
        return not self.block.disable_self_attn

    @property
    def attends_to_text(self) -> bool:
        return self.block.attn2 is not None and not self.block.switch_temporal_ca_to_sa

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Its grid (rows, columns) for a latent; every downsampling rounds up."""
        return -(-height // self.downsampling), -(-width // self.downsampling)


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


def automatic_factors(layers: Sequence[AttentionLayer], height: int, width: int) -> tuple[int, ...]:
    """The two downsampling factors whose layers outline a subject.

    2 and 4, which are the 32x32 and 16x16 layers of SD1.x at 512x512 and the 64x64 and 32x32 ones of SDXL at 1024x1024:
    coarser ones no longer outline it, and the layers at the latent's own resolution hardly tell what belongs to whom.
    Where the latent is so small that half of it has fewer than 16 cells along its long side, the finest two that the
    model has.

    Args:
        layers: all layers of the model.
        height, width: the latent's.
    """
    factors = sorted({layer.downsampling for layer in layers})
    large_enough = -(-max(height, width) // 2) >= SMALLEST_AUTOMATIC_GRID
    coarser = [factor for factor in factors if factor >= 2]
    return tuple((coarser if large_enough and coarser else factors)[:2])


def choose_layers(layers: Sequence[AttentionLayer], height: int, width: int, choice: str) -> list[AttentionLayer]:
    """The layers that a choice means for a latent of `height` x `width`.

    Args:
        choice: one of `LAYER_CHOICES`, or any downsampling factors separated by commas.

    Raises:
        IdentityEditError: when the choice cannot be read or the model has no layer of a factor.
    """
    if choice == ALL:
        return list(layers)
    present = {layer.downsampling for layer in layers}
    try:
        automatic = choice == AUTOMATIC
        factors = set(automatic_factors(layers, height, width) if automatic else (int(f) for f in choice.split(",")))
    except ValueError:
        factors = set()
    if not factors or not factors <= present:
        raise IdentityEditError(
            f"layers is {choice!r} but this model attends at 1/{', 1/'.join(map(str, sorted(present)))} of the "
            f"latent's size; choose from {', '.join(map(str, sorted(present)))}, or automatic."
        )
    return [layer for layer in layers if layer.downsampling in factors]
