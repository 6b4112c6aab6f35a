"""What the pack adds to ComfyUI's start: `python -m benchmarks startup`.

A real server is started with and without the pack in turn. Given are the medians of ComfyUI's own line "Import times
for custom nodes" (which it rounds to 0.1 s) and of the time from the start of the process to the first answer. Python's
compiled files are there, as from a user's second start on: compiling the pack once takes about 0.3 s.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import engine
from tqdm import trange

from .harness import Options, markdown

GOAL_SECONDS = 0.5


def start_once(compiled: str, *, with_pack: bool) -> tuple[float, float]:
    """Seconds until the first answer, and the pack's import time as ComfyUI gives it (0 without the pack).

    compiled: folder of the compiled files, as a user's ComfyUI has them from its second start on.
    """
    variables = {"PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""}
    with tempfile.TemporaryDirectory(prefix="identity-edit-") as base:
        server = engine.Server(Path(base), with_pack=with_pack, environment=variables)
        begin = time.perf_counter()
        with server:
            seconds = time.perf_counter() - begin
            if not with_pack:
                return seconds, 0.0
            failure = server.pack_failure()
            if failure:
                raise SystemExit(f"ComfyUI could not load the pack: {failure}")
            line = re.search(rf"([\d.]+) seconds: .*{engine.PACK_FOLDER}", server.log_text())
            assert line is not None
            return seconds, float(line[1])


OPTIONS: Options = {"starts": (5, "starts with and starts without the pack (5)")}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    with_pack, without_pack, imports = [], [], []
    with tempfile.TemporaryDirectory(prefix="identity-edit-compiled-") as compiled:
        start_once(compiled, with_pack=True)  # compiles; the disk's cache is warm for all that count
        for _ in trange(arguments.starts, unit="pair"):
            without_pack.append(start_once(compiled, with_pack=False)[0])
            seconds, import_seconds = start_once(compiled, with_pack=True)
            with_pack.append(seconds)
            imports.append(import_seconds)
    return {
        "starts": arguments.starts,
        "import_seconds": imports,
        "start_seconds_with_pack": with_pack,
        "start_seconds_without_pack": without_pack,
        "goal_import_seconds": GOAL_SECONDS,
    }


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    keys = ("import_seconds", "start_seconds_with_pack", "start_seconds_without_pack")
    imports, with_pack, without_pack = (statistics.median(figures[key]) for key in keys)
    rows = [
        ('"Import times for custom nodes", the pack\'s line', f"{imports:.1f}"),
        ("start to first answer, with the pack", f"{with_pack:.2f}"),
        ("start to first answer, without the pack", f"{without_pack:.2f}"),
    ]
    return [
        "What the pack adds to ComfyUI's start",
        f"medians of {arguments.starts} starts each, in turn, on {os.cpu_count()} CPU cores.",
        *markdown(("", "seconds"), rows),
        "",
        f"The goal is less than {GOAL_SECONDS} s of import time.",
    ]
