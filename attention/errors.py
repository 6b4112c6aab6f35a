"""The pack's only exception class, in the lowest package so that all others can raise it."""

from __future__ import annotations

import sys
import traceback

LONGEST_MESSAGE = 700
"""Maximum message length in characters; only messages that quote a long prompt exceed it."""


def for_console(text: str) -> str:
    """Escape characters that the console's encoding lacks (\\U0001f431); a UTF-8 console keeps all of them.

    ComfyUI's logging fails on such characters (an emoji in the gbk encoding of Chinese Windows), and the exception ends
    the thread that executes prompts.
    """
    for stream in (sys.stderr, sys.stdout):
        encoding = getattr(stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    return text


def loggable(error: Exception) -> Exception:
    """An equivalent error whose traceback the console can print: escaped by `for_console`, without causes.

    ComfyUI logs the traceback with all causes, such as an OSError that contains a file name. An error whose traceback
    can be printed is returned unchanged.
    """
    logged = "".join(traceback.format_exception(error))
    if for_console(logged) == logged:
        return error
    message = str(error)
    if for_console(message) != message:
        error = RuntimeError(for_console(f"{type(error).__name__}: {error}")).with_traceback(error.__traceback__)
    error.__cause__, error.__suppress_context__ = None, True
    return error


class IdentityEditError(ValueError):
    """An input cannot be used; the message names it and the remedy.

    The message is one line; the middle of a very long one is cut, since the problem is at its beginning and the remedy
    at its end. Characters that the console cannot print are escaped (`for_console`), because ComfyUI logs the message.
    """

    def __init__(self, message: str) -> None:
        line = for_console(" ".join(message.splitlines()))
        if len(line) > LONGEST_MESSAGE:
            line = f"{line[: LONGEST_MESSAGE // 2]} ... {line[10 - LONGEST_MESSAGE // 2 :]}"
        super().__init__(line)
