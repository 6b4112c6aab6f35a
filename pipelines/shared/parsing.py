"""What users write into text fields: words, numbers, ranges and points.

Commas and semicolons of Chinese and Japanese separate like those of English, and a dash may be the one that comes with
a copied text. What a technique demands beyond the form is checked there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_BETWEEN_WORDS = re.compile("[,;\uff0c\u3001\uff1b]")
_RANGE = re.compile("\\s*(\\d{1,9})\\s*(?:[-\N{EN DASH}]\\s*(\\d{1,9})\\s*)?")


def split_words(text: str) -> list[str]:
    """The words of a field that holds several, separated by spaces or commas alike."""
    return _BETWEEN_WORDS.sub(" ", text).split()


def split_parts(text: str) -> list[str]:
    """What stands between commas, without spaces around it and without what is empty."""
    return [part.strip() for part in _BETWEEN_WORDS.split(text) if part.strip()]


def numbers(text: str) -> list[float] | None:
    """Numbers separated by spaces or commas; None where something is no number."""
    try:
        return [float(part) for part in split_words(text)]
    except ValueError:
        return None


def whole_numbers(text: str) -> list[int] | None:
    """The same of whole numbers."""
    try:
        return [int(part) for part in split_words(text)]
    except ValueError:
        return None


def as_range(text: str) -> tuple[int, int] | None:
    """First and last of "3-7", or of a single "3"; None where it is no range."""
    found = _RANGE.fullmatch(text)
    return None if found is None else (int(found[1]), int(found[2] or found[1]))


def lines_of_numbers(text: str) -> Iterator[tuple[str, list[float] | None]]:
    """Each line that is not empty with its `numbers`; a semicolon ends a line too."""
    for line in text.replace(";", "\n").splitlines():
        if line.strip():
            yield line.strip(), numbers(line)
