"""Generates a dataset of pairs on several machines or GPUs: `python scripts/generate_pairs.py --output FOLDER`.

To be run by the Python that ComfyUI runs in. Every worker is a ComfyUI inside a process, which is given the workflow
once for each pair (its Generate Pairs node with the pair's number as `part`) and hands the pair back; this process
alone writes the dataset, and asks only for pairs that are missing. A pair whose worker dies is given to another one,
and the worker is replaced. One worker runs in this process.

More than one worker needs Ray (`pip install ray`; `ray_workers.py` says why Ray).

The ComfyUI is the one in whose custom_nodes the pack lies, or the one that COMFYUI_PATH names, on every machine of a
cluster (there, start Ray on every machine with `ray start`, and give `--ray-address auto`; the pack is sent to them by
Ray).
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import ray_workers
from api_workflows import Prompt, change_inputs, read_workflow
from user_comfyui import PACK, ScriptError, name_pack

SCRIPTS = str(PACK / "scripts")
DEFAULT_WORKFLOW = "mcdm_generate_pairs"
NODE = "IdentityEditGeneratePairs"
WORK_FOLDER = "pairs/work"
Result = dict[str, bytes]
"""A pair's files by name, or `rejected.json` alone; and `dataset.json`."""


def read_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate a dataset of pairs.")
    parser.add_argument(
        "--workflow", default=DEFAULT_WORKFLOW, metavar="NAME", help="a shipped workflow, or the path of an API JSON"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="change an input (may be repeated)"
    )
    parser.add_argument("--output", type=Path, required=True, help="the dataset's folder")
    parser.add_argument("--workers", type=int, default=1, help="ComfyUIs at once; more than one needs Ray")
    parser.add_argument("--ray-address", default=None, help="of a Ray cluster, such as 'auto'; a local one by default")
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs for each worker, where Ray shares them out")
    parser.add_argument(
        "--comfyui-argument",
        action="append",
        default=[],
        metavar="OPTION",
        help="an option of ComfyUI, such as "
        "--comfyui-argument=--extra-model-paths-config --comfyui-argument=FILE (may be repeated)",
    )
    return parser.parse_args(arguments)


class Worker:
    """A ComfyUI in this process that makes single pairs."""

    def __init__(self, prompt: Prompt, options: list[str], pack: str | None) -> None:
        # Ray sends the pack into the working directory of its workers on other machines.
        sys.path.insert(0, str(Path(pack or Path.cwd()) / "scripts"))
        # Imported here, as there is nothing to import before on another machine.
        from user_comfyui import ComfyUI

        self.prompt = prompt
        self.folder = tempfile.TemporaryDirectory(prefix="identity-edit-pairs-")
        self.comfyui = ComfyUI(Path(self.folder.name), options)

    def process_id(self) -> int:
        return os.getpid()

    def make(self, number: int) -> Result:
        """Run the workflow for one pair and return its files."""
        prompt = copy.deepcopy(self.prompt)
        inputs = next(node["inputs"] for node in prompt.values() if node["class_type"] == NODE)
        inputs |= {"part": str(number), "folder": WORK_FOLDER}
        folder = self.comfyui.output / WORK_FOLDER
        pair, rejected = folder / "pairs" / f"{number:06}", folder / "rejected" / f"{number:06}.json"
        from user_comfyui import NodeError

        try:
            self.comfyui.run(prompt)
        except NodeError:
            if not rejected.is_file():  # a run with nothing but rejected pairs ends with an error
                raise
        files = {"dataset.json": (folder / "dataset.json").read_bytes()}
        if pair.is_dir():
            return files | {file.name: file.read_bytes() for file in pair.iterdir()}
        return files | {"rejected.json": rejected.read_bytes()}

    def stop(self) -> None:
        self.folder.cleanup()


def results_of_one_worker(prompt: Prompt, numbers: list[int], options: list[str]) -> Iterator[tuple[int, Result]]:
    """Make pairs one after the other in this process."""
    worker = Worker(prompt, options, str(PACK))
    try:
        for number in numbers:
            yield number, worker.make(number)
    finally:
        worker.stop()


def results_of_ray(
    prompt: Prompt, numbers: list[int], options: list[str], *, workers: int, **more: Any
) -> Iterator[tuple[int, Result]]:
    """Make pairs on Ray actors, in any order; those of a worker that dies are made by another.

    Args:
        prompt: the workflow.
        numbers: of the pairs to make.
        options: of ComfyUI.
        workers: how many at once.
        more: what else `ray_workers.results_of_ray` takes.

    Raises:
        ScriptError: when Ray is missing, a node fails, or workers die over one pair again and again.
    """
    not_sent = (*ray_workers.NOT_SENT, "benchmarks", "evaluation")
    settings = {"count": workers, "paths": (SCRIPTS,), "not_sent": not_sent, "name_of": "pair {}".format, **more}
    return ray_workers.results_of_ray(Worker, (prompt, options), numbers, **settings)


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
    prompt = read_workflow(arguments.workflow)
    change_inputs(prompt, arguments.set)
    count = node_of(prompt)["count"]
    name_pack()  # for its dataset's form alone
    from identity_edit_pack.pipelines.mcdm.pair_folder import PairFolder
    from identity_edit_pack.pipelines.shared.errors import IdentityEditError

    try:
        folder = PairFolder(arguments.output)
        there = {*folder.finished(), *folder.rejected()}
        missing = [number for number in range(count) if number not in there]
        if missing:
            if arguments.workers > 1 or arguments.ray_address:
                results = results_of_ray(
                    prompt,
                    missing,
                    arguments.comfyui_argument,
                    workers=arguments.workers,
                    address=arguments.ray_address,
                    gpus=arguments.gpus,
                )
            else:
                results = results_of_one_worker(prompt, missing, arguments.comfyui_argument)
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
