"""Two servers on one folder of models and of output, at the same work at the same time: nothing is lost or half."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from api_workflows import read_workflow
from engine import make_base
from identity_edit_pack.tests.endurance import cheap_workflows
from identity_edit_pack.tests.engine.test_timestep_aware_edit import inversion_prompt, node
from safetensors import safe_open

if TYPE_CHECKING:
    from identity_edit_pack.tests.conftest import RunningServer

pytestmark = pytest.mark.endurance

SHARED = ("models", "output")
INVERSIONS = "inversions"


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


def training() -> dict[str, Any]:
    """One step of `mcdm_train`, without what only shows images; its encoded pairs are a file that both servers make."""
    prompt = cheap_workflows.cheap(read_workflow("mcdm_train"), {**cheap_workflows.MOST, "steps": 1})
    shows = ("PreviewImage", "SaveImage", "LossGraphNode", "MaskPreview")
    return {key: node for key, node in prompt.items() if node["class_type"] not in shows}


def saved_inversion() -> dict[str, Any]:
    prompt = inversion_prompt()
    prompt["save"] = node("IdentityEditSaveInversion", inversion=["inversion", 0], filename_prefix=f"{INVERSIONS}/same")
    return prompt


WORK = {
    # what both do: (its prompt, the folder of its results, the node that lists them in its `file`)
    "training": (training, "checkpoints", "IdentityEditMCDMConditioner"),
    "inversion": (saved_inversion, INVERSIONS, "IdentityEditLoadInversion"),
}


@pytest.mark.parametrize("name", WORK)
def test_the_same_work_at_the_same_time(name: str, servers: tuple[RunningServer, RunningServer]) -> None:
    make, folder, loader = WORK[name]
    output = servers[0].process.base / "output"
    prompt = make()
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
        information = server.client.get(f"/object_info/{loader}").json()[loader]["input"]["required"]["file"]
        listed = information[1]["options"] if information[0] == "COMBO" else information[0]
        for path in files:
            assert any(path.name in each for each in listed), listed


def test_each_loads_what_the_other_has_saved(servers: tuple[RunningServer, RunningServer]) -> None:
    names = [path.name for path in (servers[0].process.base / "output" / INVERSIONS).glob("*.safetensors")]

    def load_all(server: RunningServer) -> int:
        prompt = {"model": inversion_prompt()["model"]}
        for name in names:
            file = f"{INVERSIONS}/{name} [output]"
            prompt[name] = node("IdentityEditLoadInversion", model=["model", 0], file=file, steps=0)
            prompt[f"{name} shown"] = node("PreviewAny", source=[name, 2])
        return sum("tensor" in str(shown["text"]) for shown in server.run(prompt).outputs.values())

    assert both(servers, load_all) == [2, 2]
