"""Token positions of words in a prompt, and token alignment between two prompts.

Stable Diffusion 1.x, 2.x and both encoders of XL use CLIP's byte-pair encoding. ComfyUI splits a long prompt into
chunks of 77 tokens, each with its own start token, end token and padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from ..shared.comfy_types import Clip
from ..shared.errors import IdentityEditError

_END_OF_WORD = "</w>"
"""Marks the last token of a word in CLIP's byte-pair encoding."""

_TWO_TEXTS = {"l", "g", "t5xxl"}
"""ComfyUI's names of the text encoders of Stable Diffusion 3, which concatenates the tokens of CLIP and T5."""

_ENCODERS = ({"l"}, {"h"}, {"l", "g"})
"""ComfyUI's names of the text encoders of Stable Diffusion 1.x, 2.x and XL."""

Positions = tuple[int, ...]
Pair = tuple[Positions, Positions]
"""Positions in the source and the matching positions in the target."""


@dataclass(frozen=True)
class Chunk:
    """A chunk of 77 tokens: positions of its start token, end token and padding."""

    begin: int
    end: int
    padding: Positions


@dataclass(frozen=True)
class PromptTokens:
    """A tokenized prompt.

    Attributes:
        text: the prompt.
        count: T, the tokens of its embedding: 77 or a multiple.
        content: (position, token) of everything except start, end and padding; a token is a number, or a textual
            inversion's embedding.
        words: the token positions of each word; punctuation counts as a word, and so does a textual inversion with any
            number of vectors.
        chunks: positions of start, end and padding tokens.
    """

    text: str
    count: int
    content: tuple[tuple[int, Any], ...]
    words: tuple[Positions, ...]
    chunks: tuple[Chunk, ...]

    @property
    def positions(self) -> Positions:
        return tuple(position for position, _ in self.content)


def check_clip(clip: Clip, name: str, of_any_family: bool = False) -> None:
    """Raise `IdentityEditError` unless a CLIP tokenizes text for the encoders of Stable Diffusion, or of any family."""
    if not hasattr(clip, "tokenize"):
        raise IdentityEditError(
            f"{name} is not a text encoder ({type(clip).__name__}); connect the CLIP of the same Stable Diffusion 1.x, "
            f"2.x or XL checkpoint."
        )
    encoders = clip.tokenize("")
    if not of_any_family and set(encoders) not in _ENCODERS:
        family = type(clip.tokenizer).__name__.removesuffix("Tokenizer")
        raise IdentityEditError(
            f"{name} belongs to another model family ({family}: {', '.join(encoders)}); connect the CLIP of the same "
            f"Stable Diffusion 1.x, 2.x or XL checkpoint."
        )


def prompt_tokens(clip: Clip, text: str) -> PromptTokens:
    """Tokenize a prompt with `clip`, including emphasis and textual inversions."""
    tokens: dict[int, tuple[Any, int]] = {}
    chunks: dict[int, Chunk] = {}
    count = 0
    # SDXL's two encoders have the same tokens at the same positions, except for textual inversions of different
    # lengths: a position belongs to a word if it does for either. Start, end and padding have ComfyUI's word id 0.
    for encoder_chunks in clip.tokenize(text, return_word_ids=True).values():
        start = 0
        for pairs in encoder_chunks:
            content = [i for i, (_, _, word) in enumerate(pairs) if word != 0]
            tokens.update({start + i: (pairs[i][0], pairs[i][2]) for i in content})
            end = content[-1] + 1 if content else 1
            chunk = Chunk(start, start + end, tuple(range(start + end + 1, start + len(pairs))))
            chunks[start] = max(chunk, chunks.get(start, chunk), key=lambda each: each.end)
            start += len(pairs)
        count = max(count, start)
    ordered = tuple((position, tokens[position][0]) for position in sorted(tokens))
    words = _words(clip, [(position, *tokens[position]) for position in sorted(tokens)])
    return PromptTokens(text, count, ordered, words, tuple(chunks[start] for start in sorted(chunks)))


def positions_of(clip: Clip, prompt: PromptTokens, word: str, name: str) -> Positions:
    """Token positions of every occurrence of a word or phrase in a prompt.

    Args:
        clip: CLIP.
        prompt: the prompt.
        word: the word or phrase, written as in the prompt.
        name: the prompt's name as the user sees it.

    Raises:
        IdentityEditError: when the prompt does not contain it.
    """
    positions = _occurrences(clip, prompt, word)
    if not positions:
        raise IdentityEditError(
            f"{name} {prompt.text!r} does not contain the word {word!r}; write it exactly as in the prompt."
        )
    return positions


def positions_in_either(clip: Clip, source: PromptTokens, target: PromptTokens, word: str) -> Pair:
    """Token positions of a word in both prompts, of which at least one must contain it."""
    positions = _occurrences(clip, source, word), _occurrences(clip, target, word)
    if not any(positions):
        raise IdentityEditError(
            f"Neither the source prompt nor the target prompt contains the word {word!r}; write it exactly as in one "
            f"of them."
        )
    return positions


def embedded_tokens(clip: Clip, text: str, length: int) -> Positions:
    """Positions of a prompt's tokens in its embedding, for the text encoders of any model family.

    They are the tokens that an empty prompt does not have: no start, end and padding tokens, and no template of a
    language model. A word of Stable Diffusion 3 is in the embedding twice, as tokens of CLIP and of T5.

    Args:
        clip: CLIP.
        text: the prompt.
        length: T of its embedding [B, T, C]. It may be shorter than the tokenized prompt, by the start of a language
            model's template or by padding at the end.
    """
    return tuple(position for content in _embedded(clip, text, length) for position, _ in content)


def embedded_words(clip: Clip, text: str, length: int, word: str, name: str) -> Positions:
    """Positions of every occurrence of a word or phrase in an embedding; see `embedded_tokens` and `positions_of`.

    Raises:
        IdentityEditError: when the prompt does not contain it.
    """
    positions = occurrences(clip, text, length, word)
    if not positions:
        raise IdentityEditError(
            f"{name} {text!r} does not contain the word {word!r}; write it exactly as in the prompt."
        )
    return positions


def occurrences(clip: Clip, text: str, length: int, word: str) -> Positions:
    """Like `embedded_words`, but empty when the prompt does not contain the word."""
    positions: set[int] = set()
    for written in (word, f" {word}"):  # tokens of some language models include the space before a word
        for content, of_word in zip(_embedded(clip, text, length), _embedded(clip, written, length), strict=True):
            positions.update(_matches(content, [token for _, token in of_word]))
    return tuple(sorted(positions))


def _embedded(clip: Clip, text: str, length: int) -> list[list[tuple[int, Any]]]:
    """(position, token) of a prompt's tokens in an embedding of `length` tokens, for each encoder that makes it."""
    of_text, of_nothing = (clip.tokenize(each, return_word_ids=True) for each in (text, ""))
    # The embedding is T5's if there is one; CLIPs beside it make pooled outputs, except in Stable Diffusion 3.
    main = "t5xxl" if "t5xxl" in of_text else next(iter(of_text))
    names = ["l", main] if set(of_text) == _TWO_TEXTS else [main]
    lengths = {name: sum(map(len, of_text[name])) for name in names}
    if length in lengths.values():  # all, or the only encoder that was loaded
        names = [next(name for name in names if lengths[name] == length)]
    templates = [[token for chunk in of_nothing[name] for token, _, word in chunk if word != 0] for name in names]
    start = length - sum(lengths[name] for name in names) if any(templates) else 0
    contents = []
    for name, empty in zip(names, templates, strict=True):
        pairs = [pair for chunk in of_text[name] for pair in chunk]
        content = [(start + i, token) for i, (token, _, word) in enumerate(pairs) if word != 0]
        before = _common(empty, [token for _, token in content])
        after = _common(empty[before:][::-1], [token for _, token in content[before:]][::-1])
        content = content[before : len(content) - after]
        contents.append([(position, token) for position, token in content if 0 <= position < length])
        start += lengths[name]
    return contents


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of tokens at the start that are the same."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if not _same_token(a, b)), min(len(first), len(second)))


def paired_words(source: PromptTokens, target: PromptTokens) -> list[Pair]:
    """Pair the words of two prompts of equal length one by one (Hertz et al. 2023, word swap)."""
    if len(source.words) != len(target.words):
        raise IdentityEditError(
            f"The source prompt has {len(source.words)} words (with punctuation) and the target prompt "
            f"{len(target.words)}, but replace needs equal numbers; use refine."
        )
    return list(zip(source.words, target.words, strict=True))


def aligned_tokens(source: PromptTokens, target: PromptTokens) -> list[Pair]:
    """Pair the tokens that two prompts share in the same order, for prompts with added or removed words.

    This is the longest common subsequence, as in the reference implementation's alignment (match 1, mismatch -1, gap 0,
    so a mismatch is never better than two gaps). difflib finds blocks, not the longest alignment.
    """
    first, second = source.content, target.content
    # lengths[i][j]: length of the longest common subsequence of first[i:] and second[j:].
    lengths = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i in reversed(range(len(first))):
        for j in reversed(range(len(second))):
            if _same_token(first[i][1], second[j][1]):
                lengths[i][j] = lengths[i + 1][j + 1] + 1
            else:
                lengths[i][j] = max(lengths[i + 1][j], lengths[i][j + 1])
    pairs: list[Pair] = []
    i = j = 0
    while i < len(first) and j < len(second):
        if _same_token(first[i][1], second[j][1]):
            pairs.append(((first[i][0],), (second[j][0],)))
            i, j = i + 1, j + 1
        elif lengths[i + 1][j] >= lengths[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs


def token_mapper(source: PromptTokens, target: PromptTokens, pairs: Sequence[Pair]) -> torch.Tensor:
    """The matrix [S, T] float32 that maps weights of source tokens to target tokens.

    Words with equal token counts are mapped token by token; otherwise each target token gets the sum of the source
    tokens divided by the number of target tokens, as in the reference implementation. Start and end tokens are mapped
    to each other, and padding by position; surplus padding of the shorter prompt is treated as a word. The reference
    implementation maps everything after the last exchanged word by position, which is shifted if the exchanged words
    differ in length; here later words are mapped to their counterparts. Columns without a counterpart are 0.
    """
    mapper = torch.zeros(source.count, target.count)
    for source_positions, target_positions in [*pairs, *_paired_special_tokens(source, target)]:
        if len(source_positions) == len(target_positions):
            mapper[list(source_positions), list(target_positions)] = 1.0
        else:
            for position in target_positions:
                mapper[list(source_positions), position] = 1.0 / len(target_positions)
    return mapper


def _paired_special_tokens(source: PromptTokens, target: PromptTokens) -> list[Pair]:
    """Pairs of start tokens, end tokens and padding."""
    pairs: list[Pair] = []
    for first, second in zip(source.chunks, target.chunks, strict=False):
        pairs += [((first.begin,), (second.begin,)), ((first.end,), (second.end,))]
        if first.padding and second.padding:
            common = max(first.padding[0], second.padding[0])
            pairs.append(
                (
                    tuple(position for position in first.padding if position <= common),
                    tuple(position for position in second.padding if position <= common),
                )
            )
            # Both chunks start at the same position and have the same length.
            pairs += [((position,), (position,)) for position in first.padding if position > common]
    return pairs


def _words(clip: Clip, content: Sequence[tuple[int, Any, int]]) -> tuple[Positions, ...]:
    """Group (position, token, ComfyUI's word id) into words. ComfyUI splits words at spaces only."""
    words: list[Positions] = []
    word: list[int] = []
    for (is_vector, _), tokens in groupby(content, lambda item: (isinstance(item[1], torch.Tensor), item[2])):
        for position, token, _ in tokens:
            word.append(position)
            if not is_vector and clip.tokenizer.untokenize([(token, 1.0)])[0][1].endswith(_END_OF_WORD):
                words.append(tuple(word))
                word = []
        if is_vector:
            words.append(tuple(word))
            word = []
    return tuple(words + ([tuple(word)] if word else []))


def _occurrences(clip: Clip, prompt: PromptTokens, word: str) -> Positions:
    return _matches(prompt.content, [token for _, token in prompt_tokens(clip, word).content])


def _matches(content: Sequence[tuple[int, Any]], wanted: Sequence[Any]) -> Positions:
    positions: list[int] = []
    for start in range(len(content) - len(wanted) + 1):
        span = content[start : start + len(wanted)]
        if wanted and all(_same_token(token, other) for (_, token), other in zip(span, wanted, strict=True)):
            positions += [position for position, _ in span]
    return tuple(positions)


def _same_token(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):  # textual inversions
        return torch.equal(first, second)
    return type(first) is type(second) and first == second
