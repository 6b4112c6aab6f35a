"""The pack's one exception; it stands in the lowest room, so that all of them can raise it."""

from __future__ import annotations

LONGEST_MESSAGE = 700
"""Characters; the longest of the pack's own are below, unless they quote a user's whole prompt."""


class IdentityEditError(ValueError):
    """An input cannot be used; the message says which one and what to do instead.

    It stays one line that can be read: of a very long one the middle is left out, as what is wrong stands at its
    beginning and the remedy at its end.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        if len(line) > LONGEST_MESSAGE:
            line = f"{line[: LONGEST_MESSAGE // 2]} ... {line[10 - LONGEST_MESSAGE // 2 :]}"
        super().__init__(line)
