"""Every shipped workflow runs on a real ComfyUI, unchanged but for its cost, and gives images.

Those that begin with the user's photos get the demo world's, and their values for the demo checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from api_workflows import read_workflow, with_demo_values
from demo_photos import draw_photos
from identity_edit_pack.tests.endurance.cheap_workflows import NAMES, WITH_PHOTOS, cheap

if TYPE_CHECKING:
    from collections.abc import Callable

    from api_client import Run
    from identity_edit_pack.tests.conftest import RunningServer

ONLY_FILES = "export_trained"


def test_workflows_are_shipped() -> None:
    assert NAMES and WITH_PHOTOS, "workflows/api holds no workflow"


@pytest.mark.parametrize("name", NAMES)
def test_workflow_gives_images(name: str, server: RunningServer) -> None:
    check_images(server, server.run(cheap(read_workflow(name)), timeout=900))


@pytest.fixture(scope="module")
def run_with_photos(server: RunningServer) -> Callable[[str], Run]:
    """Runs a workflow with the demo world's photos, once the workflows whose files it loads have run."""
    draw_photos(server.process.base / "input")
    done: dict[str, Run] = {}

    def run(name: str) -> Run:
        for needed in WITH_PHOTOS[name].get("needs", []):
            run(needed)
        if name not in done:
            done[name] = server.run(cheap(with_demo_values(name, read_workflow(name))), timeout=900)
        return done[name]

    return run


@pytest.mark.parametrize("name", WITH_PHOTOS)
def test_workflow_with_photos_gives_images(
    name: str, server: RunningServer, run_with_photos: Callable[[str], Run]
) -> None:
    run = run_with_photos(name)
    if name == ONLY_FILES:
        saved = [text for output in run.outputs.values() for text in output.get("text", [])]
        assert any("Saved as" in text for text in saved)
    else:
        check_images(server, run)


def check_images(server: RunningServer, run: Run) -> None:
    images = {key: server.images(run, key) for key in run.outputs}
    assert any(images.values()), "no output node gave an image"
    for key, shown in images.items():
        for image in shown:
            values = np.asarray(image.convert("RGB"), dtype=np.float64)
            assert values.std() > 5.0, f"node {key} gave a flat image"
            assert values.mean() > 5.0, f"node {key} gave a black image"
