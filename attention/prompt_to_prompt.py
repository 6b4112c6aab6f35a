"""Prompt-to-prompt attention control (Hertz et al. 2023): the target uses the attention maps of the source.

Cross-attention determines which words form which part of an image. The target combines the source's attention weights,
token by token, with its own values: M' = mapped M_source where a token has a counterpart, M_target where it has none,
times a factor per token (the paper's word swap, refinement and re-weighting). Self-attention in early steps determines
the layout and is copied from the source completely.

The source is evaluated and recorded first, then the target, matched by conditioning (ComfyUI's uuid), however ComfyUI
batches them. Only the positive side is controlled, as in the reference implementation. If the two prompts are equal,
the model's own attention function is called with the source's queries and keys and the target's values, with the same
shapes as without control, so a target equal to its source is bit-identical.

Self-attention is controlled in front of the projections by the patch list `attn1_patch`, which other packs can share.
Mapped cross-attention needs the attention weights, for which ComfyUI has the single `attn2_replace` slot of a block. It
is occupied only during a model call, and a previous owner is still called: the result is the owner's output plus the
change that control makes to plain attention. This is exact for owners that add to plain attention, such as image prompt
adapters. For owners that compute a different text attention, such as regional prompts, it is approximate.

Read on ComfyUI 0.3.75: comfy/ldm/modules/attention.py (BasicTransformerBlock), comfy/samplers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from einops import rearrange
from torch.nn.functional import max_pool2d

from .errors import IdentityEditError
from .maps import MeanMap, cross_attention_columns, heads_apart
from .masks import blurred, resized
from .regions import region_of
from .sites import LayerKey, of_source
from .unet import AttentionLayer, Patched, by_conditioning, keys_and_values, layer_key, with_patches

REFERENCE_FACTOR, REFERENCE_CELLS = 4, 16
"""The reference implementation controls self-attention on grids of at most 16x16, and uses those of 16x16 for the local
blend: a quarter of the latent's 64x64."""

Replace = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]

SOURCE, TARGET = "source", "target"


def automatic_factor(layers: Sequence[AttentionLayer], height: int, width: int) -> int:
    """The downsampling factor of the reference implementation's 16x16 grid, for a latent of any size.

    The largest factor up to 4 whose grid has at least 16 positions along its long side, else the model's smallest: 4
    for SD1.x at 512x512 and SDXL at 1024x1024, 2 at 256x256.
    """
    present = sorted({layer.downsampling for layer in layers})
    large_enough = [
        factor for factor in present
        if factor <= REFERENCE_FACTOR and -(-max(height, width) // factor) >= REFERENCE_CELLS
    ]  # fmt: skip
    return large_enough[-1] if large_enough else present[0]


@dataclass(frozen=True)
class TokenMap:
    """Mapping of cross-attention from source tokens to target tokens.

    Attributes:
        mapper: [S, T] float32: fraction of each source token's weight that each target token gets.
        mapped: [T] bool: target tokens with a counterpart; the others keep their own weights.
        factors: [T] float32: factor of each target token's weight.
    """

    mapper: torch.Tensor
    mapped: torch.Tensor
    factors: torch.Tensor

    @cached_property
    def is_identity(self) -> bool:
        """Whether every token takes the weight of the source token at the same position, unchanged."""
        count = self.mapper.shape[0]
        return (
            self.mapper.shape[1] == count
            and bool(self.mapped.all())
            and bool((self.factors == 1).all())
            and torch.equal(self.mapper, torch.eye(count))
        )

    def weights(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The target's weights before the factors [..., N, T] float32, from M_source [..., N, S] and M_target."""
        return torch.where(self.mapped.to(target.device), source @ self.mapper.to(source.device), target)


class LocalBlend:
    """Mask of the blend words in source and target, from all model calls of a run so far.

    As in the reference implementation: the words' cross-attention averaged over heads, layers and steps, 3x3 max
    pooled, enlarged to the latent, divided by its maximum and thresholded; the union of source and target.

    Args:
        source_columns, target_columns: the words' tokens in each prompt; one of them may be empty.
        threshold: fraction of the largest attention above which a latent pixel belongs to a word.
        smoothed: blur the maps first, with a Gaussian of standard deviation 1 and 7 positions, as Shin et al. 2025 do
            for joint attention, whose maps are noisier.
    """

    def __init__(
        self, source_columns: Sequence[int], target_columns: Sequence[int], threshold: float, smoothed: bool = False
    ) -> None:
        self._smoothed = smoothed
        self.columns = {SOURCE: tuple(source_columns), TARGET: tuple(target_columns)}
        self._threshold = threshold
        self._means: dict[tuple[str, tuple[int, int]], MeanMap] = {}

    def add(self, of: str, maps: torch.Tensor, entry: dict[str, Any], height: int, width: int, shape: Any) -> None:
        """Add one layer's maps [B, positions] of a conditioning; `shape` is its rows and columns in that layer."""
        region = region_of(entry, height, width, shape)
        whole = (maps.shape[0], *region.grid)
        mean = self._means.setdefault((of, region.grid), MeanMap.empty(whole, whole, maps.device))
        mean.total[:, region.rows, region.columns] += maps.unflatten(1, region.shape)
        mean.weight[:, region.rows, region.columns] += 1.0

    def mask(self, height: int, width: int) -> torch.Tensor:
        """[B, 1, H, W] bool: where the latent may change.

        Raises:
            IdentityEditError: when no layer has been recorded.
        """
        masks = []
        for of, columns in self.columns.items():
            means = [mean for (owner, _), mean in self._means.items() if owner == of]
            if columns and means:
                rows, columns_of_grid = max(mean.total.shape[1:] for mean in means)
                total, weight = (
                    torch.stack([resized(getattr(mean, part), (rows, columns_of_grid)) for mean in means]).sum(dim=0)
                    for part in ("total", "weight")
                )
                mean_map = total / weight.clamp(min=1e-12)
                if self._smoothed:
                    mean_map = blurred(mean_map, 1.0, 3, "constant")
                spread = max_pool2d(mean_map.unsqueeze(1), 3, stride=1, padding=1).squeeze(1)
                enlarged = resized(spread, (height, width))
                masks.append(enlarged > self._threshold * enlarged.amax(dim=(1, 2), keepdim=True))
        if not masks:
            raise IdentityEditError(
                "The attention of the blend's words could not be read; remove token merging or HyperTile, or the words."
            )
        batch = max(mask.shape[0] for mask in masks)
        return torch.stack([mask.expand(batch, -1, -1) for mask in masks]).any(dim=0).unsqueeze(1)


@dataclass
class AttentionControl:
    """Prompt-to-prompt in one model call of the source and one of the target.

    Attributes:
        tokens: mapping of cross-attention from source to target tokens.
        cross_layers: layers with controlled cross-attention.
        self_layers: layers with controlled self-attention.
        entries: the controlled conditionings by uuid.
        height, width: the latent's size.
        blend: the local blend, or None.
        blend_layers: layers recorded for the local blend.
    """

    tokens: TokenMap
    cross_layers: Mapping[LayerKey, AttentionLayer]
    self_layers: Mapping[LayerKey, AttentionLayer]
    entries: Mapping[Any, dict[str, Any]]
    height: int
    width: int
    blend: LocalBlend | None = None
    blend_layers: Mapping[LayerKey, AttentionLayer] = field(default_factory=dict)
    _cross: dict[tuple[LayerKey, Any], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _self: dict[tuple[LayerKey, Any], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def recording(self, model_options: dict[str, Any] | None) -> dict[str, Any]:
        """Model options for the source's model call; they do not change its result."""
        options = with_patches(of_source(model_options), attn1_patch=self._record_self)
        return _with_attn2(options, self._keys(), self._record_cross)

    def injecting(self, model_options: dict[str, Any] | None) -> dict[str, Any]:
        """Model options for the target's model call, after the source's.

        Raises:
            IdentityEditError: when layers were not recorded.
        """
        recorded_cross, recorded_self = {key for key, _ in self._cross}, {key for key, _ in self._self}
        missing = [key for key in self._keys() if key not in recorded_cross]
        missing += [key for key in self.self_layers if key not in recorded_self]
        if missing:
            raise IdentityEditError(
                f"Attention control could not record the layers {missing}; remove the node that skips them (such as "
                f"DeepCache)."
            )
        return _with_attn2(with_patches(model_options, attn1_patch=self._inject_self), self._keys(), self._inject_cross)

    def _keys(self) -> list[LayerKey]:
        return [*self.cross_layers, *(key for key in self.blend_layers if key not in self.cross_layers)]

    def _record_self(
        self, n: torch.Tensor, context: torch.Tensor | None, value: torch.Tensor | None, extra: dict[str, Any]
    ) -> Patched:
        key = layer_key(extra)
        if key in self.self_layers:
            to_keys, _ = keys_and_values(n, context, value)
            for uuid, *rows in by_conditioning(extra, n, to_keys):
                if uuid in self.entries:
                    self._self.setdefault((key, uuid), (rows[0], rows[1]))
        return n, context, value

    def _inject_self(
        self, n: torch.Tensor, context: torch.Tensor | None, value: torch.Tensor | None, extra: dict[str, Any]
    ) -> Patched:
        """Queries and keys of the source, values of the target: M_source V_target, computed by the block itself."""
        key = layer_key(extra)
        if key not in self.self_layers:
            return n, context, value
        to_keys, to_values = keys_and_values(n, context, value)
        queries, keys = self._from_source(self._self, key, extra, n, to_keys)
        return queries, keys, to_values

    def _record_cross(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any], previous: Replace | None
    ) -> torch.Tensor:
        key = layer_key(extra)
        for uuid, *rows in by_conditioning(extra, q, k):
            if uuid in self.entries:
                self._cross.setdefault((key, uuid), (rows[0], rows[1]))
                count = _check_tokens(k, self.tokens.mapper.shape[0], SOURCE)
                self._add_to_blend(SOURCE, rows[0], rows[1][:, :count], uuid, extra)
        return (previous or _attention)(q, k, v, extra)

    def _inject_cross(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any], previous: Replace | None
    ) -> torch.Tensor:
        controlled = self._controlled(q, k, v, extra)
        if previous is None:
            return controlled
        return previous(q, k, v, extra) + (controlled - _attention(q, k, v, extra))

    def _controlled(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        """The block's attention, with the weights of controlled conditionings replaced."""
        key = layer_key(extra)
        is_controlled = key in self.cross_layers
        if not is_controlled or self.tokens.is_identity:
            if is_controlled:
                q, k = self._from_source(self._cross, key, extra, q, k)
            for uuid, queries, keys in by_conditioning(extra, q, k):
                if uuid in self.entries:
                    self._add_to_blend(TARGET, queries, keys[:, : self._target_tokens(keys)], uuid, extra)
            return _attention(q, k, v, extra)
        outputs = []
        for uuid, queries, keys, values, plain in by_conditioning(extra, q, k, v, _attention(q, k, v, extra)):
            if (key, uuid) not in self._cross:
                outputs.append(plain)
                continue
            output, maps = self._mapped(self._cross[key, uuid], queries, keys, values, extra["n_heads"])
            outputs.append(output)
            self._add_maps(TARGET, maps, uuid, extra)
        return torch.cat(outputs)

    def _mapped(
        self,
        source: tuple[torch.Tensor, torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """M' V computed in float32 [B, N, C], and the blend words' sum of M' [B, N]; image by image, to save memory."""
        source_tokens = _check_tokens(source[1], self.tokens.mapper.shape[0], SOURCE)
        target_tokens = self._target_tokens(k)
        columns = [] if self.blend is None else list(self.blend.columns[TARGET])
        outputs, maps = [], []
        for b in range(q.shape[0]):
            b_source = b % source[0].shape[0]
            # ComfyUI repeats a shorter prompt to the length of a longer one in the batch; one repetition is enough.
            m_source = attention_weights(source[0][b_source], source[1][b_source, :source_tokens], heads)
            m_target = attention_weights(q[b], k[b, :target_tokens], heads)
            weights = self.tokens.weights(m_source, m_target)
            maps.append(weights[:, :, columns].sum(dim=-1).mean(dim=0))
            values = heads_apart(v[b, :target_tokens], heads).float()
            attended = (weights * self.tokens.factors.to(weights.device)) @ values
            outputs.append(rearrange(attended, "h n d -> n (h d)"))
        return torch.stack(outputs).to(v.dtype), torch.stack(maps)

    def _from_source(
        self,
        recorded: Mapping[tuple[LayerKey, Any], tuple[torch.Tensor, torch.Tensor]],
        key: LayerKey,
        extra: dict[str, Any],
        *target: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Two tensors of the target with the rows of controlled conditionings replaced by the source's."""
        result: list[list[torch.Tensor]] = [[], []]
        for uuid, *rows in by_conditioning(extra, *target):
            source_rows = recorded.get((key, uuid), rows)
            for replaced, row, source in zip(result, rows, source_rows, strict=True):
                if source.shape[1] != row.shape[1]:
                    # The same prompt, repeated to the length of a longer negative prompt.
                    source = source[:, : self.tokens.mapper.shape[0]]
                    source = source.repeat(1, row.shape[1] // source.shape[1], 1)
                replaced.append(source.repeat(row.shape[0] // source.shape[0], 1, 1))
        return [torch.cat(replaced) for replaced in result]

    def _target_tokens(self, k: torch.Tensor) -> int:
        return _check_tokens(k, self.tokens.mapper.shape[1], TARGET)

    def _add_to_blend(self, of: str, q: torch.Tensor, k: torch.Tensor, uuid: Any, extra: dict[str, Any]) -> None:
        if self.blend is not None and self.blend.columns[of] and layer_key(extra) in self.blend_layers:
            queries, keys = (heads_apart(each, extra["n_heads"]) for each in (q, k))
            maps = cross_attention_columns(queries, keys, self.blend.columns[of])
            self._add_maps(of, maps, uuid, extra)

    def _add_maps(self, of: str, maps: torch.Tensor, uuid: Any, extra: dict[str, Any]) -> None:
        shape = extra["activations_shape"][2:]
        is_whole = maps.shape[1] == int(shape[0]) * int(shape[1])  # no merged or tiled tokens
        if self.blend is not None and layer_key(extra) in self.blend_layers and is_whole and self.blend.columns[of]:
            self.blend.add(of, maps, self.entries[uuid], self.height, self.width, shape)


def attention_weights(q: torch.Tensor, k: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)) of one image [heads, N, T] float32, from q [N, heads * d] and k [T, heads * d]."""
    queries, keys = heads_apart(q, heads).float(), heads_apart(k, heads).float()
    return (queries * queries.shape[-1] ** -0.5 @ keys.transpose(-1, -2)).softmax(dim=-1)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
    """A block's attention when its `attn2_replace` slot is empty."""
    return optimized_attention(
        q, k, v, extra["n_heads"], attn_precision=extra.get("attn_precision"), transformer_options=extra
    )


def _with_attn2(
    model_options: dict[str, Any],
    keys: Sequence[LayerKey],
    function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any], Replace | None], torch.Tensor],
) -> dict[str, Any]:
    """Model options with `function` in the attn2 slots of some layers; it gets the previous owner as argument."""
    transformer = model_options["transformer_options"]
    replace = transformer.get("patches_replace", {})
    slots = dict(replace.get("attn2", {}))

    def chained(previous: Replace | None) -> Replace:
        return lambda q, k, v, extra: function(q, k, v, extra, previous)

    # A slot may be keyed by block alone, without the transformer's index.
    chain = {key: chained(slots.get(key, slots.get(key[:2]))) for key in keys}
    replace = {**replace, "attn2": {**slots, **chain}}
    return {**model_options, "transformer_options": {**transformer, "patches_replace": replace}}


def _check_tokens(keys: torch.Tensor, count: int, whose: str) -> int:
    if keys.shape[1] % count != 0:
        raise IdentityEditError(
            f"The {whose}'s conditioning has {keys.shape[1]} tokens but its prompt has {count}; connect the "
            f"conditioning of the prompt that was used for attention control."
        )
    return count
