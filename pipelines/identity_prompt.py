"""The identity-aware object prompt P^e of Liu et al. 2024 (section 2.2): its embedding and the tokens that count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..attention.capture import IdentityAttention, capture_attention
from ..attention.layers import AUTOMATIC
from . import engine
from .errors import IdentityEditError


@dataclass(frozen=True)
class IdentityPrompt:
    """An encoded identity prompt.

    Attributes:
        embedding: [B or 1, T, C], as the text encoder gives it: with begin, end and padding, over which the softmax of
            cross-attention runs too.
        tokens: positions, 0 to T - 1, whose attention is summed.
    """

    embedding: torch.Tensor
    tokens: tuple[int, ...]


def encode_identity_prompt(clip: Any, text: str, words: str = "") -> IdentityPrompt:
    """Encode the words that name the subject, such as "sks cat": the rare token and the class noun.

    Args:
        clip: CLIP of the model.
        text: the prompt.
        words: the part of it that counts, each word as it stands in the prompt; empty is the whole prompt. The tokens
            of begin, end and padding never count.

    Raises:
        IdentityEditError: when the prompt is empty or lacks one of the words.
    """
    positions = [position for position, _ in _content_tokens(clip, text)]
    if not positions:
        raise IdentityEditError(
            'The identity prompt is empty; write what the subject is, such as "cat", with its rare token before it if '
            'the model has learned one ("sks cat").'
        )
    if words.split():
        positions = [position for word in words.split() for position in _positions_of(clip, word, text)]
    with torch.no_grad():
        embedding = clip.encode_from_tokens(clip.tokenize(text))
    inside = tuple(sorted({position for position in positions if position < embedding.shape[1]}))
    return IdentityPrompt(embedding, inside)


def capture_identity(
    model: Any, identity: IdentityPrompt, layers: str = AUTOMATIC, self_attention: bool = True
) -> tuple[Any, IdentityAttention]:
    """A clone of `model` that records where it sees the identity; see `attention.capture.capture_attention`.

    Raises:
        IdentityEditError: when the model or the prompt's embedding cannot be used.
    """
    engine.require_noise_prediction_model(model)
    channels = engine.context_channels(model)
    if identity.embedding.shape[-1] != channels:
        raise IdentityEditError(
            f"The identity prompt has embeddings of {identity.embedding.shape[-1]} channels but the model takes "
            f"{channels}; connect the CLIP of the same checkpoint."
        )
    try:
        return capture_attention(model, identity.embedding, identity.tokens, layers, self_attention)
    except ValueError as error:
        raise IdentityEditError(str(error)) from error


def _content_tokens(clip: Any, text: str) -> list[tuple[int, Any]]:
    """(position in the embedding, token) of everything but begin, end and padding.

    ComfyUI gives those the word id 0. SDXL's two encoders have the same tokens at the same positions, but for textual
    inversions of different lengths: a position counts when either has a word there.
    """
    found: dict[int, Any] = {}
    for chunks in clip.tokenize(text, return_word_ids=True).values():
        start = 0
        for chunk in chunks:
            found.update({start + i: token for i, (token, _, word) in enumerate(chunk) if word != 0})
            start += len(chunk)
    return sorted(found.items(), key=lambda item: item[0])


def _positions_of(clip: Any, word: str, text: str) -> list[int]:
    """Positions of every occurrence of a word's tokens among those of the prompt."""
    content, wanted = _content_tokens(clip, text), [token for _, token in _content_tokens(clip, word)]
    found: list[int] = []
    for start in range(len(content) - len(wanted) + 1):
        part = content[start : start + len(wanted)]
        if wanted and all(_same_token(token, other) for (_, token), other in zip(part, wanted, strict=True)):
            found += [position for position, _ in part]
    if not found:
        raise IdentityEditError(
            f"The identity prompt {text!r} does not contain the word {word!r}; write it as it stands in the prompt."
        )
    return found


def _same_token(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):  # of a textual inversion
        return torch.equal(first, second)
    return type(first) is type(second) and first == second
