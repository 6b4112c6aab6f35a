"""Attention sites: the layers of a network that read text or the image itself, whatever family it is of.

A UNet reads the text in cross-attention layers of their own and the image in self-attention layers (`unet`). A
transformer with joint attention (Flux, Stable Diffusion 3) has one sequence of text and image in every block
(`joint`). Both give a site's key and grid here, and what it attends to as `Attended`.

What families differ in, and no technique above needs to know: where the text stands among the keys (a UNet's
cross-attention has nothing else; in a joint sequence it stands in front of the image), the grid (a UNet's goes down
to an eighth of the latent, that of joint attention is the latent in patches of 2x2), and the hook (lists of patches, or
`optimized_attention_override`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from .errors import IdentityEditError
from .maps import cross_attention_columns, self_attention_map

AUTOMATIC, ALL = "automatic", "all"
LAYER_CHOICES = (AUTOMATIC, "1", "2", "4", "8", "1, 2", "2, 4", "4, 8", "1, 2, 4", ALL)
"""What a user can choose: `automatic_factors`, some factors by which the latent is downsampled, or all layers."""

SMALLEST_AUTOMATIC_GRID = 16
"""Cells along the long side below which a grid is too coarse to outline a subject."""

LayerKey = tuple[str, int, int]
"""Block name, its number, and the transformer's index in it; see `unet` and `joint`."""


@dataclass(frozen=True)
class Site:
    """One layer that attends.

    Attributes:
        key: where it is in its network.
        downsampling: how many times smaller than the latent its grid is along each side: 1, 2, 4 or 8.
    """

    key: LayerKey
    downsampling: int

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Its grid (rows, columns) for a latent; every downsampling rounds up."""
        return -(-height // self.downsampling), -(-width // self.downsampling)


AnySite = TypeVar("AnySite", bound=Site)


@dataclass(frozen=True)
class Attended:
    """Queries and keys of one layer in one model call, as they meet: after norms and position embeddings.

    Attributes:
        query, key: [B, heads, N, d] and [B or 1, heads, M, d].
        grid: rows and columns of the image's cells.
        text: where the text's tokens stand among the keys.
        image: where the image's cells stand among the queries, and among the keys where they are there, row by row.
    """

    query: torch.Tensor
    key: torch.Tensor
    grid: tuple[int, int]
    text: slice = field(default_factory=lambda: slice(0, None))
    image: slice = field(default_factory=lambda: slice(0, None))

    def to_text(self, tokens: Sequence[int]) -> torch.Tensor:
        """[B, rows, columns] float32, 0 to 1: how much each cell attends to some tokens of the text; mean over heads,
        sum over the tokens, after a softmax over all keys."""
        columns = [self.text.start + token for token in tokens]
        return cross_attention_columns(self.query[:, :, self.image], self.key, columns).unflatten(1, self.grid)

    def to_image(self) -> torch.Tensor:
        """[B, n, n] float32: how much each cell attends to each cell, mean over heads. A row sums to 1, or to what the
        text leaves of it in a joint sequence."""
        return self_attention_map(self.query[:, :, self.image], self.key)[..., self.image]


def automatic_factors(sites: Sequence[Site], height: int, width: int) -> tuple[int, ...]:
    """The two downsampling factors whose layers outline a subject.

    2 and 4, which are the 32x32 and 16x16 layers of SD1.x at 512x512 and the 64x64 and 32x32 ones of SDXL at 1024x1024:
    coarser ones no longer outline it, and the layers at the latent's own resolution hardly tell what belongs to whom.
    Where the latent is so small that half of it has fewer than 16 cells along its long side, the finest two that the
    model has.

    Args:
        sites: all layers of the model.
        height, width: the latent's.
    """
    factors = sorted({site.downsampling for site in sites})
    large_enough = -(-max(height, width) // 2) >= SMALLEST_AUTOMATIC_GRID
    coarser = [factor for factor in factors if factor >= 2]
    return tuple((coarser if large_enough and coarser else factors)[:2])


def choose_layers(sites: Sequence[AnySite], height: int, width: int, choice: str) -> list[AnySite]:
    """The layers that a choice means for a latent of `height` x `width`.

    Args:
        choice: one of `LAYER_CHOICES`, or any downsampling factors separated by commas.

    Raises:
        IdentityEditError: when the choice cannot be read or the model has no layer of a factor.
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
            f"layers is {choice!r} but this model attends at 1/{', 1/'.join(map(str, sorted(present)))} of the "
            f"latent's size; choose from {', '.join(map(str, sorted(present)))}, or automatic."
        )
    return [site for site in sites if site.downsampling in factors]
