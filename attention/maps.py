"""Attention maps from queries and keys, in float32 and in pieces, so that no full set of maps is ever in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

_ELEMENTS = {"cpu": 2 * 2**20}
_ELEMENTS_ELSEWHERE = 16 * 2**20
"""Numbers in one piece: 8 MiB where a piece should stay in the cache, 64 MiB where few, large kernels are faster."""


def cross_attention_columns(
    query: torch.Tensor, key: torch.Tensor, heads: int, columns: Sequence[int] | torch.Tensor
) -> torch.Tensor:
    """How much each query attends to some of the keys: softmax(Q K^T / sqrt(d)), mean over heads, sum over `columns`.

    Only the chosen columns are made into probabilities; of all others only the softmax's normaliser is needed.

    Args:
        query: [B, N, heads * d] in any precision.
        key: [B or 1, T, heads * d].
        heads: number of heads.
        columns: indices of keys, 0 to T - 1.

    Returns:
        [B, N] float32, 0 to 1.
    """
    q, k = _heads_apart(query, heads), _heads_apart(key, heads).transpose(-1, -2)
    batch, _, count, dimension = q.shape
    chosen = torch.as_tensor(columns, device=query.device)
    result = torch.empty(batch, count, device=query.device)
    for rows in _pieces(count, batch * heads * k.shape[-1], query.device):
        logits = (q[:, :, rows] * dimension**-0.5) @ k
        normaliser = logits.logsumexp(dim=-1, keepdim=True)
        result[:, rows] = (logits.index_select(-1, chosen) - normaliser).exp_().sum(dim=-1).mean(dim=1)
    return result


def self_attention_map(query: torch.Tensor, key: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)), mean over heads: how much each cell attends to each cell.

    Args:
        query, key: [B, N, heads * d] in any precision.
        heads: number of heads.

    Returns:
        [B, N, N] float32; every row sums to 1.
    """
    q, k = _heads_apart(query, heads), _heads_apart(key, heads).transpose(-1, -2)
    batch, _, count, dimension = q.shape
    result = torch.zeros(batch, count, count, device=query.device)
    for rows in _pieces(count, batch * count, query.device):
        for group in _pieces(heads, batch * (rows.stop - rows.start) * count, query.device):
            logits = (q[:, group, rows] * dimension**-0.5) @ k[:, group]
            result[:, rows] += logits.softmax(dim=-1).sum(dim=1)
    return result.div_(heads)


def _heads_apart(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, heads * d] to [B, heads, N, d] float32."""
    batch, count, width = tensor.shape
    return tensor.view(batch, count, heads, width // heads).transpose(1, 2).float()


def _pieces(count: int, numbers_each: int, device: torch.device) -> Iterator[slice]:
    """Cut `count` things, each of which needs `numbers_each` numbers, into slices that fit in a piece."""
    size = max(1, _ELEMENTS.get(device.type, _ELEMENTS_ELSEWHERE) // numbers_each)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
