"""What a core that is busy with something else costs a shipped workflow: `python -m benchmarks busy_core`.

A workflow runs on a real server on an idle machine and beside a program that keeps one core busy, with the scripts' own
choice of threads (`scripts/engine.py`), with as many threads as cores, and with those threads not spinning while they
wait. A run that takes more than --limit seconds is ended there. Medians of --runs, each on a server that has just
started. Writes benchmarks/results/busy_core.json and busy_core.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import engine
from api_client import Client
from api_workflows import read_workflow
from tqdm import tqdm

from .harness import Options, markdown

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SETTINGS: dict[str, dict[str, str]] = {
    "as the scripts choose": engine.thread_variables(),
    "a thread for each core": {"OMP_NUM_THREADS": str(CORES)},
    "the same, waiting without spinning": {"OMP_NUM_THREADS": str(CORES), "OMP_WAIT_POLICY": "PASSIVE"},
}
GOAL = 2.0


def seconds_of(workflow: str, variables: dict[str, str], limit: float) -> float:
    """Seconds of the workflow on a server of its own; `limit` when it takes longer."""
    with (
        tempfile.TemporaryDirectory(prefix="identity-edit-") as base,
        engine.Server(Path(base), environment=variables) as server,
    ):
        deadline = time.monotonic() + limit

        def listen(*_: object) -> None:
            if time.monotonic() > deadline:
                raise TimeoutError

        try:
            return Client(server.address).run(read_workflow(workflow), listen).seconds
        except TimeoutError:
            return limit


def busy_program() -> subprocess.Popen[bytes]:
    """Keeps one core busy, in a session of its own as another user's programs are, with the weight of this one."""
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    with contextlib.suppress(OSError):  # Linux shares cores between sessions
        weight = Path("/proc/self/autogroup").read_text().split()[-1]
        Path(f"/proc/{program.pid}/autogroup").write_text(weight)
    return program


OPTIONS: Options = {
    "workflow": ("timestep_aware_edit_fast", "a shipped workflow"),
    "runs": (3, "of each setting"),
    "limit": (120.0, "seconds after which a run is ended (120)"),
    "note": ("", "a sentence about the machine, for the table"),
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, dict[str, list[float]]] = {name: {"idle": [], "busy": []} for name in SETTINGS}
    for _ in tqdm(range(arguments.runs), unit="round"):
        for machine in ("idle", "busy"):
            other = busy_program() if machine == "busy" else None
            try:
                for name, variables in SETTINGS.items():
                    if arguments.limit not in found[name][machine]:  # once is enough
                        found[name][machine].append(seconds_of(arguments.workflow, variables, arguments.limit))
            finally:
                if other is not None:
                    other.kill()
    return {"cores": CORES, "settings": SETTINGS, "seconds": found}


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    medians = {
        name: {machine: statistics.median(values) for machine, values in by.items()}
        for name, by in figures["seconds"].items()
    }

    def shown(value: float) -> str:
        return f"over {arguments.limit:.0f}" if value >= arguments.limit else f"{value:.1f}"

    own = medians["as the scripts choose"]
    return [
        "What a busy core costs",
        f"`{arguments.workflow}` on a server, medians of {arguments.runs} runs in seconds, on {CORES} CPU cores, with "
        f"and without a program that keeps one of them busy. {arguments.note}".strip(),
        *markdown(
            ("threads", "idle machine", "one core busy"),
            ((name, shown(by["idle"]), shown(by["busy"])) for name, by in medians.items()),
        ),
        "",
        f"The goal is that a busy core costs at most a factor of {GOAL:.0f}: it costs {own['busy'] / own['idle']:.2f}.",
    ]
