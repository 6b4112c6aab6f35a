"""Input checks shared by several techniques; they raise the pack's only exception class.

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
"""Largest accepted batch of latents; a larger one is almost always a mistake (a video, a folder)."""
LARGEST_VALUE = 1e6
"""Largest accepted magnitude in latents and embeddings. Typical values are below 100, and below 150000 in noise
(sigma 4500); networks overflow far beyond."""


def check_latent(latent: torch.Tensor, name: str, channels: int | None = None, has_frames: bool = False) -> None:
    """Raise `IdentityEditError` unless latents are [B, C, H, W], finite, with 1 <= B <= 64.

    Args:
        latent: the latents.
        name: the input's name as the user sees it, for the message.
        channels: C, the model's number of latent channels; None for any.
        has_frames: also accept [B, C, 1, H, W], a single frame of a model whose latents have frames.
    """
    is_batch = isinstance(latent, torch.Tensor) and not getattr(latent, "is_nested", False)
    if is_batch and has_frames and latent.ndim == 5:
        if latent.shape[2] != 1:
            raise IdentityEditError(
                f"{name} is a video of {latent.shape[2]} latent frames, but one image is edited at a time; connect a "
                f"VAE Encode node with a single image."
            )
        latent = latent[:, :, 0]
    if not is_batch or latent.ndim != 4:
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
            f"checkpoint's VAE."
        )
    check_finite(latent, not_finite(latent, name) or name)
    check_size_of_values(latent, name)


def shortened(text: str, length: int = 80) -> str:
    """Text to quote in a message, as one line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."


def first_line(error: Exception) -> str:
    """The first line of an exception's text, cut to 200 characters, or its class name if there is no text."""
    lines = str(error).strip().splitlines()
    return shortened(lines[0] if lines else type(error).__name__, 200)


def check_size_of_values(tensor: torch.Tensor, name: str) -> None:
    """Raise `IdentityEditError` if `tensor` contains a magnitude above `LARGEST_VALUE`."""
    largest = float(tensor.detach().float().abs().max())
    if largest > LARGEST_VALUE:
        raise IdentityEditError(
            f"{name} contains values up to {largest:.3g}, which is out of range; remove whatever scales it, or encode "
            f"it again."
        )


def not_finite(batch: torch.Tensor, name: str) -> str | None:
    """`name` with the numbers (from 1) of the batch entries [B, ...] that contain NaN or infinite values, or None."""
    bad = [str(i + 1) for i, entry in enumerate(batch) if not bool(torch.isfinite(entry).all())]
    if not bad:
        return None
    return name if len(bad) == len(batch) else f"{name} (number {', '.join(bad)} of {len(batch)})"


ENCODE_AGAIN = "encode the image again, with the VAE in float32 (--fp32-vae)"
IN_FLOAT32 = "load the model in float32 (--force-fp32)"
"""Remedies for NaN and infinite values in an image's latent and in a model's output."""


def check_finite(tensor: torch.Tensor, name: str, remedy: str = ENCODE_AGAIN) -> None:
    """Raise `IdentityEditError` with the remedy if `tensor` contains NaN or infinite values."""
    if not bool(torch.isfinite(tensor).all()):
        raise IdentityEditError(f"{name} contains NaN or infinite values; {remedy}.")


def check_steps(steps: int, most: int) -> None:
    """Raise `IdentityEditError` unless 1 <= `steps` <= `most`."""
    if not 1 <= steps <= most:
        raise IdentityEditError(f"steps is {steps}; choose a number from 1 to {most}.")


def check_batch_matches(count: int, batch: int, name: str, what: str = "latents") -> None:
    """Raise `IdentityEditError` unless `count` is 1 or the batch size; `what` names the batch's entries."""
    if count not in (1, batch):
        raise IdentityEditError(
            f"{name} holds {count} entries for a batch of {batch} {what}; give one for all, or one for each."
        )


def check_conditioning(conditioning: Any, name: str) -> None:
    """Raise `IdentityEditError` unless a CONDITIONING is a nonempty list of [embedding [B, T, C], options] with finite
    values up to `LARGEST_VALUE`; `name` is the input's name as the user sees it."""
    if not isinstance(conditioning, list) or len(conditioning) == 0:
        raise IdentityEditError(f"{name} is empty; connect a CLIP Text Encode node.")
    for entry in conditioning:
        if not isinstance(entry, (list, tuple)) or len(entry) < 2 or not isinstance(entry[1], dict):
            raise IdentityEditError(f"{name} is not a valid CONDITIONING; connect a CLIP Text Encode node.")
        embedding, pooled = entry[0], entry[1].get("pooled_output")
        if not isinstance(embedding, torch.Tensor):
            raise IdentityEditError(f"{name} holds no text embedding; connect a CLIP Text Encode node.")
        if embedding.ndim != 3 or 0 in embedding.shape:
            raise IdentityEditError(
                f"{name} must hold text embeddings [batch, tokens, channels], not {tuple(embedding.shape)}; connect a "
                f"CLIP Text Encode node."
            )
        if pooled is not None and (not isinstance(pooled, torch.Tensor) or pooled.ndim != 2 or 0 in pooled.shape):
            raise IdentityEditError(f"{name} has an invalid pooled output; connect a CLIP Text Encode node.")
        for tensor in (embedding, pooled):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise IdentityEditError(f"{name} contains NaN or infinite values; encode the prompt again.")
            if tensor is not None:
                check_size_of_values(tensor, name)


def check_areas(options: Iterable[dict[str, Any]], latent: torch.Tensor, name: str) -> None:
    """Raise `IdentityEditError` if an area of a conditioning starts at or beyond the latent's right or bottom edge.

    ComfyUI clips areas that only end there.

    Args:
        options: the options of every entry; "area" is (height, width, y, x) in latent pixels, or
            ("percentage", height, width, y, x) as fractions of the latent, or absent.
        latent: [B, C, H, W].
        name: the conditioning's name as the user sees it, for the message.
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
                f"{name} has an area that starts outside the image ({x}, {y} in a latent of {width}x{height}); lower "
                f"x and y of the node that sets the area."
            )
