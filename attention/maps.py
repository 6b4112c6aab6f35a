"""Attention maps from queries and keys, computed in float32 and in slices to save memory, and their running mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange

_ELEMENTS = {"cpu": 2 * 2**20}
_ELEMENTS_ELSEWHERE = 16 * 2**20
"""Elements per slice: 8 MiB on the CPU, to fit in its cache, and 64 MiB elsewhere, for few and large kernels."""


@dataclass
class MeanMap:
    """A running mean over heads, layers and model calls.

    Attributes:
        total: weighted sum of the maps so far: cross-attention [B, h, w] or self-attention [B, h * w, h * w].
        weight: sum of the weights for each query, [B, h, w] or [B, h * w].
    """

    total: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def empty(cls, shape: Sequence[int], query_shape: Sequence[int], device: torch.device) -> MeanMap:
        return cls(torch.zeros(*shape, device=device), torch.zeros(*query_shape, device=device))

    def cpu(self) -> MeanMap:
        return MeanMap(self.total.cpu(), self.weight.cpu())


def cross_attention_columns(
    query: torch.Tensor, key: torch.Tensor, columns: Sequence[int] | torch.Tensor
) -> torch.Tensor:
    """Attention of each query to some of the keys: softmax(Q K^T / sqrt(d)), mean over heads, sum over `columns`.

    Probabilities are computed only for these columns; the others enter only the softmax's normalizer.

    Args:
        query: [B, heads, N, d] in any precision.
        key: [B or 1, heads, T, d].
        columns: indices of keys, 0 to T - 1.

    Returns:
        [B, N] float32, 0 to 1.
    """
    q, k = query.float(), key.float().transpose(-1, -2)
    batch, heads, count, dimension = q.shape
    chosen = torch.as_tensor(columns, device=query.device)
    result = torch.empty(batch, count, device=query.device)
    for rows in _pieces(count, batch * heads * k.shape[-1], query.device):
        logits = (q[:, :, rows] * dimension**-0.5) @ k
        normalizer = logits.logsumexp(dim=-1, keepdim=True)
        result[:, rows] = (logits.index_select(-1, chosen) - normalizer).exp_().sum(dim=-1).mean(dim=1)
    return result


def self_attention_map(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)), mean over heads: the attention of each query to each key.

    Args:
        query, key: [B, heads, N, d] and [B, heads, M, d] in any precision.

    Returns:
        [B, N, M] float32; every row sums to 1.
    """
    q, k = query.float(), key.float().transpose(-1, -2)
    batch, heads, count, dimension = q.shape
    result = torch.zeros(batch, count, k.shape[-1], device=query.device)
    for rows in _pieces(count, batch * k.shape[-1], query.device):
        for group in _pieces(heads, batch * (rows.stop - rows.start) * k.shape[-1], query.device):
            logits = (q[:, group, rows] * dimension**-0.5) @ k[:, group]
            result[:, rows] += logits.softmax(dim=-1).sum(dim=1)
    return result.div_(heads)


def heads_apart(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """A view of [..., N, heads * d] as [..., heads, N, d]."""
    return rearrange(tensor, "... n (h d) -> ... h n d", h=heads)


def _pieces(count: int, numbers_each: int, device: torch.device) -> Iterator[slice]:
    """Slices of range(count), where each item needs `numbers_each` elements and a slice at most `_ELEMENTS`."""
    size = max(1, _ELEMENTS.get(device.type, _ELEMENTS_ELSEWHERE) // numbers_each)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
