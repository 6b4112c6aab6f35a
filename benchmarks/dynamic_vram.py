"""Every node under ComfyUI's dynamic VRAM beside plain models: `COMFYUI_PATH=FOLDER python -m benchmarks dynamic_vram`.

Runs the cases of tests/dynamic_vram, on the device in host memory that they bring: ComfyUI's own code brings and takes
back weights there, with room for all of them or for 1 MB, in one stream or in NVIDIA's two, and with everything taken
back between forward and backward pass. Given is the largest error of what a node gives, of what stands in the files it
writes and of what its MODEL samples afterwards: the mean absolute difference from what plain models on the processor
give, relative to their mean absolute value. FOLDER is a ComfyUI that has dynamic VRAM; the Python is one with what it
needs and with pytest (`scripts/test.py --engine FOLDER` makes one below .venv/engines).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from engine import find_engine, version_of
from identity_edit_pack.tests.dynamic_vram import test_dynamic_vram as tests

from .harness import markdown


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    reason = tests.reason_for_none()
    if reason is not None:
        sys.exit(f"error: {reason}.")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        worker = tests.Worker(Path(folder) / "worker.log")
        for case, setting in tests.CASES:
            found = worker.run(case, **tests.SETTINGS[setting])
            found.pop("trace", None)
            rows.append({"case": case, "setting": setting, **found})
            print(rows[-1], flush=True)
        worker.stop()
    return {"comfyui": version_of(find_engine()), "rows": rows}


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    rows = figures["rows"]
    right = [row for row in rows if row.get("error", 1.0) <= tests.THRESHOLDS.get(row["case"], tests.TOLERANCE)]

    def cells(row: dict[str, Any]) -> tuple[Any, ...]:
        found = (row["failed"], "", "", "") if "failed" in row else (f"{row['error']:.1e}", *map(row.get, counts))
        return row["case"], row["setting"], *found

    counts = ("compared", "evictions", "refusals")
    titles = "largest relative error", "tensors compared", "weights taken back", "without room"
    return [
        "Dynamic VRAM: every node beside plain models",
        f"ComfyUI {figures['comfyui']}, torch {torch.__version__}, on a device in host memory, tiny models; all seeds "
        "fixed in the code.",
        *markdown(("case or node", "setting", *titles), map(cells, rows)),
        "",
        f"{len(right)} of {len(rows)} are right: an error of at most {tests.TOLERANCE:g}; of SegmentSubject, which "
        f"decides by a threshold, {tests.THRESHOLDS['SegmentSubject']:g}.",
    ]
