"""Attention maps from queries and keys, computed in float32 and in slices to save memory, and their running mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch.nn.functional import pad

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
    query: torch.Tensor,
    key: torch.Tensor,
    columns: Sequence[int] | torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each query to some of the keys: softmax(Q K^T / sqrt(d)), mean over heads, sum over `columns`.

    Probabilities are computed only for these columns; the others enter only the softmax's normalizer.

    Args:
        query: [B, heads, N, d] in any precision.
        key: [B or 1, heads, T, d].
        columns: indices of keys, 0 to T - 1.
        bias: [B or 1, heads or 1, N or 1, T] added to the logits, or None.

    Returns:
        [B, N] float32, 0 to 1.
    """
    q, k = query.float(), key.float().transpose(-1, -2)
    batch, heads, count, dimension = q.shape
    chosen = torch.as_tensor(columns, device=query.device)
    result = torch.empty(batch, count, device=query.device)
    for rows in _pieces(count, batch * heads * k.shape[-1], query.device):
        logits = _biased((q[:, :, rows] * dimension**-0.5) @ k, bias, rows)
        normalizer = logits.logsumexp(dim=-1, keepdim=True)
        result[:, rows] = (logits.index_select(-1, chosen) - normalizer).exp_().sum(dim=-1).mean(dim=1)
    return result


def self_attention_map(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)), mean over heads: the attention of each query to each key.

    Args:
        query, key: [B, heads, N, d] and [B, heads, M, d] in any precision.
        bias: [B or 1, heads or 1, N or 1, M] added to the logits, or None.

    Returns:
        [B, N, M] float32; every row sums to 1.
    """
    q, k = query.float(), key.float().transpose(-1, -2)
    batch, heads, count, dimension = q.shape
    result = torch.zeros(batch, count, k.shape[-1], device=query.device)
    for rows in _pieces(count, batch * k.shape[-1], query.device):
        for group in _pieces(heads, batch * (rows.stop - rows.start) * k.shape[-1], query.device):
            bias_of_group = bias if bias is None or bias.shape[1] == 1 else bias[:, group]
            logits = _biased((q[:, group, rows] * dimension**-0.5) @ k[:, group], bias_of_group, rows)
            result[:, rows] += logits.softmax(dim=-1).sum(dim=1)
    return result.div_(heads)


def reduced_attention_map(
    query: torch.Tensor,
    key: torch.Tensor,
    bias: torch.Tensor | None,
    columns: slice,
    grid: tuple[int, int],
    factor: int,
) -> torch.Tensor:
    """The attention between image positions on a coarser grid, without storing the fine one: mean over the queries and
    sum over the keys of each cell of `factor` x `factor` positions.

    Args:
        query, key: [B, heads, rows * columns, d] of the image positions, and [B, heads, M, d].
        bias: see `self_attention_map`.
        columns: slice of the image positions among the keys.
        grid: rows and columns.
        factor: positions per cell and side; the last cells may be smaller.

    Returns:
        [B, n, n] float32 over the n cells.
    """
    count = grid[0] * grid[1]
    to_cells = []
    for rows in _pieces(count, query.shape[0] * key.shape[-2], query.device):
        bias_of_rows = bias if bias is None or bias.shape[2] == 1 else bias[:, :, rows]
        piece = self_attention_map(query[:, :, rows], key, bias_of_rows)[..., columns]
        to_cells.append(_sum_of_cells(piece, grid, factor))
    of_cells = _sum_of_cells(torch.cat(to_cells, dim=1).transpose(1, 2), grid, factor)
    sizes = _sum_of_cells(torch.ones(count, device=query.device), grid, factor)
    return (of_cells / sizes).transpose(1, 2)


def _sum_of_cells(values: torch.Tensor, grid: tuple[int, int], factor: int) -> torch.Tensor:
    """[..., n]: sums of values [..., rows * columns] over cells of `factor` x `factor`."""
    rows, columns = grid
    padded = pad(values.unflatten(-1, grid), (0, -columns % factor, 0, -rows % factor))
    return rearrange(padded, "... (h y) (w x) -> ... h w y x", y=factor, x=factor).sum(dim=(-1, -2)).flatten(-2)


def output_scores(output: torch.Tensor, image: slice, tokens: Sequence[int]) -> torch.Tensor:
    """Scalar products of a joint attention's outputs at image positions with those at text tokens (Helbling et al.
    2025).

    Args:
        output: [B, N, channels], before the projection.
        image: slice of the image positions.
        tokens: indices of the tokens in the sequence.

    Returns:
        [B, positions, tokens] float32.
    """
    return output[:, image].float() @ output[:, list(tokens)].float().transpose(1, 2)


def standardized(values: torch.Tensor) -> torch.Tensor:
    """Each image's map [B, h, w] with mean 0 and standard deviation 1; 0 where all are equal."""
    centered = values - values.mean(dim=(1, 2), keepdim=True)
    return centered / centered.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-12)


def heads_apart(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """A view of [..., N, heads * d] as [..., heads, N, d]."""
    return rearrange(tensor, "... n (h d) -> ... h n d", h=heads)


def _biased(logits: torch.Tensor, bias: torch.Tensor | None, rows: slice) -> torch.Tensor:
    if bias is None:
        return logits
    return logits + (bias if bias.shape[2] == 1 else bias[:, :, rows])


def _pieces(count: int, numbers_each: int, device: torch.device) -> Iterator[slice]:
    """Slices of range(count), where each item needs `numbers_each` elements and a slice at most `_ELEMENTS`."""
    size = max(1, _ELEMENTS.get(device.type, _ELEMENTS_ELSEWHERE) // numbers_each)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
