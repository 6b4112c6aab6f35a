"""Detection of settings without any effect, and of inversions that do not lead back to their image.

They are valid, but the result looks like a failure of the method, so the node shows a one-line warning (`show_text`).
"""

from __future__ import annotations

from typing import Any

import torch

from ..pipelines.inversion.inversion import EDIT_FRIENDLY_DDPM, Inversion
from ..pipelines.inversion.methods import DDIM, FIXED_POINT, UNI_INV
from ..pipelines.shared.conditioning import Conditioning

LARGEST_LAST_UPDATE = 0.02
"""Of a fixed point, relative to the latent. On the demo flow model the image's error is about two thirds of it."""


def first_said(*cases: tuple[bool, str]) -> str | None:
    """The sentence of the first true case, or None."""
    return next((sentence for holds, sentence in cases if holds), None)


def joined(*warnings: str | None) -> str | None:
    """Several warnings as one text; those that are None are left out."""
    return " ".join(warning for warning in warnings if warning is not None) or None


def same_prompt(first: Conditioning, second: Conditioning) -> bool:
    """Whether two CONDITIONINGs have equal embeddings, pooled outputs and other options."""
    return len(first) == len(second) and all(
        _same(list(one), list(other)) for one, other in zip(first, second, strict=True)
    )


def is_empty(mask: torch.Tensor | None) -> bool:
    """Whether a mask is connected and is zero everywhere."""
    return mask is not None and not bool((mask > 0).any())


def takes_no_part(share: float, steps: int) -> bool:
    """Whether a share of the steps rounds to 0 steps."""
    return round(share * steps) == 0


def takes_all(share: float, steps: int) -> bool:
    """Whether a share of the steps rounds to all steps."""
    return round(share * steps) >= steps


def blend_idle(blends: bool, threshold: float, start: float, steps: int) -> str | None:
    """Warning for a local blend that never starts or preserves the whole source, else None."""
    return first_said(
        (blends and takes_all(start, steps), f"blend_start is {start:g}, so the local blend never starts; lower it."),
        (
            blends and threshold >= 1.0,
            "blend_threshold is 1, which no attention exceeds, so the local blend returns the source image; lower it.",
        ),
    )


def not_reversed_by_euler(inversion: Inversion) -> str | None:
    """Warning of a node that samples from an inversion in Euler's steps, for one that they do not reverse; else None.
    Null-text embeddings correct any."""
    if inversion.embeddings is not None or inversion.method in (DDIM, FIXED_POINT, UNI_INV, EDIT_FRIENDLY_DDPM):
        return None
    return (
        f"The inversion was made by {inversion.method}, which this node's steps (euler) do not reverse, so the image "
        f"drifts; choose fixed point in Noise Inversion."
    )


def not_converged(inversion: Inversion) -> str | None:
    """Warning of an inversion by the fixed point that did not come near it, else None."""
    if inversion.last_update <= LARGEST_LAST_UPDATE:
        return None
    return (
        f"The fixed point has not converged: the last of the iterations still changed a latent by "
        f"{inversion.last_update:.0%}, so euler will not return exactly to the image; raise iterations or steps."
    )


def noise_mask_left_out(latent: dict[str, Any]) -> str | None:
    """Warning of a node that uses the whole image of a LATENT, when its noise mask excludes a part; else None."""
    mask = latent.get("noise_mask")
    if mask is None or bool((mask == 1).all()):
        return None
    return (
        "latent has a noise mask, which this node ignores because it uses the whole image; use the mask in the sampler "
        "(Set Latent Noise Mask), or in a node with a mask input."
    )


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.shape == second.shape and torch.equal(first.cpu(), second.cpu())
    if type(first) is not type(second):
        return False
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return first is second or isinstance(first, (str, int, float, bool)) and bool(first == second)
