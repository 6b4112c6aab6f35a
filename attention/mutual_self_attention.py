"""Mutual self-attention of MasaCtrl (Cao et al. 2023): queries of one image, keys and values of another.

The source image's activations are recorded where the self-attention would project them to keys and values, and the
target's self-attention gets them in the place of its own: its layout is its own, what fills it the source's. Both are
patches on the list `attn1_patch`, which other packs share; the `replace` slot of a block stays free. They are put last
on the list, so that what is recorded is what the projections would see.

Read on ComfyUI 0.3.75: comfy/ldm/modules/attention.py (BasicTransformerBlock).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import IdentityEditError
from .regions import region_of
from .sites import LayerKey
from .unet import AttentionLayer, Patched, attention_layers, by_conditioning, keys_and_values, layer_key

AUTOMATIC = -1

Patch = Callable[[torch.Tensor, "torch.Tensor | None", "torch.Tensor | None", dict[str, Any]], Patched]


def mutual_layers(network: Any, start_layer: int = AUTOMATIC) -> dict[LayerKey, AttentionLayer]:
    """The layers whose self-attention takes keys and values from the source.

    Args:
        network: the UNetModel.
        start_layer: the first of them, counting the self-attention layers from 0 in the order in which they run. The
            reference implementation takes 10 of the 16 layers of SD1.x and 64 (also 44 and 54) of the 70 of SDXL.
            `AUTOMATIC` finds the same two in any UNet: the decoder's layers without those on its coarsest grid.

    Raises:
        IdentityEditError: when the network is no UNet, or start_layer is not one of its layers.
    """
    layers = [layer for layer in attention_layers(network) if layer.attends_to_itself]
    if start_layer == AUTOMATIC:
        decoder = [layer for layer in layers if layer.key[0] == "output"]
        coarsest = max((layer.downsampling for layer in decoder), default=0)
        chosen = [layer for layer in decoder if layer.downsampling < coarsest] or decoder
    else:
        if not 0 <= start_layer < len(layers):
            raise IdentityEditError(
                f"start_layer is {start_layer} but the model has {len(layers)} self-attention layers; choose a number "
                f"from 0 to {len(layers) - 1}, or {AUTOMATIC} for automatic."
            )
        chosen = layers[start_layer:]
    if not chosen:
        raise IdentityEditError("The model's decoder has no self-attention; choose start_layer by hand.")
    return {layer.key: layer for layer in chosen}


@dataclass
class SourceFeatures:
    """What the source offers to keys and values in one model call.

    Attributes:
        layers: the layers that are recorded and injected.
        recorded: (input to keys, input to values), each [rows, tokens, channels], for each layer and conditioning
            (by ComfyUI's uuid, which a conditioning keeps in both evaluations, in whatever order they are batched).
    """

    layers: Mapping[LayerKey, AttentionLayer]
    recorded: dict[tuple[LayerKey, Any], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def recording_patch(self) -> Patch:
        """An attn1_patch for the source's evaluation; it changes nothing."""

        def record(
            n: torch.Tensor, context: torch.Tensor | None, value: torch.Tensor | None, extra: dict[str, Any]
        ) -> Patched:
            key = layer_key(extra)
            if key in self.layers:
                for uuid, of_keys, of_values in by_conditioning(extra, *keys_and_values(n, context, value)):
                    self.recorded.setdefault((key, uuid), (of_keys, of_values))
            return n, context, value

        return record

    def injecting_patch(self, masks: MutualMasks | None = None) -> Patch:
        """An attn1_patch for the target's evaluation: keys and values from the source, conditioning by conditioning.

        A conditioning that the source was not evaluated with (one that another node adds) keeps its own. A source of
        one image serves every image of the target's batch.
        """

        def inject(
            n: torch.Tensor, context: torch.Tensor | None, value: torch.Tensor | None, extra: dict[str, Any]
        ) -> Patched:
            key = layer_key(extra)
            if key not in self.layers:
                return n, context, value
            keys, values = [], []
            for uuid, *own in by_conditioning(extra, *keys_and_values(n, context, value)):
                rows = own[0].shape[0]
                of_keys, of_values = self.recorded.get((key, uuid), own)
                keys.append(of_keys.repeat(rows // of_keys.shape[0], 1, 1))
                values.append(of_values.repeat(rows // of_values.shape[0], 1, 1))
            to_keys, to_values = torch.cat(keys), torch.cat(values)
            if masks is not None:
                masks.attend(self.layers[key], n, to_keys, to_values, extra)
            return n, to_keys, to_values

        return inject

    def missing(self) -> list[LayerKey]:
        """Layers that were not recorded although they should have been."""
        return [key for key in self.layers if all(recorded != key for recorded, _ in self.recorded)]


class MutualMasks:
    """Mask-guided mutual self-attention (Cao et al. 2023): subject from subject, background from background.

    A target cell inside the target mask sees only source cells inside the source mask, one outside only those outside.
    The masks are averaged onto a layer's grid and cut at one half; the reference implementation takes the nearest
    pixel. Where the source has no cell of a kind on a layer's grid, that kind sees all of them.

    The attention with the mask is computed beside the block's own and takes its place behind it, because a block gives
    no mask to its self-attention; in these layers another pack's `attn1_replace` has no effect.

    Args:
        source, target: [1 or B, H, W], 1 on the subject.
        entries: the guider's conditionings of this evaluation by uuid, for those with an area of their own.
        height, width: the latent's.
    """

    def __init__(
        self, source: torch.Tensor, target: torch.Tensor, entries: Mapping[Any, dict[str, Any]], height: int, width: int
    ) -> None:
        self._source, self._target = source, target
        self._entries = entries
        self._height, self._width = height, width
        self._attended: dict[LayerKey, torch.Tensor] = {}

    def attend(
        self,
        layer: AttentionLayer,
        n: torch.Tensor,
        to_keys: torch.Tensor,
        to_values: torch.Tensor,
        extra: dict[str, Any],
    ) -> None:
        """Compute a layer's masked attention and keep it for `output_patch`."""
        shape = extra["activations_shape"][2:]
        cells = int(shape[0]) * int(shape[1])
        if n.shape[1] != cells or to_keys.shape[1] != cells:
            raise IdentityEditError(
                "Masks of mutual self-attention need whole layers, but another patch merges or cuts their cells; "
                "remove token merging or HyperTile, or the masks."
            )
        rows = n.shape[0] // len(extra["uuids"])
        # A finite number instead of -inf: every attention function takes it, in any dtype.
        forbidden = torch.finfo(n.dtype).min / 2
        biases = []
        for uuid in extra["uuids"]:
            source = self._on_grid(self._source, uuid, shape, rows, n.device).unsqueeze(1)  # [B, 1, keys]
            target = self._on_grid(self._target, uuid, shape, rows, n.device).unsqueeze(2)  # [B, queries, 1]
            allowed = source == target
            allowed |= ~allowed.any(dim=2, keepdim=True)
            biases.append(torch.zeros_like(allowed, dtype=n.dtype).masked_fill_(~allowed, forbidden))
        self._attended[layer.key] = layer.block.attn1(
            n, context=to_keys, value=to_values, mask=torch.cat(biases), transformer_options=extra
        )

    def output_patch(self) -> Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]:
        """An attn1_output_patch that puts the masked attention in its place."""

        def put(n: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
            return self._attended.pop(layer_key(extra), n)

        return put

    def _on_grid(
        self, mask: torch.Tensor, uuid: Any, shape: Sequence[int], rows: int, device: torch.device
    ) -> torch.Tensor:
        """[rows, cells] bool: which cells of a conditioning's part of the layer's grid are inside the mask."""
        region = region_of(self._entries.get(uuid, {}), self._height, self._width, shape)
        inside = region.part_of(mask, device).flatten(1) >= 0.5
        return inside.repeat(rows // inside.shape[0], 1)
