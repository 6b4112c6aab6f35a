"""Word vectors in prompts, used by a text encoder like its own token embeddings (Gal et al. 2022)."""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch

from ..shared.errors import IdentityEditError, shortened
from .words import word_pattern

_MARKERS = ("sks", "ufc", "nfl", "ibm", "bbc", "nba", "fifa", "gmo")
"""Words of one token. One that is not in the prompt is the placeholder of the word vectors during tokenization."""


def mark_subject(clip: Any, token: str, class_word: str, count: int, prompt: str, **options: Any) -> dict[str, Any]:
    """Tokenize a prompt with `count` empty places for word vectors where it names the subject.

    The subject's name is the token with the class word behind it, or the token alone; the class word alone where the
    prompt has no token.

    Args:
        clip: CLIP.
        token, class_word: one of them may be "".
        count: word vectors.
        prompt: the text; ComfyUI's weights "(sks cat:1.2)" work.
        options: for `clip.tokenize`.

    Returns:
        ComfyUI's tokens: by encoder, chunks of (token, weight), with None for the token in each place.

    Raises:
        IdentityEditError: when the prompt does not name the subject.
    """
    pattern = rf"{word_pattern(token)}(\s+{word_pattern(class_word)})?" if class_word else word_pattern(token)
    if not token or not re.search(pattern, prompt, re.IGNORECASE):
        pattern = word_pattern(class_word)
    if not (token or class_word) or not re.search(pattern, prompt, re.IGNORECASE):
        name = f"{token} {class_word}".strip() or "the subject"
        raise IdentityEditError(
            f"The prompt '{shortened(prompt, 60)}' does not name the subject; write '{name}' in it."
        )
    marker, ids = _free_marker(clip, prompt)
    text = re.sub(pattern, lambda _: " ".join([marker] * count), prompt, flags=re.IGNORECASE)
    return {
        encoder: [[(None if _is(token, ids[encoder]) else token, weight) for token, weight in part] for part in chunks]
        for encoder, chunks in clip.tokenize(text, **options).items()
    }


def with_word_vectors(marked: dict[str, Any], vectors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Put word vectors [n, C] of each encoder into the places that `mark_subject` left; gradients pass through."""
    filled = {}
    for encoder, chunks in marked.items():
        rows, place = vectors[f"clip_{encoder}"], itertools.count()
        filled[encoder] = [
            [(rows[next(place) % len(rows)] if token is None else token, weight) for token, weight in chunk]
            for chunk in chunks
        ]
    return filled


def word_table(clip: Any) -> dict[str, torch.Tensor]:
    """The table of word vectors [words, C] of each text encoder, by its name.

    Raises:
        IdentityEditError: when the CLIP has no CLIP text encoder.
    """
    tables: dict[str, torch.Tensor] = {}
    for encoder in clip.tokenize(""):
        part = getattr(clip.cond_stage_model, f"clip_{encoder}", None)
        if part is None:
            raise IdentityEditError(
                "The CLIP has no CLIP text encoder; use the CLIP of a Stable Diffusion 1.x, 2.x or XL checkpoint."
            )
        tables[f"clip_{encoder}"] = part.transformer.get_input_embeddings().weight
    return tables


def word_vectors(clip: Any, text: str) -> dict[str, torch.Tensor]:
    """The word vectors of a text's tokens [tokens, C] by the text encoder's name, as the encoder holds them."""
    tables, vectors = word_table(clip), {}
    for encoder, chunks in clip.tokenize(text, return_word_ids=True, disable_weights=True).items():
        tokens = [token for token, _, word in chunks[0] if word != 0]
        vectors[f"clip_{encoder}"] = tables[f"clip_{encoder}"].detach()[tokens]
    return vectors


def check_word_widths(clip: Any, vectors: dict[str, torch.Tensor]) -> None:
    """Raise `IdentityEditError` unless there are word vectors of the right width for every text encoder of the CLIP."""
    for encoder, table in word_table(clip).items():
        if encoder not in vectors or vectors[encoder].shape[-1] != table.shape[-1]:
            found = ", ".join(f"{name} of {each.shape[-1]} channels" for name, each in vectors.items())
            raise IdentityEditError(
                f"The subject has word vectors for {found}, but this CLIP needs {encoder} of {table.shape[-1]} "
                f"channels; use the checkpoint family that it was made for."
            )


def _free_marker(clip: Any, prompt: str) -> tuple[str, dict[str, int]]:
    """A word of one token for every encoder that the prompt does not hold, and its token by encoder."""
    of_prompt = {
        token for chunks in clip.tokenize(prompt).values() for chunk in chunks for token, _ in chunk
        if not isinstance(token, torch.Tensor)
    }  # fmt: skip
    for marker in _MARKERS:
        tokens = {
            encoder: [token for chunk in chunks for token, _, word in chunk if word != 0]
            for encoder, chunks in clip.tokenize(marker, return_word_ids=True).items()
        }
        if all(len(found) == 1 and found[0] not in of_prompt for found in tokens.values()):
            return marker, {encoder: found[0] for encoder, found in tokens.items()}
    raise IdentityEditError(f"The prompt contains all of {', '.join(_MARKERS)}; leave one of these words out.")


def _is(token: Any, token_id: int) -> bool:
    return not isinstance(token, torch.Tensor) and token == token_id
