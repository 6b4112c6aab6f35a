"""Parsers for text widgets: words, numbers, ranges and points.

Chinese and Japanese commas and semicolons are accepted like English ones, and an en dash like a hyphen. Each technique
checks its own further requirements.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_BETWEEN_WORDS = re.compile("[,;\uff0c\u3001\uff1b]")
_RANGE = re.compile("\\s*(\\d{1,9})\\s*(?:[-\N{EN DASH}]\\s*(\\d{1,9})\\s*)?")


def split_words(text: str) -> list[str]:
    """Words separated by spaces or commas."""
    return _BETWEEN_WORDS.sub(" ", text).split()


def split_parts(text: str) -> list[str]:
    """Nonempty parts separated by commas, with surrounding spaces removed."""
    return [part.strip() for part in _BETWEEN_WORDS.split(text) if part.strip()]


def numbers(text: str) -> list[float] | None:
    """Numbers separated by spaces or commas, or None if any part is not a number."""
    try:
        return [float(part) for part in split_words(text)]
    except ValueError:
        return None


def whole_numbers(text: str) -> list[int] | None:
    """Integers separated by spaces or commas, or None if any part is not an integer."""
    try:
        return [int(part) for part in split_words(text)]
    except ValueError:
        return None


def as_range(text: str) -> tuple[int, int] | None:
    """First and last number of "3-7", or of a single "3"; None if it is not a range."""
    match = _RANGE.fullmatch(text)
    return None if match is None else (int(match[1]), int(match[2] or match[1]))


def lines_of_numbers(text: str) -> Iterator[tuple[str, list[float] | None]]:
    """Each nonempty line with its `numbers`; a semicolon also ends a line."""
    for line in text.replace(";", "\n").splitlines():
        if line.strip():
            yield line.strip(), numbers(line)
