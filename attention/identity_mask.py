"""Identity-aware masks from attention (Liu et al. 2024, section 2.2, equations 1 to 3)."""

from __future__ import annotations

import torch

from .capture import IdentityAttention
from .errors import IdentityEditError
from .masks import normalized, resized

THRESHOLD, SELF_ATTENTION_POWER = 0.4, 1
"""Threshold of the normalized map, and lambda of eq. 2. Not given in the paper; these values overlapped well with the
true masks of the demo world, see benchmarks/results/lipe_edit.md."""
JOINT_THRESHOLD, JOINT_POWER = 0.55, 8
"""The same of joint attention: benchmarks/results/segment_subject_flow.md. Of 12 edits of the demo world's flow
checkpoint the source masks overlapped .82 with these, .63 with those above."""
AUTOMATIC_THRESHOLD, AUTOMATIC_POWER = 0.0, -1
"""Stand for the values of the attention's kind."""


def rough_mask(attention: IdentityAttention) -> torch.Tensor:
    """M^1, eq. 1: the identity tokens' cross-attention, averaged over layers and all model calls so far.

    Every layer's map is resized to one grid and has the same weight. The paper divides by (T - t) L, which is 0 at the
    first step; here the divisor is the number of maps (weighted by their conditionings).

    Returns:
        [B, h, w] float32, 0 to 1, on the grid of the self-attention, or else of the finest layer.

    Raises:
        IdentityEditError: when nothing has been recorded.
    """
    if not attention.cross:
        raise IdentityEditError("No attention has been recorded; sample with the model of Identity Attention first.")
    grid = attention.self_grid or max(attention.cross)
    total = torch.stack([resized(mean.total, grid) for mean in attention.cross.values()]).sum(dim=0)
    weight = torch.stack([resized(mean.weight, grid) for mean in attention.cross.values()]).sum(dim=0)
    return torch.where(weight > 0, total / weight.clamp(min=1e-12), torch.zeros_like(total))


def refined_mask(rough: torch.Tensor, self_attention: torch.Tensor, power: int) -> torch.Tensor:
    """M^2, eq. 2: SA^lambda M^1, which spreads the rough mask over related positions.

    SA is row-stochastic: each multiplication replaces a value by the mean of the positions it attends to. Multiplying
    the mask lambda times equals the matrix power but takes N^2 instead of N^3 operations.

    Args:
        rough: M^1 [B, h, w].
        self_attention: mean self-attention [B, h * w, h * w]; rows sum to 1.
        power: lambda, 0 or more; 0 returns the mask unchanged.

    Returns:
        [B, h, w] float32.
    """
    mask = rough.flatten(1).unsqueeze(-1)
    for _ in range(power):
        mask = self_attention @ mask
    return mask.view_as(rough)


def identity_map(attention: IdentityAttention, height: int, width: int, power: int = AUTOMATIC_POWER) -> torch.Tensor:
    """The normalized map [B, height, width] in [0, 1], before thresholding: M^1 for power 0, else M^2."""
    mask = rough_mask(attention)
    if power == AUTOMATIC_POWER:
        power = JOINT_POWER if attention.is_joint else SELF_ATTENTION_POWER
    if power > 0:
        mask = refined_mask(mask, attention.self_attention(), power)
    return resized(normalized(mask), (height, width))


def identity_mask(
    attention: IdentityAttention,
    height: int,
    width: int,
    threshold: float = AUTOMATIC_THRESHOLD,
    power: int = AUTOMATIC_POWER,
) -> torch.Tensor:
    """The identity mask of a run.

    The map is enlarged to the latent's size before thresholding, for a contour finer than the attention grid.

    Args:
        attention: the attention recorded so far.
        height, width: the latent's size.
        threshold: value of the normalized map above which a latent pixel belongs to the subject.
        power: lambda of eq. 2.

    Returns:
        [B, height, width] float32, 0 or 1.
    """
    if threshold == AUTOMATIC_THRESHOLD:
        threshold = JOINT_THRESHOLD if attention.is_joint else THRESHOLD
    return (identity_map(attention, height, width, power) > threshold).float()
