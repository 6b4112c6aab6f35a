"""Mutual self-attention of MasaCtrl (Cao et al. 2023): queries from one image, keys and values from another.

The source's input to the key and value projections of the self-attention is recorded and replaces that of the target,
which keeps its own layout but takes its content from the source. Both are patches on the list `attn1_patch`, which
other packs can share; the `replace` slot of a block stays free. They are last on the list, so that the recorded
activations are those that the projections receive.

Read on ComfyUI 0.3.75: comfy/ldm/modules/attention.py (BasicTransformerBlock).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import IdentityEditError
from .regions import region_of
from .sites import LayerKey, of_source
from .unet import AttentionLayer, Patched, attention_layers, by_conditioning, keys_and_values, layer_key, with_patches

AUTOMATIC = -1

Patch = Callable[[torch.Tensor, "torch.Tensor | None", "torch.Tensor | None", dict[str, Any]], Patched]


def mutual_layers(
    network: Any, start_layer: int = AUTOMATIC, end_layer: int = AUTOMATIC
) -> dict[LayerKey, AttentionLayer]:
    """The layers whose self-attention takes keys and values from the source.

    Args:
        network: the UNetModel.
        start_layer: index of the first one among the self-attention layers, from 0 in the order in which they run. The
            reference implementation uses 10 for the 16 layers of SD1.x and 64 (also 44 and 54) for the 70 of SDXL.
            `AUTOMATIC` generalizes 10 and 64 to any UNet: the decoder's layers except those on its coarsest grid.
        end_layer: index of the last one; `AUTOMATIC` is the network's last.

    Raises:
        IdentityEditError: when the network is not a UNet or has no such layer.
    """
    layers = [layer for layer in attention_layers(network) if layer.attends_to_itself]
    check_layers(start_layer, end_layer, len(layers), "self-attention layers")
    layers = layers if end_layer == AUTOMATIC else layers[: end_layer + 1]
    if start_layer == AUTOMATIC:
        decoder = [layer for layer in layers if layer.key[0] == "output"]
        coarsest = max((layer.downsampling for layer in decoder), default=0)
        chosen = [layer for layer in decoder if layer.downsampling < coarsest] or decoder
    else:
        chosen = layers[start_layer:]
    if not chosen:
        raise IdentityEditError("The model's decoder has no self-attention up to end_layer; set start_layer manually.")
    return {layer.key: layer for layer in chosen}


def check_layers(start_layer: int, end_layer: int, count: int, what: str) -> None:
    """Raise `IdentityEditError` unless both are automatic or among `count` layers, the last not before the first."""
    for name, layer in (("start_layer", start_layer), ("end_layer", end_layer)):
        if layer != AUTOMATIC and not 0 <= layer < count:
            raise IdentityEditError(
                f"{name} is {layer} but the model has {count} {what}; choose a number from 0 to {count - 1}, or "
                f"{AUTOMATIC} for automatic."
            )
    if AUTOMATIC != end_layer < start_layer:
        raise IdentityEditError(
            f"end_layer is {end_layer}, before start_layer {start_layer}; choose a larger end_layer, or {AUTOMATIC}."
        )


@dataclass
class SourceFeatures:
    """The source's key and value inputs in one model call.

    Attributes:
        layers: the layers to record and inject.
        masks: masks of the subject, or None.
        recorded: (input to keys, input to values), each [rows, tokens, channels], by layer and conditioning (ComfyUI's
            uuid, which is the same in both calls, whatever the batching order).
    """

    layers: Mapping[LayerKey, AttentionLayer]
    masks: MutualMasks | None = None
    recorded: dict[tuple[LayerKey, Any], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def recording_patch(self) -> Patch:
        """An attn1_patch for the source's model call; it does not change the activations."""

        def record(
            n: torch.Tensor, context: torch.Tensor | None, value: torch.Tensor | None, extra: dict[str, Any]
        ) -> Patched:
            key = layer_key(extra)
            if key in self.layers:
                for uuid, to_keys, to_values in by_conditioning(extra, *keys_and_values(n, context, value)):
                    self.recorded.setdefault((key, uuid), (to_keys, to_values))
            return n, context, value

        return record

    def injecting_patch(self, masks: MutualMasks | None = None) -> Patch:
        """An attn1_patch for the target's model call: keys and values from the source, per conditioning.

        A conditioning without a recorded source (added by another node) keeps its own keys and values. A single source
        image is used for every image of the target's batch.
        """

        def inject(
            n: torch.Tensor, context: torch.Tensor | None, value: torch.Tensor | None, extra: dict[str, Any]
        ) -> Patched:
            key = layer_key(extra)
            if key not in self.layers:
                return n, context, value
            keys, values = [], []
            for uuid, *target in by_conditioning(extra, *keys_and_values(n, context, value)):
                rows = target[0].shape[0]
                source_keys, source_values = self.recorded.get((key, uuid), target)
                keys.append(source_keys.repeat(rows // source_keys.shape[0], 1, 1))
                values.append(source_values.repeat(rows // source_values.shape[0], 1, 1))
            to_keys, to_values = torch.cat(keys), torch.cat(values)
            if masks is not None:
                masks.attend(self.layers[key], n, to_keys, to_values, extra)
            return n, to_keys, to_values

        return inject

    def recording(self, model_options: dict[str, Any] | None) -> dict[str, Any]:
        """Model options for the source's model call; they do not change its result."""
        return with_patches(of_source(model_options), attn1_patch=self.recording_patch())

    def injecting(self, model_options: dict[str, Any] | None) -> dict[str, Any]:
        """Model options for the target's model call, after the source's."""
        patches: dict[str, Any] = {"attn1_patch": self.injecting_patch(self.masks)}
        if self.masks is not None:
            patches["attn1_output_patch"] = self.masks.output_patch()
        return with_patches(model_options, **patches)

    def missing(self) -> list[LayerKey]:
        """Layers that should have been recorded but were not."""
        return [key for key in self.layers if all(recorded != key for recorded, _ in self.recorded)]


@dataclass
class MutualMasks:
    """Mask-guided mutual self-attention (Cao et al. 2023): subject attends to subject, background to background.

    Target positions inside the target mask attend only to source positions inside the source mask, and those outside
    only to those outside. The masks are averaged to a layer's grid and thresholded at one half; the reference
    implementation samples the nearest pixel. If the source has no position of a kind on a layer's grid, target
    positions of that kind attend to all positions.

    A block passes no mask to its self-attention, so the masked attention is computed separately and replaces the
    block's output; in these layers another pack's `attn1_replace` has no effect.

    Attributes:
        source, target: [1 or B, H, W], 1 on the subject.
        entries: the guider's conditionings of this model call by uuid, for their areas.
        height, width: the latent's size.
    """

    source: torch.Tensor
    target: torch.Tensor
    entries: Mapping[Any, dict[str, Any]]
    height: int
    width: int
    _attended: dict[LayerKey, torch.Tensor] = field(default_factory=dict)

    def attend(
        self,
        layer: AttentionLayer,
        n: torch.Tensor,
        to_keys: torch.Tensor,
        to_values: torch.Tensor,
        extra: dict[str, Any],
    ) -> None:
        """Compute a layer's masked attention and store it for `output_patch`."""
        shape = extra["activations_shape"][2:]
        count = int(shape[0]) * int(shape[1])
        if n.shape[1] != count or to_keys.shape[1] != count:
            raise IdentityEditError(
                "Masks of mutual self-attention cannot be used while another patch merges or tiles tokens; remove "
                "token merging or HyperTile, or the masks."
            )
        rows = n.shape[0] // len(extra["uuids"])
        # Finite instead of -inf, which not every attention function supports in every dtype.
        forbidden = torch.finfo(n.dtype).min / 2
        biases = []
        for uuid in extra["uuids"]:
            source = self.on_grid(self.source, uuid, shape, rows, n.device).unsqueeze(1)  # [B, 1, keys]
            target = self.on_grid(self.target, uuid, shape, rows, n.device).unsqueeze(2)  # [B, queries, 1]
            allowed = source == target
            allowed |= ~allowed.any(dim=2, keepdim=True)
            biases.append(torch.zeros_like(allowed, dtype=n.dtype).masked_fill_(~allowed, forbidden))
        self._attended[layer.key] = layer.block.attn1(
            n, context=to_keys, value=to_values, mask=torch.cat(biases), transformer_options=extra
        )

    def output_patch(self) -> Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]:
        """An attn1_output_patch that returns the masked attention."""

        def put(n: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
            return self._attended.pop(layer_key(extra), n)

        return put

    def on_grid(
        self, mask: torch.Tensor, uuid: Any, shape: Sequence[int], rows: int, device: torch.device
    ) -> torch.Tensor:
        """[rows, positions] bool: which positions of a conditioning's region on the grid are inside the mask."""
        region = region_of(self.entries.get(uuid, {}), self.height, self.width, shape)
        inside = region.part_of(mask, device).flatten(1) >= 0.5
        return inside.repeat(rows // inside.shape[0], 1)
