"""Style cross-attention, SCA (PIDiff, section 2.2.3): a block attends to a person's style tokens in addition to text.

    Out = softmax(Q K^T / sqrt(d)) V                                            the text cross-attention, eq. 1
    SCA = softmax(Q' K'^T / sqrt(d)) V'     Q' = Out W'_q, K' = v W'_k, V' = v W'_v                        eq. 3
    Out_final = Out + lambda SCA                                                                           eq. 4

with v the style tokens. The paper omits the output projection; in Stable Diffusion the block's own, to_out, follows the
sum, and only W'_q, W'_k and W'_v are trained (section 2.2.4). to_out is linear except for its bias, so
to_out(Out + lambda SCA) = to_out(Out) + lambda (to_out(SCA) - to_out(0)), and SCA can be added to the block's output by
a patch on the list `attn2_output_patch`, which other packs can share, instead of `attn2_replace`, which only one pack
can own. Such a patch receives to_out(Out), which is the query here ("a cross-attention block behind the text
cross-attention block", figure 4). The published w-plus-adapter uses the query before to_out; the two differ by one
square matrix in front of the trained W'_q.

The parallel variant (section 3.4.3) differs only in the query: the hidden state from which the text cross-attention
computes its own query. It is initialized like IP-Adapter (Ye et al. 2023), which shares the text's query.

With only four style tokens, both large products can be computed on the tokens first: the query projection with the
keys, and the values with to_out. A layer with C channels, h heads and n tokens then costs 2 h n C multiplications per
position instead of 2 C^2 (SD1.5: 64 instead of 640 to 2560 columns), with the same result.

Read on ComfyUI 0.3.75 and 0.33.0: comfy/ldm/modules/attention.py (BasicTransformerBlock), comfy/ops.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.ops
import torch
from einops import rearrange
from torch import nn

from .capture import IdentityAttention
from .errors import IdentityEditError
from .regions import Region, region_of
from .sites import LayerKey
from .unet import AttentionLayer, Patched, attention_layers, layer_key

SEQUENTIAL, PARALLEL = "sequential", "parallel"
KINDS = (SEQUENTIAL, PARALLEL)
"""Query of the style cross-attention: the text cross-attention's output (SCA) or its input (PCA)."""

_TEXT_OUTPUT = "identity_edit_text_output"
_HIDDEN_STATE = "identity_edit_hidden_state"
"""Keys in the dictionary that a block passes to all its patches."""

LayerSize = tuple[int, int, int]
"""Channels of a block's activations, of all its heads combined, and of its text embeddings."""


class StyleCrossAttention(nn.Module):
    """SCA of one layer: W'_q, W'_k and W'_v."""

    def __init__(self, size: LayerSize) -> None:
        """Weights are uninitialized; they are copied from the text cross-attention or loaded afterwards."""
        super().__init__()
        channels, inner, text = size
        # These layers cast their weights to the dtype and device of their input.
        self.to_q = _layer(channels, inner)
        self.to_k = _layer(text, inner)
        self.to_v = _layer(text, inner)

    @property
    def size(self) -> LayerSize:
        return self.to_q.in_features, self.to_q.out_features, self.to_k.in_features

    def forward(
        self,
        query: torch.Tensor,
        tokens: torch.Tensor,
        heads: int,
        to_out: Callable[[torch.Tensor], torch.Tensor],
        record: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """to_out(SCA) - to_out(0).

        Args:
            query: [B, N, C], the input of the query projection.
            tokens: v [B, n, text channels], the style tokens of each row.
            heads: h, the layer's number of heads.
            to_out: the text cross-attention's output projection.
            record: called with the attention [B, N, h, n] in float32.

        Returns:
            [B, N, C].
        """
        keys = rearrange(self.to_k(tokens), "b n (h d) -> b n h d", h=heads)
        values = rearrange(self.to_v(tokens), "b n (h d) -> b h n 1 d", h=heads)
        n, d = keys.shape[1], keys.shape[-1]
        # Q' K'^T / sqrt(d) = query (W'_q K'^T / sqrt(d))                                                    eq. 3
        with _weight(self.to_q, query) as w_q:
            w_q = rearrange(w_q, "(h d) c -> h d c", h=heads)
            to_scores = torch.einsum("bnhd,hdc->bchn", keys * d**-0.5, w_q).flatten(2)
        scores = (query @ to_scores).unflatten(-1, (heads, n))
        probabilities = scores.float().softmax(dim=-1)
        if record is not None:
            record(probabilities)
        attention = probabilities.to(query.dtype).flatten(2)  # [B, N, h n]
        # to_out(softmax(.) V') = softmax(.) to_out(V'), per head: its values, with zeros for all other heads
        diagonal = torch.eye(heads, dtype=values.dtype, device=values.device)[:, None, :, None]
        head_values = rearrange(values * diagonal, "b h n k d -> b (h n) (k d)")
        bias = to_out(torch.zeros_like(head_values[:1, :1]))
        return attention @ (to_out(head_values) - bias)


def _layer(inputs: int, outputs: int) -> nn.Linear:
    layer = comfy.ops.manual_cast.Linear(inputs, outputs, bias=False)
    if layer.weight is None:  # with dynamic VRAM ComfyUI's layers allocate no weight until one is loaded
        layer.weight = nn.Parameter(torch.empty(outputs, inputs))
    return layer


@contextlib.contextmanager
def _weight(layer: nn.Linear, like: torch.Tensor) -> Iterator[torch.Tensor]:
    """A layer's weight in the dtype and on the device of a tensor within this context, cast as in ComfyUI's layers."""
    release = getattr(comfy.ops, "uncast_bias_weight", None)
    if release is None:  # older than 0.3.68
        yield comfy.ops.cast_bias_weight(layer, like)[0]
        return
    weight, bias, handle = comfy.ops.cast_bias_weight(layer, like, offloadable=True)
    try:
        yield weight
    finally:
        release(layer, weight, bias, handle)


class StyleLayers(nn.Module):
    """SCA of all text layers of a UNet, by key."""

    def __init__(self, sizes: Mapping[LayerKey, LayerSize]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({_name(key): StyleCrossAttention(size) for key, size in sizes.items()})

    def __getitem__(self, key: LayerKey) -> StyleCrossAttention:
        layer = self.layers[_name(key)]
        assert isinstance(layer, StyleCrossAttention)
        return layer

    @property
    def sizes(self) -> dict[LayerKey, LayerSize]:
        return {_key(name): self[_key(name)].size for name in self.layers}


def _name(key: LayerKey) -> str:
    return "_".join(str(part) for part in key)


def _key(name: str) -> LayerKey:
    block, number, index = name.split("_")
    return block, int(number), int(index)


def text_layers(network: Any) -> dict[LayerKey, AttentionLayer]:
    """The layers of a UNet that attend to text, by key; each gets an SCA.

    Raises:
        IdentityEditError: when the network is not a UNet or has no such layer.
    """
    layers = {layer.key: layer for layer in attention_layers(network) if layer.attends_to_text}
    if not layers:
        raise IdentityEditError("The model has no cross-attention; load a text-to-image checkpoint.")
    return layers


def layer_sizes(layers: Mapping[LayerKey, AttentionLayer]) -> dict[LayerKey, LayerSize]:
    """The SCA sizes of these layers."""
    text = {key: layer.block.attn2 for key, layer in layers.items()}
    return {key: (a.to_q.in_features, a.to_q.out_features, a.to_k.in_features) for key, a in text.items()}


def style_patches(
    network: Any,
    style_layers: StyleLayers,
    styles: Callable[[torch.Tensor, Mapping[str, Any]], tuple[torch.Tensor, float | torch.Tensor] | None],
    kind: str = SEQUENTIAL,
    record: Callable[[LayerKey, Mapping[str, Any], torch.Tensor], None] | None = None,
) -> dict[str, Callable[..., Any]]:
    """The patches that add SCA to a UNet, by patch list.

    Several SCAs on one model use the same query, that of the text cross-attention, and their outputs are summed, so
    their order does not matter.

    Args:
        network: the UNetModel.
        style_layers: SCA of all its text layers, on any device.
        styles: called with a block's rows [B, N, channels] and its `transformer_options`; returns the style tokens
            [B, n, C] of each row, with the rows' dtype and device, and lambda, a number or [B, N, 1]; or None for no
            style.
        kind: SEQUENTIAL or PARALLEL.
        record: called with a layer's key, the block's `transformer_options`, and the attention to the style tokens
            [B, N, h, n].
    """
    to_out = {key: layer.block.attn2.to_out for key, layer in text_layers(network).items()}

    def keep_hidden_state(
        n: torch.Tensor, context: torch.Tensor | None, value: torch.Tensor | None, extra: dict[str, Any]
    ) -> Patched:
        extra[_HIDDEN_STATE] = n
        return n, context, value

    def add_style(n: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        key = layer_key(extra)
        if key not in to_out:
            return n
        text_output = extra.setdefault(_TEXT_OUTPUT, n)
        style = styles(text_output, extra)
        if style is None:  # lambda 0 is bit-identical to no style
            return n
        tokens, strength = style
        query = text_output if kind == SEQUENTIAL else extra[_HIDDEN_STATE]
        seen = None if record is None else partial(record, key, extra)
        added = style_layers[key](query, tokens, extra["n_heads"], to_out[key], seen)
        return n + strength * added  # Out_final = Out + lambda SCA                                          eq. 4

    patches: dict[str, Callable[..., Any]] = {"attn2_output_patch": add_style}
    if kind == PARALLEL:
        patches["attn2_patch"] = keep_hidden_state
    return patches


@dataclass(frozen=True)
class Evaluation:
    """A guider's current model call.

    Attributes:
        strength: lambda at this noise level.
        null: uuids of the unconditional side's conditionings, which get the null style.
        entries: the guider's conditionings by uuid.
        height, width: the latent's size.
    """

    strength: float
    null: frozenset[Any]
    entries: Mapping[Any, Mapping[str, Any]]
    height: int
    width: int


@dataclass
class SubjectStyles:
    """One person's `styles` (see `style_patches`) during sampling.

    Attributes:
        tokens: v [P, n, C] of the person, P one or the number of images.
        null: v [1, n, C] of the null style, for the unconditional side.
        strength: lambda outside a guider.
        mask: [1 or B, H, W], 0 to 1, of the person, averaged to each layer's grid; None for the whole image.
        evaluation: the current model call, or None outside a guider.
    """

    tokens: torch.Tensor
    null: torch.Tensor
    strength: float
    mask: torch.Tensor | None = None
    evaluation: Evaluation | None = None
    _rows: dict[Any, torch.Tensor] = field(default_factory=dict)
    _masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def forget(self) -> None:
        """Clear the device copies of a run."""
        self._rows.clear()
        self._masks.clear()

    def __call__(
        self, rows: torch.Tensor, extra: Mapping[str, Any]
    ) -> tuple[torch.Tensor, float | torch.Tensor] | None:
        strength = self.strength if self.evaluation is None else self.evaluation.strength
        if strength == 0.0:
            return None
        sides = extra.get("cond_or_uncond", (0,))
        uuids = extra.get("uuids", (None,) * len(sides))
        null = tuple(self._is_null(side, uuid) for side, uuid in zip(sides, uuids, strict=True))
        tokens = self._tokens(rows, null)
        if self.mask is None:
            return tokens, strength
        return tokens, strength * self._mask_weights(self.mask, rows, uuids, extra["activations_shape"][2:])

    def record(self, attention: IdentityAttention, probabilities: torch.Tensor, extra: Mapping[str, Any]) -> None:
        """Add one layer's attention [B, N, h, n] to the style tokens `attention.columns`, of the positive side."""
        grid = int(extra["activations_shape"][2]), int(extra["activations_shape"][3])
        if self.evaluation is None or probabilities.shape[1] != grid[0] * grid[1]:
            return  # another patch merged or tiled the positions
        each = probabilities.shape[0] // len(extra["uuids"])
        maps = probabilities[..., list(attention.columns)].sum(dim=-1).mean(dim=-1).unflatten(1, grid)
        for rows, side, uuid in zip(maps.split(each), extra["cond_or_uncond"], extra["uuids"], strict=True):
            if not self._is_null(side, uuid):
                region = self._region(uuid, grid)
                weight = region.weight(dict(self.evaluation.entries.get(uuid, {})), rows.device, each)
                attention.add_cross_attention(rows, region, weight, each)

    def _is_null(self, side: int, uuid: Any) -> bool:
        if self.evaluation is not None and uuid in self.evaluation.entries:
            return uuid in self.evaluation.null
        return side == 1  # ComfyUI's rule: 0 is the conditional side, 1 the unconditional

    def _tokens(self, rows: torch.Tensor, null: Sequence[bool]) -> torch.Tensor:
        """Style tokens [B, n, C] for all rows of a batch of conditionings."""
        each = rows.shape[0] // len(null)
        if self.tokens.shape[0] not in (1, each):
            raise IdentityEditError(
                f"There are W+ codes of {self.tokens.shape[0]} images for a batch of {each}; give one for all, or one "
                f"for each."
            )
        key = tuple(null), each, rows.dtype, rows.device
        if key not in self._rows:
            sides = [(self.null if is_null else self.tokens).expand(each, -1, -1) for is_null in null]
            self._rows = {key: torch.cat(sides).to(rows)}  # only the latest: all layers of a model call share it
        return self._rows[key]

    def _mask_weights(
        self, mask: torch.Tensor, rows: torch.Tensor, uuids: Sequence[Any], shape: Sequence[int]
    ) -> torch.Tensor:
        """The mask on a layer's grid, [B, N, 1]."""
        grid = int(shape[0]), int(shape[1])
        if rows.shape[1] != grid[0] * grid[1]:
            raise IdentityEditError(
                "The mask of a style cannot be used while another patch merges or tiles tokens; remove token merging, "
                "or the mask."
            )
        key = tuple(uuids), rows.shape[0], grid, rows.dtype, rows.device
        if key not in self._masks:
            each = rows.shape[0] // len(uuids)
            masks = [self._region(uuid, grid).part_of(mask, rows.device).flatten(1) for uuid in uuids]
            if masks[0].shape[0] not in (1, each):
                raise IdentityEditError(
                    f"The mask holds {masks[0].shape[0]} masks for a batch of {each}; give one for all, or one for "
                    f"each."
                )
            self._masks[key] = torch.cat([part.expand(each, -1) for part in masks]).unsqueeze(-1).to(rows.dtype)
        return self._masks[key]

    def _region(self, uuid: Any, grid: tuple[int, int]) -> Region:
        if self.evaluation is None or uuid not in self.evaluation.entries:
            return Region(grid, grid)
        return region_of(dict(self.evaluation.entries[uuid]), self.evaluation.height, self.evaluation.width, grid)
