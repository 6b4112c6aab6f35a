"""What an interrupt does: `python -m benchmarks interrupts --interrupts 100`.

At a random moment of a random shipped workflow, made cheap, the running prompt is interrupted. Measured is the time
from the request to the prompt's end, beside that of one step of a stock sampler on the same server; the number of steps
reported after the request; and whether the next prompt, the reference one computed anew, gives the same image bit for
bit.

Writes benchmarks/results/interrupts.md and .json after every ten interrupts.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from api_client import Client, Interrupted, PromptError
from api_workflows import read_workflow
from engine import Server
from tqdm import tqdm

from ...benchmarks.harness import command_line, source_commit, write_results
from . import cheap_workflows

LONG = {**cheap_workflows.MOST, "steps": 30, "count": 4, "inner_steps": 5}
"""Limits of the workflows here: long enough for an interrupt to meet something."""
LATEST_SECONDS = 8.0
"""After the start of a prompt; later moments would mostly meet finished ones."""


class Moment:
    """Asks for an interrupt some time after the prompt has begun, and notes when it did and where the prompt was."""

    def __init__(self, client: Client, seconds: float) -> None:
        self.client = client
        self.seconds = seconds
        self.asked_at: float | None = None
        self.node: str | None = None
        self.node_when_asked: str | None = None
        self.steps_after = 0
        self._timer: threading.Timer | None = None

    def listen(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "executing" and data["node"]:
            self.node = data["node"]
        if kind == "progress" and self.asked_at is not None:
            self.steps_after += 1
        if kind == "execution_start" and self._timer is None:
            self._timer = threading.Timer(self.seconds, self._ask)
            self._timer.start()

    def _ask(self) -> None:
        self.node_when_asked = self.node
        self.asked_at = time.perf_counter()
        # A client of its own: the other one's connection belongs to the thread that runs the prompt.
        Client(self.client.address).interrupt()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()


def interrupt_once(client: Client, base: Path, name: str, seconds: float, seed: int) -> dict[str, Any]:
    """Run a workflow and interrupt it; says what came of it."""
    prompt = cheap_workflows.with_seed(cheap_workflows.cheap(read_workflow(name), LONG), seed)
    for node in prompt.values():
        if node["class_type"] == "IdentityEditGeneratePairs":  # goes on with pairs, but not with those of another seed
            shutil.rmtree(base / "output" / node["inputs"]["folder"], ignore_errors=True)
    moment = Moment(client, seconds)
    how = "finished before it"
    try:
        client.run(prompt, moment.listen, timeout=900)
    except Interrupted:
        how = "interrupted"
    except PromptError as error:
        how = f"failed in {error.node_id}: {type(error).__name__}"
    ended = time.perf_counter()
    moment.cancel()
    node = prompt.get(moment.node_when_asked or "", {}).get("class_type", "")
    late = None if moment.asked_at is None or how != "interrupted" else ended - moment.asked_at
    return {
        "workflow": name,
        "after_seconds": round(seconds, 2),
        "node": node,
        "end": how,
        "seconds_to_end": late,
        "steps_after": None if late is None else moment.steps_after,
    }


def interrupts(
    client: Client, base: Path, count: int, seed: int, latest: float = LATEST_SECONDS
) -> Iterator[dict[str, Any]]:
    """Interrupt `count` prompts and, after each, draw the reference image; facts of each.

    base: the server's folder.
    """
    draws = random.Random(seed)
    expected = cheap_workflows.reference_digest(client)
    for number in range(count):
        name, seconds = draws.choice(cheap_workflows.NAMES), draws.uniform(0.0, latest)
        facts = interrupt_once(client, base, name, seconds, 1 + number)
        yield {**facts, "reference_is_right": cheap_workflows.reference_digest(client) == expected}


def step_seconds(client: Client) -> float:
    """Seconds of the longest step of the reference sampler, twice: with guidance a step is one evaluation of two."""
    times: list[float] = []

    def listen(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress":
            times.append(time.perf_counter())

    client.run(cheap_workflows.anew(cheap_workflows.reference()), listen)
    client.run(cheap_workflows.anew(cheap_workflows.reference()), listen)
    return max(later - earlier for earlier, later in zip(times[1:4], times[2:4], strict=False))


def report(arguments: argparse.Namespace, commit: str, step: float, found: list[dict[str, Any]]) -> None:
    ends = Counter(one["end"] for one in found)
    met = [one for one in found if one["seconds_to_end"] is not None]
    by_node: dict[str, list[float]] = defaultdict(list)
    for one in met:
        by_node[one["node"]].append(one["seconds_to_end"])
    seconds = sorted(one["seconds_to_end"] for one in met) or [0.0]
    tenths = quantiles(seconds, n=20) if len(seconds) > 1 else seconds
    figures = {
        "command": command_line(),
        "commit": commit,
        "seed": arguments.seed,
        "interrupts": len(found),
        "step_seconds": step,
        "steps_after": dict(sorted(Counter(one["steps_after"] for one in met).items())),
        "ends": dict(ends),
        "wrong_references": sum(not one["reference_is_right"] for one in found),
        "median_seconds": median(seconds),
        "seconds_95": tenths[-1],
        "most_seconds": seconds[-1],
        "all": found,
    }
    lines = [
        f"# {len(found)} interrupts at random moments",
        "",
        f"`{figures['command']}` at commit {commit}: random shipped workflows, made cheap, interrupted at a moment "
        f"drawn from 0 to {LATEST_SECONDS:g} s after their start (seed {arguments.seed}); one CPU thread.",
        "",
        "| | |",
        "|---|---|",
        *(f"| prompts that {end if end.startswith('f') else 'were ' + end} | {count} |" for end, count in ends.items()),
        f"| wrong reference images afterwards | {figures['wrong_references']} of {len(found)} |",
        f"| seconds from the request to the end: median | {figures['median_seconds']:.3f} |",
        f"| ... 95 % | {figures['seconds_95']:.3f} |",
        f"| ... most | {figures['most_seconds']:.3f} |",
        f"| one step of the stock sampler on this machine (batch 1, guidance), seconds | {step:.3f} |",
        "",
        "Steps that progress was reported of after the request: "
        + ", ".join(f"{steps} in {count} prompts" for steps, count in figures["steps_after"].items())
        + ".",
        "",
        "| interrupted in | times | median seconds | most |",
        "|---|---|---|---|",
        *(
            f"| {node} | {len(times)} | {median(times):.3f} | {max(times):.3f} |"
            for node, times in sorted(by_node.items(), key=lambda item: -max(item[1]))
        ),
    ]
    write_results("interrupts", figures, lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--interrupts", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the workflows and moments (default 0)")


def main(arguments: argparse.Namespace) -> None:
    commit = source_commit()
    found: list[dict[str, Any]] = []
    variables = {"HF_HUB_OFFLINE": "1", "MKL_CBWR": "AUTO,STRICT", "OMP_NUM_THREADS": "1"}
    with (
        tempfile.TemporaryDirectory(prefix="identity-edit-interrupts-") as folder,
        Server(Path(folder), environment=variables) as server,
    ):
        client = Client(server.address)
        step = step_seconds(client)
        for facts in tqdm(
            interrupts(client, server.base, arguments.interrupts, arguments.seed), total=arguments.interrupts
        ):
            found.append(facts)
            if len(found) % 10 == 0 or len(found) == arguments.interrupts:
                report(arguments, commit, step, found)
