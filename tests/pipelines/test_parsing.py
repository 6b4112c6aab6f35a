"""What users write into text fields, by its form."""

from __future__ import annotations

import pytest
from identity_edit_pack.pipelines.shared import parsing

SEPARATED = ["cat snow", "cat, snow", "cat,snow", " cat ,\n snow,", "cat; snow", "cat\uff0csnow", "cat\u3001 snow"]


@pytest.mark.parametrize("text", SEPARATED)
def test_words_are_separated_by_spaces_and_commas_alike(text: str) -> None:
    assert parsing.split_words(text) == ["cat", "snow"]


def test_numbers_are_numbers_or_nothing() -> None:
    assert parsing.numbers(" 1, 2.5 -3e2") == [1.0, 2.5, -300.0] and parsing.numbers(" , ") == []
    assert parsing.whole_numbers("1\u30012") == [1, 2]
    assert parsing.numbers("1, x") is parsing.whole_numbers("1.5") is None


def test_ranges_have_one_end_or_two() -> None:
    assert [parsing.as_range(text) for text in ("3", " 3 - 7 ", "3\N{EN DASH}7", "7-3")] == [
        (3, 3), (3, 7), (3, 7), (7, 3)
    ]  # fmt: skip
    for text in ("", "-3", "3-", "3-4-5", "1.5", "x", "9" * 5000):
        assert parsing.as_range(text) is None


def test_lines_and_semicolons_end_a_point() -> None:
    found = list(parsing.lines_of_numbers("1, 2; 3 4\n\n x"))
    assert found == [("1, 2", [1.0, 2.0]), ("3 4", [3.0, 4.0]), ("x", None)]
