"""Detection of settings without any effect.

They are valid, but the result looks like a failure of the method, so the node shows a one-line warning (`show_text`).
"""

from __future__ import annotations

from typing import Any

import torch

from ..pipelines.shared.conditioning import Conditioning


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
