"""The pack's one exception; it stands in the lowest room, so that all of them can raise it."""

from __future__ import annotations

import sys
import traceback

LONGEST_MESSAGE = 700
"""Characters; the longest of the pack's own are below, unless they quote a user's whole prompt."""


def for_console(text: str) -> str:
    """The text with letters that the console's encoding lacks as escapes (\\U0001f431); a UTF-8 console keeps all.

    ComfyUI logs with an encoder that refuses such letters (an emoji where a Chinese Windows has gbk), and what it
    raises then ends the thread that runs prompts.
    """
    for stream in (sys.stderr, sys.stdout):
        encoding = getattr(stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    return text


def loggable(error: Exception) -> Exception:
    """The error, without causes whose text the console cannot hold and with its own text as `for_console` gives it.

    ComfyUI logs an error's traceback with all causes, such as the OSError that names a user's file.
    """
    logged = "".join(traceback.format_exception(error))
    if for_console(logged) == logged:
        return error
    own = str(error)
    if for_console(own) != own:
        error = RuntimeError(for_console(f"{type(error).__name__}: {error}")).with_traceback(error.__traceback__)
    error.__cause__, error.__suppress_context__ = None, True
    return error


class IdentityEditError(ValueError):
    """An input cannot be used; the message says which one and what to do instead.

    It stays one line that can be read: of a very long one the middle is left out, as what is wrong stands at its
    beginning and the remedy at its end. ComfyUI logs it, so it holds only what the console can (`for_console`).
    """

    def __init__(self, message: str) -> None:
        line = for_console(" ".join(message.splitlines()))
        if len(line) > LONGEST_MESSAGE:
            line = f"{line[: LONGEST_MESSAGE // 2]} ... {line[10 - LONGEST_MESSAGE // 2 :]}"
        super().__init__(line)
