"""The tests with tiny models under other processors' instructions: `python -m benchmarks processors`.

PyTorch and oneDNN choose their kernels by the processor; ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA make them choose as
on an older one. Each setting of --settings runs the --folders once; its row in benchmarks/results/processors.json is
replaced, the others stay, and processors.md is made of all.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from typing import Any

from ...benchmarks.harness import ROOT, read_results, source_commit, write_results

INSTRUCTIONS = {"default": "SSE41", "avx2": "AVX2", "avx512": "AVX512_CORE"}
SETTINGS = [f"{capability}-{threads}" for capability in INSTRUCTIONS for threads in (1, 2)]
FOLDERS = ["tests/attention", "tests/pipelines"]


def variables_of(setting: str) -> dict[str, str]:
    """The environment of a setting, such as "avx2-1": the instructions and the number of threads."""
    capability, threads = setting.split("-")
    chosen = {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": INSTRUCTIONS[capability]}
    # Two threads that spin wait for each other beside a busy core (busy_core.md).
    waiting = {} if threads == "1" else {"OMP_WAIT_POLICY": "PASSIVE"}
    return {**chosen, "OMP_NUM_THREADS": threads, **waiting}


def row_of(setting: str, folders: list[str], output: str) -> dict[str, Any]:
    """What pytest's last line says, and the names of the tests that failed."""
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", output)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    if not counts:
        raise SystemExit(f"pytest said nothing that is understood:\n{output[-2000:]}")
    found: dict[str, Any] = {"variables": variables_of(setting), "folders": folders, "commit": source_commit()}
    return found | {"counts": counts, "failed": failed}


def write_table(rows: dict[str, dict[str, Any]]) -> None:
    lines = [
        "# The tests with tiny models under other processors' instructions",
        "",
        "`python -m benchmarks processors`; each row by `pytest` of its folders with its variables.",
        "",
        "| variables | folders | commit | passed | failed | skipped |",
        "|---|---|---|---|---|---|",
    ]
    for setting in (setting for setting in SETTINGS if setting in rows):
        row = rows[setting]
        variables = " ".join(f"{name}={value}" for name, value in row["variables"].items())
        counts = " | ".join(str(row["counts"].get(kind, 0)) for kind in ("passed", "failed", "skipped"))
        lines.append(f"| `{variables}` | {', '.join(row['folders'])} | {row['commit']} | {counts} |")
    failed = [f"- {setting}: `{name}`" for setting, row in rows.items() for name in row["failed"]]
    notes = [row["note"] for row in rows.values() if "note" in row]  # by hand, until the setting is run again
    write_results("processors", rows, [*lines, *(["", *failed] if failed else []), *(["", *notes] if notes else [])])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS, metavar="SETTING")
    parser.add_argument("--folders", nargs="+", default=FOLDERS)


def main(arguments: argparse.Namespace) -> None:
    rows = {name: row for name, row in read_results("processors").items() if name in SETTINGS}
    for setting in arguments.settings:
        command = [sys.executable, "-m", "pytest", *arguments.folders, "-q", "-rfE", "-p", "no:cacheprovider"]
        variables = {**os.environ, **variables_of(setting)}
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        rows[setting] = row_of(setting, arguments.folders, done.stdout)
        write_table(rows)
