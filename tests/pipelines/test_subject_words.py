"""Captions and the words that name a subject in them."""

from __future__ import annotations

import pytest
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.subjects.words import check_caption, check_words, with_article, with_token


def test_a_token_is_put_before_whole_words_and_once() -> None:
    assert with_token("a catalog and a cat and a cat", "cat", "sks") == "a catalog and a sks cat and a cat"
    assert with_token("A Cat", "cat", "<cat-toy>") == "A <cat-toy> Cat"
    assert with_token("a sks cat", "cat", "sks") == "a sks cat"
    assert with_token("a tree", "cat", "sks") == "a tree"
    assert with_token("a cat", "cat", "") == "a cat"


def test_words_that_cannot_name_a_subject_are_refused() -> None:
    assert check_words(" guinea \n pig ", " sks ") == ("guinea pig", "sks")
    for class_word, token in (("", "sks"), ("sks dog", "sks"), ("dog", "two words")):
        with pytest.raises(IdentityEditError):
            check_words(class_word, token)


def test_a_caption_holds_both_words() -> None:
    assert check_caption("a dog asleep", "It", "dog", "sks", add_token=True) == "a sks dog asleep"
    for caption in ("", "a cat", "a dog asleep"):
        with pytest.raises(IdentityEditError, match="^It "):
            check_caption(caption, "It", "dog", "sks")


def test_articles() -> None:
    assert [with_article(word) for word in ("dog", "Owl")] == ["a dog", "an Owl"]
