"""The identity-aware object prompt P^e of Liu et al. 2024 (section 2.2): its embedding and its relevant tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ...attention.capture import IdentityAttention, capture_attention
from ...attention.joint_capture import capture_joint_attention
from ...attention.sites import AUTOMATIC
from .. import engine
from ..shared.comfy_types import Clip, Model
from ..shared.conditioning import Conditioning
from ..shared.errors import IdentityEditError
from ..shared.parsing import as_range, split_words, whole_numbers
from ..text.prompt_tokens import embedded_tokens, embedded_words, occurrences, positions_of, prompt_tokens


@dataclass(frozen=True)
class IdentityPrompt:
    """An encoded identity prompt.

    Attributes:
        embedding: [B or 1, T, C] from the text encoder, including start, end and padding tokens, which are part of the
            cross-attention's softmax. For joint attention, the tokens of the contrast follow.
        tokens: positions, 0 to T - 1, whose attention is used.
        contrast: positions of the contrast, for joint attention.
        options: the options of its CONDITIONING, likewise.
    """

    embedding: torch.Tensor
    tokens: tuple[int, ...]
    contrast: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def conditioning(self) -> Conditioning:
        """The prompt as a CONDITIONING, for joint attention."""
        return [[self.embedding, dict(self.options)]]


def encode_identity_prompt(
    clip: Clip, text: str, words: str = "", name: str = "identity_prompt", contrast: str | None = None
) -> IdentityPrompt:
    """Encode the subject's name, such as "sks cat": rare token and class noun.

    Args:
        clip: CLIP of the model.
        text: the prompt.
        words: the relevant words, written as in the prompt, separated by spaces or commas; empty for the whole prompt.
            Start, end and padding tokens are never included.
        name: the prompt's name as the user sees it.
        contrast: None for models with cross-attention. For joint attention, what is beside the subject, such as the
            place: these words of the prompt, or tokens appended to it; empty for the first token of an empty prompt (of
            CLIP, the start token).

    Raises:
        IdentityEditError: when the prompt is empty or lacks one of the words.
    """
    if contrast is not None:
        return _encode_with_contrast(clip, text, words, name, contrast)
    prompt = prompt_tokens(clip, text)
    if not prompt.positions:
        raise _empty(name)
    positions = set(prompt.positions)
    if separate := split_words(words):
        positions = {p for word in separate for p in positions_of(clip, prompt, word, name)}
    with torch.no_grad():
        embedding = clip.encode_from_tokens(clip.tokenize(text))
    inside = tuple(position for position in sorted(positions) if position < embedding.shape[1])
    return IdentityPrompt(embedding, inside)


def _encode_with_contrast(clip: Clip, text: str, words: str, name: str, contrast: str) -> IdentityPrompt:
    with torch.no_grad():
        embedding, options = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]
        other, _ = clip.encode_from_tokens_scheduled(clip.tokenize(contrast))[0]
    count = embedding.shape[1]
    positions = set(embedded_tokens(clip, text, count))
    if not positions:
        raise _empty(name)
    if separate := split_words(words):
        positions = {p for word in separate for p in embedded_words(clip, text, count, word, name)}
    if contrast and (inside := occurrences(clip, text, count, contrast)):
        return IdentityPrompt(embedding, tuple(sorted(positions)), inside, dict(options))
    of_contrast = list(embedded_tokens(clip, contrast, other.shape[1])) or [0]
    options = dict(options)
    if options.get("attention_mask") is not None:
        mask = options["attention_mask"]
        options["attention_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], len(of_contrast))], dim=1)
    return IdentityPrompt(
        embedding=torch.cat([embedding, other[:, of_contrast]], dim=1),
        tokens=tuple(sorted(positions)),
        contrast=tuple(range(count, count + len(of_contrast))),
        options=options,
    )


def identity_in_caption(clip: Clip, subject: str, caption: str, contrast: str) -> IdentityPrompt:
    """For joint attention, the subject's words in a caption of the image, which outline it better than a prompt of the
    subject alone; that prompt if the caption does not contain them."""
    count = clip.encode_from_tokens_scheduled(clip.tokenize(caption))[0][0].shape[1]
    words = split_words(subject)
    if words and all(occurrences(clip, caption, count, word) for word in words):
        return encode_identity_prompt(clip, caption, subject, "caption", contrast)
    return encode_identity_prompt(clip, subject, name="subject", contrast=contrast)


def _empty(name: str) -> IdentityEditError:
    return IdentityEditError(
        f'{name} is empty; write what the subject is, such as "cat", with its rare token before it if '
        'the model has learned one ("sks cat").'
    )


def contrast_for(model: Model, text: str) -> str | None:
    """The `contrast` of `encode_identity_prompt` for a model: the text, or None for cross-attention."""
    return text.strip() if engine.is_joint(model) else None


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
    sampled: bool = False,
) -> tuple[Model, IdentityAttention]:
    """A clone of `model` that records its attention to the identity.

    See `attention.capture.capture_attention`, and `attention.joint_capture.capture_joint_attention` for models with
    joint attention, which need a prompt with a contrast.

    Args:
        model, layers, self_attention, by_step: see there.
        identity: the identity prompt.
        sampled: with joint attention, the identity prompt is the sampled one and needs no model calls of its own.
    """
    channels = engine.require(model, engine.Capability.TEXT_ATTENTION).text_width
    if channels and identity.embedding.shape[-1] != channels:
        raise IdentityEditError(
            f"clip has embeddings of {identity.embedding.shape[-1]} channels but the model takes {channels}; connect "
            f"the CLIP of the same checkpoint."
        )
    if engine.is_joint(model):
        engine.check_prompt(model, identity.conditioning, "The identity prompt")
        prompt = None if sampled else identity.conditioning
        return capture_joint_attention(
            model, prompt, identity.tokens, identity.contrast, layers, self_attention, by_step
        )
    return capture_attention(model, identity.embedding, identity.tokens, layers, self_attention, by_step)


def capture_tokens(
    model: Model, positions: tuple[int, ...], layers: str = AUTOMATIC, by_step: bool = False
) -> tuple[Model, IdentityAttention]:
    """A clone of `model` that records its attention to tokens of the sampled prompt."""
    engine.require(model, engine.Capability.TEXT_ATTENTION)
    if engine.is_joint(model):
        return capture_joint_attention(model, None, positions, layers=layers, by_step=by_step)
    return capture_attention(model, None, positions, layers, by_step=by_step)
