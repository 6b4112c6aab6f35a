"""Prompt-to-prompt attention control (Hertz et al. 2023): a target attends where its source does.

Cross-attention decides which words form which part of an image. The target's weights are taken from the source's,
token by token, with its own values: M' = mapped M_source where a token has a counterpart, M_target where it has none,
times a factor for each token (the paper's word swap, refinement and re-weighting). Early self-attention fixes the
layout, and is taken from the source as a whole.

The source is evaluated first and recorded, the target afterwards, conditioning by conditioning (by ComfyUI's uuid), so
it does not matter how ComfyUI batches or splits them. Only the positive side is controlled, as in the reference
implementation. Where nothing differs between the two prompts, the model's own attention function gets the source's
queries and keys and the target's values, in a call of the very shape that it has without control: a target that equals
its source is then sampled to the same bits.

Self-attention is exchanged on the list `attn1_patch`, in front of the projections, which other packs share. Mapped
cross-attention needs the weights themselves, for which ComfyUI has the one `attn2_replace` slot of a block. It is taken
for the time of an evaluation only, and a previous owner is called: the result is what it returns, plus what control
changes of the plain attention. That is exact for owners who add something to the plain attention, such as image prompt
adapters. An owner who computes another attention of the text, such as regional prompts, keeps its own and gets the
difference on top: those two cannot be composed exactly.

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
from .masks import resized
from .regions import region_of
from .sites import LayerKey
from .unet import AttentionLayer, Patched, by_conditioning, keys_and_values, layer_key, with_patches

REFERENCE_FACTOR, REFERENCE_CELLS = 4, 16
"""The reference implementation controls self-attention on grids of at most 16x16 cells, and finds words for the local
blend on those of 16x16: a quarter of the latent's 64x64."""

Replace = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]

_SOURCE, _TARGET = "source", "target"


def automatic_factor(layers: Sequence[AttentionLayer], height: int, width: int) -> int:
    """The downsampling factor of the reference implementation's 16x16 grid, for a latent of any size.

    The largest factor up to 4 whose grid has at least 16 cells along its long side, else the model's smallest: 4 for
    SD1.x at 512x512 and SDXL at 1024x1024, 2 at 256x256.
    """
    present = sorted({layer.downsampling for layer in layers})
    large_enough = [
        factor for factor in present
        if factor <= REFERENCE_FACTOR and -(-max(height, width) // factor) >= REFERENCE_CELLS
    ]  # fmt: skip
    return large_enough[-1] if large_enough else present[0]


@dataclass(frozen=True)
class TokenMap:
    """How the target's tokens take the cross-attention of the source's.

    Attributes:
        mapper: [S, T] float32: share of each source token's weight that each target token gets.
        mapped: [T] bool: the target tokens that have a counterpart; the others keep their own weights.
        factors: [T] float32: what each target token's weight is multiplied by.
    """

    mapper: torch.Tensor
    mapped: torch.Tensor
    factors: torch.Tensor

    @cached_property
    def is_identity(self) -> bool:
        """Whether every token takes the weight of the token at its own place, unchanged."""
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
    """Where the named words are, in the source or in the target, over the evaluations of a run so far.

    As in the reference implementation: the mean over heads, layers and steps of the words' cross-attention, spread over
    3x3 cells, enlarged to the latent, divided by its maximum, cut at a threshold; the union of source and target.

    Args:
        source_columns, target_columns: the words' tokens in either prompt; one of them may be empty.
        threshold: share of the largest attention above which a cell belongs to a word.
    """

    def __init__(self, source_columns: Sequence[int], target_columns: Sequence[int], threshold: float) -> None:
        self.columns = {_SOURCE: tuple(source_columns), _TARGET: tuple(target_columns)}
        self._threshold = threshold
        self._means: dict[tuple[str, tuple[int, int]], MeanMap] = {}

    def add(self, of: str, maps: torch.Tensor, entry: dict[str, Any], height: int, width: int, shape: Any) -> None:
        """Add one layer's maps [B, cells] of a conditioning, whose activations there have `shape` rows and columns."""
        region = region_of(entry, height, width, shape)
        whole = (maps.shape[0], *region.grid)
        mean = self._means.setdefault((of, region.grid), MeanMap.empty(whole, whole, maps.device))
        mean.total[:, region.rows, region.columns] += maps.unflatten(1, region.shape)
        mean.weight[:, region.rows, region.columns] += 1.0

    def mask(self, height: int, width: int) -> torch.Tensor:
        """[B, 1, H, W] bool: where the latent may change.

        Raises:
            IdentityEditError: when no layer has been read.
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
                spread = max_pool2d((total / weight.clamp(min=1e-12)).unsqueeze(1), 3, stride=1, padding=1).squeeze(1)
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
        tokens: how the target's tokens take the source's cross-attention.
        cross_layers: the layers whose cross-attention is controlled.
        self_layers: the layers whose self-attention is.
        entries: the conditionings that are controlled, by uuid.
        height, width: the latent's.
        blend: what finds the words for the local blend, or None.
        blend_layers: the layers in which it does.
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
        """Model options for the source's evaluation; they change nothing."""
        return _with_attn2(with_patches(model_options, attn1_patch=self._record_self), self._keys(), self._record_cross)

    def injecting(self, model_options: dict[str, Any] | None) -> dict[str, Any]:
        """Model options for the target's evaluation, after the source's.

        Raises:
            IdentityEditError: when a layer of the source was not evaluated, with its key.
        """
        recorded_cross, recorded_self = {key for key, _ in self._cross}, {key for key, _ in self._self}
        missing = [key for key in self._keys() if key not in recorded_cross]
        missing += [key for key in self.self_layers if key not in recorded_self]
        if missing:
            raise IdentityEditError(
                f"Attention control found no attention in the layers {missing}; remove the node that skips them (such "
                f"as a cache of deep features)."
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
        """Queries and keys of the source, values of the target: M_source V_target, by the block's own attention."""
        key = layer_key(extra)
        if key not in self.self_layers:
            return n, context, value
        to_keys, to_values = keys_and_values(n, context, value)
        queries, keys = self._of_the_source(self._self, key, extra, n, to_keys)
        return queries, keys, to_values

    def _record_cross(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any], previous: Replace | None
    ) -> torch.Tensor:
        key = layer_key(extra)
        for uuid, *rows in by_conditioning(extra, q, k):
            if uuid in self.entries:
                self._cross.setdefault((key, uuid), (rows[0], rows[1]))
                count = _check_tokens(k, self.tokens.mapper.shape[0], _SOURCE)
                self._add_to_blend(_SOURCE, rows[0], rows[1][:, :count], uuid, extra)
        return (previous or _attention)(q, k, v, extra)

    def _inject_cross(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any], previous: Replace | None
    ) -> torch.Tensor:
        controlled = self._controlled(q, k, v, extra)
        if previous is None:
            return controlled
        return previous(q, k, v, extra) + (controlled - _attention(q, k, v, extra))

    def _controlled(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        """The block's attention, with the weights of the controlled conditionings' rows exchanged."""
        key = layer_key(extra)
        is_controlled = key in self.cross_layers
        if not is_controlled or self.tokens.is_identity:
            if is_controlled:
                q, k = self._of_the_source(self._cross, key, extra, q, k)
            for uuid, of_q, of_k in by_conditioning(extra, q, k):
                if uuid in self.entries:
                    self._add_to_blend(_TARGET, of_q, of_k[:, : self._target_tokens(of_k)], uuid, extra)
            return _attention(q, k, v, extra)
        parts = []
        for uuid, of_q, of_k, of_v, own in by_conditioning(extra, q, k, v, _attention(q, k, v, extra)):
            if (key, uuid) not in self._cross:
                parts.append(own)
                continue
            rows, maps = self._mapped(self._cross[key, uuid], of_q, of_k, of_v, extra["n_heads"])
            parts.append(rows)
            self._add_maps(_TARGET, maps, uuid, extra)
        return torch.cat(parts)

    def _mapped(
        self,
        source: tuple[torch.Tensor, torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """M' V in float32 [B, N, C], and the blend's words in M' [B, N]; image by image, to save memory."""
        source_tokens = _check_tokens(source[1], self.tokens.mapper.shape[0], _SOURCE)
        target_tokens = self._target_tokens(k)
        columns = [] if self.blend is None else list(self.blend.columns[_TARGET])
        outputs, maps = [], []
        for b in range(q.shape[0]):
            of_source = b % source[0].shape[0]
            # A shorter prompt is repeated to the length of a longer one beside it: once is enough.
            m_source = attention_weights(source[0][of_source], source[1][of_source, :source_tokens], heads)
            m_target = attention_weights(q[b], k[b, :target_tokens], heads)
            weights = self.tokens.weights(m_source, m_target)
            maps.append(weights[:, :, columns].sum(dim=-1).mean(dim=0))
            values = heads_apart(v[b, :target_tokens], heads).float()
            attended = (weights * self.tokens.factors.to(weights.device)) @ values
            outputs.append(rearrange(attended, "h n d -> n (h d)"))
        return torch.stack(outputs).to(v.dtype), torch.stack(maps)

    def _of_the_source(
        self,
        recorded: Mapping[tuple[LayerKey, Any], tuple[torch.Tensor, torch.Tensor]],
        key: LayerKey,
        extra: dict[str, Any],
        *own: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Two tensors of the target with the rows of the controlled conditionings exchanged for the source's."""
        result: list[list[torch.Tensor]] = [[], []]
        for uuid, *rows in by_conditioning(extra, *own):
            of_source = recorded.get((key, uuid), rows)
            for parts, mine, its in zip(result, rows, of_source, strict=True):
                if its.shape[1] != mine.shape[1]:
                    # The same prompt, repeated more often beside a longer negative one.
                    its = its[:, : self.tokens.mapper.shape[0]]
                    its = its.repeat(1, mine.shape[1] // its.shape[1], 1)
                parts.append(its.repeat(mine.shape[0] // its.shape[0], 1, 1))
        return [torch.cat(parts) for parts in result]

    def _target_tokens(self, k: torch.Tensor) -> int:
        return _check_tokens(k, self.tokens.mapper.shape[1], _TARGET)

    def _add_to_blend(self, of: str, q: torch.Tensor, k: torch.Tensor, uuid: Any, extra: dict[str, Any]) -> None:
        if self.blend is not None and self.blend.columns[of] and layer_key(extra) in self.blend_layers:
            queries, keys = (heads_apart(each, extra["n_heads"]) for each in (q, k))
            maps = cross_attention_columns(queries, keys, self.blend.columns[of])
            self._add_maps(of, maps, uuid, extra)

    def _add_maps(self, of: str, maps: torch.Tensor, uuid: Any, extra: dict[str, Any]) -> None:
        shape = extra["activations_shape"][2:]
        is_whole = maps.shape[1] == int(shape[0]) * int(shape[1])  # no cells were merged or tiled before
        if self.blend is not None and layer_key(extra) in self.blend_layers and is_whole and self.blend.columns[of]:
            self.blend.add(of, maps, self.entries[uuid], self.height, self.width, shape)


def attention_weights(q: torch.Tensor, k: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)) of one image [heads, N, T] float32, from q [N, heads * d] and k [T, heads * d]."""
    queries, keys = heads_apart(q, heads).float(), heads_apart(k, heads).float()
    return (queries * queries.shape[-1] ** -0.5 @ keys.transpose(-1, -2)).softmax(dim=-1)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
    """What a block computes when nobody owns its slot."""
    return optimized_attention(
        q, k, v, extra["n_heads"], attn_precision=extra.get("attn_precision"), transformer_options=extra
    )


def _with_attn2(
    model_options: dict[str, Any],
    keys: Sequence[LayerKey],
    function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any], Replace | None], torch.Tensor],
) -> dict[str, Any]:
    """Model options with `function` in the attn2 slots of some layers, in front of their owners."""
    transformer = model_options["transformer_options"]
    replace = transformer.get("patches_replace", {})
    slots = dict(replace.get("attn2", {}))

    def chained(previous: Replace | None) -> Replace:
        return lambda q, k, v, extra: function(q, k, v, extra, previous)

    # A slot may belong to a block as a whole, without the transformer's index.
    chain = {key: chained(slots.get(key, slots.get(key[:2]))) for key in keys}
    replace = {**replace, "attn2": {**slots, **chain}}
    return {**model_options, "transformer_options": {**transformer, "patches_replace": replace}}


def _check_tokens(keys: torch.Tensor, count: int, whose: str) -> int:
    if keys.shape[1] % count != 0:
        raise IdentityEditError(
            f"The {whose}'s conditioning has {keys.shape[1]} tokens but its prompt {count}; connect the conditioning "
            f"of the prompt that attention control was made for."
        )
    return count
