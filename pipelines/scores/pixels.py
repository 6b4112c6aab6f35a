"""Pixel-wise differences of two images: mean squared error, PSNR and SSIM, of whole images or of a region.

A part is given by weights, 1 where pixels count. Two rules are in use for it:

- the mean over the part: only its pixels count (`mean_squared_error` and `ssim` with weights);
- PIE-Bench (Ju et al. 2024, evaluation/matrics_calculator.py of its code): both images are multiplied by the mask
  and compared as whole images (`multiplied`), so that the blackened rest counts as equal. The smaller the part, the
  better this looks; published tables on PIE-Bench have it.
"""

from __future__ import annotations

import torch

SSIM_WINDOW = 11
"""Pixels along a side of the Gaussian window, whose standard deviation is 1.5 (Wang et al. 2004, section III.C)."""


def mean_squared_error(edited: torch.Tensor, source: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared difference over pixels and colors.

    Args:
        edited, source: [B, H, W, 3], 0 to 1.
        weights: [B, H, W], 0 to 1; None counts every pixel.

    Returns:
        [B] float64; NaN where no pixel counts.
    """
    error = (edited.double() - source.double()).square().mean(dim=-1)
    return _weighted_mean(error, weights)


def psnr_of_error(error: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of mean squared errors between images of 0 to 1; infinite without an error."""
    return -10.0 * torch.log10(error)


def ssim(edited: torch.Tensor, source: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13) with its published settings.

    A Gaussian window of 11 pixels and standard deviation 1.5, K1 = 0.01, K2 = 0.03, each color by itself; the map is
    computed by kornia. Windows that leave the image are left out, as in the authors' code, in scikit-image, and in
    torchmetrics until September 2024, with which PIE-Bench's figures were made (later ones count them). With weights
    each window counts by the weight of its center; its other pixels may lie outside of the part.

    Args:
        edited, source: [B, H, W, 3], 0 to 1.
        weights: [B, H, W], 0 to 1; None counts every window.

    Returns:
        [B] float64, -1 to 1; NaN where no window counts, as in images below 11 pixels.
    """
    if min(edited.shape[1:3]) < SSIM_WINDOW:
        return torch.full((len(edited),), torch.nan, dtype=torch.float64)
    from kornia.metrics import ssim as ssim_map  # comes with every ComfyUI

    # In float32, which is ten times as fast and right to a millionth (measured against float64).
    first, second = (images.float().movedim(-1, 1) for images in (edited, source))
    found = ssim_map(first, second, SSIM_WINDOW, padding="valid").double().mean(dim=1)
    margin = SSIM_WINDOW // 2
    centers = None if weights is None else weights[:, margin:-margin, margin:-margin]
    return _weighted_mean(found, centers)


def multiplied(images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Images [B, H, W, 3] times weights [B, H, W]: black where the weight is 0."""
    return images * weights.unsqueeze(-1).to(images)


def _weighted_mean(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Mean [B] of values [B, H, W]; 0/0, which is NaN, where all weights are zero."""
    if weights is None:
        return values.mean(dim=(1, 2))
    weights = weights.to(values)
    return (values * weights).sum(dim=(1, 2)) / weights.sum(dim=(1, 2))
