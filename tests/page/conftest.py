"""What all tests of the page need: a browser."""

from __future__ import annotations

import pytest
from environment import ScriptError
from page import find_chromium


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium; tests that ask for it are skipped where there is none."""
    try:
        return find_chromium()
    except ScriptError as error:
        pytest.skip(str(error))
