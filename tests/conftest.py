"""The ground every test stands on: ComfyUI first on the path, on the CPU, and the pack loaded the way ComfyUI loads it.

Tests import the pack's modules under one fixed name, whatever the clone's folder is called:
`from identity_edit_pack.pipelines import schedule`.

What must hold in a real server is tested there: the `server` fixture starts one for the whole session, or for each
worker of a parallel one (`parallel`); `server.run(prompt)` runs a workflow in the API format and raises
`api_client.ExecutionError` as the page would show it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
for folder in ("scripts", "tests"):  # what tests share: the engine, tiny models, reference loops
    sys.path.append(str(ROOT / folder))

import load_pack  # noqa: E402  (these four are found on the path that was extended just above)
import parallel  # noqa: E402
from api_client import Client, Prompt, Run  # noqa: E402
from engine import Server  # noqa: E402

# Tests that compare images to the bit need a matrix product that does not depend on where its operands lie in
# memory; Intel's library gives that on request only. Servers started by tests inherit it.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# Tiny models are faster with one thread, many times so beside a busy core; servers and other processes inherit it.
# So each of several workers has a core of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from PIL import Image

_failure: Exception | None = None
"""What loading the pack raised: one broken module must not hide the tests of all others; the `pack` fixture raises."""


class EntryPointIsNotATestPackage:
    """The root's __init__.py is ComfyUI's entry point: pytest pytest must not import it once more as a test package."""

    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Dir | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parallel.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    global _failure
    config.pluginmanager.register(EntryPointIsNotATestPackage())
    parallel.configure(config)
    if parallel.hands_out(config):  # its workers run the tests
        return
    load_pack.prepare_engine(cpu=True)
    try:
        load_pack.load_pack()
    except Exception as error:
        _failure = error


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return parallel.make_scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = frozenset(parallel.recorded("slow", []))
    for item in items:
        parallel.mark(item, slow)
    if parallel.is_worker():
        parallel.longest_first(items)


@pytest.fixture(scope="session")
def pack() -> ModuleType:
    """The pack, as ComfyUI has loaded it: the package of the repository's root."""
    if _failure is not None:
        raise _failure
    return sys.modules[load_pack.PACK_NAME]


@pytest.fixture(scope="session")
def node_classes(pack: ModuleType) -> dict[str, Any]:
    """The node classes by node id, asked for as ComfyUI does: through `comfy_entrypoint` and `get_node_list`."""

    async def ask() -> list[Any]:
        extension = await pack.comfy_entrypoint()
        return await extension.get_node_list()

    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(ask())}


class RunningServer:
    """A real ComfyUI with the pack, and a client of its API."""

    def __init__(self, process: Server) -> None:
        self.process = process
        self.client = Client(process.address)

    def run(self, prompt: Prompt, timeout: float = 600.0) -> Run:
        """Run a prompt to its end; see `api_client.Client.run` for what it returns and raises."""
        try:
            return self.client.run(prompt, timeout=timeout)
        finally:
            assert self.process.is_running(), f"the server died:\n{self.process.log_tail()}"

    def images(self, run: Run, node_id: str) -> list[Image.Image]:
        """The images that an output node of the run saved or previewed."""
        return self.client.images(run, node_id)


@contextlib.contextmanager
def running_server(base: Path, *arguments: str) -> Iterator[RunningServer]:
    """A ComfyUI with further command line options. No hub can be reached, so that a node which downloads something
    unasked fails here."""
    with Server(base, arguments=arguments, environment={"HF_HUB_OFFLINE": "1"}) as process:
        yield RunningServer(process)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One real ComfyUI for all tests, started when the first test asks for it, with empty folders of its own."""
    with running_server(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture
def start_server() -> Callable[..., contextlib.AbstractContextManager[RunningServer]]:
    """Starts a ComfyUI of a test's own: `with start_server(folder) as server`."""
    return running_server


@pytest.fixture(scope="module", params=["split", "pytorch"])
def server_by_attention(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A ComfyUI for each of its attention functions that run on a CPU, but for its own choice there."""
    option = f"--use-{request.param}-cross-attention"
    with running_server(tmp_path_factory.mktemp(f"comfyui_{request.param}"), option) as running:
        yield running
