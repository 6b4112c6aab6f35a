"""What becomes of random valid graphs: `.venv/bin/python benchmarks/random_graphs_report.py`.

The graphs are those of tests/engine/test_random_graphs.py, which fails when one ends otherwise than well or with one
sentence; here they are counted. Writes benchmarks/results/random_graphs.json and .md.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))

from load_pack import source_commit  # noqa: E402  (found on the path that was extended just above)
from report import write_results  # noqa: E402

TEST = "tests/engine/test_random_graphs.py"
ENDS = {
    "finished": "finished",
    "our error": "ended with one sentence of the pack",
    "refused": "refused with one sentence before anything ran",
    "stock error": "ended with an error of a stock node",
    "fault": "anything else: a fault",
}


def run(graphs: int, seed: int) -> dict[str, Any]:
    """Run the test; what became of the graphs, as it writes it."""
    with tempfile.TemporaryDirectory(prefix="identity-edit-") as folder:
        log = Path(folder, "graphs.json")
        variables = {
            "IDENTITY_EDIT_GRAPHS": str(graphs),
            "IDENTITY_EDIT_GRAPHS_SEED": str(seed),
            "IDENTITY_EDIT_GRAPHS_LOG": str(log),
        }
        command = [sys.executable, "-m", "pytest", "-q", TEST]
        subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=False)
        return json.loads(log.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="another one draws other graphs")
    arguments = parser.parse_args()
    found = run(arguments.graphs, arguments.seed)

    nodes = [len(run["prompt"]) for run in found["runs"]]
    lines = [
        f"# {found['graphs']} random valid graphs on one server",
        "",
        f"`benchmarks/random_graphs_report.py --graphs {arguments.graphs} --seed {arguments.seed}` at commit "
        f"{source_commit()}: nodes of the pack and stock nodes joined by their socket types, {min(nodes)} to "
        f"{max(nodes)} of them in a graph (median {sorted(nodes)[len(nodes) // 2]}). A reference picture, drawn anew "
        f"after every ten graphs, stayed the same to the bit.",
        "",
        "| a graph | times |",
        "|---|---|",
        *(f"| {words} | {found['ends'].get(end, 0)} |" for end, words in ENDS.items()),
        "",
        "In how many graphs a node occurred, and in how many of them it came to its end; the others failed at it or "
        "before it.",
        "",
        "| node | occurred | finished |",
        "|---|---|---|",
        *(f"| {node} | {n} | {done} |" for node, (n, done) in found["occurred_and_computed"].items()),
        "",
        "Where graphs ended with a sentence of the pack:",
        "",
        "| node | times | the most frequent sentence |",
        "|---|---|---|",
        *sentences(found["runs"]),
    ]
    figures = {key: found[key] for key in ("graphs", "ends", "occurred_and_computed")}
    figures["faults"] = [run for run in found["runs"] if run["how"] == "fault"]
    write_results("random_graphs", {"commit": source_commit(), "seed": arguments.seed, **figures}, lines)


def sentences(runs: list[dict[str, Any]]) -> list[str]:
    """A line of the table for each node at which graphs ended, the most frequent first."""
    said: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for one in runs:
        if one["how"] == "our error":
            text = re.sub(r"/\S*/comfyui\d*/", "", one["said"])  # the test's own folder
            said[one["node"]][text.replace("|", "\\|")] += 1
    nodes = sorted(said, key=lambda node: (-said[node].total(), node))
    return [f"| {node} | {said[node].total()} | {said[node].most_common(1)[0][0]} |" for node in nodes]


if __name__ == "__main__":
    main()
