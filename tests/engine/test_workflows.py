"""Every shipped workflow runs on a real ComfyUI, unchanged but for its cost, and gives pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from identity_edit_pack.tests.endurance.cheap_workflows import NAMES, cheap, read

if TYPE_CHECKING:
    from identity_edit_pack.tests.conftest import RunningServer


def test_workflows_are_shipped() -> None:
    assert NAMES, "workflows/api holds no workflow"


@pytest.mark.parametrize("name", NAMES)
def test_workflow_gives_pictures(name: str, server: RunningServer) -> None:
    run = server.run(cheap(read(name)), timeout=900)
    pictures = {key: server.images(run, key) for key in run.outputs}
    assert any(pictures.values()), "no output node gave a picture"
    for key, shown in pictures.items():
        for image in shown:
            values = np.asarray(image.convert("RGB"), dtype=np.float64)
            assert values.std() > 5.0, f"node {key} gave a flat picture"
            assert values.mean() > 5.0, f"node {key} gave a black picture"
