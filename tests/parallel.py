"""How pytest-xdist shares the tests out among its workers, and how long each file of tests takes.

A file goes to one worker as a whole, so that what its fixtures make is made once; the tests of the page go to one
worker together, as a browser takes more than a core. Each worker starts a server of its own when a test asks for one,
with folders of its own below pytest's temporary folder of that worker. The longest files come first, by the seconds in
durations.json, which `--record-durations` writes; -n 0 runs everything in pytest's own order in one process.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

DURATIONS = Path(__file__).with_name("durations.json")
TOGETHER = ("tests/page/",)
"""Folders whose files go to the same worker."""
SLOW_SECONDS = 0.3
"""A function of which one test took longer is marked `slow`; durations.json names them."""
UNKNOWN_SECONDS = 5.0
"""Of a file that durations.json does not know."""


def group_of(node_id: str) -> str:
    """The folder or the file that goes to one worker as a whole."""
    return next((folder for folder in TOGETHER if node_id.startswith(folder)), node_id.split("::")[0])


def longest_first(items: list[pytest.Item]) -> None:
    """Sort the collected tests in place: groups by their recorded seconds, tests of a group in their own order."""
    known = recorded("files", {})
    seconds: dict[str, float] = defaultdict(float)
    for file in dict.fromkeys(item.nodeid.split("::")[0] for item in items):
        seconds[group_of(file)] += known.get(file, UNKNOWN_SECONDS)
    items.sort(key=lambda item: (-seconds[group_of(item.nodeid)], group_of(item.nodeid)))


def recorded(name: str, otherwise: Any) -> Any:
    """What durations.json says: "files", the seconds of each file of tests; "slow", functions, sorted."""
    return json.loads(DURATIONS.read_text(encoding="utf-8")).get(name, otherwise) if DURATIONS.is_file() else otherwise


class Durations:
    """Writes durations.json at the end of a run; files of which no test ran keep their seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        files: dict[str, float] = defaultdict(float)
        for test, seconds in self.seconds.items():
            files[test.split("::")[0]] += seconds
        known = {**recorded("files", {}), **files}
        # Of files that ran as a whole or in part, other functions than before may be slow.
        slow = {function for function in recorded("slow", []) if function.split("::")[0] not in files}
        slow |= {function_of(test) for test, seconds in self.seconds.items() if seconds > SLOW_SECONDS}
        root = DURATIONS.parents[1]
        written = {
            "files": {file: round(known[file], 1) for file in sorted(known) if (root / file).is_file()},
            "slow": sorted(function for function in slow if (root / function.split("::")[0]).is_file()),
        }
        DURATIONS.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


SERVERS = {"server", "start_server", "server_by_attention"}
"""Fixtures that start a ComfyUI."""


def function_of(node_id: str) -> str:
    """Of a test, without its parameters."""
    return node_id.split("[")[0]


def mark(item: pytest.Item, slow: Collection[str]) -> None:
    """Give a test the markers that follow from where it is, what it asks for and how long it took; others are in the
    files."""
    if function_of(item.nodeid) in slow:
        item.add_marker("slow")
    if item.nodeid.startswith("tests/page/"):
        item.add_marker("page")
    if item.nodeid.startswith("tests/engine/") or SERVERS & set(getattr(item, "fixturenames", ())):
        item.add_marker("engine")


def is_worker() -> bool:
    """Whether this process runs a part of the tests for another one."""
    return "PYTEST_XDIST_WORKER" in os.environ


def hands_out(config: pytest.Config) -> bool:
    """Whether this process only hands the tests out to workers."""
    distributes = config.getoption("dist", "no") != "no" and bool(config.getoption("tx", None))
    return distributes and not is_worker() and not config.getoption("collectonly")


def add_option(parser: pytest.Parser) -> None:
    parser.addoption("--record-durations", action="store_true", help=f"write {DURATIONS.name}")


def configure(config: pytest.Config) -> None:
    if config.getoption("--record-durations") and not is_worker():
        config.pluginmanager.register(Durations())


def make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For pytest-xdist's hook of that name: whole groups, in the order in which they were collected."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)
