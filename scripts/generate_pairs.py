"""Generates a dataset of pairs on several machines or GPUs: `python3 scripts/generate_pairs.py --output FOLDER`.

Every worker is a headless ComfyUI that is given the workflow once for each pair (its Generate Pairs node with the
pair's number as `part`) and hands the pair back; this process alone writes the dataset, and asks only for pairs that
are missing. A pair whose worker dies is given to another one, and the worker is replaced.

Across machines by Ray, of the two engines that come into question. Pairs are independent jobs of minutes for workers
that differ (a GPU here, a CPU there) and may die: Ray places actors where a GPU is free, sets CUDA_VISIBLE_DEVICES,
brings files back without a shared folder, and reports the death of one actor as that actor's error. Hugging Face
accelerate starts the same program in lockstep on equal processes with a collective group between them: the death of
one ends them all, there is no queue, and its processes would have to be ComfyUI's. Ray is optional and in no list of
requirements (`pip install ray`): one local worker needs none.

On a cluster, start Ray on every machine (`ray start`), give `--ray-address auto`, and set COMFYUI_PATH on the machines
whose own ComfyUI is to be used; this repository is sent to them by Ray.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import environment
from environment import ROOT, ScriptError

DEFAULT_WORKFLOW = "mcdm_generate_pairs"
NODE = "IdentityEditGeneratePairs"
WORK_FOLDER = "pairs/work"
MOST_LOSSES = 3
"""Workers that may die over one pair before the run is given up: then it is the pair that kills them."""
_NOT_SENT = [".venv", ".git", "demo_output", "node_modules", "tests", "benchmarks", "**/__pycache__"]

Prompt = dict[str, dict[str, Any]]
Result = dict[str, bytes]
"""A pair's files by name, or `rejected.json` alone; and `dataset.json`."""


def read_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate pairs with headless ComfyUI workers.")
    parser.add_argument(
        "--workflow", default=DEFAULT_WORKFLOW, metavar="NAME", help="a shipped workflow, or the path of an API JSON"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="change an input (may be repeated)"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "demo_output" / "pairs", help="the dataset's folder")
    parser.add_argument("--workers", type=int, default=1, help="headless ComfyUIs; more than one needs Ray")
    parser.add_argument("--ray-address", default=None, help="of a Ray cluster, such as 'auto'; a local one by default")
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs for each worker, where Ray shares them out")
    parser.add_argument(
        "--server-argument", action="append", default=[], help="further options of ComfyUI, such as model paths"
    )
    return parser.parse_args(arguments)


class Worker:
    """A headless ComfyUI that makes single pairs."""

    def __init__(self, prompt: Prompt, server_arguments: list[str], scripts: str | None) -> None:
        # Ray sends the repository into the working directory of its workers on other machines.
        sys.path.insert(0, scripts or str(Path.cwd() / "scripts"))
        # Imported here, as there is nothing to import before on another machine.
        from api_client import Client
        from engine import Server
        from environment import ScriptError

        self.prompt = prompt
        self.base = tempfile.TemporaryDirectory(prefix="identity-edit-pairs-")
        self.server = Server(Path(self.base.name), arguments=tuple(server_arguments)).start()
        if self.server.pack_failure():
            raise ScriptError(f"ComfyUI could not load the pack: {self.server.pack_failure()}")
        self.client = Client(self.server.address)

    def process_id(self) -> int:
        return os.getpid()

    def make(self, number: int) -> Result:
        """Run the workflow for one pair and return its files."""
        prompt = copy.deepcopy(self.prompt)
        inputs = next(node["inputs"] for node in prompt.values() if node["class_type"] == NODE)
        inputs |= {"part": str(number), "folder": WORK_FOLDER}
        folder = self.server.base / "output" / WORK_FOLDER
        pair, rejected = folder / "pairs" / f"{number:06}", folder / "rejected" / f"{number:06}.json"
        from api_client import ExecutionError

        try:
            self.client.run(prompt)
        except ExecutionError:
            if not rejected.is_file():  # a run with nothing but rejected pairs ends with an error
                raise
        files = {"dataset.json": (folder / "dataset.json").read_bytes()}
        if pair.is_dir():
            return files | {file.name: file.read_bytes() for file in pair.iterdir()}
        return files | {"rejected.json": rejected.read_bytes()}

    def stop(self) -> None:
        self.server.stop()
        self.base.cleanup()


def results_of_one_worker(
    prompt: Prompt, numbers: list[int], server_arguments: list[str]
) -> Iterator[tuple[int, Result]]:
    """Make pairs one after the other on this machine."""
    worker = Worker(prompt, server_arguments, str(ROOT / "scripts"))
    try:
        for number in numbers:
            try:
                files = worker.make(number)
            except ScriptError:
                raise
            except Exception as error:  # of the connection
                if worker.server.is_running():
                    raise
                log = worker.server.log_tail()
                raise ScriptError(f"ComfyUI ended while it made pair {number}; the end of its log:\n{log}") from error
            yield number, files
    finally:
        worker.stop()


def results_of_ray(
    prompt: Prompt,
    numbers: list[int],
    server_arguments: list[str],
    *,
    workers: int,
    address: str | None = None,
    gpus: float = 0.0,
    on_worker: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Result]]:
    """Make pairs on Ray actors, in any order; those of a worker that dies are made by another.

    Args:
        prompt: the workflow.
        numbers: of the pairs to make.
        server_arguments: of ComfyUI.
        workers: how many at once.
        address: of a cluster; None starts one on this machine for the time of the run.
        gpus: for each worker.
        on_worker: told the process id of each worker that has started.

    Raises:
        ScriptError: when Ray is missing, a node fails, or workers die over one pair again and again.
    """
    try:
        import ray
        from ray.exceptions import RayActorError, RayTaskError
    except ImportError:
        raise ScriptError("More than one worker needs Ray: 'pip install ray', or --workers 1.") from None
    options: dict[str, Any]
    if address:
        # Run as a command, this file is sent by value; what it imports is in the working directory.
        options = {"address": address, "runtime_env": {"working_dir": str(ROOT), "excludes": _NOT_SENT}}
    else:
        path = os.pathsep.join(filter(None, (str(ROOT / "scripts"), os.environ.get("PYTHONPATH"))))
        options = {"num_cpus": workers, "include_dashboard": False, "runtime_env": {"env_vars": {"PYTHONPATH": path}}}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    ray.init(log_to_driver=False, **options)
    actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(Worker)
    waiting, losses = deque(numbers), dict.fromkeys(numbers, 0)
    busy: dict[Any, tuple[Any, int]] = {}

    def start() -> Any:
        started = actor.remote(prompt, server_arguments, None if address else str(ROOT / "scripts"))
        if on_worker is not None:
            on_worker(ray.get(started.process_id.remote()))
        return started

    def lost(number: int, error: Exception) -> None:
        losses[number] += 1
        if losses[number] >= MOST_LOSSES:
            raise ScriptError(f"{MOST_LOSSES} workers have died over pair {number}; the last one said: {error}")
        waiting.appendleft(number)

    try:
        idle = deque(start() for _ in range(min(workers, len(waiting))))
        while waiting or busy:
            while waiting and idle:
                worker, number = idle.popleft(), waiting.popleft()
                busy[worker.make.remote(number)] = worker, number
            ready, _ = ray.wait(list(busy), num_returns=1)
            worker, number = busy.pop(ready[0])
            try:
                result = ray.get(ready[0])
            except RayActorError as error:
                lost(number, error)
                idle.append(start())
            except RayTaskError as error:
                if isinstance(error.cause, ScriptError):  # a node's own error would come again on every worker
                    raise ScriptError(f"pair {number}: {error.cause}") from None
                ray.kill(worker)  # its ComfyUI is gone, or does not answer
                lost(number, error)
                idle.append(start())
            else:
                idle.append(worker)
                yield number, result
        for worker in idle:
            ray.get(worker.stop.remote())
    finally:
        ray.shutdown()


def node_of(prompt: Prompt) -> dict[str, Any]:
    """The inputs of the workflow's one Generate Pairs node."""
    nodes = [node["inputs"] for node in prompt.values() if node["class_type"] == NODE]
    if len(nodes) != 1:
        raise ScriptError(f"The workflow has {len(nodes)} Generate Pairs nodes, and one is needed.")
    return nodes[0]


def collect(folder: Any, results: Iterator[tuple[int, Result]], total: int) -> None:
    """Write results into the dataset as they come, with a progress bar.

    Args:
        folder: the pack's `PairFolder`.
        results: pairs' numbers and files.
        total: how many there will be.
    """
    import json

    from tqdm import tqdm

    for number, files in tqdm(results, total=total, unit="pair"):
        folder.claim(json.loads(files.pop("dataset.json")))
        if "rejected.json" in files:
            facts = json.loads(files["rejected.json"])
            folder.reject(facts.pop("number"), facts)
        else:
            folder.adopt(number, files)


def main() -> None:
    arguments = read_arguments()
    environment.enter()
    from demo import change_inputs, read_workflow

    prompt = read_workflow(arguments.workflow)
    change_inputs(prompt, arguments.set)
    count = node_of(prompt)["count"]
    # The pack is loaded here for its dataset's form alone.
    import load_pack

    load_pack.prepare_engine(cpu=True)
    load_pack.load_pack()
    from identity_edit_pack.pipelines.errors import IdentityEditError
    from identity_edit_pack.pipelines.pair_folder import PairFolder

    try:
        folder = PairFolder(arguments.output)
        there = {*folder.finished(), *folder.rejected()}
        missing = [number for number in range(count) if number not in there]
        if missing:
            if arguments.workers > 1 or arguments.ray_address:
                results = results_of_ray(
                    prompt,
                    missing,
                    arguments.server_argument,
                    workers=arguments.workers,
                    address=arguments.ray_address,
                    gpus=arguments.gpus,
                )
            else:
                results = results_of_one_worker(prompt, missing, arguments.server_argument)
            try:
                collect(folder, results, len(missing))
            finally:
                folder.write_index()
        kept = folder.write_index()
        folder.contact_sheet()
        print(f"{kept} pairs, {len(folder.rejected())} rejected: {folder.path}")
    except IdentityEditError as error:
        raise ScriptError(str(error)) from None


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except ScriptError as error:
        sys.exit(f"error: {error}")
