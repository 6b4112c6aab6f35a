"""Checks of inputs that several techniques share; they raise the pack's one exception.

Every message is one sentence that names the input and what to do about it; ComfyUI shows it on the node.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ...attention.errors import IdentityEditError as IdentityEditError
from ...attention.errors import for_console as for_console
from ...attention.errors import loggable as loggable

MAXIMUM_BATCH = 64
"""Largest number of latents processed at once; a batch beyond it is almost always a mistake (a video, a folder)."""
LARGEST_VALUE = 1e6
"""Of latents and embeddings. Theirs are below 100, those of noise below 150000 (sigma 4500); networks overflow far
beyond."""


def check_latent(latent: torch.Tensor, name: str, channels: int | None = None) -> None:
    """Check a batch of image latents.

    Args:
        latent: tensor that should be [B, C, H, W], finite, with 1 <= B <= 64.
        name: the input's name as the user sees it, for the message.
        channels: the number of channels that the model takes, where known.

    Raises:
        IdentityEditError: for an empty or oversized batch, a wrong shape or channel count, or NaN and infinite values.
    """
    if getattr(latent, "is_nested", False) or not isinstance(latent, torch.Tensor) or latent.ndim != 4:
        raise IdentityEditError(
            f"{name} must be a batch of image latents [batch, channels, height, width]; connect a VAE Encode node."
        )
    if latent.shape[0] < 1 or latent.shape[2] < 1 or latent.shape[3] < 1:
        raise IdentityEditError(f"{name} is empty {tuple(latent.shape)}; connect at least one image.")
    if latent.shape[0] > MAXIMUM_BATCH:
        raise IdentityEditError(
            f"{name} holds {latent.shape[0]} latents, more than {MAXIMUM_BATCH}; split the batch (Latent From Batch)."
        )
    if channels is not None and latent.shape[1] != channels:
        raise IdentityEditError(
            f"{name} has {latent.shape[1]} channels but the model takes {channels}; encode the image with this "
            f"checkpoint's own VAE."
        )
    check_finite(latent, not_finite(latent, name) or name)
    check_size_of_values(latent, name)


def shortened(text: str, length: int = 80) -> str:
    """A text that a message quotes, as one line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."


def first_line(error: Exception) -> str:
    """The first line of an exception's text, at most 200 characters of it, or else its name."""
    lines = str(error).strip().splitlines()
    return shortened(lines[0] if lines else type(error).__name__, 200)


def check_size_of_values(tensor: torch.Tensor, name: str) -> None:
    """Raise `IdentityEditError` when `tensor` holds a value beyond what any network computes with."""
    largest = float(tensor.detach().float().abs().max())
    if largest > LARGEST_VALUE:
        raise IdentityEditError(
            f"{name} holds values up to {largest:.3g}, with which no model can compute; take away what multiplies it, "
            f"or encode it again."
        )


def not_finite(batch: torch.Tensor, name: str) -> str | None:
    """`name` with the numbers of those of a batch [B, ...] that hold NaN or infinite values; None where none does."""
    bad = [str(i + 1) for i, entry in enumerate(batch) if not bool(torch.isfinite(entry).all())]
    if not bad:
        return None
    return name if len(bad) == len(batch) else f"{name} (number {', '.join(bad)} of {len(batch)})"


ENCODE_AGAIN = "encode the image again, with the VAE in float32 (--fp32-vae)"
IN_FLOAT32 = "load the model in float32 (--force-fp32)"
"""Remedies for numbers that are none, in an image's latent and in what a model has computed."""


def check_finite(tensor: torch.Tensor, name: str, remedy: str = ENCODE_AGAIN) -> None:
    """Raise `IdentityEditError` with the remedy when `tensor` holds NaN or infinite values."""
    if not bool(torch.isfinite(tensor).all()):
        raise IdentityEditError(f"{name} contains NaN or infinite values; {remedy}.")


def check_steps(steps: int, most: int) -> None:
    """Raise `IdentityEditError` unless 1 <= `steps` <= `most`."""
    if not 1 <= steps <= most:
        raise IdentityEditError(f"steps is {steps}; choose a number from 1 to {most}.")


def check_batch_matches(count: int, batch: int, name: str, what: str = "latents") -> None:
    """Raise `IdentityEditError` unless `name` has one entry, or one for each of the batch; `what` it is a batch of."""
    if count not in (1, batch):
        raise IdentityEditError(
            f"{name} holds {count} entries for a batch of {batch} {what}; give one for all, or one for each."
        )


def check_conditioning(conditioning: Any, name: str) -> None:
    """Check a ComfyUI CONDITIONING list.

    Args:
        conditioning: should be a list of [embedding [B, T, C], options], not empty, with finite numbers.
        name: the input's name as the user sees it, for the message.

    Raises:
        IdentityEditError: when it is empty, of another form, or holds NaN, infinite or huge values.
    """
    if not isinstance(conditioning, list) or len(conditioning) == 0:
        raise IdentityEditError(f"{name} is empty; connect a CLIP Text Encode node.")
    for entry in conditioning:
        if not isinstance(entry, (list, tuple)) or len(entry) < 2 or not isinstance(entry[1], dict):
            raise IdentityEditError(f"{name} is no list of embeddings with options; connect a CLIP Text Encode node.")
        embedding, pooled = entry[0], entry[1].get("pooled_output")
        if not isinstance(embedding, torch.Tensor):
            raise IdentityEditError(f"{name} holds no text embedding; connect a CLIP Text Encode node.")
        if embedding.ndim != 3 or 0 in embedding.shape:
            raise IdentityEditError(
                f"{name} must hold text embeddings [batch, tokens, channels], not {tuple(embedding.shape)}; connect a "
                f"CLIP Text Encode node."
            )
        if pooled is not None and (not isinstance(pooled, torch.Tensor) or pooled.ndim != 2 or 0 in pooled.shape):
            raise IdentityEditError(f"The pooled output of {name} is of another form; connect a CLIP Text Encode node.")
        for tensor in (embedding, pooled):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise IdentityEditError(f"{name} contains NaN or infinite values; encode the prompt again.")
            if tensor is not None:
                check_size_of_values(tensor, name)


def check_areas(options: Iterable[dict[str, Any]], latent: torch.Tensor, name: str) -> None:
    """Check that each area that a conditioning is limited to begins inside the latent; ComfyUI cuts it at the far ends.

    Args:
        options: those of every entry of a conditioning; "area" is (height, width, y, x) in latent pixels, or
            ("percentage", height, width, y, x) in shares of the latent, or absent.
        latent: [B, C, H, W].
        name: the conditioning's name as the user sees it, for the message.

    Raises:
        IdentityEditError: when an area begins at or beyond the latent's right or lower end.
    """
    height, width = latent.shape[-2:]
    for entry in options:
        area = entry.get("area")
        if area is None:
            continue
        y, x = area[-2:]
        if area[0] == "percentage":
            y, x = round(y * height), round(x * width)
        if y >= height or x >= width:
            raise IdentityEditError(
                f"{name} is for an area that begins outside of the image ({x}, {y} in a latent of {width}x{height}); "
                f"lower x and y of the node that sets the area."
            )
