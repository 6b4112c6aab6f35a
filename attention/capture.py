"""Records a model's attention during sampling, without changing the result.

The identity-aware branch of Liu et al. 2024 (section 2.2, figure 4): the cross-attention of an identity prompt is
computed from the same queries as the prompt's, and only its maps are kept. Self-attention maps are computed from the
normalized activations that the block's self-attention receives.

It uses the patch lists `attn1_patch` and `attn2_patch`, which other packs can share, and wrappers; the `replace` slot
of a block, which only one pack can own, stays free. Patches return their input tensors, so the latent is bit-identical.
The cost is an additional projection to queries (and keys) in each recorded layer, because a block's own projections
are not available to patches.

Read on ComfyUI 0.3.75: comfy/samplers.py, comfy/ldm/modules/attention.py.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from .errors import IdentityEditError
from .maps import MeanMap, heads_apart
from .regions import Region, region_of
from .sites import AUTOMATIC, Attended, LayerKey, choose_layers, is_of_source, on_one_gpu
from .unet import AttentionLayer, Patched, attention_layers, layer_key

_KEY = "identity_edit_attention"
MAXIMUM_SELF_ATTENTION_POSITIONS = 32 * 32
"""Self-attention is recorded on the finest chosen grid with at most this many positions: the map of a 32x32 grid takes
4 MiB per image, that of a 64x64 grid 16 times the memory and time."""

Grid = tuple[int, int]


class IdentityAttention:
    """Attention maps of one sampling run, recorded by the model that `capture_attention` returns.

    Each run of that model clears it first. Maps are weighted like ComfyUI's predictions of several conditionings: by
    their strength, inside their areas and masks.

    Attributes:
        evaluations: number of recorded model calls.
        cross: for each grid (rows, columns), the running mean of the identity tokens' cross-attention over layers and
            model calls, as a weighted sum and its weights (see `identity_mask.rough_mask`).
        self_grid: the grid of the self-attention maps, or None if none were recorded.
        steps: cross-attention of every step (from 0) with its tokens apart, if `by_step`: the maps of the first image's
            tokens, then those of the second and so on, in place of the batch.
        step_count: number of steps of the run.
        latent_size: height and width of the run's latents; (0, 0) before the first run.
        is_joint: whether it was read from joint attention.
    """

    def __init__(
        self,
        columns: Sequence[int],
        choice: str = AUTOMATIC,
        self_attention: bool = True,
        by_step: bool = False,
        is_joint: bool = False,
    ) -> None:
        self.columns = tuple(columns)
        self.choice = choice
        self.reads_self_attention = self_attention
        self.by_step = by_step
        self.is_joint = is_joint
        self.begin((0, 0))

    def __deepcopy__(self, memo: dict[int, Any]) -> IdentityAttention:
        return self  # shared by all clones of a model

    def begin(self, latent_size: Grid) -> None:
        """Discard the last run for one of latents of this height and width."""
        self.latent_size = latent_size
        self.evaluations = 0
        self.cross: dict[Grid, MeanMap] = {}
        self.self_grid: Grid | None = None
        self._self: MeanMap | None = None
        self.steps: dict[int, IdentityAttention] = {}
        self.step_count = 0

    def at_step(self, step: int) -> IdentityAttention:
        """The entry of `steps`, new if needed."""
        return self.steps.setdefault(step, IdentityAttention(self.columns, self.choice, False, is_joint=self.is_joint))

    def self_attention(self) -> torch.Tensor:
        """Mean self-attention [B, N, N] float32 over the positions of `self_grid`; each row sums to 1.

        A position not covered by any conditioning attends only to itself.

        Raises:
            IdentityEditError: when none was recorded.
        """
        if self._self is None:
            raise IdentityEditError(
                "No self-attention was recorded; sample with the model of Identity Attention first, with a "
                "self-attention power above 0."
            )
        mean = self._self
        covered = (mean.weight > 0).unsqueeze(-1)
        identity = torch.eye(mean.total.shape[-1], device=mean.total.device)
        return torch.where(covered, mean.total / mean.weight.clamp(min=1e-12).unsqueeze(-1), identity)

    def add_cross_attention(self, maps: torch.Tensor, region: Region, weight: torch.Tensor, batch: int) -> None:
        """Add one layer's maps [B, h, w] of a region, with weights [1 or B, h, w]."""
        shape = (batch, *region.grid)
        mean = self.cross.setdefault(region.grid, MeanMap.empty(shape, shape, maps.device))
        rows, columns = region.rows, region.columns
        mean.total[:, rows, columns] += maps * weight
        mean.weight[:, rows, columns] += weight

    def add_self_attention(self, maps: torch.Tensor, region: Region, weight: torch.Tensor, batch: int) -> None:
        """Add one layer's maps [B, n, n] of a region's n positions, with weights [1 or B, h, w] of the queries."""
        if self._self is None:
            count = region.grid[0] * region.grid[1]
            self._self = MeanMap.empty((batch, count, count), (batch, count), maps.device)
            self.self_grid = region.grid
        weights = weight.flatten(1)
        if region.is_whole:
            self._self.total += maps.mul_(weights.unsqueeze(-1))
            self._self.weight += weights
        else:
            indices = region.indices(maps.device)
            self._self.total[:, indices.unsqueeze(1), indices] += maps * weights.unsqueeze(-1)
            self._self.weight[:, indices] += weights

    def to_cpu(self) -> None:
        """Move the maps to the CPU."""
        for attention in self.steps.values():
            attention.to_cpu()
        self.cross = {grid: mean.cpu() for grid, mean in self.cross.items()}
        self._self = None if self._self is None else self._self.cpu()


@dataclass
class Run:
    """State of one sampling run."""

    batch: int
    height: int
    width: int
    cross_layers: Mapping[LayerKey, Any]
    self_layers: Mapping[LayerKey, Any]
    fired: set[tuple[str, LayerKey]] = field(default_factory=set)
    context: torch.Tensor | None = None
    sigmas: Sequence[float] = ()
    step: int = 0
    guider: Any = None  # set until the model call's first batch of conditionings
    side: int | None = None  # index of the positive side while its rows are recorded
    entries: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def missing(self) -> list[LayerKey]:
        """Layers that could not be recorded: their patch did not run, or another patch changed the positions."""
        expected = [("cross", key) for key in self.cross_layers] + [("self", key) for key in self.self_layers]
        return [item[1] for item in expected if item not in self.fired]

    def rows_to_read(self, options: Mapping[str, Any]) -> Iterator[tuple[slice, dict[str, Any]]]:
        """The positive side's rows of a batch of conditionings, and the conditioning of each.

        ComfyUI concatenates the conditionings of both sides into one batch, in any order, or evaluates them in separate
        calls; `cond_or_uncond` and `uuids` identify the rows.
        """
        for number, (side, uuid) in enumerate(zip(options["cond_or_uncond"], options["uuids"], strict=True)):
            if side == self.side:
                yield slice(number * self.batch, (number + 1) * self.batch), self.entries.get(uuid, {})

    def region(self, entry: dict[str, Any], shape: Sequence[int], device: torch.device) -> tuple[Region, torch.Tensor]:
        """Region of a conditioning on a layer's grid, and its weights [1 or B, h, w]."""
        region = region_of(entry, self.height, self.width, shape)
        return region, region.weight(entry, device, self.batch)


def capture_attention(
    model: Any,
    context: torch.Tensor | None,
    columns: Sequence[int],
    layers: str = AUTOMATIC,
    self_attention: bool = True,
    by_step: bool = False,
) -> tuple[Any, IdentityAttention]:
    """A clone of `model` that records where it attends to the identity prompt's tokens during sampling.

    Works with any sampler and guider. Only the positive side is recorded, once per model call of the guider (additional
    evaluations of guidance nodes, such as perturbed attention, are not). Layers whose positions another patch merges or
    tiles (token merging, HyperTile) cannot be recorded; a warning names them.

    Args:
        model: MODEL (a ModelPatcher) with a Stable Diffusion 1.x, 2.x or XL UNet; not modified.
        context: [B or 1, T, C], the identity prompt's embedding. The softmax runs over all T tokens. None reads the
            prompt that is sampled, with each step's own embedding where it has one.
        columns: the tokens whose attention is summed, from 0, or from -1 for the last; of an identity prompt never
            start, end or padding tokens.
        layers: see `sites.choose_layers`.
        self_attention: also record self-attention, on one grid (see `MAXIMUM_SELF_ATTENTION_POSITIONS`).
        by_step: also keep the map of every token at every step (`IdentityAttention.steps`).

    Returns:
        the clone, and the object that its runs fill.

    Raises:
        IdentityEditError: for an unsupported model, missing layers, or tokens outside the embedding.
    """
    all_layers = attention_layers(model.get_model_object("diffusion_model"))
    choose_layers(all_layers, 64, 64, layers)  # raises early for invalid choices
    if context is not None:
        check_columns(columns, context, "identity prompt")
    attention = IdentityAttention(columns, layers, self_attention, by_step)
    return _UNetRecorder(attention, None if context is None else context.detach()).on(model), attention


def check_columns(columns: Sequence[int], context: torch.Tensor, name: str) -> None:
    """Raise `IdentityEditError` unless there are tokens and all are in an embedding [B, T, C]."""
    count = context.shape[1]
    if len(columns) == 0 or not all(-count <= column < count for column in columns):
        raise IdentityEditError(
            f"The identity tokens {list(columns)} are not among the {count} tokens of the {name}; choose at least one "
            f"of its words."
        )


class Recorder(ABC):
    """Fills an `IdentityAttention` during sampling: wrappers track the model calls, hooks read the layers."""

    def __init__(self, attention: IdentityAttention) -> None:
        self._attention = attention
        self._run: Run | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        return self  # cloning a model deep-copies its options, which contain these bound methods

    def on(self, model: Any) -> Any:
        """A clone of a model with this recorder attached."""
        clone = self._with_hooks(model)
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, self._outer_sample)
        clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, _KEY, self._predict_noise)
        clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, _KEY, self._calc_cond_batch)
        return clone

    @abstractmethod
    def _with_hooks(self, model: Any) -> Any:
        """A clone of a model whose chosen layers this recorder reads."""

    @abstractmethod
    def _begin(self, network: Any, noise: torch.Tensor) -> Run:
        """The state of a run for these latents."""

    def _outer_sample(self, executor: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        network = executor.class_obj.model_patcher.get_model_object("diffusion_model")
        self._attention.begin((noise.shape[-2], noise.shape[-1]))
        self._run = run = self._begin(network, noise)
        run.sigmas = args[2].tolist() if len(args) > 2 else kwargs["sigmas"].tolist()
        self._attention.step_count = len(run.sigmas) - 1
        try:
            result = executor(noise, *args, **kwargs)
            missing = run.missing()
            if self._attention.evaluations > 0 and missing:
                logging.warning(
                    "IdentityEdit: the attention of %d layers could not be recorded (%s) because another patch merges "
                    "or tiles their positions.",
                    len(missing),
                    missing,
                )
            return result
        finally:
            self._run = None
            self._attention.to_cpu()

    def _predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        run = self._run
        if run is None:
            return executor(*args, **kwargs)
        run.guider = executor.class_obj
        sigma = float((args[1] if len(args) > 1 else kwargs["timestep"]).max())
        # A call between two steps' noise levels belongs to the earlier step.
        run.step = max(0, sum(level > sigma * (1 - 1e-4) for level in run.sigmas) - 1)
        try:
            return executor(*args, **kwargs)
        finally:
            run.guider = None

    def _calc_cond_batch(
        self,
        executor: Any,
        network: Any,
        conds: Any,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any],
    ) -> Any:
        run = self._run
        side = None if run is None or run.guider is None else _positive_side(run.guider, conds)
        if run is None or side is None or is_of_source(model_options) or x.shape[-2:] != (run.height, run.width):
            return executor(network, conds, x, timestep, model_options)
        if self._attention.evaluations == 0:
            run.batch = x.shape[0]  # Prompt-to-Prompt evaluates the targets alone
        if x.shape[0] != run.batch:
            return executor(network, conds, x, timestep, model_options)
        guider, run.guider = run.guider, None
        return self._evaluate(run, guider, side, executor, network, conds, x, timestep, on_one_gpu(model_options))

    def _evaluate(
        self, run: Run, guider: Any, side: int, executor: Any, network: Any, conds: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A model call in which the layers of one side are read."""
        run.side, run.entries = side, {entry["uuid"]: entry for entry in conds[side]}
        try:
            result = executor(network, conds, *args, **kwargs)
            self._attention.evaluations += 1
            return result
        finally:
            run.side, run.entries = None, {}


class _UNetRecorder(Recorder):
    """Reads cross-attention and self-attention layers by patches."""

    def __init__(self, attention: IdentityAttention, context: torch.Tensor | None) -> None:
        super().__init__(attention)
        self._context = context

    def _with_hooks(self, model: Any) -> Any:
        clone = model.clone()
        clone.set_model_attn2_patch(self._read_cross_attention)
        if self._attention.reads_self_attention:
            clone.set_model_attn1_patch(self._read_self_attention)
        return clone

    def _begin(self, network: Any, noise: torch.Tensor) -> Run:
        batch, height, width = noise.shape[0], noise.shape[-2], noise.shape[-1]
        if self._context is not None and self._context.shape[0] not in (1, batch):
            raise IdentityEditError(
                f"The identity prompt has {self._context.shape[0]} embeddings for a batch of {batch} latents; give one "
                f"for all, or one for each."
            )
        chosen = choose_layers(attention_layers(network), height, width, self._attention.choice)
        cross = {layer.key: layer for layer in chosen if layer.attends_to_text}
        self_layers: list[AttentionLayer] = []
        if self._attention.reads_self_attention:
            factor = _self_attention_factor(chosen, height, width)
            self_layers = [layer for layer in chosen if layer.attends_to_itself and layer.downsampling == factor]
        return Run(batch, height, width, cross, {layer.key: layer for layer in self_layers})

    @torch.no_grad()
    def _read_cross_attention(
        self, n: torch.Tensor, context: torch.Tensor | None, value: torch.Tensor | None, extra: dict[str, Any]
    ) -> Patched:
        run = self._run
        layer = None if run is None or run.side is None else run.cross_layers.get(layer_key(extra))
        if run is not None and layer is not None:
            for rows, region, weight, entry in _read_rows(run, n, extra):
                query, key = layer.block.attn2.to_q(rows), layer.block.attn2.to_k(self._context_of(run, entry, n))
                query, key = (heads_apart(each, extra["n_heads"]) for each in (query, key))
                attended = Attended(query, key, region.shape)
                columns = [column % key.shape[-2] for column in self._attention.columns]
                self._attention.add_cross_attention(attended.to_text(columns), region, weight, run.batch)
                if self._attention.by_step:
                    each = torch.stack([attended.to_text([column]) for column in columns], dim=1).flatten(0, 1)
                    weights = weight.expand(run.batch, -1, -1).repeat_interleave(len(columns), dim=0)
                    at_step = self._attention.at_step(run.step)
                    at_step.add_cross_attention(each, region, weights, len(each))
                run.fired.add(("cross", layer.key))
        return n, context, value

    def _context_of(self, run: Run, entry: dict[str, Any], n: torch.Tensor) -> torch.Tensor:
        """The embedding whose tokens are attended to: of the identity prompt, or of the sampled conditioning."""
        if self._context is None:
            sampled = entry["model_conds"]["c_crossattn"].cond
            check_columns(self._attention.columns, sampled, "prompt")
            return sampled.to(device=n.device, dtype=n.dtype)
        if run.context is None:
            run.context = self._context.to(device=n.device, dtype=n.dtype)
        return run.context

    @torch.no_grad()
    def _read_self_attention(
        self, n: torch.Tensor, context: torch.Tensor | None, value: torch.Tensor | None, extra: dict[str, Any]
    ) -> Patched:
        run = self._run
        layer = None if run is None or run.side is None else run.self_layers.get(layer_key(extra))
        if run is not None and layer is not None:
            for rows, region, weight, _ in _read_rows(run, n, extra):
                if self._attention.self_grid not in (None, region.grid):
                    continue
                query, key = layer.block.attn1.to_q(rows), layer.block.attn1.to_k(rows)
                query, key = (heads_apart(each, extra["n_heads"]) for each in (query, key))
                maps = Attended(query, key, region.shape).to_image()
                self._attention.add_self_attention(maps, region, weight, run.batch)
                run.fired.add(("self", layer.key))
        return n, context, value


def _read_rows(
    run: Run, n: torch.Tensor, extra: dict[str, Any]
) -> Iterator[tuple[torch.Tensor, Region, torch.Tensor, dict[str, Any]]]:
    """The positive side's rows of a layer's activations: (activations [B, positions, C], region, weight, entry)."""
    shape = tuple(extra["activations_shape"][2:])
    if n.shape[0] != run.batch * len(extra["cond_or_uncond"]) or n.shape[1] != shape[0] * shape[1]:
        return  # another patch merged or tiled the positions
    for rows, entry in run.rows_to_read(extra):
        yield n[rows], *run.region(entry, shape, n.device), entry


def _self_attention_factor(layers: Sequence[AttentionLayer], height: int, width: int) -> int:
    """Downsampling factor of the finest chosen grid of at most 32x32 positions, or else of the coarsest grid."""
    factors = sorted({layer.downsampling for layer in layers})

    def count(factor: int) -> int:
        return -(-height // factor) * -(-width // factor)

    return next((factor for factor in factors if count(factor) <= MAXIMUM_SELF_ATTENTION_POSITIONS), factors[-1])


def _positive_side(guider: Any, conds: Sequence[Any]) -> int | None:
    """Index of the guider's positive side among the sides evaluated together, or None if it is not included.

    Stock guiders pass their own list object, not always first (last in Dual CFG Guider). If it is another object,
    ComfyUI's rule applies: the first side is the conditional one.
    """
    positive = getattr(guider, "conds", {}).get("positive")
    for index, side in enumerate(conds):
        if side is not None and side is positive:
            return index
    return 0 if len(conds) > 0 and conds[0] is not None else None
