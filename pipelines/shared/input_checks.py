"""Value checks of inputs, for all nodes (`nodes.sockets.checked`) and for the settings of techniques.

ComfyUI checks the limits of values typed into a widget, but not of linked values, and for links only the socket type.
These functions validate values. See `errors` for latents and conditionings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from .errors import IdentityEditError, not_finite, shortened

BRIGHTEST = 2.0
"""Largest value of an image or mask of 0 to 1 with some overshoot. Brighter images have a high dynamic range (HDR)."""
BRIGHTEST_HDR = 16.0
"""Largest value of an HDR image. Brighter ones are in other units, such as 8-bit levels."""


def check_images(images: Any, name: str) -> None:
    """Check an IMAGE [B, H, W, C].

    Args:
        images: floating point of 0 to 1, HDR up to `BRIGHTEST_HDR`, or unsigned integers of 8 or 16 bits; 1 to 4
            channels.
        name: the input's name as the user sees it.

    Raises:
        IdentityEditError: for another shape or type, no pixels, NaN, or values out of range.
    """
    if not isinstance(images, torch.Tensor) or images.ndim != 4:
        shape = f", not {tuple(images.shape)}" if isinstance(images, torch.Tensor) else ""
        raise IdentityEditError(
            f"{name} must be images [batch, height, width, channels]{shape}; connect a Load Image node."
        )
    if min(images.shape) < 1 or images.shape[-1] > 4:
        raise IdentityEditError(
            f"{name} must be images [batch, height, width, channels] with 1 to 4 channels, not "
            f"{tuple(images.shape)}; connect a Load Image node."
        )
    if images.is_floating_point():
        bad = not_finite(images, name)
        if bad:
            raise IdentityEditError(f"{bad} contains NaN or infinite values; load or decode it again.")
        brightest = float(images.detach().max())
        if brightest > BRIGHTEST_HDR:
            raise IdentityEditError(
                f"{name} has values up to {brightest:g} but images range from 0 to 1; divide it by its maximum (255, "
                f"or 65535 for 16 bits)."
            )
    elif images.dtype not in (torch.uint8, torch.uint16):
        raise IdentityEditError(f"{name} has the type {images.dtype}; convert it to floating point from 0 to 1.")


def check_mask(mask: Any, name: str) -> None:
    """Raise `IdentityEditError` unless a MASK is [B, H, W], [H, W] or [B, 1, H, W], not empty, finite, of 0 to 1."""
    is_mask = isinstance(mask, torch.Tensor) and (mask.ndim in (2, 3) or (mask.ndim == 4 and mask.shape[1] == 1))
    if not is_mask or 0 in mask.shape:
        shape = f", not {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else ""
        raise IdentityEditError(
            f"{name} must be a mask [batch, height, width]{shape}; connect a node that outputs a mask, such as Load "
            f"Image (as Mask)."
        )
    bad = not_finite(mask if mask.ndim > 2 else mask[None], name)
    if bad:
        raise IdentityEditError(f"{bad} contains NaN or infinite values; make the mask again.")
    farthest = float(mask.detach().float().abs().max())
    if farthest > BRIGHTEST:
        raise IdentityEditError(
            f"{name} has values up to {farthest:g} but masks range from 0 to 1; divide it by its maximum."
        )


def check_sigmas(sigmas: Any, name: str) -> None:
    """Raise `IdentityEditError` unless SIGMAS [N + 1], N from 1, are floating point, finite and not below 0."""
    if not isinstance(sigmas, torch.Tensor) or sigmas.ndim != 1 or len(sigmas) < 2 or not sigmas.is_floating_point():
        raise IdentityEditError(f"{name} must be a list of at least two noise levels; connect a scheduler node.")
    if not bool(torch.isfinite(sigmas).all()) or float(sigmas.min()) < 0.0:
        raise IdentityEditError(f"{name} contains negative, NaN or infinite noise levels; connect a scheduler node.")


def check_number(value: Any, name: str, least: float | None, most: float | None) -> None:
    """Raise `IdentityEditError` unless `value` is a number from `least` to `most` (None: no limit)."""
    try:
        is_number = math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        is_number = False
    limits = f" from {least:g}" if least is not None else ""
    limits += f" to {most:g}" if most is not None else ""
    if not is_number:
        raise IdentityEditError(f"{name} is {shortened(str(value))}; choose a number{limits}.")
    if (least is not None and value < least) or (most is not None and value > most):
        raise IdentityEditError(f"{name} is {value:g}; choose a number{limits}.")


def check_above_zero(value: float, name: str) -> None:
    """Raise `IdentityEditError` unless `value` is above 0."""
    if not value > 0.0:
        raise IdentityEditError(f"{name} is {value:g}; choose a value above 0.")


def check_choice(value: str, name: str, choices: Iterable[str]) -> None:
    """Raise `IdentityEditError` unless `value` is one of `choices`."""
    if value not in choices:
        raise IdentityEditError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")


def check_text(text: Any, name: str) -> None:
    """Raise `IdentityEditError` unless `text` is a string that UTF-8 can encode and that contains no NUL."""
    if not isinstance(text, str):
        raise IdentityEditError(f"{name} is not text; type it, or connect a node that outputs text.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise IdentityEditError(f"{name} contains a broken character; type it again.") from error
    if "\0" in text:
        raise IdentityEditError(f"{name} contains a NUL character; remove it.")
