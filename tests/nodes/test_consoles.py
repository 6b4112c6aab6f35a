"""Nothing that the pack says can end the server, whatever the console's encoding: ComfyUI's own handler is strict."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from comfy_api.latest import io as comfy
from identity_edit_pack.nodes import NODE_CLASSES
from identity_edit_pack.nodes.sockets import checked, show_text
from identity_edit_pack.pipelines.shared.errors import IdentityEditError, for_console

SAID = "a \N{CAT FACE} caf\xe9, \u732b, \udcff"
"""An emoji, a letter of cp1252, one of gbk, and half a character as names of files on Linux may hold it."""
ENCODINGS = ("ascii", "cp1252", "gbk", "cp932", "latin-1", "utf-8")


class Strict(logging.StreamHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        raise


@pytest.fixture(params=ENCODINGS)
def encoding(request: pytest.FixtureRequest) -> str:
    return request.param


@contextlib.contextmanager
def console(encoding: str) -> Iterator[Any]:
    """A console of this encoding, and ComfyUI's logger on it."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
    with pytest.MonkeyPatch.context() as patch:  # pytest exchanges sys.stderr between a fixture and its test
        patch.setattr(sys, "stderr", stream)
        patch.setattr(logging.getLogger(), "handlers", [Strict(stream)])
        yield stream


class Fails(comfy.ComfyNode):
    """Raises as a node may."""

    @classmethod
    def define_schema(cls) -> comfy.Schema:
        return comfy.Schema(node_id="Fails", inputs=[comfy.String.Input("how")], outputs=[])

    @classmethod
    @checked
    def execute(cls, how: str) -> comfy.NodeOutput:
        if how == "our sentence":
            raise IdentityEditError(f"prompt says {SAID}; write another.")
        if how == "a cause":
            try:
                os.listdir(f"/nowhere/{SAID}")
            except OSError as error:
                raise IdentityEditError("file cannot be read; choose another.") from error
        if how == "something before":
            try:
                {}[SAID]
            except KeyError:
                raise MemoryError("too large")  # noqa: B904  (the other error is its context)
        raise KeyError(SAID)


@pytest.mark.parametrize("how", ["our sentence", "a cause", "something before", "no sentence"])
def test_a_traceback_can_be_logged(how: str, encoding: str) -> None:
    kinds = {"no sentence": (KeyError, RuntimeError), "something before": MemoryError}
    with console(encoding) as stream:
        with pytest.raises(kinds.get(how, IdentityEditError)) as raised:
            Fails.execute(how)
        logging.error("".join(traceback.format_exception(raised.value)))
        text = stream.buffer.getvalue().decode(encoding)
        assert "test_consoles.py" in text and "in execute" in text  # still says where
        if how == "our sentence":
            assert f"prompt says {for_console(SAID)}; write another." in text


def test_a_console_keeps_the_letters_that_it_has(encoding: str) -> None:
    with console(encoding):
        shown = for_console(SAID)
    kept = {"ascii": "", "cp1252": "\xe9", "latin-1": "\xe9", "gbk": "\u732b\xe9", "cp932": "\u732b"}
    for letter in SAID[:-1]:
        assert (letter in shown) == (letter.isascii() or letter in kept.get(encoding, SAID))
    assert "\\udcff" in shown and ("\\U0001f431" in shown) == (encoding != "utf-8")


def test_warnings_can_be_logged_and_the_page_has_all_letters(encoding: str) -> None:
    with console(encoding) as stream:
        assert show_text(Fails, "done", f"{SAID} is empty.") == f"done\nWarning: {SAID} is empty."
        assert for_console(SAID) in stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize(
    "node", [node for node in NODE_CLASSES if "validate_inputs" in vars(node)], ids=lambda node: node.__name__
)
def test_what_a_validation_says_can_be_logged(node: Any, encoding: str) -> None:
    """ComfyUI logs it too, before a node runs."""
    names = inspect.getfullargspec(node.validate_inputs).args[1:]
    with console(encoding) as stream:
        said = node.validate_inputs(**dict.fromkeys(names, SAID))
        assert isinstance(said, str)
        logging.error(said)
        assert for_console(SAID) in stream.buffer.getvalue().decode(encoding)


def test_a_console_without_an_encoding() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", None)  # pythonw
        assert for_console("\N{CAT FACE}") == "\N{CAT FACE}"
