"""The color cast and contrast of an edit, estimated from what was not changed, and undone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

SAMPLES = 20_000
"""[choice] Pixels of the fit."""
ITERATIONS = 10
"""[choice] Refits of the line, each without the pixels that fit worst."""
KEPT = 0.5
"""[choice] Share of the pixels that a refit keeps (least trimmed squares, Rousseeuw 1984): an edit may cover half."""
CURVATURE = 0.06
"""[choice] Largest distance of the curve from the line, 0 to 1. A freer one colors a new object like what it hides."""
RIDGE = 5e-5
"""[choice] Pull of the curve towards the line, which decides colors that the unchanged part does not have."""
SAME_COLOR = 0.02
"""[choice] Largest difference of a color that did not change."""
CONTRADICTED = 0.1
"""[choice] Share of pixels that have their colors still, and would lose them, which no cast leaves."""
LARGEST_CAST = 0.15
"""[choice] Largest mean change that is a cast; a larger one was asked for ("make it night")."""


@dataclass(frozen=True)
class ColorMap:
    """Colors of the original from those of the edit: a line for each color, and a small curve of all three.

    Attributes:
        offset, gain: [3], added to the edit: offset + gain * color.
        curve: [10, 3], likewise, of 1, r, g, b, their squares and cubes.
        cast: mean absolute change of the unchanged part, 0 to 1.
    """

    offset: torch.Tensor
    gain: torch.Tensor
    curve: torch.Tensor
    cast: float

    def __call__(self, colors: torch.Tensor) -> torch.Tensor:
        """Colors [..., 3] as the original would have them, 0 to 1."""
        bend = (_basis(colors) @ self.curve).clamp(-CURVATURE, CURVATURE)
        return (colors + self.offset + self.gain * colors + bend).clamp(0.0, 1.0)


def no_change() -> ColorMap:
    return ColorMap(torch.zeros(3), torch.zeros(3), torch.zeros(10, 3), 0.0)


def fit_colors(original: torch.Tensor, edited: torch.Tensor, weight: torch.Tensor) -> ColorMap | None:
    """The map from an edit's colors to the original's; None if much has its colors still, so that an edit of most of
    the image looks like a cast.

    Args:
        original, edited: [H, W, 3], 0 to 1, registered; slightly blurred, so that noise does not flatten the map.
        weight: [H, W], 1 where the edit probably changed nothing, 0 where it did.
    """
    step = max(1, round((original.shape[0] * original.shape[1] / SAMPLES) ** 0.5))
    target, colors, weight = (each[::step, ::step].flatten(0, 1) for each in (original, edited, weight))
    # Clipped colors have lost what the map would need.
    weight = weight * ((colors > 0.02) & (colors < 0.98)).all(dim=-1) + 1e-6
    change = target - colors
    offset = torch.stack([_weighted_quantile(each, weight, 0.5) for each in change.T])
    gain = torch.zeros(3)
    for _ in range(ITERATIONS):
        error = (offset + gain * colors - change).abs().amax(dim=-1)
        kept = weight * (error <= _weighted_quantile(error, weight, KEPT))
        share = kept[:, None] / kept.sum()
        centers = (share * colors).sum(dim=0), (share * change).sum(dim=0)
        spread = (share * (colors - centers[0]).square()).sum(dim=0) + RIDGE
        gain = (share * (colors - centers[0]) * (change - centers[1])).sum(dim=0) / spread
        gain = gain.clamp(-0.6, 1.5)
        offset = centers[1] - gain * centers[0]
    error = (offset + gain * colors - change).abs().amax(dim=-1)
    has_its_color = (change.abs().amax(dim=-1) < SAME_COLOR) & (error > 2.0 * SAME_COLOR)
    if float(weight[has_its_color].sum()) > CONTRADICTED * float(weight.sum()):
        return None
    kept = weight * (1.0 - (error / (2.0 * CURVATURE)).square()).clamp(min=0.0).square() + 1e-9
    basis = _basis(colors)
    scaled = basis * kept[:, None] / kept.sum()
    normal, side = scaled.T @ basis + RIDGE * torch.eye(10), scaled.T @ (change - offset - gain * colors)
    curve = torch.linalg.solve(normal.double(), side.double()).float()
    fitted = ColorMap(offset, gain, curve, 0.0)
    cast = ((fitted(colors) - colors).abs().mean(dim=-1) * kept).sum() / kept.sum()
    return replace(fitted, cast=float(cast))


def _basis(colors: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.ones_like(colors[..., :1]), colors, colors.square(), colors**3], dim=-1)


def _weighted_quantile(values: torch.Tensor, weight: torch.Tensor, share: float) -> torch.Tensor:
    ordered, places = values.sort()
    total = weight[places].cumsum(0)
    return ordered[int(torch.searchsorted(total, share * total[-1]).clamp(max=len(values) - 1))]
