"""Reconstruction quality of an inversion."""

from __future__ import annotations

import torch

from ..shared.images import matched_images

LOWEST_PSNR = 20.0
"""dB below which a reconstruction counts as failed. Chosen between two values of the demo world at 20 steps: 26 dB for
the autoencoder alone, and 17 dB for a DDIM inversion sampled with guidance scale 7.5."""


def psnr(image: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio, 10 log10(1 / mean squared error).

    Args:
        image, reconstruction: as `images.matched_images` takes them.

    Returns:
        [B] float64 in dB, infinite for equal images.

    Raises:
        IdentityEditError: as `images.matched_images`.
    """
    image, reconstruction, _ = matched_images(image, reconstruction, ("image", "reconstruction"))
    error = (image.double() - reconstruction.double()).square().flatten(1).mean(dim=1)
    return -10.0 * torch.log10(error)


def reconstruction_warning(values: torch.Tensor, lowest: float = LOWEST_PSNR) -> str | None:
    """A warning with the images whose PSNR (`values` [B], dB) is below `lowest`, or None."""
    bad = [f"{index + 1} ({value:.1f} dB)" for index, value in enumerate(values.tolist()) if not value >= lowest]
    if not bad:
        return None
    return (
        f"The inversion does not reconstruct image {', '.join(bad)}, below {lowest:g} dB; sample with euler or ddim, "
        f"without added noise, at the inversion's guidance scale, or else use more steps, a source prompt that "
        f"describes the image, or Null-Text Optimization."
    )
