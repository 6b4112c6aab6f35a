"""Every shipped workflow runs on a real ComfyUI, unchanged but for its cost, and gives images."""

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
def test_workflow_gives_images(name: str, server: RunningServer) -> None:
    run = server.run(cheap(read(name)), timeout=900)
    images = {key: server.images(run, key) for key in run.outputs}
    assert any(images.values()), "no output node gave an image"
    for key, shown in images.items():
        for image in shown:
            values = np.asarray(image.convert("RGB"), dtype=np.float64)
            assert values.std() > 5.0, f"node {key} gave a flat image"
            assert values.mean() > 5.0, f"node {key} gave a black image"
