"""Every node that touches a model, on models of full width: `python -m benchmarks real_sizes`.

SD 1.5, SD 2.1 (v-prediction) and SDXL with random weights, read by the stock Load Checkpoint from a file that is
written once and removed at the end. Rows run in inference mode as ComfyUI runs a prompt, with the fewest steps their
nodes take: so they say whether dtypes, shapes and memory fit, and nothing about images. A few rows share a process
and its checkpoint; between them freed memory is given back and the kernel's highest mark is reset. The UNet is kept and
computes in bfloat16 (`--bf16-unet` and the stock ModelComputeDtype), much as in float16 on a GPU, with PyTorch's
attention. Rows wait until there is memory for them, and are stopped when they exceed --most-gib.

Rows are kept in benchmarks/results/real_sizes.json as they are made; --only and --family choose what is run (again),
--missing leaves out what is there. Writes benchmarks/results/real_sizes.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import load_pack
import psutil

from .harness import ROOT, Options, command_of, markdown, read_results, source_commit, write_results

NAME = "real_sizes"
FAMILIES = {"sd15": "SD 1.5", "sd21": "SD 2.1 (v-prediction)", "sdxl": "SDXL"}
FOLDERS_OF_FILES = {"vision": "clip_vision", "pose": "controlnet", "mcdm": "diffusion_models"}
"""Of ComfyUI's models, for files that are no checkpoints."""
GIB = 2**30
GIB_NEEDED = {"sd15": 6.0, "sd21": 6.5, "sdxl": 10.0}
"""Before a row begins, beside what is left to others."""
OK, REFUSED, TOO_LARGE, STOPPED, FAILED = RESULTS_OF_A_ROW = ("ok", "refused", "not run", "stopped", "failed")
ROWS = {
    "plain sampling, for comparison": "plain",
    "Noise Inversion": "invert_image",
    "Edit-Friendly DDPM": "edit_friendly",
    "Null-Text Optimization": "null_text",
    "Null-Text Optimization without checkpointing": "null_text_without_checkpointing",
    "Null-Text Optimization (adaptive)": "null_text_adaptive",
    "negative-prompt inversion": "negative_prompt_inversion",
    "Optimize Text Embedding": "optimize_text_embedding",
    "Timestep-Aware Text Injection": "text_injection",
    "Timestep-Aware Text Injection (Model)": "text_injection_model",
    "Identity Attention": "identity_attention",
    "Identity-Aware Mask Blend": "mask_blend",
    "Segment Subject": "segment_subject",
    "Select Reference": "select_reference",
    "Reference-Guided Null-Text Optimizer": "reference_guidance",
    "Mutual Self-Attention": "mutual_self_attention",
    "Prompt-to-Prompt": "prompt_to_prompt",
    "Replace Subject": "replace_subject",
    "Pair Guider": "pair_guider",
    "Generate Pairs": "generate_pairs",
    "MCDM editing": "mcdm_editing",
    "DiffEdit": "diffedit",
    "Train MCDM": "train_mcdm",
    "Train Identity Words": "identity_words",
    "Train Subject Embedding": "subject_embedding",
    "Train Subject Embedding (word)": "subject_word",
    "Train Style Attention": "style_attention",
    "Train Identity Prior": "identity_prior",
    "Train Identity Prior (low rank)": "identity_prior_of_low_rank",
}
"""What is run, and its function in real_sizes_nodes.py."""
TRAININGS = {name for name in ROWS if name.startswith("Train ")}
ROWS_OF_A_PROCESS = 9
SMALLER_FOR_TRAINING = 2
"""Trainings make a sample image of 20 steps by themselves; theirs are this much smaller."""


def run_rows(names: list[str], arguments: argparse.Namespace) -> None:
    """Rows of one family in this process, one after the other; prints a line of JSON for each."""
    load_pack.prepare_engine(cpu=True, base=arguments.base)
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = True
    if arguments.dtype == "bfloat16":
        args.bf16_unet = args.bf16_vae = True
    load_pack.load_pack()
    import torch
    from identity_edit_pack.pipelines.engine.edit_model import register_families

    from . import real_sizes_nodes

    register_families()  # as the pack's entry point does

    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        models = real_sizes_nodes.Models(arguments.family[0], arguments.dtype, memory_gib=0.0)
        model = f"{type(models.model.model).__name__}, {models.model.model.model_type.name}"
        for name in names:
            give_memory_back()
            used = psutil.Process().memory_info().rss / GIB
            free = psutil.virtual_memory().available / GIB - arguments.leave_gib
            models.memory_gib = min(arguments.most_gib - used, free)
            result = run_row(name, models.at_size(size_of(name, arguments)))
            result["nodes_with_models"] = real_sizes_nodes.nodes_with_models()
            print(json.dumps({**result, "model": model, "peak_memory_mib": highest_memory_mib()}), flush=True)


def run_row(name: str, models: Any) -> dict[str, Any]:
    """One row: what came of it, and seconds by what ran."""
    import traceback

    from identity_edit_pack.pipelines.shared.errors import IdentityEditError

    from . import real_sizes_nodes

    result: dict[str, Any] = {"result": OK}
    try:
        getattr(real_sizes_nodes, ROWS[name])(models)
    except IdentityEditError as error:
        result = {"result": REFUSED, "message": str(error)}
    except real_sizes_nodes.TooLargeError as error:
        result = {"result": TOO_LARGE, "message": str(error)}
    except Exception as error:
        traceback.print_exc()
        result = {"result": FAILED, "message": f"{type(error).__name__}: {error}"}
    return {**result, "seconds": {what: round(value, 2) for what, value in models.seconds.items()}}


def give_memory_back() -> None:
    """Return what earlier rows have freed, and begin to look for the highest memory anew."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)


def highest_memory_mib() -> int:
    """The highest resident memory of this process since `give_memory_back`."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text("ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return round(int(line.split()[1]) / 1024)
    return round(psutil.Process().memory_info().rss / 2**20)


def in_a_process(names: list[str], family: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What came of rows that share a process, as it comes.

    The process is stopped when it needs too much memory; then the row that was running is the last.
    """
    command = [*command_of(NAME), "--alone", "--only", *names, "--family", family]
    command += ["--size", str(arguments.size), "--base", str(arguments.base)]
    command += ["--threads", str(arguments.threads), "--dtype", arguments.dtype]
    command += ["--most-gib", str(arguments.most_gib), "--leave-gib", str(arguments.leave_gib)]
    # Settings that keep freed memory in the process would count it as used.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    with (arguments.base / "last_process.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True, cwd=ROOT)
        stopped: list[float] = []
        watcher = threading.Thread(target=watch, args=(process, arguments, stopped), daemon=True)
        watcher.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield dict(json.loads(line))
        process.wait()
        watcher.join()
    if stopped:
        message = f"stopped at {stopped[0] / GIB:.1f} GiB, more than this machine could give then"
        yield {"result": STOPPED, "message": message, "peak_memory_mib": round(stopped[0] / 2**20)}
    elif process.returncode:
        yield {"result": FAILED, "message": f"the process ended with {process.returncode}"}


def watch(process: subprocess.Popen[str], arguments: argparse.Namespace, stopped: list[float]) -> None:
    """Stop a process that takes too much memory, and say at how many bytes."""
    watched = psutil.Process(process.pid)
    with contextlib.suppress(psutil.Error):
        while process.poll() is None:
            used = used_memory(watched)
            if used > arguments.most_gib * GIB or psutil.virtual_memory().available < arguments.leave_gib * GIB / 2:
                stopped.append(float(used))
                process.kill()
                return
            time.sleep(0.2)


def used_memory(process: psutil.Process) -> int:
    """Bytes, without what is mapped of files, such as a checkpoint's, which can be dropped at any time."""
    memory = process.memory_info()
    return memory.rss - getattr(memory, "shared", 0)


def size_of(name: str, arguments: argparse.Namespace) -> int:
    return int(arguments.size // (SMALLER_FOR_TRAINING if name in TRAININGS else 1))


def wait_for_memory(gib: float) -> None:
    """Until so much memory is free that others keep theirs."""
    while psutil.virtual_memory().available < gib * GIB:
        time.sleep(5)


def write_checkpoint(name: str, arguments: argparse.Namespace) -> None:
    """In a process of its own, whose memory is given back."""
    folder = FOLDERS_OF_FILES.get(name, "checkpoints")
    if not (arguments.base / "models" / folder / f"{name}.safetensors").is_file():
        command = [*command_of(NAME), "--write", name, "--base", str(arguments.base), "--size", str(arguments.size)]
        subprocess.run([*command, "--threads", str(arguments.threads)], check=True, cwd=ROOT)


def write_here(name: str, arguments: argparse.Namespace) -> None:
    load_pack.prepare_engine(cpu=True, base=arguments.base)
    import torch

    from . import real_sizes_checkpoints as checkpoints

    torch.set_num_threads(arguments.threads)
    path = arguments.base / "models" / FOLDERS_OF_FILES.get(name, "checkpoints") / f"{name}.safetensors"
    if name == "vision":
        checkpoints.write_clip_vision(path)
    elif name == "pose":
        checkpoints.write_controlnet(path)
    elif name == "mcdm":
        import nodes as stock

        model, clip, vae = stock.CheckpointLoaderSimple().load_checkpoint("sd15.safetensors")[:3]
        vision = stock.CLIPVisionLoader().load_clip("vision.safetensors")[0]
        checkpoints.write_untrained_mcdm(model, clip, vae, vision, path, arguments.size)
    else:
        checkpoints.write_checkpoint(name, path)


def write_rows(rows: list[dict[str, Any]], nodes: list[str]) -> None:
    lines = [
        "# Nodes on models of full width",
        "",
        "`python -m benchmarks real_sizes`: random weights, the fewest steps each node takes, on a CPU; "
        "commit and threads stand in the JSON file for each row. Seconds are of the named nodes and of the sampling "
        "with them, on a machine that had other work to do; the peak is the whole process's resident memory during "
        "the row, with Python, PyTorch, the checkpoint and what is mapped of its file. A row is made again by "
        "`--family FAMILY --only ROW --size SIZE`, with twice the size for trainings; all seeds are fixed in the code.",
    ]
    for family, title in FAMILIES.items():
        of_family = [row for row in rows if row["family"] == family]
        lines += ["", f"## {title}", ""]
        if not of_family:
            lines.append("Not run.")
            continue
        model = next((row["model"] for row in of_family if "model" in row), "")
        table = []
        for row in of_family:
            parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row.get("seconds", {}).items())
            result = row["result"] if row["result"] == OK else f"{row['result']}: {row['message']}"
            size, peak = f"{row['size']}x{row['size']}", row.get("peak_memory_mib", "")
            table.append((row["row"], parts, size, row["dtype"], result, peak))
        headings = ("row", "nodes (seconds)", "image", "UNet computes in", "result", "peak MiB")
        lines += [f"Recognized by ComfyUI as {model}.", "", *markdown(headings, table)]
        ran = {name for row in of_family if row["result"] == OK for name in row["seconds"]}
        if missing := [name for name in nodes if name not in ran]:
            which = "Nodes with a MODEL, CLIP, VAE or CLIP_VISION input that have not run"
            lines += ["", f"{which}: {', '.join(missing)}."]
    counts = {result: sum(row["result"] == result for row in rows) for result in RESULTS_OF_A_ROW}
    lines += ["", ", ".join(f"{count} rows {result}" for result, count in counts.items() if count) + "."]
    with contextlib.redirect_stdout(None):
        write_results(NAME, {"rows": rows, "nodes_with_models": nodes}, lines)


OPTIONS: Options = {
    "family": (list(FAMILIES), "which are run (all)", {"choices": FAMILIES}),
    "only": (None, "rows to run (all)", {"choices": ROWS, "nargs": "+", "metavar": "ROW"}),
    "missing": (False, "leave out rows that the results have as ok"),
    "size": (512, "images' width and height (512)"),
    "dtype": ("bfloat16", "in which UNets compute", {"choices": ("bfloat16", "float32")}),
    "threads": (1, "of PyTorch (1)"),
    "most_gib": (20.0, "memory at which a row is stopped (20)"),
    "leave_gib": (2.0, "memory that is left to others (2)"),
    "keep": (False, "keep the checkpoints for another call with --base"),
    "base": (None, "folder for the checkpoints (a temporary one)", {"type": Path}),
    "alone": (False, argparse.SUPPRESS),
    "write": (None, argparse.SUPPRESS),
}


def main(arguments: argparse.Namespace) -> None:
    if arguments.write:
        write_here(arguments.write, arguments)
        return
    if arguments.alone:
        run_rows(arguments.only, arguments)
        return
    with tempfile.TemporaryDirectory(prefix="identity-edit-sizes-") as temporary:
        arguments.base = arguments.base or Path(temporary)
        arguments.base.mkdir(parents=True, exist_ok=True)
        measure(arguments)
        if not arguments.keep:
            for path in (arguments.base / "models").rglob("*.safetensors"):
                path.unlink()


def measure(arguments: argparse.Namespace) -> None:
    rows = read_results(NAME).get("rows", [])
    write_checkpoint("vision", arguments)
    for family in arguments.family:
        write_checkpoint(family, arguments)
        chosen = [name for name in arguments.only or ROWS if not (arguments.missing and is_ok(name, family, rows))]
        for begin in range(0, len(chosen), ROWS_OF_A_PROCESS):
            names = chosen[begin : begin + ROWS_OF_A_PROCESS]
            while names:
                wait_for_memory(GIB_NEEDED[family] + arguments.leave_gib)
                names, group = [], names
                for number, found in enumerate(in_a_process(group, family, arguments)):
                    key = {"family": family, "row": group[number], "size": size_of(group[number], arguments)}
                    nodes = found.pop("nodes_with_models", read_results(NAME).get("nodes_with_models", []))
                    record = {**key, "dtype": arguments.dtype, **found}
                    record |= {"threads": arguments.threads, "commit": source_commit()}
                    others = [
                        row for row in read_results(NAME).get("rows", []) if place(row) != place(record)
                    ]  # another call may have added some
                    rows = sorted([*others, record], key=place)
                    write_rows(rows, nodes)
                    print(family, *(record.get(part) for part in ("row", "result", "message", "seconds")), flush=True)
                    names = group[number + 1 :]  # those after a row at which the process ended


def is_ok(name: str, family: str, rows: list[dict[str, Any]]) -> bool:
    return any(row["row"] == name and row["family"] == family and row["result"] == OK for row in rows)


def place(row: dict[str, Any]) -> tuple[int, int, int, str]:
    """Where a row stands in the results."""
    return list(FAMILIES).index(row["family"]), list(ROWS).index(row["row"]), row["size"], row["dtype"]
