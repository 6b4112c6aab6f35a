"""The color cast and contrast of an edit, estimated from what was not changed, and undone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SAMPLES = 40_000
"""[choice] Pixels of the fit."""
ITERATIONS = 12
"""[choice] Refits, each without the pixels that fit worst."""
KEPT = 0.5
"""[choice] Share of the pixels that each refit keeps (least trimmed squares, Rousseeuw 1984): an edit may cover half."""
RIDGE = 5e-5
"""[choice] Pull towards no change, which decides colors that the unchanged part does not have."""
LARGEST_CAST = 0.15
"""[choice] Largest mean change that is a cast; a larger one was asked for ("make it night")."""


@dataclass(frozen=True)
class ColorMap:
    """Colors of the original from those of the edit: cubics of red, green and blue.

    Attributes:
        weights: [10, 3] of 1, r, g, b, their squares and cubes; added to the edit.
        lowest, highest: [3] limits of the change, from the unchanged part.
        cast: mean absolute change of the unchanged part, 0 to 1.
    """

    weights: torch.Tensor
    lowest: torch.Tensor
    highest: torch.Tensor
    cast: float

    def __call__(self, colors: torch.Tensor) -> torch.Tensor:
        """Colors [..., 3] as the original would have them, 0 to 1."""
        change = _basis(colors) @ self.weights
        return (colors + torch.minimum(torch.maximum(change, self.lowest), self.highest)).clamp(0.0, 1.0)


def no_change() -> ColorMap:
    return ColorMap(torch.zeros(10, 3), torch.zeros(3), torch.zeros(3), 0.0)


def fit_colors(original: torch.Tensor, edited: torch.Tensor, weight: torch.Tensor) -> ColorMap:
    """The map from an edit's colors to the original's.

    Args:
        original, edited: [H, W, 3], 0 to 1, registered; slightly blurred, so that noise does not flatten the map.
        weight: [H, W], 1 where the edit probably changed nothing, 0 where it did.
    """
    step = max(1, round((original.shape[0] * original.shape[1] / SAMPLES) ** 0.5))
    target, colors, weight = (each[::step, ::step].flatten(0, 1) for each in (original, edited, weight))
    # Clipped colors have lost what the map would need.
    weight = weight * ((colors > 0.01) & (colors < 0.99)).all(dim=-1) + 1e-6
    basis, change = _basis(colors), target - colors
    kept = weight
    for iteration in range(ITERATIONS):
        scaled = basis * kept[:, None]
        normal = scaled.T @ basis / kept.sum() + RIDGE * torch.eye(10)
        weights = torch.linalg.solve(normal.double(), (scaled.T @ change / kept.sum()).double()).float()
        error = (basis @ weights - change).abs().mean(dim=-1)
        limit = _weighted_quantile(error, weight, KEPT)
        # Trimmed at first; at last by Tukey's weights, which use most of the unchanged pixels.
        is_last = iteration >= ITERATIONS - 2
        limit = 3.0 * limit + 0.01 if is_last else limit
        kept = weight * ((1.0 - (error / limit).square()).clamp(min=0.0).square() if is_last else (error <= limit))
    fitted = (basis @ weights)[kept > 0]
    margin = 0.02
    return ColorMap(
        weights,
        fitted.quantile(0.01, dim=0) - margin,
        fitted.quantile(0.99, dim=0) + margin,
        float((fitted.abs() * kept[kept > 0][:, None]).sum() / (3.0 * kept.sum())),
    )


def _basis(colors: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.ones_like(colors[..., :1]), colors, colors.square(), colors**3], dim=-1)


def _weighted_quantile(values: torch.Tensor, weight: torch.Tensor, share: float) -> float:
    ordered, places = values.sort()
    total = weight[places].cumsum(0)
    return float(ordered[int(torch.searchsorted(total, share * total[-1]).clamp(max=len(values) - 1))])
