"""The class word and rare token of a subject, and captions that contain them."""

from __future__ import annotations

import re

from ..shared.errors import IdentityEditError, shortened

CLASS_WORD_FILE = "class_word.txt"
"""In the folder of a subject's images."""


def check_words(class_word: str, token: str) -> tuple[str, str]:
    """The class word and the token without spaces around them.

    Raises:
        IdentityEditError: when the class word is empty or contains the token, or the token is several words.
    """
    class_word, token = one_line(class_word), token.strip()
    if not class_word:
        raise IdentityEditError(
            f"class_word is empty; write what the subject is, such as 'dog', or put it into {CLASS_WORD_FILE} beside "
            f"the images."
        )
    if len(token.split()) > 1:
        raise IdentityEditError(f"token is '{token}'; write one rare word that stands for the subject, such as 'sks'.")
    if token and has_word(class_word, token):
        raise IdentityEditError(
            f"class_word '{class_word}' contains the token '{token}'; write only what the subject is, such as 'dog'."
        )
    return class_word, token


def has_word(text: str, word: str) -> bool:
    """Whether `text` holds `word`, whole ("cat" is not in "caterpillar") and in upper or lower case."""
    return re.search(word_pattern(word), text, re.IGNORECASE) is not None


def with_token(caption: str, class_word: str, token: str) -> str:
    """The caption with the token before its first class word; unchanged where it has the token or no class word."""
    if not token or has_word(caption, token):
        return caption
    return re.sub(
        word_pattern(class_word), lambda found: f"{token} {found.group()}", caption, count=1, flags=re.IGNORECASE
    )


def with_article(class_word: str) -> str:
    """ "a dog", "an owl"."""
    return f"{'an' if class_word[0].lower() in 'aeiou' else 'a'} {class_word}"


def identity_prompt(class_word: str, token: str) -> str:
    """How prompts call the subject: "sks dog", or "dog" without a token."""
    return f"{token} {class_word}".strip()


def word_pattern(word: str) -> str:
    """A pattern for whole words, with any spaces between them."""
    # \b would not do: a token such as <dog> begins and ends with characters that are no letters.
    return r"(?<!\w)" + r"\s+".join(re.escape(part) for part in word.split()) + r"(?!\w)"


def check_caption(caption: str, what: str, class_word: str, token: str, add_token: bool = False) -> str:
    """The caption, with the token where `add_token` asks for it.

    Args:
        caption: the text.
        what: the caption's name for the message, such as "The caption 1.txt".
        class_word, token: both must be in the caption as whole words (the token unless it is "").
        add_token: put the token before the class word where it is missing.

    Raises:
        IdentityEditError: when the caption is empty or lacks one of the two words.
    """
    name = identity_prompt(class_word, token)
    if not caption.strip():
        raise IdentityEditError(f"{what} is empty; write what the image shows, with '{name}' in it.")
    if not has_word(caption, class_word):
        raise IdentityEditError(
            f"{what} lacks the class word '{class_word}'; call the subject '{name}' in it (it says: "
            f"'{shortened(caption)}')."
        )
    if add_token:
        caption = with_token(caption, class_word, token)
    if token and not has_word(caption, token):
        raise IdentityEditError(
            f"{what} lacks the identity token '{token}'; write '{name}' instead of '{class_word}', or "
            f"switch add_token on (it says: '{shortened(caption)}')."
        )
    return caption


def one_line(text: str) -> str:
    """The text with every run of spaces and line ends as one space."""
    return " ".join(text.split())
