"""Random valid graphs over all nodes of the pack and stock nodes on one server, and what becomes of each:
`python -m benchmarks random_graphs`.

A graph may end with an error of the pack's class, or of a stock node by its own hand; anything else is a fault, and so
is a server that dies or that afterwards draws another reference image. `test_random_graphs.py` runs a few and fails
at a fault; the command counts what becomes of many. Writes benchmarks/results/random_graphs.json and .md.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
from api_client import ExecutionError, Prompt, ValidationError
from engine import PACK_FOLDER
from hypothesis import strategies

from ...benchmarks.harness import made_by, write_results
from . import cheap_workflows
from . import graphs as random_graphs

if TYPE_CHECKING:
    from ..conftest import RunningServer

GRAPHS_FOR_A_NODE = 2
"""Hypothesis begins with the plainest graph of a node; from the second on they are random."""
EVERY = 10
"""Graphs between two reference images."""
SHRINKS = 30
"""Graphs that are run to make a failing one smaller."""
ENDS = {
    "finished": "finished",
    "our error": "ended with one sentence of the pack",
    "refused": "refused with one sentence before anything ran",
    "stock error": "ended with an error of a stock node",
    "fault": "anything else: a fault",
}
SUBJECT = ("cat", "test/cat")
"""Images of a subject in the input folder's `cat`."""
ERROR = "IdentityEditError"
BLOCKED = "ExecutionBlocked"


@dataclasses.dataclass
class Ended:
    """How a graph ended: "finished", "refused" (before anything ran), "our error", "stock error", or "fault"."""

    how: str
    said: str = ""
    node: str = ""


class Graphs:
    """Runs graphs on the server and keeps count."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        self.catalog = random_graphs.Catalog.of(server.client.object_info())
        self.reference = cheap_workflows.reference_digest(server.client)
        self.occurred: collections.Counter[str] = collections.Counter()
        self.computed: collections.Counter[str] = collections.Counter()
        self.ends: list[dict[str, Any]] = []
        self.known: dict[str, Ended] = {}

    def write_captions(self) -> None:
        """The captions of the subject's images, as they were before a graph wrote others."""
        for name in SUBJECT:
            path = self.server.process.base / "input" / "cat" / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("a sks cat", encoding="utf-8")

    def run(self, prompt: Prompt) -> Ended:
        key = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()
        if key not in self.known:
            self.write_captions()
            self.known[key] = self._run(prompt)
            self.ends.append({**dataclasses.asdict(self.known[key]), "prompt": prompt})
            if len(self.ends) % EVERY == 0:
                self.check_reference()
        return self.known[key]

    def check_reference(self) -> None:
        digest = cheap_workflows.reference_digest(self.server.client)
        assert digest == self.reference, f"the reference image changed within the last {EVERY} graphs"

    def _run(self, prompt: Prompt) -> Ended:
        classes = {key: node["class_type"] for key, node in prompt.items()}
        self.occurred.update(set(classes.values()))
        failure: dict[str, Any] = {}
        started: list[str] = []

        def listen(kind: str, data: dict[str, Any]) -> None:
            if kind == "executing" and data["node"]:
                started.append(data["node"])
            elif kind == "execution_error":
                failure.update(data)

        try:
            self.server.client.run(prompt, listen, timeout=300)
        except ValidationError as error:
            # The graph is valid by its types and ranges: only a node's own validate_inputs may refuse it.
            return Ended("refused" if one_sentence(error.message) else "fault", str(error))
        except ExecutionError:
            return self._failed(failure, classes)
        except TimeoutError as error:
            self.server.client.interrupt()
            return Ended("fault", str(error), classes.get(started[-1], "") if started else "")
        finally:
            assert self.server.process.is_running(), f"the server died:\n{self.server.process.log_tail()}"
            failed = str(failure.get("node_id", ""))
            self.computed.update({classes[number] for number in started if number in classes and number != failed})
        return Ended("finished")

    @staticmethod
    def _failed(failure: dict[str, Any], classes: dict[str, str]) -> Ended:
        said, node = failure["exception_message"].strip(), classes[str(failure["node_id"])]
        if failure["exception_type"].split(".")[-1] == ERROR:
            return Ended("our error" if one_sentence(said) else "fault", said, node)
        if failure["exception_type"].split(".")[-1] == BLOCKED:  # an output that a node of the pack left out, and why
            return Ended("our error" if one_sentence(said) else "fault", said, node)
        through_the_pack = any(PACK_FOLDER in line for line in failure["traceback"])
        trace = "".join(failure["traceback"][-3:])
        if node.startswith(random_graphs.PREFIX) or through_the_pack:
            return Ended("fault", f"{failure['exception_type']}: {said}\n{trace}", node)
        return Ended("stock error", f"{failure['exception_type']}: {said}", node)


def one_sentence(said: str) -> bool:
    return "\n" not in said and said.endswith(".") and len(said) < 600


def prepare(graphs: Graphs) -> None:
    """Run the plain graph of every node that saves something, so that the loaders have files to offer."""
    folder = graphs.server.process.base / "input" / "cat"
    graphs.write_captions()
    empty = {"width": 96, "height": 96, "batch_size": 1, "color": 0x996633}
    drawn = graphs.server.run(
        {
            "1": {"class_type": "EmptyImage", "inputs": empty},
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        }
    )
    for name in SUBJECT:
        graphs.server.images(drawn, "2")[0].save(folder / f"{name}.png")
    for _ in range(2):  # what loads a file and saves it in another form joins in the second pass
        before = set(graphs.catalog.nodes)
        for key in graphs.catalog.of_the_pack():
            if graphs.catalog.nodes[key]["output_node"] and graphs.occurred[key] == 0:
                graphs.run(random_graphs.build(graphs.catalog, key, random_graphs.first_of))
                graphs.occurred[key] += 1
        graphs.catalog = random_graphs.Catalog.of(graphs.server.client.object_info())
        if set(graphs.catalog.nodes) == before:
            break


class GraphFault(AssertionError):
    """A graph ended otherwise than well or with one sentence."""


def look_for_a_fault(graphs: Graphs, target: str, count: int, seed: int) -> None:
    """Run random graphs around one node; hypothesis makes one that fails smaller, within SHRINKS graphs."""
    left: list[int] = []  # graphs that may still be run, once one has failed

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        report_multiple_bugs=False,
    )
    @hypothesis.seed(seed)
    @hypothesis.given(strategies.data())
    def ends_well(data: Any) -> None:
        prompt = random_graphs.build(
            graphs.catalog, target, lambda options: data.draw(strategies.sampled_from(options))
        )
        key = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()
        if left and key not in graphs.known:
            if left[0] == 0:
                return
            left[0] -= 1
        ended = graphs.run(prompt)
        if ended.how == "fault":
            left[:] = left or [SHRINKS]
            raise GraphFault(f"seed {seed}, {target}, at {ended.node}: {ended.said}\n{json.dumps(prompt, indent=1)}")

    ends_well()


def run_graphs(graphs: Graphs, wanted: int, seed: int) -> list[str]:
    """Run random graphs around every node in turn until there are `wanted`; the faults, with their graphs."""
    ours = graphs.catalog.of_the_pack()
    order = sorted(ours, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).hexdigest())
    faults: list[str] = []
    number = 0
    while len(graphs.ends) < wanted:
        try:
            look_for_a_fault(graphs, order[number % len(order)], GRAPHS_FOR_A_NODE, seed + number)
        except GraphFault as fault:
            faults.append(str(fault))
        number += 1
    graphs.check_reference()
    return faults


def prepared(server: RunningServer) -> Graphs:
    """A server's graphs, with files for the loaders; raises `GraphFault` where one of the plain graphs is a fault."""
    made = Graphs(server)
    prepare(made)
    faults = [end for end in made.ends if end["how"] == "fault"]
    if faults:
        raise GraphFault(json.dumps(faults, indent=1))
    made.ends.clear()
    made.occurred.clear()
    made.computed.clear()
    return made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--graphs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="another one draws other graphs")


def main(arguments: argparse.Namespace) -> None:
    from ..conftest import running_server

    with tempfile.TemporaryDirectory(prefix="identity-edit-") as folder, running_server(Path(folder)) as server:
        graphs = prepared(server)
        run_graphs(graphs, arguments.graphs, arguments.seed)
    found = {
        "graphs": len(graphs.ends),
        "ends": dict(collections.Counter(end["how"] for end in graphs.ends)),
        "occurred_and_computed": {
            key: [graphs.occurred[key], graphs.computed[key]] for key in graphs.catalog.of_the_pack()
        },
        "runs": graphs.ends,
    }
    nodes = [len(run["prompt"]) for run in graphs.ends]
    lines = [
        f"# {found['graphs']} random valid graphs on one server",
        "",
        f"{made_by()} (seed {arguments.seed}): nodes of the pack and stock nodes joined by their socket types, "
        f"{min(nodes)} to {max(nodes)} of them in a graph (median {sorted(nodes)[len(nodes) // 2]}). A reference "
        f"image, drawn anew after every ten graphs, stayed the same to the bit.",
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
    write_results("random_graphs", {"seed": arguments.seed, **figures}, lines)


def sentences(runs: list[dict[str, Any]]) -> list[str]:
    """A line of the table for each node at which graphs ended, the most frequent first."""
    said: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for one in runs:
        if one["how"] == "our error":
            text = re.sub(r"/\S*/comfyui\d*/", "", one["said"])  # the server's own folder
            said[one["node"]][text.replace("|", "\\|")] += 1
    nodes = sorted(said, key=lambda node: (-said[node].total(), node))
    return [f"| {node} | {said[node].total()} | {said[node].most_common(1)[0][0]} |" for node in nodes]
