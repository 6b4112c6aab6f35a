"""Attention sites: the layers of a network that attend to text or to the image, for any model family.

A UNet attends to text in cross-attention layers and to the image in self-attention layers (`unet`). A transformer with
joint attention, such as Flux, has one sequence of text and image in every block (`joint`). Both describe a layer as a
`Site` and its queries and keys as `Attended`.

This hides the differences between families from the techniques: the position of text among the keys (the only keys of
a UNet's cross-attention; before or after the image in a joint sequence), the grid (down to 1/8 of the latent in a UNet;
2x2 patches of the latent in joint attention), and the hook (patch lists, or `optimized_attention_override`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from .errors import IdentityEditError
from .maps import cross_attention_columns, reduced_attention_map, self_attention_map

AUTOMATIC, ALL = "automatic", "all"
FIRST, MIDDLE, LAST = "first third", "middle third", "last third"
LAYER_CHOICES = (AUTOMATIC, "1", "2", "4", "8", "1, 2", "2, 4", "4, 8", "1, 2, 4", FIRST, MIDDLE, LAST, ALL)
"""Options for users: automatic or all layers; of UNets, downsampling factors relative to the latent; of joint
attention, thirds of the blocks in execution order."""

SMALLEST_AUTOMATIC_GRID = 16
"""Minimum positions along the long side for a grid that can outline a subject."""

LayerKey = tuple[str, int, int]
"""Block name, block number, and the transformer's index in the block; see `unet` and `joint`."""


@dataclass(frozen=True)
class Site:
    """One attention layer.

    Attributes:
        key: its position in the network.
        downsampling: downsampling factor of its grid relative to the latent, per side: 1, 2, 4 or 8.
    """

    key: LayerKey
    downsampling: int

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Its grid (rows, columns) for a latent of this size; downsampling rounds up."""
        return -(-height // self.downsampling), -(-width // self.downsampling)


AnySite = TypeVar("AnySite", bound=Site)


@dataclass(frozen=True)
class Attended:
    """Queries and keys of one layer in one model call, after norms and position embeddings.

    Attributes:
        query, key: [B, heads, N, d] and [B or 1, heads, M, d]; in grouped-query attention the keys have fewer heads.
        grid: rows and columns of the image positions.
        text: slice of the text tokens among the keys.
        image: slice of the image positions (row by row) among the queries, and among the keys if they include them.
        references: slices of reference images in a joint sequence.
        bias: [B or 1, heads or 1, N or 1, M] added to the logits (an attention mask), or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    grid: tuple[int, int]
    text: slice = field(default_factory=lambda: slice(0, None))
    image: slice = field(default_factory=lambda: slice(0, None))
    references: tuple[slice, ...] = ()
    bias: torch.Tensor | None = None

    def to_text(self, tokens: Sequence[int]) -> torch.Tensor:
        """[B, rows, columns] float32, 0 to 1: attention of each image position to some text tokens; softmax over all
        keys, mean over heads, sum over the tokens."""
        columns = [self.text.start + token for token in tokens]
        of_image = cross_attention_columns(*self._image_queries_and_keys(), columns, self._image_bias())
        return of_image.unflatten(1, self.grid)

    def to_image(self, factor: int = 1) -> torch.Tensor:
        """[B, n, n] float32: attention between image positions, mean over heads. Rows sum to 1, or to less in a joint
        sequence, where the text has the rest. With a factor, between cells of `factor` x `factor` positions."""
        query, key = self._image_queries_and_keys()
        if factor > 1:
            return reduced_attention_map(query, key, self._image_bias(), self.image, self.grid, factor)
        return self_attention_map(query, key, self._image_bias())[..., self.image]

    def part(self, rows: slice) -> Attended:
        """Part of the batch."""
        bias = self.bias if self.bias is None or self.bias.shape[0] == 1 else self.bias[rows]
        return replace(self, query=self.query[rows], key=self.key[rows], bias=bias)

    def _image_queries_and_keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        shared_by = self.query.shape[1] // self.key.shape[1]  # heads that share a key, in grouped-query attention
        key = self.key if shared_by == 1 else self.key.repeat_interleave(shared_by, dim=1)
        return self.query[:, :, self.image], key

    def _image_bias(self) -> torch.Tensor | None:
        return self.bias if self.bias is None or self.bias.shape[2] == 1 else self.bias[:, :, self.image]


def automatic_factors(sites: Sequence[Site], height: int, width: int) -> tuple[int, ...]:
    """The two downsampling factors whose layers outline a subject best.

    2 and 4, which are the 32x32 and 16x16 layers of SD1.x at 512x512 and the 64x64 and 32x32 layers of SDXL at
    1024x1024: coarser ones cannot outline a subject, and layers at the latent's full resolution hardly separate
    subjects. For latents with fewer than 16 positions along the long side at factor 2, the model's two finest.

    Args:
        sites: all layers of the model.
        height, width: the latent's size.
    """
    factors = sorted({site.downsampling for site in sites})
    large_enough = -(-max(height, width) // 2) >= SMALLEST_AUTOMATIC_GRID
    coarser = [factor for factor in factors if factor >= 2]
    return tuple((coarser if large_enough and coarser else factors)[:2])


def choose_layers(sites: Sequence[AnySite], height: int, width: int, choice: str) -> list[AnySite]:
    """The layers selected by `choice` for a latent of `height` x `width`.

    Args:
        choice: one of `LAYER_CHOICES`, or any downsampling factors separated by commas.

    Raises:
        IdentityEditError: when the choice is invalid or the model has no layer with a factor.
    """
    if choice == ALL:
        return list(sites)
    present = {site.downsampling for site in sites}
    try:
        automatic = choice == AUTOMATIC
        factors = set(automatic_factors(sites, height, width) if automatic else (int(f) for f in choice.split(",")))
    except ValueError:
        factors = set()
    if not factors or not factors <= present:
        raise IdentityEditError(
            f"layers is {choice!r} but this model has attention at 1/{', 1/'.join(map(str, sorted(present)))} of the "
            f"latent's size; choose from {', '.join(map(str, sorted(present)))}, or automatic."
        )
    return [site for site in sites if site.downsampling in factors]


def choose_blocks(sites: Sequence[Site], choice: str) -> list[Site]:
    """The blocks with joint attention selected by `choice`: a third, or all, also for "automatic".

    Args:
        sites: all blocks in execution order.
        choice: one of `LAYER_CHOICES`.

    Raises:
        IdentityEditError: when the choice is for UNets.
    """
    third = len(sites) // 3
    ranges = {
        FIRST: slice(0, max(1, third)),
        MIDDLE: slice(third, len(sites) - third),
        LAST: slice(-max(1, third), None),
        ALL: slice(0, None),
        AUTOMATIC: slice(0, None),
    }
    if choice not in ranges:
        raise IdentityEditError(
            f"layers is {choice!r} but all {len(sites)} blocks of this model have the same grid; choose "
            f"{', '.join(ranges)}."
        )
    return list(sites[ranges[choice]])


_OF_SOURCE = "identity_edit_of_source"


def of_source(model_options: dict[str, Any] | None) -> dict[str, Any]:
    """A copy of model options that marks a model call as that of a source image or prompt, which is not recorded."""
    options = dict(model_options or {})
    return {**options, "transformer_options": {**options.get("transformer_options", {}), _OF_SOURCE: True}}


def on_one_gpu(model_options: dict[str, Any] | None) -> dict[str, Any]:
    """A copy of model options for a model call on the model's own GPU: ComfyUI's clones on other GPUs have other layers
    and tensors than those that are read or exchanged."""
    return {name: value for name, value in (model_options or {}).items() if name != "multigpu_clones"}


def is_of_source(model_options: dict[str, Any]) -> bool:
    return bool(model_options.get("transformer_options", {}).get(_OF_SOURCE, False))
