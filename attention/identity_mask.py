"""Identity-aware masks from attention (Liu et al. 2024, section 2.2, equations 1 to 3)."""

from __future__ import annotations

import torch

from .capture import IdentityAttention
from .errors import IdentityEditError
from .masks import normalized, resized

SELF_ATTENTION_POWER = 1
"""lambda of eq. 2. The paper names no value; measured, see `THRESHOLD`."""
THRESHOLD = 0.4
"""Of the normalized map. The paper names none; these two overlapped well with the true masks of the demo world, see
benchmarks/results/lipe_edit.md."""


def rough_mask(attention: IdentityAttention, grid: tuple[int, int] | None = None) -> torch.Tensor:
    """M^1, eq. 1: the identity tokens' cross-attention, mean over layers and over all evaluations so far.

    Every layer's map is brought to one grid and counts the same. The paper divides by (T - t) L, which is 0 at the
    first step; here the divisor is the number of maps (each with its conditioning's weight).

    Args:
        attention: what a run has recorded so far.
        grid: rows and columns of the result; by default those of the self-attention, else of the finest layer read.

    Returns:
        [B, h, w] float32, 0 to 1.

    Raises:
        IdentityEditError: when nothing has been recorded.
    """
    if not attention.cross:
        raise IdentityEditError("No attention has been recorded; sample with the model of Identity Attention first.")
    grid = grid or attention.self_grid or max(attention.cross)
    total = torch.stack([resized(mean.total, grid) for mean in attention.cross.values()]).sum(dim=0)
    weight = torch.stack([resized(mean.weight, grid) for mean in attention.cross.values()]).sum(dim=0)
    return torch.where(weight > 0, total / weight.clamp(min=1e-12), torch.zeros_like(total))


def refined_mask(rough: torch.Tensor, self_attention: torch.Tensor, power: int = SELF_ATTENTION_POWER) -> torch.Tensor:
    """M^2, eq. 2: SA^lambda M^1, which spreads the rough mask within what belongs together.

    SA is row-stochastic: each multiplication gives a cell the mean of what it attends to. It is applied lambda times to
    the mask, which equals the power of the matrix applied once and takes N^2 instead of N^3 operations.

    Args:
        rough: M^1 [B, h, w].
        self_attention: mean self-attention [B, h * w, h * w]; rows sum to 1.
        power: lambda, 0 or more; 0 leaves the mask as it is.

    Returns:
        [B, h, w] float32.
    """
    mask = rough.flatten(1).unsqueeze(-1)
    for _ in range(power):
        mask = self_attention @ mask
    return mask.view_as(rough)


def identity_map(attention: IdentityAttention, height: int, width: int, power: int) -> torch.Tensor:
    """The normalized map [B, height, width] in [0, 1] that a mask is cut out of: M^1 for power 0, else M^2."""
    mask = rough_mask(attention)
    if power > 0:
        mask = refined_mask(mask, attention.self_attention(), power)
    return resized(normalized(mask), (height, width))


def identity_mask(
    attention: IdentityAttention,
    height: int,
    width: int,
    threshold: float = THRESHOLD,
    power: int = SELF_ATTENTION_POWER,
) -> torch.Tensor:
    """The mask of what a run has attended to as the identity.

    The map is enlarged to the latent before it is cut, so that the contour runs between the cells of a coarse grid.

    Args:
        attention: what a run has recorded so far.
        height, width: the latent's.
        threshold: share of the normalized map's range above which a cell belongs to the subject.
        power: lambda of eq. 2.

    Returns:
        [B, height, width] float32, 0 or 1.
    """
    return (identity_map(attention, height, width, power) > threshold).float()
