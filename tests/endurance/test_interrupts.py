"""Interrupts at random moments of shipped workflows: the prompt ends, and the next one is right to the bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from identity_edit_pack.tests.endurance.interrupts import interrupts

if TYPE_CHECKING:
    from identity_edit_pack.tests.conftest import RunningServer

pytestmark = pytest.mark.endurance

INTERRUPTS = 8
LATEST_SECONDS = 4.0


def test_an_interrupted_prompt_ends_and_the_next_one_is_right(server: RunningServer) -> None:
    found = list(interrupts(server.client, server.process.base, INTERRUPTS, seed=1, latest=LATEST_SECONDS))
    assert all(one["reference_is_right"] for one in found), found
    assert not [one for one in found if one["end"].startswith("failed")], found
    # A step under way is finished and reported, and the report of the one before may still be on its way.
    assert all((one["steps_after"] or 0) <= 2 for one in found), found
    assert any(one["end"] == "interrupted" for one in found), found
