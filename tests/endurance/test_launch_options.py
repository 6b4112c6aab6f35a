"""A shipped workflow under launch options of a real ComfyUI that change how the UNet's weights are kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from api_workflows import read_workflow
from identity_edit_pack.tests.endurance import launch_options

if TYPE_CHECKING:
    from identity_edit_pack.tests.conftest import RunningServer

pytestmark = pytest.mark.endurance

WORKFLOW = "nima_only"
STEPS = 4


@pytest.fixture(scope="module")
def plain(server: RunningServer) -> launch_options.Images:
    """What the server without an option shows."""
    return launch_options.images_of(server.client, launch_options.cheaper(read_workflow(WORKFLOW), STEPS))


@pytest.mark.parametrize("option", ["--bf16-unet", "--fp8_e4m3fn-unet"])
def test_a_masked_edit_is_nearly_the_same(
    option: str, plain: launch_options.Images, start_server: Any, tmp_path: Path
) -> None:
    with start_server(tmp_path, option) as server:
        prompt = launch_options.cheaper(read_workflow(WORKFLOW), STEPS)
        images = launch_options.images_of(server.client, prompt)
    distance = launch_options.lowest_psnr(images, plain)
    assert distance >= launch_options.CLOSE_DB
    assert distance < 99.0, "the option had no effect"


def test_the_stock_compile_node_is_put_behind_every_loader() -> None:
    prompt = read_workflow(WORKFLOW)
    compiled = launch_options.compiled(prompt)
    (loader,) = [key for key, node in prompt.items() if node["class_type"] == "CheckpointLoaderSimple"]
    users = [node for node in prompt.values() if [loader, 0] in node["inputs"].values()]
    again = [node for node in compiled.values() if [f"compiled_{loader}", 0] in node["inputs"].values()]
    assert users and len(again) == len(users), "every node that took the model takes the compiled one"
    assert compiled[f"compiled_{loader}"]["inputs"]["model"] == [loader, 0]
    assert f"compiled_{loader}" not in prompt, "the given prompt is not changed"


def test_psnr_is_that_of_the_worst_image() -> None:
    gray = np.full((4, 6, 3), 100, dtype=np.uint8)
    plain = {"1": [gray], "2": [gray, gray]}
    assert launch_options.lowest_psnr(plain, plain) == 99.0
    worst = {"1": [gray + 1], "2": [gray, gray + 10]}
    assert launch_options.lowest_psnr(worst, plain) == pytest.approx(20.0 * np.log10(255.0 / 10.0))
    with pytest.raises(ValueError, match="and not"):
        launch_options.lowest_psnr({"1": [gray]}, plain)
