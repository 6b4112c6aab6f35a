"""What the pack adds to the page's load with many files: `python -m benchmarks page_load`.

Two real servers, one with the pack, share an input folder and are asked for /object_info in turn: with no file, with
40,000 images in the input folder itself, and with as many in 400 folders below it. Given are the first answer after
the files have appeared, when no list is known yet, the median of the later ones, and the processor's time of a later
one, which other programs on the machine do not change.
Writes benchmarks/results/page_load_VERSION.json and .md, VERSION being ComfyUI's (COMFYUI_PATH names another one).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import engine
import psutil

from .harness import Options, markdown

GOAL_SECONDS = 0.1
FOLDERS = 400


def make_files(folder: Path, count: int, folders: int) -> None:
    """Empty images, spread over folders below `folder`, or in it for 0 folders."""
    for number in range(count):
        place = folder / f"set {number % folders}" if folders else folder
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:05}.png").touch()


def seconds(server: engine.Server) -> float:
    begin = time.perf_counter()
    with urllib.request.urlopen(f"{server.url}/object_info", timeout=120) as answer:
        answer.read()
    return time.perf_counter() - begin


def measured(count: int, folders: int, requests: int) -> dict[str, Any]:
    """First and median seconds of both servers, for one layout of files."""
    with tempfile.TemporaryDirectory(prefix="identity-edit-") as folder:
        base = Path(folder)
        make_files(base / "shared", count, folders)
        (base / "shared").mkdir(exist_ok=True)
        arguments = ("--input-directory", str(base / "shared"))
        with (
            engine.Server(base / "without", with_pack=False, arguments=arguments) as without,
            engine.Server(base / "with", arguments=arguments) as with_pack,
        ):
            if failure := with_pack.pack_failure():
                raise SystemExit(f"ComfyUI could not load the pack: {failure}")
            time.sleep(3.0)  # the folders' times are no longer the clock's
            first = (seconds(without), seconds(with_pack))
            processes = [psutil.Process(server.process_id) for server in (without, with_pack)]
            before = [process.cpu_times() for process in processes]
            later = [(seconds(without), seconds(with_pack)) for _ in range(requests)]
            after = [process.cpu_times() for process in processes]
    spent = [
        (end.user + end.system - start.user - start.system) / requests for start, end in zip(before, after, strict=True)
    ]
    return {
        "files": count,
        "folders": folders,
        "first": figures([first]),
        "later": figures(later),
        "processor": figures([(spent[0], spent[1])]),
    }


def figures(both: list[tuple[float, float]]) -> dict[str, float]:
    """Medians of (without, with), and of what the pack adds to each pair."""
    without, with_pack = zip(*both, strict=True)
    added = [second - first for first, second in both]
    return {
        name: round(statistics.median(values), 4)
        for name, values in (("without", without), ("with", with_pack), ("added", added))
    }


OPTIONS: Options = {
    "files": (40_000, "images below the input folder (40000)"),
    "requests": (15, "later answers, whose median is given (15)"),
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    layouts = [(0, 0), (arguments.files, 0), (arguments.files, FOLDERS)]
    rows = [measured(count, folders, arguments.requests) for count, folders in layouts]
    version = engine.version_of(engine.find_engine())
    return {"name": f"page_load_{version}", "comfyui": version, "goal_seconds": GOAL_SECONDS, "rows": rows}


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    rows = []
    for row in figures["rows"]:
        where = f"{row['files']:,} in {row['folders']} folders" if row["folders"] else f"{row['files']:,} in it"
        times = [row[when][what] for when in ("first", "later", "processor") for what in ("without", "with", "added")]
        rows.append((where, *(f"{seconds:.3f}" for seconds in times)))
    columns = (f"{when}, without | with | added" for when in ("first", "later", "processor"))
    headings = ("files below the input folder", *" | ".join(columns).split(" | "))
    return [
        f"What the pack adds to /object_info, ComfyUI {figures['comfyui']}",
        f"on {os.cpu_count()} CPU cores (load {os.getloadavg()[0]:.1f}): seconds of the first answer, the median of "
        f"{arguments.requests} later ones with each server asked in turn, and the processor's time of a later one.",
        *markdown(headings, rows),
        "",
        f"The goal is less than {GOAL_SECONDS} s added.",
    ]
