"""The workflows that begin with one's own photos, at full width: `python -m benchmarks photo_workflows`.

Each shipped workflow with photos runs on a server of its own as its API JSON has it, but for two steps of everything
and images of --size pixels, on SD 1.5 or (--family sdxl) on SDXL with *weights* low rank. The checkpoint, the CLIP
vision, the MCDM and the ControlNet have random weights, so a row says that all of it fits together at this width and
what memory and time it takes, and nothing about images. The photos are those of scripts/demo_photos.py. The W+ encoder
is the demo world's, for its size does not depend on the checkpoint.

Rows are kept in benchmarks/results/photo_workflows.json as they are made; --only chooses what is run again. --base
keeps the files for another call. Writes benchmarks/results/photo_workflows.json and .md.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from api_client import Client
from api_workflows import Prompt, demo_values, read_workflow
from demo_photos import draw_photos
from engine import Server
from user_comfyui import ScriptError

from ..tests.endurance.cheap_workflows import MOST, cheap
from .harness import Options, markdown, read_results, source_commit
from .real_sizes import FAMILIES, used_memory, write_checkpoint

NAME = "photo_workflows"
WITHOUT_A_MODEL = ("keep_the_rest_photos",)
WORKFLOWS = [name for name in demo_values() if name not in WITHOUT_A_MODEL]
TRAINED_MCDM = ("mcdm_photos_pairs", "mcdm_photos_train", "mcdm_photos", "mcdm_saved_words")
WORKFLOWS_OF = {"sd15": WORKFLOWS, "sdxl": [name for name in WORKFLOWS if name not in TRAINED_MCDM]}
"""An MCDM of SDXL takes 51 GB to train."""
FILES_OF = {"sd15": ("sd15", "vision", "mcdm", "pose"), "sdxl": ("sdxl",)}
REPLACED = {
    "clip_vision_h.safetensors": "vision.safetensors",
    "identity-edit-demo-mcdm.safetensors": "mcdm.safetensors",
    "identity-edit-demo-mcdm.safetensors [diffusion_models]": "mcdm.safetensors [diffusion_models]",
    "identity-edit-demo-pose.safetensors": "pose.safetensors",
}
"""Files of the shipped workflows, and those of full width in their place."""
FEWEST = {**MOST, "noise_steps": 1, "seeds": 1, "count": 1, "batch_size": 1, "amount": 1}
"""The largest value of an input, by its name. A training makes a sample image of 20 steps at its end."""
PIXELS = 512
"""An input of this value is the side of images in the shipped workflows."""


def at_full_width(name: str, family: str, size: int) -> Prompt:
    """A shipped workflow with the files of full width, two steps of everything and images of `size` pixels; in words,
    what the photos show."""
    replaced = {**REPLACED, "identity-edit-demo.safetensors": f"{family}.safetensors"}
    changed = read_workflow(name)
    for target, value in demo_values()[name]["values"].items():
        node, _, key = target.partition(".")
        if isinstance(value, str) and key != "class_type":
            changed[node]["inputs"][key] = value
    for node in changed.values():
        for name, value in node["inputs"].items():
            if isinstance(value, str):
                node["inputs"][name] = replaced.get(value, value)
            elif value == PIXELS and not isinstance(value, bool):
                node["inputs"][name] = size
        if family == "sdxl" and "weights" in node["inputs"]:
            node["inputs"]["weights"] = "low rank"
    return cheap(changed, FEWEST)


class Memory:
    """The highest memory of a process while the block runs, without what is mapped of files.

    Attributes:
        highest: bytes.
    """

    def __init__(self, process_id: int) -> None:
        self.process = psutil.Process(process_id)
        self.highest = 0
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)

    def watch(self) -> None:
        while not self.done.wait(0.2):
            try:
                self.highest = max(self.highest, used_memory(self.process))
            except psutil.NoSuchProcess:  # ended for lack of memory
                return

    def __enter__(self) -> Memory:
        self.watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.watcher.join()


def run_workflow(name: str, base: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One workflow on a server of its own, so that the memory is its own."""
    variables = {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    launch = tuple(f"--{option}" for option in arguments.launch)
    row: dict[str, Any] = {"workflow": name, "family": arguments.family, "size": arguments.size}
    row["commit"] = source_commit()
    row |= {"launch": " ".join(launch)} if launch else {}
    prompt = at_full_width(name, arguments.family, arguments.size)
    with Server(base, arguments=launch, environment=variables) as server:
        assert server.process_id is not None
        client = Client(server.address)
        with Memory(server.process_id) as memory:
            begin = time.perf_counter()
            try:
                run = client.run(prompt, timeout=3600)
                shown = [image.size for key in run.outputs for image in client.images(run, key)]
                row |= {"result": "ok", "images": len(shown)}
            except (ScriptError, TimeoutError) as error:
                row["result"] = str(error)
        return row | {"seconds": round(time.perf_counter() - begin, 1), "memory_mib": round(memory.highest / 2**20)}


OPTIONS: Options = {
    "only": (WORKFLOWS, "workflows to run (all)", {"choices": WORKFLOWS}),
    "family": ("sd15", "of the checkpoint (sd15)", {"choices": list(WORKFLOWS_OF)}),
    "size": (512, "images' width and height (512)"),
    "threads": (1, "of PyTorch (1)"),
    "launch": (
        [],
        "launch options of ComfyUI without their dashes, such as bf16-unet (none)",
        {"type": str, "nargs": "+"},
    ),
    "base": (None, "folder for the files and the server (a temporary one)", {"type": Path}),
}


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="identity-edit-photos-") as temporary:
        base = arguments.base = arguments.base or Path(temporary)
        for file in FILES_OF[arguments.family]:
            write_checkpoint(file, arguments)
        draw_photos(base / "input")
        for name in WORKFLOWS_OF[arguments.family]:
            if name not in arguments.only:
                continue
            row = run_workflow(name, base, arguments)
            others = [each for each in read_results(NAME).get("rows", []) if place(each) != place(row)]
            yield {"rows": sorted([*others, row], key=place)}


def place(row: dict[str, Any]) -> tuple[int, int]:
    """Of a row in the table."""
    return list(FAMILIES).index(row["family"]), WORKFLOWS.index(row["workflow"])


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    rows = figures["rows"]
    lines = [
        (row["workflow"], FAMILIES[row["family"]], f"{row['size']}x{row['size']}",
         ", with ".join(filter(None, (row["result"].rstrip("."), row.get("launch")))), row.get("images", ""),
         f"{row['seconds']:.0f}", row["memory_mib"])
        for row in rows
    ]  # fmt: skip
    run = {(row["family"], row["workflow"]) for row in rows}
    missing = [
        f"{name} on {FAMILIES[family]}"
        for family, names in WORKFLOWS_OF.items()
        for name in names
        if (family, name) not in run
    ]
    return [
        "The workflows with photos at full width",
        "random weights, two steps of everything, on a processor in float32 unless a launch option says otherwise, "
        "with as many threads as --threads says; the commit of a row stands in the JSON file. Memory is the server's "
        "highest, without what is mapped of files. On SDXL *weights* is low rank.",
        *markdown(("workflow", "checkpoint", "images of", "result", "images shown", "seconds", "memory, MiB"), lines),
        "",
        f"Not run yet: {', '.join(missing) or 'none'}. On SDXL without those of a trained MCDM, which takes 51 GB to "
        "train. `keep_the_rest_photos` uses no model.",
    ]
