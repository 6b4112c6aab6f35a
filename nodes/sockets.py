"""What all nodes share: the pack's own sockets, the schema's form, progress with preview, text shown on a node."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from comfy_api.latest import io

from ..pipelines.engine import Callback
from ..pipelines.errors import IdentityEditError

CATEGORY = "identity edit"
PIXELS_OF_A_CELL = 8
"""Pixels of a picture along a side of one cell of its latent."""

Inversion = io.Custom("INVERSION")
"""`pipelines.inversion.Inversion`: a picture's way to noise, its schedule, and perhaps a table of embeddings."""
SubjectPictures = io.Custom("SUBJECT_PICTURES")
"""`pipelines.subject_pictures.SubjectPictures`: the pictures of one subject, with captions and perhaps masks."""
Subject = io.Custom("SUBJECT")
"""`pipelines.subject_embedding.SubjectEmbedding`: what was learned of a subject, as text embeddings."""

IdentityWords = io.Custom("IDENTITY_WORDS")
"""`pipelines.identity_words.IdentityWords`: a network that says in words of the text encoder who is in a picture."""
WPlus = io.Custom("W_PLUS")
"""`pipelines.w_plus.WPlus`: style rows that say from coarse to fine who is in a picture."""
WPlusEncoder = io.Custom("W_PLUS_ENCODER")
"""`pipelines.w_plus_encoder.WPlusEncoder`: the network that gives such rows."""
FaceDetector = io.Custom("FACE_DETECTOR")
"""`pipelines.faces.FaceDetector`: what finds faces and five points in each."""

StyleAttention = io.Custom("STYLE_ATTENTION")
"""`pipelines.style_attention.StyleAttention`: what shows such rows to a model: mapping network and cross-attention."""


def schema(*, category: str, search_aliases: list[str], **fields: Any) -> io.Schema:
    """A node's schema below the pack's category, with search aliases where ComfyUI has them (newer than 0.3.75).

    Args:
        category: the part below "identity edit/".
        search_aliases: other words under which a user may look for the node.
        fields: everything else of `io.Schema`.
    """
    if any(field.name == "search_aliases" for field in dataclasses.fields(io.Schema)):
        fields["search_aliases"] = search_aliases
    return io.Schema(category=f"{CATEGORY}/{category}", hidden=[io.Hidden.unique_id], **fields)


def progress(model: Any, total: int) -> Callback:
    """ComfyUI's own progress bar with its preview of latents, for a loop of `total` steps."""
    import latent_preview  # a module of ComfyUI, not needed before a node runs

    return latent_preview.prepare_callback(model, max(1, total))


def at_picture_size(mask: torch.Tensor) -> torch.Tensor:
    """A mask of the latent [B, H, W] at the picture's size, cell by cell as it was used."""
    return mask.repeat_interleave(PIXELS_OF_A_CELL, dim=1).repeat_interleave(PIXELS_OF_A_CELL, dim=2)


def latent_samples(latent: dict[str, Any], name: str) -> torch.Tensor:
    """The tensor of a LATENT socket; its shape and values are checked where it is used.

    Raises:
        IdentityEditError: when the socket holds no latents.
    """
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if samples is None:
        raise IdentityEditError(f"{name} holds no latents; connect a VAE Encode node.")
    return samples


def show_text(node: type[io.ComfyNode], text: str, warning: str | None = None) -> str:
    """Show a text on the node on the page, write a warning into ComfyUI's log, and return both as one text."""
    if warning is not None:
        logging.warning("IdentityEdit: %s", warning)
        text = f"{text}\nWarning: {warning}" if text else f"Warning: {warning}"
    try:
        from server import PromptServer

        instance = getattr(PromptServer, "instance", None)
    except ImportError:  # outside of a server
        instance = None
    if instance is not None and node.hidden is not None:
        instance.send_progress_text(text, node.hidden.unique_id)
    return text
