"""The shipped workflows under ComfyUI's launch options: `python -m benchmarks launch_options`.

Each option starts a real server of its own, on which shipped workflows run with all numbers of steps cut to --steps.
Their images are compared with those of a server without the option: given is the lowest PSNR of a workflow's
images, and what does not run is given with its message. "TorchCompileModel" is no launch option: the stock node of
this name is put behind every Load Checkpoint, so that the pack's patches meet a compiled UNet; it needs a C++ compiler
on a CPU. In ComfyUI's command line --lowvram and --highvram exclude --cpu: they run on a machine with a GPU only.

Results are kept in benchmarks/results/launch_options.json as they are made; --option and --workflow choose what is run
(again), --missing leaves out what is there. Writes benchmarks/results/launch_options.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from api_client import Client, PromptError
from api_workflows import read_workflow
from engine import ENGINE_VERSION, Server, find_engine, has_accelerator, version_of

from ...benchmarks.harness import read_results, source_commit, write_results
from .cheap_workflows import NAMES

PLAIN, COMPILED = "plain", "TorchCompileModel"
LOADERS = ("CheckpointLoaderSimple", "UNETLoader")
OPTIONS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    "--fp16-unet": ("--fp16-unet",),
    "--bf16-unet": ("--bf16-unet",),
    "--fp8_e4m3fn-unet": ("--fp8_e4m3fn-unet",),
    "--fp8_e5m2-unet": ("--fp8_e5m2-unet",),
    "--bf16-vae --bf16-text-enc": ("--bf16-vae", "--bf16-text-enc"),
    "--lowvram": ("--lowvram",),
    "--highvram": ("--highvram",),
    "--fp16-intermediates": ("--fp16-intermediates",),
    "--cache-none": ("--cache-none",),
    "--cache-ram 1": ("--cache-ram", "1"),
    "--fast": ("--fast",),
    "--deterministic": ("--deterministic",),
    "--disable-dynamic-vram": ("--disable-dynamic-vram",),
    COMPILED: (),
}
"""Names in the results, and the command line of ComfyUI."""
NEEDS_ACCELERATOR = ("--lowvram", "--highvram")
CLOSE_DB = 20.0
"""PSNR from which two images look like the same one."""
LOADED_IN_PART = (
    "With models that are loaded in part or not at all, as by --lowvram and --novram on a GPU, every node gives what "
    "it gives with whole ones: tests/nodes/test_low_memory.py, which makes ComfyUI load them so on a processor."
)
OK, FAILED, SKIPPED = "ok", "failed", "not run"
Images = dict[str, list[np.ndarray]]
"""By output node, its images [H, W, 3] from 0 to 255."""


def cheaper(prompt: dict[str, Any], most_steps: int) -> dict[str, Any]:
    """The prompt with every number of steps or iterations cut down."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        for name, value in node["inputs"].items():
            is_count = isinstance(value, int) and not isinstance(value, bool)
            if is_count and ("steps" in name or "iterations" in name):
                node["inputs"][name] = min(value, most_steps)
    return prompt


def compiled(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with the stock TorchCompileModel behind every Load Checkpoint and Load Diffusion Model."""
    prompt = copy.deepcopy(prompt)
    loaders = [key for key, node in prompt.items() if node["class_type"] in LOADERS]
    for loader in loaders:
        for node in prompt.values():
            for name, value in node["inputs"].items():
                if value == [loader, 0]:
                    node["inputs"][name] = [f"compiled_{loader}", 0]
        inputs = {"model": [loader, 0], "backend": "inductor"}
        prompt[f"compiled_{loader}"] = {"class_type": COMPILED, "inputs": inputs}
    return prompt


def why_not(option: str) -> str | None:
    """Why an option cannot be run on this machine, or None."""
    if option in NEEDS_ACCELERATOR and not has_accelerator():
        return f"ComfyUI accepts {option} only without --cpu, and this machine has no GPU"
    if option == COMPILED and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler on a CPU, and there is none"
    if any(word.startswith("--") and word not in known_options() for word in OPTIONS[option]):
        return f"this ComfyUI has no {option}"
    return None


@functools.cache
def known_options() -> str:
    """ComfyUI's own list of its options."""
    return (find_engine() / "comfy" / "cli_args.py").read_text(encoding="utf-8")


@contextlib.contextmanager
def server_with(option: str, base: Path, threads: int) -> Iterator[Client]:
    """A running ComfyUI with an option, without a way to any hub."""
    variables = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with Server(base, arguments=OPTIONS[option], environment=variables) as server:
        yield Client(server.address)


def images_of(client: Client, prompt: dict[str, Any]) -> Images:
    """Run a prompt and return what it shows."""
    run = client.run(prompt, timeout=1800)
    found = {key: client.images(run, key) for key in run.outputs}
    return {key: [np.asarray(image.convert("RGB")) for image in shown] for key, shown in found.items() if shown}


def lowest_psnr(images: Images, plain: Images) -> float:
    """The lowest PSNR in dB among images and those of the same nodes without the option; 99 for the same images.

    Raises:
        ValueError: when there are others, or of other sizes.
    """
    shapes, wanted = ({key: [image.shape for image in shown] for key, shown in p.items()} for p in (images, plain))
    if shapes != wanted or not shapes:
        raise ValueError(f"the images are {shapes} and not {wanted}")
    errors = [
        float(np.mean((image.astype(np.float64) - other) ** 2))
        for key, shown in images.items()
        for image, other in zip(shown, plain[key], strict=True)
    ]
    worst = max(errors)
    return 99.0 if worst == 0.0 else min(99.0, float(10.0 * np.log10(255.0**2 / worst)))


def run_workflow(client: Client, option: str, workflow: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one, keep its images when the option is PLAIN, else compare with those."""
    prompt = cheaper(read_workflow(workflow), arguments.steps)
    begin = time.perf_counter()
    try:
        images = images_of(client, compiled(prompt) if option == COMPILED else prompt)
        result: dict[str, Any] = {"result": OK, "seconds": round(time.perf_counter() - begin, 1)}
        if not images or min(image.std() for shown in images.values() for image in shown) < 1.0:
            return {"result": FAILED, "message": "an image is flat"}
        kept = arguments.base / f"plain_{workflow}.npz"
        if option == PLAIN:
            arrays: dict[str, Any] = {
                f"{key} {i}": image for key, shown in images.items() for i, image in enumerate(shown)
            }
            np.savez(kept, **arrays)
        else:
            result["psnr_db"] = round(lowest_psnr(images, read_images(kept)), 2)
    except (PromptError, TimeoutError, ValueError) as error:
        return {"result": FAILED, "message": " ".join(str(error).split())[:400]}
    return result


def read_images(path: Path) -> Images:
    """What a plain run kept."""
    images: Images = {}
    with np.load(path) as kept:
        for name in kept.files:
            images.setdefault(name.split()[0], []).append(kept[name])
    return images


def measure(arguments: argparse.Namespace) -> None:
    rows = read_rows()
    # What is compared with comes first, and again where its images are gone.
    options = [PLAIN, *(option for option in arguments.option or OPTIONS if option != PLAIN)]
    for option in options:
        names = [name for name in arguments.workflow if not is_there(rows, option, name, arguments)]
        reason = why_not(option)
        with contextlib.ExitStack() as stack:
            client = None
            if names and reason is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="identity-edit-options-"))
                client = stack.enter_context(server_with(option, Path(folder), arguments.threads))
            for name in names:
                found: dict[str, Any] = {"result": SKIPPED, "message": reason}
                if client is not None:
                    found = run_workflow(client, option, name, arguments)
                row = {"option": option, "workflow": name, **found, "steps": arguments.steps}
                row["commit"] = source_commit()
                # Read again: another call may have added some meanwhile.
                rows = [r for r in read_rows() if (r["option"], r["workflow"]) != (option, name)] + [row]
                rows.sort(key=lambda r: (list(OPTIONS).index(r["option"]), r["workflow"]))
                print(option, name, found, flush=True)
                write_rows(rows)


def results_name() -> str:
    """The tables of another ComfyUI than the usual one have its version in their name."""
    version = version_of(find_engine())
    return "launch_options" if version == ENGINE_VERSION else f"launch_options_{version}"


def read_rows() -> list[dict[str, Any]]:
    return list(read_results(results_name()).get("rows", []))


def is_there(rows: list[dict[str, Any]], option: str, workflow: str, arguments: argparse.Namespace) -> bool:
    """Whether a row need not be run (again)."""
    found = [row for row in rows if (row["option"], row["workflow"]) == (option, workflow) and row["result"] != FAILED]
    if option == PLAIN:
        return bool(found) and (arguments.base / f"plain_{workflow}.npz").is_file()
    return bool(found) and arguments.missing


def write_rows(rows: list[dict[str, Any]]) -> None:
    options = [option for option in OPTIONS if any(row["option"] == option for row in rows)]
    by_place = {(row["option"], row["workflow"]): row for row in rows}
    steps = sorted({row["steps"] for row in rows})
    lines = [
        "# The shipped workflows under ComfyUI's launch options",
        "",
        f"`python -m benchmarks launch_options` on ComfyUI {version_of(find_engine())}, demo checkpoint, every number "
        f"of steps cut to {', '.join(map(str, steps))}; commits stand in the JSON file. A number is the lowest PSNR in "
        f"dB of a workflow's images against the same server without the option, 99 for the same images; "
        f"{CLOSE_DB:g} dB and more look like the same image. In `plain` it is the seconds.",
        "",
        f"| workflow | {' | '.join(options)} |",
        f"|---|{'---|' * len(options)}",
    ]
    notes: list[str] = []
    for name in sorted({row["workflow"] for row in rows}):
        cells = []
        for option in options:
            row = by_place.get((option, name))
            if row is None:
                cells.append("")
            elif row["result"] == OK:
                cells.append(f"{row['seconds']:.0f} s" if option == PLAIN else f"{row['psnr_db']:.1f}")
            else:
                note = f"{row['result']}: {row['message']}"
                if note not in notes:
                    notes.append(note)
                cells.append(f"{row['result']} ({notes.index(note) + 1})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {note}." for number, note in enumerate(notes, 1))]
    compared = [row for row in rows if "psnr_db" in row]
    close = sum(row["psnr_db"] >= CLOSE_DB for row in compared)
    lines += ["", f"{len(compared)} runs with an option gave images, {close} of them close to the plain ones."]
    lines += ["", LOADED_IN_PART]
    with contextlib.redirect_stdout(None):
        write_results(results_name(), {"rows": rows}, lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--option", choices=OPTIONS, action="append", help='--option="--fast", repeated (default all)')
    parser.add_argument("--workflow", choices=NAMES, nargs="+", default=NAMES, help="default all")
    parser.add_argument("--steps", type=int, default=4, help="most steps of anything (default 4)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--missing", action="store_true", help="leave out what the results have")
    parser.add_argument("--base", type=Path, help="folder for plain images, to go on later (default: temporary)")


def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="identity-edit-plain-") as temporary:
        arguments.base = arguments.base or Path(temporary)
        arguments.base.mkdir(parents=True, exist_ok=True)
        measure(arguments)
