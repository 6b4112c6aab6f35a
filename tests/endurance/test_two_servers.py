"""Two servers on one folder of models and of output, at the same work at the same time: nothing is lost or half."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from api_workflows import read_workflow
from engine import make_base
from identity_edit_pack.tests.endurance import cheap_workflows
from safetensors import safe_open

if TYPE_CHECKING:
    from identity_edit_pack.tests.conftest import RunningServer

pytestmark = pytest.mark.endurance

SHARED = ("models", "output")
TRAINED = {
    # workflow: (folder of its results, the node and the input that list them)
    "mcdm_train": ("checkpoints", "IdentityEditMCDMConditioner", "file"),
    "hifi_train_subject": ("subject_embeddings", "IdentityEditStepWiseEmbeddingLoader", "file"),
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, RunningServer]]:
    from identity_edit_pack.tests.conftest import running_server

    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    make_base(first)
    for name in SHARED:
        try:
            (second / name).symlink_to(first / name, target_is_directory=True)
        except OSError:
            pytest.skip("links cannot be made here")
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(running_server(base)) for base in (first, second))
        yield one, other


def both(servers: tuple[RunningServer, RunningServer], work: Callable[[RunningServer], Any]) -> list[Any]:
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(work, servers))


def small(name: str) -> dict[str, Any]:
    """The workflow without what only shows images, with one step."""
    prompt = cheap_workflows.cheap(read_workflow(name), {**cheap_workflows.MOST, "steps": 1})
    shows = ("PreviewImage", "SaveImage", "LossGraphNode", "MaskPreview")
    return {key: node for key, node in prompt.items() if node["class_type"] not in shows}


@pytest.mark.parametrize("name", TRAINED)
def test_the_same_training_at_the_same_time(name: str, servers: tuple[RunningServer, RunningServer]) -> None:
    folder, node, listing = TRAINED[name]
    output = servers[0].process.base / "output"
    prompt = small(name)
    both(servers, lambda server: server.run(prompt, timeout=900))
    files = sorted((output / folder).glob("*.safetensors"))
    assert len(files) == 2, "each server's result has a name of its own"
    contents = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            contents.append({key: file.get_tensor(key).numpy().tobytes() for key in sorted(file.keys())})
    assert contents[0] == contents[1], "both made the same run"
    left = [path for path in output.rglob("*") if path.suffix in (".tmp", ".part", ".bin")]
    assert not left, left
    for server in servers:
        information = server.client.get(f"/object_info/{node}").json()[node]["input"]["required"][listing]
        listed = information[1]["options"] if information[0] == "COMBO" else information[0]
        for path in files:
            assert any(path.name in each for each in listed), listed


def test_each_loads_what_the_other_has_saved(servers: tuple[RunningServer, RunningServer]) -> None:
    output = servers[0].process.base / "output" / "subject_embeddings"
    names = sorted(os.listdir(output))
    assert [name for name in names if name.endswith(".safetensors")]

    def load_all(server: RunningServer) -> int:
        loaded = 0
        for path in output.glob("*.safetensors"):
            prompt = {
                "1": {
                    "class_type": "IdentityEditStepWiseEmbeddingLoader",
                    "inputs": {"file": f"subject_embeddings/{Path(path).name} [output]"},
                },
                "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 2]}},
            }
            loaded += "cat" in str(server.run(prompt).outputs["2"]["text"])
        return loaded

    assert both(servers, load_all) == [2, 2]
