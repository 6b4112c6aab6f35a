"""The identity-aware object prompt P^e of Liu et al. 2024 (section 2.2): its embedding and its relevant tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...attention.capture import IdentityAttention, capture_attention
from ...attention.sites import AUTOMATIC
from .. import engine
from ..shared.comfy_types import Clip, Model
from ..shared.errors import IdentityEditError
from ..shared.parsing import as_range, split_words, whole_numbers
from ..text.prompt_tokens import positions_of, prompt_tokens


@dataclass(frozen=True)
class IdentityPrompt:
    """An encoded identity prompt.

    Attributes:
        embedding: [B or 1, T, C] from the text encoder, including start, end and padding tokens, which are part of the
            cross-attention's softmax.
        tokens: positions, 0 to T - 1, whose attention is summed.
    """

    embedding: torch.Tensor
    tokens: tuple[int, ...]


def encode_identity_prompt(clip: Clip, text: str, words: str = "", name: str = "identity_prompt") -> IdentityPrompt:
    """Encode the subject's name, such as "sks cat": rare token and class noun.

    Args:
        clip: CLIP of the model.
        text: the prompt.
        words: the relevant words, written as in the prompt, separated by spaces or commas; empty for the whole prompt.
            Start, end and padding tokens are never included.
        name: the prompt's name as the user sees it.

    Raises:
        IdentityEditError: when the prompt is empty or lacks one of the words.
    """
    prompt = prompt_tokens(clip, text)
    if not prompt.positions:
        raise IdentityEditError(
            f'{name} is empty; write what the subject is, such as "cat", with its rare token before it if '
            'the model has learned one ("sks cat").'
        )
    positions = set(prompt.positions)
    if separate := split_words(words):
        positions = {p for word in separate for p in positions_of(clip, prompt, word, name)}
    with torch.no_grad():
        embedding = clip.encode_from_tokens(clip.tokenize(text))
    inside = tuple(position for position in sorted(positions) if position < embedding.shape[1])
    return IdentityPrompt(embedding, inside)


def token_positions(text: str) -> tuple[int, ...]:
    """Positions of tokens in a prompt's embedding from a text such as "1, 72-76" or "-5 -4": from 0, the start token,
    or from -1 for the last.

    Raises:
        IdentityEditError: when a part is not a position or a range.
    """
    positions: list[int] = []
    for part in split_words(text):
        single, (first, last) = whole_numbers(part), as_range(part) or (1, 0)
        if single is None and first > last:
            raise IdentityEditError(f"token_numbers has '{part}'; write positions such as 72-76, or -1 for the last.")
        positions += range(first, last + 1) if single is None else single
    return tuple(dict.fromkeys(positions))


def capture_identity(
    model: Model,
    identity: IdentityPrompt,
    layers: str = AUTOMATIC,
    self_attention: bool = True,
    by_step: bool = False,
) -> tuple[Model, IdentityAttention]:
    """A clone of `model` that records its attention to the identity; see `attention.capture.capture_attention`."""
    channels = engine.require(model, engine.Capability.CROSS_ATTENTION).text_width
    if identity.embedding.shape[-1] != channels:
        raise IdentityEditError(
            f"clip has embeddings of {identity.embedding.shape[-1]} channels but the model takes {channels}; connect "
            f"the CLIP of the same checkpoint."
        )
    return capture_attention(model, identity.embedding, identity.tokens, layers, self_attention, by_step)
