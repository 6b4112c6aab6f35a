"""What the pack adds to ComfyUI's start: `python -m benchmarks startup`.

A real server is started with and without the pack in turn. Given are the medians of ComfyUI's own line "Import times
for custom nodes" (which it rounds to 0.1 s) and of the time from the start of the process to the first answer.
Writes benchmarks/results/startup.json and startup.md.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import tempfile
import time
from pathlib import Path

import engine
from tqdm import trange

from .harness import made_by, write_results

GOAL_SECONDS = 0.5


def start_once(*, with_pack: bool) -> tuple[float, float]:
    """Seconds until the first answer, and the pack's import time as ComfyUI gives it (0 without the pack)."""
    with tempfile.TemporaryDirectory(prefix="identity-edit-") as base:
        server = engine.Server(Path(base), with_pack=with_pack)
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--starts", type=int, default=5, help="starts with and starts without the pack (default 5)")


def main(arguments: argparse.Namespace) -> None:
    starts = arguments.starts
    start_once(with_pack=True)  # compiled files and the disk's cache are warm for all that count
    with_pack, without_pack, imports = [], [], []
    for _ in trange(starts, unit="pair"):
        without_pack.append(start_once(with_pack=False)[0])
        seconds, import_seconds = start_once(with_pack=True)
        with_pack.append(seconds)
        imports.append(import_seconds)

    result = {
        "starts": starts,
        "import_seconds": imports,
        "start_seconds_with_pack": [round(value, 3) for value in with_pack],
        "start_seconds_without_pack": [round(value, 3) for value in without_pack],
        "median_import_seconds": statistics.median(imports),
        "median_start_seconds_with_pack": round(statistics.median(with_pack), 3),
        "median_start_seconds_without_pack": round(statistics.median(without_pack), 3),
        "goal_import_seconds": GOAL_SECONDS,
    }
    table = f"""# What the pack adds to ComfyUI's start

{made_by()}: medians of {starts} starts each, in turn, on {os.cpu_count()} CPU
cores.

| | seconds |
|---|---|
| "Import times for custom nodes", the pack's line | {result["median_import_seconds"]:.1f} |
| start to first answer, with the pack | {result["median_start_seconds_with_pack"]:.2f} |
| start to first answer, without the pack | {result["median_start_seconds_without_pack"]:.2f} |

The goal is less than {GOAL_SECONDS} s of import time.
"""
    write_results("startup", result, table.splitlines())
