"""Where the words of a prompt are in its embedding, and which tokens of two prompts belong together.

Stable Diffusion 1.x, 2.x and both encoders of XL cut text with the same byte-pair encoding of CLIP. ComfyUI cuts a long
prompt into parts of 77 tokens, each with its own begin, end and padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from ..shared.errors import IdentityEditError

_END_OF_WORD = "</w>"
"""How CLIP's byte-pair encoding marks the last token of a word."""

_ENCODERS = ({"l"}, {"h"}, {"l", "g"})
"""What ComfyUI calls the text encoders of Stable Diffusion 1.x, 2.x and XL."""

Positions = tuple[int, ...]
Pair = tuple[Positions, Positions]
"""Positions in the source that belong to positions in the target."""


@dataclass(frozen=True)
class Part:
    """77 tokens: positions of begin, end and padding."""

    begin: int
    end: int
    padding: Positions


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as the text encoder gets it.

    Attributes:
        text: the prompt.
        count: tokens of its embedding, T: 77 or a multiple.
        content: (position, token) of everything but begin, end and padding; a token is a number, or an embedding of a
            textual inversion.
        words: the positions of each word's tokens; punctuation is a word of its own, and so is an embedding of however
            many vectors.
        parts: where begin, end and padding are.
    """

    text: str
    count: int
    content: tuple[tuple[int, Any], ...]
    words: tuple[Positions, ...]
    parts: tuple[Part, ...]

    @property
    def positions(self) -> Positions:
        return tuple(position for position, _ in self.content)


def check_clip(clip: Any, name: str) -> None:
    """Check that a CLIP cuts text for the encoders of Stable Diffusion.

    Args:
        clip: CLIP.
        name: the input's name as the user sees it.

    Raises:
        IdentityEditError: for another family's, with that family's name and encoders, and for what is no CLIP at all,
            as a node with an output of any type can bring.
    """
    if not hasattr(clip, "tokenize"):
        raise IdentityEditError(
            f"{name} is no text encoder ({type(clip).__name__}); connect the CLIP of the same Stable Diffusion 1.x, "
            f"2.x or XL checkpoint."
        )
    encoders = clip.tokenize("")
    if set(encoders) not in _ENCODERS:
        family = type(clip.tokenizer).__name__.removesuffix("Tokenizer")
        raise IdentityEditError(
            f"{name} is another family's ({family}, with {', '.join(encoders)}); connect the CLIP of the same Stable "
            f"Diffusion 1.x, 2.x or XL checkpoint."
        )


def prompt_tokens(clip: Any, text: str) -> PromptTokens:
    """Cut a prompt into tokens as `clip` does, emphasis and textual inversions included."""
    found: dict[int, tuple[Any, int]] = {}
    parts: dict[int, Part] = {}
    count = 0
    # SDXL's two encoders have the same tokens at the same positions, but for textual inversions of different lengths:
    # a position counts as a word when either has one there. ComfyUI gives begin, end and padding the word id 0.
    for chunks in clip.tokenize(text, return_word_ids=True).values():
        start = 0
        for chunk in chunks:
            content = [i for i, (_, _, word) in enumerate(chunk) if word != 0]
            found.update({start + i: (chunk[i][0], chunk[i][2]) for i in content})
            end = content[-1] + 1 if content else 1
            part = Part(start, start + end, tuple(range(start + end + 1, start + len(chunk))))
            parts[start] = max(part, parts.get(start, part), key=lambda part: part.end)
            start += len(chunk)
        count = max(count, start)
    ordered = tuple((position, found[position][0]) for position in sorted(found))
    words = _words(clip, [(position, *found[position]) for position in sorted(found)])
    return PromptTokens(text, count, ordered, words, tuple(parts[start] for start in sorted(parts)))


def positions_of(clip: Any, prompt: PromptTokens, word: str, name: str) -> Positions:
    """Positions of every occurrence of a word (or of several that follow one another) in a prompt.

    Args:
        clip: CLIP.
        prompt: where to look.
        word: as it stands in the prompt.
        name: the prompt's, as the user sees it.

    Raises:
        IdentityEditError: when the prompt does not contain it.
    """
    found = _occurrences(clip, prompt, word)
    if not found:
        raise IdentityEditError(
            f"{name} {prompt.text!r} does not contain the word {word!r}; write it as it stands in the prompt."
        )
    return found


def positions_in_either(clip: Any, source: PromptTokens, target: PromptTokens, word: str) -> Pair:
    """Positions of a word in both prompts; one of them may be empty.

    Raises:
        IdentityEditError: when neither prompt contains it.
    """
    found = _occurrences(clip, source, word), _occurrences(clip, target, word)
    if not any(found):
        raise IdentityEditError(
            f"Neither the source prompt nor the target prompt contains the word {word!r}; write it as it stands in one "
            f"of them."
        )
    return found


def paired_words(source: PromptTokens, target: PromptTokens) -> list[Pair]:
    """Word for word, for prompts in which words are exchanged (Hertz et al. 2023, word swap).

    Raises:
        IdentityEditError: when the prompts have different numbers of words.
    """
    if len(source.words) != len(target.words):
        raise IdentityEditError(
            f"The source prompt has {len(source.words)} words (with punctuation) and the target prompt "
            f"{len(target.words)}, but replace exchanges word for word; use refine."
        )
    return list(zip(source.words, target.words, strict=True))


def aligned_tokens(source: PromptTokens, target: PromptTokens) -> list[Pair]:
    """The tokens that both prompts share in the same order, for prompts in which words are added or left out.

    The longest common subsequence: the reference implementation's alignment (a match counts 1, a mismatch -1, a gap
    nothing, so that a mismatch is never better than two gaps). difflib finds blocks, not the longest alignment.
    """
    first, second = source.content, target.content
    # lengths[i][j]: of the longest common subsequence of first[i:] and second[j:].
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
    """The matrix [S, T] float32 that brings weights of the source's tokens to the target's tokens.

    A word of as many tokens as its counterpart is mapped token by token; else each token of the target gets the sum of
    the source's divided by their number, as in the reference implementation. Begin and end are mapped to begin and end,
    padding by its position; where a longer prompt has left less of it, the surplus is treated as a word. The reference
    implementation maps everything behind the last exchanged word by position, which shifts it where the exchanged words
    differ in length; here words behind follow their words. Columns without a counterpart are 0.
    """
    mapper = torch.zeros(source.count, target.count)
    for of_source, of_target in [*pairs, *_paired_parts(source, target)]:
        if len(of_source) == len(of_target):
            mapper[list(of_source), list(of_target)] = 1.0
        else:
            for position in of_target:
                mapper[list(of_source), position] = 1.0 / len(of_target)
    return mapper


def _paired_parts(source: PromptTokens, target: PromptTokens) -> list[Pair]:
    pairs: list[Pair] = []
    for first, second in zip(source.parts, target.parts, strict=False):
        pairs += [((first.begin,), (second.begin,)), ((first.end,), (second.end,))]
        if first.padding and second.padding:
            common = max(first.padding[0], second.padding[0])
            pairs.append(
                (
                    tuple(position for position in first.padding if position <= common),
                    tuple(position for position in second.padding if position <= common),
                )
            )
            # Both parts begin at the same position and have the same length.
            pairs += [((position,), (position,)) for position in first.padding if position > common]
    return pairs


def _words(clip: Any, content: Sequence[tuple[int, Any, int]]) -> tuple[Positions, ...]:
    """Of (position, token, number that ComfyUI gives to what stands between two spaces)."""
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


def _occurrences(clip: Any, prompt: PromptTokens, word: str) -> Positions:
    wanted = [token for _, token in prompt_tokens(clip, word).content]
    content, found = prompt.content, []
    for start in range(len(content) - len(wanted) + 1):
        part = content[start : start + len(wanted)]
        if wanted and all(_same_token(token, other) for (_, token), other in zip(part, wanted, strict=True)):
            found += [position for position, _ in part]
    return tuple(found)


def _same_token(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):  # of a textual inversion
        return torch.equal(first, second)
    return type(first) is type(second) and first == second
