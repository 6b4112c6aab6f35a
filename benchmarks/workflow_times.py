"""How long does every shipped workflow take on this processor? `python -m benchmarks workflow_times`.

Each runs once, as `demo.py --workflow NAME` runs it: on a server that has loaded nothing yet and finds nothing trained,
with its shipped values, those for one's own photos with the demo checkpoint and drawn photos. The latter share a
folder, and those that load what others save come after them. Seconds are those of the whole workflow without the
server's start, on one core fewer than there are. A workflow should end within a minute, one that trains within five.
Writes benchmarks/results/workflow_times.json and .md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from api_client import Client
from api_workflows import Prompt, demo_values, read_workflow, with_demo_values, workflow_names
from demo_photos import draw_photos
from engine import Server, cores

from .harness import Options, markdown

LONGEST, LONGEST_TRAINING = 60, 300
"""Seconds."""
TRAININGS = ("IdentityEditTrain", "IdentityEditImagicFineTuning")
"""Beginnings of the names of nodes that train."""

OPTIONS: Options = {"only": (workflow_names(), "workflows to run (all)", {"choices": workflow_names()})}


def trains(prompt: Prompt) -> bool:
    return any(node["class_type"].startswith(TRAININGS) for node in prompt.values())


def in_order(names: list[str]) -> list[str]:
    """Each after those whose saved files it loads."""
    ordered: list[str] = []

    def add(name: str) -> None:
        for needed in demo_values().get(name, {}).get("needs", ()):
            add(needed)
        if name not in ordered:
            ordered.append(name)

    for name in names:
        add(name)
    return ordered


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="identity-edit-") as folder:
        draw_photos(Path(folder, "photos", "input"))
        for name in in_order(arguments.only):
            prompt = with_demo_values(name, read_workflow(name))
            base = Path(folder, "photos" if name in demo_values() else name)
            with Server(base, environment={"HF_HUB_OFFLINE": "1"}) as server:
                run = Client(server.address).run(prompt)
            rows.append({"workflow": name, "seconds": run.seconds, "trains": trains(prompt)})
            print(f"{name}: {run.seconds:.1f} s", flush=True)
            yield {"rows": rows}


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    rows = sorted(figures["rows"], key=lambda row: row["seconds"], reverse=True)
    limits = {True: LONGEST_TRAINING, False: LONGEST}
    late = [row["workflow"] for row in rows if row["seconds"] > limits[row["trains"]]]
    return [
        "The time of every shipped workflow",
        f"on {max(1, cores() - 1)} of {cores()} cores, with the demo checkpoints. "
        f"{len(rows) - len(late)} of {len(rows)} end within {LONGEST} seconds, or {LONGEST_TRAINING} where they train; "
        f"later: {', '.join(late) or 'none'}.",
        *markdown(
            ("workflow", "trains", "seconds"),
            [(row["workflow"], "yes" if row["trains"] else "", f"{row['seconds']:.0f}") for row in rows],
        ),
    ]
