"""Style attention: conditions a diffusion model on a person's W+ code (PIDiff: Gu et al. 2025, sections 2.2.2, 2.2.3).

A mapping network turns groups of rows of the W+ code, from coarse to fine, into one token each, which style
cross-attention after every text cross-attention (`attention.style_cross_attention`) brings into the image. Both are
trained on a few images of one person (`train`); the diffusion model is frozen.

The paper uses Stable Diffusion 1.5. SD2.x and SDXL are our extension: tokens have the width of their text embeddings,
and every transformer block has a style cross-attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ...attention.capture import IdentityAttention
from ...attention.sites import choose_layers, on_one_gpu
from ...attention.style_cross_attention import (
    KINDS,
    Evaluation,
    LayerSize,
    StyleLayers,
    SubjectStyles,
    layer_sizes,
    style_patches,
    text_layers,
)
from ...attention.unet import attention_layers
from .. import engine
from ..shared.errors import IdentityEditError, check_batch_matches
from ..shared.masks import as_masks, cut_to
from ..shared.parsing import as_range, numbers, split_parts
from .w_plus import WPlus

ROW_GROUPS = "1-5, 6-9, 10-13, 14-18"
"""Groups of e4e's 18 rows in Gu et al. 2025, section 2.2.2. The published w-plus-adapter groups 4, 4, 4 and 6 rows."""
STRENGTH = 0.4
"""lambda for sampling in Gu et al. 2025, section 3.4.4; it is 1 in training."""

_KEY = "identity_edit_style_attention"
_WITHOUT_PROMPT = ("negative", "empty")
"""Guider sides that get the null style; "empty" is Perp-Neg Guider's."""

RowGroups = tuple[tuple[int, int], ...]
"""First and last row of each group, counted from 1."""


def parse_row_groups(text: str, count: int) -> RowGroups:
    """Parse groups of W+ code rows such as "1-5, 6-9, 10-13, 14-18".

    Args:
        text: ranges or single rows, separated by commas, in order from row 1 to the last.
        count: N, the number of rows of the encoder's W+ codes.

    Raises:
        IdentityEditError: when a part is not a range, or the groups do not contain every row once and in order.
    """
    groups = []
    for part in split_parts(text):
        ends = as_range(part)
        if ends is None:
            raise IdentityEditError(f"row_groups is '{text}'; write ranges such as '{ROW_GROUPS}'.")
        groups.append(ends)
    expected = 1
    for first, last in groups:
        if first != expected or last < first:
            expected = -1
            break
        expected = last + 1
    if expected != count + 1:
        raise IdentityEditError(
            f"row_groups is '{text}' but the W+ codes have {count} rows; write groups with the rows from 1 to {count} "
            f"once and in order, such as '{written_row_groups(proportional_row_groups(count))}'."
        )
    return tuple(groups)


def proportional_row_groups(count: int) -> RowGroups:
    """The paper's four groups of 18 rows, scaled to another number of rows, without empty groups."""
    lasts = sorted({max(1, round(count * last / 18)) for last in (5, 9, 13, 18)})
    return tuple((first + 1, last) for first, last in zip([0, *lasts[:-1]], lasts, strict=True))


def written_row_groups(groups: RowGroups) -> str:
    return ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in groups)


class MappingNetwork(nn.Module):
    """F of Gu et al. 2025, section 2.2.2: each mapping layer turns one group of W+ code rows into one token.

    The paper specifies neither the layers nor the null style. Here the layers are linear, and the tokens are normalized
    like IP-Adapter's, to the scale of text embeddings expected by the copied projections W'_k and W'_v. The input is
    the difference from the encoder's latent average (equivalent to other biases), so that the null style, that average,
    differs from a person from the first step on.
    """

    def __init__(self, groups: RowGroups, style_width: int, text_width: int) -> None:
        """
        Args:
            groups: groups of rows of the W+ codes.
            style_width: C, width of a row.
            text_width: width of the model's text embeddings.
        """
        super().__init__()
        self.groups = groups
        self.layers = nn.ModuleList(nn.Linear((last - first + 1) * style_width, text_width) for first, last in groups)
        self.normalize = nn.LayerNorm(text_width)

    def forward(self, rows: torch.Tensor, average: torch.Tensor) -> torch.Tensor:
        """W+ codes [B, N, C] and the latent average [N, C] -> tokens v [B, number of groups, text width]."""
        difference = rows - average
        tokens = [
            layer(difference[:, first - 1 : last].flatten(1))
            for layer, (first, last) in zip(self.layers, self.groups, strict=True)
        ]
        return self.normalize(torch.stack(tokens, dim=1))


class StyleNetwork(nn.Module):
    """The trained networks: the mapping network and the style cross-attention of every layer."""

    def __init__(
        self, groups: RowGroups, style_width: int, text_width: int, sizes: dict[tuple[str, int, int], LayerSize]
    ) -> None:
        super().__init__()
        self.mapping = MappingNetwork(groups, style_width, text_width)
        self.attention = StyleLayers(sizes)


@dataclass(frozen=True, eq=False)
class StyleAttention:
    """A trained style attention.

    Attributes:
        network: its weights, float32 and frozen. The mapping network stays on the CPU.
        kind: SEQUENTIAL (SCA) or PARALLEL (PCA).
        style_rows, style_width: N and C of its W+ codes.
        text_width: width of its model's text embeddings.
        encoder: name and fingerprint of the W+ encoder it was trained with.
        pseudo_word: the person's word in training captions, or "".
        model: tag of the model it was trained with.
        training: training metadata.
    """

    network: StyleNetwork
    kind: str
    style_rows: int
    style_width: int
    text_width: int
    encoder: str
    pseudo_word: str = ""
    model: engine.ModelTag | None = None
    training: dict[str, Any] = field(default_factory=dict)
    _patchers: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise IdentityEditError(f"The kind of a style attention is {self.kind}; choose {' or '.join(KINDS)}.")

    @property
    def row_groups(self) -> RowGroups:
        return self.network.mapping.groups

    def patcher(self, model: Any) -> Any:
        """Its style cross-attention as a ModelPatcher, which ComfyUI loads and offloads together with `model`.

        In the model's compute dtype; models with the same dtype and devices share one.
        """
        dtype = model.get_model_object("manual_cast_dtype") or model.model_dtype()
        key = dtype, model.load_device, model.offload_device
        if key not in self._patchers:
            # Outside inference mode, so that trainings can differentiate through it.
            with torch.inference_mode(False), torch.no_grad():
                layers = self.network.attention
                remake = partial(StyleLayers, layers.sizes)
                if dtype != torch.float32:
                    copy = remake()
                    copy.load_state_dict({name: weight.cpu() for name, weight in layers.state_dict().items()})
                    layers = copy.to(dtype)
                devices = {"load_device": model.load_device, "offload_device": model.offload_device}
                self._patchers[key] = engine.managed(layers, remake=remake, **devices)
        return self._patchers[key]


def style_tokens(style: StyleAttention, w_plus: WPlus) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens v of each person [P, n, text width] and of the null style [1, n, text width], float32 CPU.

    The null style (for classifier-free guidance) is the encoder's latent average through the mapping network.

    Raises:
        IdentityEditError: for W+ codes of another shape.
    """
    check_styles(style, w_plus)
    mapping = style.network.mapping
    with torch.inference_mode(False), torch.no_grad():
        rows, average = w_plus.rows.detach().clone().float(), w_plus.average.detach().clone().float()
        return mapping(rows, average), mapping(average[None], average)


def check_styles(style: StyleAttention, w_plus: WPlus) -> str | None:
    """Check that W+ codes fit a style attention.

    Returns:
        a warning if they are from another encoder, or None.

    Raises:
        IdentityEditError: for W+ codes of another shape.
    """
    if (w_plus.count, w_plus.width) != (style.style_rows, style.style_width):
        raise IdentityEditError(
            f"The W+ code has {w_plus.count} rows of {w_plus.width} but the style attention needs {style.style_rows} "
            f"of {style.style_width}; encode the image with the W+ encoder of its training ({style.encoder})."
        )
    if w_plus.encoder != style.encoder:
        return (
            f"The W+ code is from the encoder {w_plus.encoder} but the style attention was trained with "
            f"{style.encoder}; codes of different encoders are not interchangeable."
        )
    return None


def check_model(style: StyleAttention, model: Any) -> str | None:
    """Check that a style attention fits a model.

    Returns:
        a warning for another checkpoint of the same family, or None.

    Raises:
        IdentityEditError: for another family, with missing layers or other sizes.
    """
    engine.require(model, engine.Capability.CROSS_ATTENTION)
    sizes = layer_sizes(text_layers(model.get_model_object("diffusion_model")))
    if sizes != style.network.attention.sizes:
        trained_with = f" ({style.model.architecture})" if style.model is not None else ""
        raise IdentityEditError(
            f"The style attention has {len(style.network.attention.sizes)} layers for text embeddings of "
            f"{style.text_width} channels, and this model has {len(sizes)} layers, {engine.require(model).text_width} "
            f"channels, or other sizes; load a checkpoint of the family it was trained with{trained_with}."
        )
    if style.model is not None:
        tag = engine.model_tag(model)
        if tag.difference(style.model) is not None:
            return "The style attention was trained with another checkpoint; the person may look less like themselves."
    return None


def parse_schedule(text: str) -> tuple[float, ...]:
    """Parse factors of lambda such as "0, 1", or "" for none.

    Raises:
        IdentityEditError: when a part is not a finite number.
    """
    factors = numbers(text)
    if factors is None or not bool(torch.isfinite(torch.tensor(factors)).all()):
        raise IdentityEditError(f"schedule is '{text}'; write numbers separated by commas, such as '0, 1', or nothing.")
    return tuple(factors)


def strength_at(
    sampling: Any, sigma: float, strength: float, start_percent: float, end_percent: float, schedule: Sequence[float]
) -> float:
    """lambda at a noise level.

    Args:
        sampling: the model's sampling object.
        sigma: the noise level.
        strength: lambda.
        start_percent, end_percent: range of timesteps in which it applies, as fractions from the noisiest, both
            inclusive, as for ComfyUI's conditionings.
        schedule: factors of lambda, evenly spaced from start to end and linearly interpolated; empty for constant 1.
    """
    if not sampling.percent_to_sigma(end_percent) <= sigma <= sampling.percent_to_sigma(start_percent):
        return 0.0
    if not schedule:
        return strength
    percent = 1.0 - float(sampling.timestep(torch.tensor(sigma))) / 999.0  # as in ComfyUI's percent_to_sigma
    length = max(end_percent - start_percent, 1e-9)
    place = min(max((percent - start_percent) / length, 0.0), 1.0) * (len(schedule) - 1)
    before = min(int(place), len(schedule) - 1)
    after = min(before + 1, len(schedule) - 1)
    return strength * (schedule[before] + (place - before) * (schedule[after] - schedule[before]))


def apply_style_attention(
    model: Any,
    style: StyleAttention,
    w_plus: WPlus,
    *,
    strength: float = STRENGTH,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    schedule: Sequence[float] = (),
    mask: torch.Tensor | None = None,
    attention: IdentityAttention | None = None,
) -> Any:
    """A clone of MODEL conditioned on a person's W+ code (Gu et al. 2025, section 2.2.5), for any sampler and guider.

    Can be applied several times for several people: their outputs are summed, and masks restrict each person to a
    region. The negative side gets the null style, as in training.

    Args:
        model: MODEL, Stable Diffusion 1.x, 2.x or XL.
        style: a style attention trained with its family.
        w_plus: W+ code of one image for the whole batch, or one for each.
        strength: lambda; 0 disables it.
        start_percent, end_percent, schedule: see `strength_at`.
        mask: [1 or B, H, W], 0 to 1, of the person; of any size, stretched to the latent.
        attention: filled by every run with the attention to the style tokens `attention.columns` (figure 3), the mean
            over heads, steps and the layers of `attention.choice`; None records none.

    Raises:
        IdentityEditError: when an input cannot be used.
    """
    check_model(style, model)
    tokens, null = style_tokens(style, w_plus)
    if not 0.0 <= start_percent <= end_percent <= 1.0:
        raise IdentityEditError(
            f"start_percent is {start_percent:g} and end_percent {end_percent:g}; choose 0 <= start <= end <= 1."
        )
    if not bool(torch.isfinite(torch.tensor(strength))):
        raise IdentityEditError(f"strength is {strength}; choose a number, such as {STRENGTH}.")
    if attention is not None and max(attention.columns) >= tokens.shape[1]:
        raise IdentityEditError(
            f"recorded_token is {max(attention.columns) + 1}, but the style attention has {tokens.shape[1]} style "
            f"tokens; choose one of them, or 0."
        )
    if strength == 0.0:
        return model.clone()
    person_mask = None if mask is None else as_masks(mask, "mask")
    styles = SubjectStyles(tokens, null, strength, person_mask)
    network = model.get_model_object("diffusion_model")
    recorded_layers: set[Any] = set()

    def record(key: Any, extra: Any, probabilities: torch.Tensor) -> None:
        if attention is not None and key in recorded_layers:
            styles.record(attention, probabilities, extra)

    def predict_noise(
        executor: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: Any = None, seed: Any = None
    ) -> torch.Tensor:
        guider = executor.class_obj
        check_batch_matches(tokens.shape[0], x.shape[0], "w_plus")
        if person_mask is not None:
            check_batch_matches(person_mask.shape[0], x.shape[0], "mask")
            styles.mask = cut_to(person_mask, x.shape[-2], x.shape[-1])
        sampling = guider.model_patcher.get_model_object("model_sampling")
        sigma = float(timestep.max())
        before, styles.evaluation = (
            styles.evaluation,
            Evaluation(
                strength=strength_at(sampling, sigma, strength, start_percent, end_percent, schedule),
                null=frozenset(entry.get("uuid") for name in _WITHOUT_PROMPT for entry in guider.conds.get(name) or ()),
                entries={entry.get("uuid"): entry for side in guider.conds.values() for entry in side or ()},
                height=x.shape[-2],
                width=x.shape[-1],
            ),
        )
        try:
            return executor(x, timestep, on_one_gpu(model_options), seed)
        finally:
            styles.evaluation = before

    def outer_sample(executor: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if attention is not None:
            attention.begin((noise.shape[-2], noise.shape[-1]))
            chosen = choose_layers(attention_layers(network), noise.shape[-2], noise.shape[-1], attention.choice)
            recorded_layers.clear()
            recorded_layers.update(layer.key for layer in chosen)
        try:
            return executor(noise, *args, **kwargs)
        finally:
            styles.forget()
            if attention is not None:
                attention.to_cpu()

    patcher = style.patcher(model)
    patches = style_patches(network, patcher.model, styles, style.kind, None if attention is None else record)
    clone = engine.with_wrappers(model, _KEY, predict_noise, outer_sample, replace=False)
    for name, patch in patches.items():
        clone.set_model_patch(patch, name)
    # One key per style attention, so that several people who share it load it once.
    clone.set_additional_models(f"{_KEY}_{id(patcher.model)}", [patcher])
    return clone


def described(style: StyleAttention) -> str:
    """One-line description of a style attention for reports."""
    name = f" of '{style.pseudo_word}'" if style.pseudo_word else ""
    return (
        f"Style attention{name}: {style.kind}, {len(style.row_groups)} tokens of the rows "
        f"{written_row_groups(style.row_groups)}, {len(style.network.attention.sizes)} layers, encoder {style.encoder}"
    )
