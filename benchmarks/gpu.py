"""The pack on a graphics card, in at most eight minutes: `COMFYUI_PATH=FOLDER python -m benchmarks gpu`.

For a person with an NVIDIA card: with the Python that ComfyUI runs with, from this folder; FOLDER is that ComfyUI.
Models of SD 1.5's and SDXL's width with random weights, read by the stock loaders from files that are written to a
temporary folder (9 GB) and removed at the end:

- gradients: every node with gradients, under ComfyUI's dynamic VRAM and without it. How far what they learn is apart
  is given relative to its size: both compute the same.
- attention: capture and style cross-attention beside plain sampling.
- null-text: the pack's methods beside the reference's loop, in float32.
- precision, compiled: nodes with a UNet in float16, bfloat16 and float8, and compiled by the stock TorchCompileModel.

Each part is a process of its own. What fails is recorded and the next is done; what the minutes leave no time for is
recorded as not run. On a machine without a card the demo world's small models take the place of the wide ones and
nothing is compiled, which shows that the script works and says nothing about a card. Peaks of memory are those of
PyTorch's allocator on a card, without what dynamic VRAM itself holds, and of the process on a processor.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import load_pack

from .harness import (
    DEMO_CHECKPOINT,
    ROOT,
    Options,
    command_line,
    command_of,
    load_checkpoint,
    markdown,
    source_commit,
    write_results,
)

MINUTES = 8.0
PART_SECONDS = 150.0
"""What a part may take at most, so that one that hangs leaves time for the others."""
WIDE, TINY = ("sd15", "sdxl"), "tiny"
TITLES = {"sd15": "SD 1.5", "sdxl": "SDXL", TINY: "demo world"}
OK, FAILED, NOT_RUN = "ok", "failed", "not run"
GRADIENTS, ATTENTION, NULL_TEXT, PRECISION, COMPILED = PARTS = (
    "gradients", "attention", "null-text", "precision", "compiled",
)  # fmt: skip
DYNAMIC, WHOLE = "dynamic VRAM", "without dynamic VRAM"
UNET_IN = {"float16": "fp16_unet", "bfloat16": "bf16_unet", "float8": "fp8_e4m3fn_unet"}
"""Types and ComfyUI's options for them."""
WITH_GRADIENTS = (
    "Null-Text Optimization",
    "Optimize Text Embedding",
    "Reference-Guided Null-Text Optimizer",
    "Null-Text Optimization (adaptive)",
    "Train Subject Embedding",
    "Train Subject Embedding (word)",
    "Train Identity Words",
    "Train Style Attention",
    "Train Identity Prior",
    "Train MCDM",
)
"""Rows of real_sizes.py; those of the largest files last."""
IN_EVERY_TYPE = ("plain sampling, for comparison", "Null-Text Optimization", "Train Subject Embedding (word)")
WHEN_COMPILED = ("plain sampling, for comparison", "Null-Text Optimization", "Identity Attention")
LEARNING_RATES = {"NullTextOptimization": 0.1, "ReferenceGuidedNullTextOptimizer": 0.1, "OptimizeTextEmbedding": 0.1}
"""So large that an embedding that goes another way is seen in its numbers."""
APART = 0.05
"""Up to here what was learned in two ways is the same but for rounding: the mean absolute difference of its numbers
relative to their mean absolute value. Where nothing or something else is learned it is 0.1 to 2."""
SAMPLES = 512
ROUNDS, STEPS = 3, 2
NULL_TEXT_STEPS = {"sd15": 10, TINY: 2}
SIZES = {"sd15": 512, "sdxl": 512, TINY: 64}

Part = tuple[str, str, str]
"""What is measured, on models of which width, in which setting."""


def parts(tiny: bool) -> list[Part]:
    """In the order in which they are measured: what concerns most people first."""
    widths = (TINY,) if tiny else WIDE
    types = ("bfloat16",) if tiny else tuple(UNET_IN)
    return [
        *((GRADIENTS, width, setting) for width in widths for setting in (WHOLE, DYNAMIC)),
        *((ATTENTION, width, "") for width in widths),
        (NULL_TEXT, widths[0], ""),
        *((PRECISION, widths[0], type_) for type_ in types),
        (COMPILED, widths[0], ""),
    ]


def rows_of(part: Part) -> tuple[str, ...]:
    return {
        GRADIENTS: WITH_GRADIENTS,
        PRECISION: IN_EVERY_TYPE,
        COMPILED: WHEN_COMPILED,
        ATTENTION: ("attention and style attention",),
        NULL_TEXT: ("null-text and the reference's loop",),
    }[part[0]]


# -- in a process of its own -------------------------------------------------------------------------------------------


class NotHereError(Exception):
    """This machine or this ComfyUI has not what a part is about."""


def begin_dynamic_vram() -> None:
    """What ComfyUI's main.py does before torch is imported."""
    try:
        import comfy_aimdo.control as control
    except ImportError:
        raise NotHereError("this ComfyUI has no dynamic VRAM") from None
    # Its versions take different settings.
    for settings in ({"simple_vram_headroom": None, "nvml_pressure": True}, {"simple_vram_headroom": None}, {}):
        with contextlib.suppress(TypeError):
            control.init(**settings)
            return


def switch_to_dynamic_vram() -> None:
    """What ComfyUI's main.py does once its modules are imported."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy_aimdo.control as control
    from comfy.cli_args import args

    devices = comfy.model_management.get_all_torch_devices()
    try:
        begun = control.init_devices((each.index, int(args.vram_headroom * 2**30)) for each in devices)
    except (AttributeError, TypeError):
        begun = control.init_devices(each.index for each in devices)
    if not begun:
        raise NotHereError("comfy-aimdo cannot work with this device")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def prepare(arguments: argparse.Namespace, *, dynamic: bool, option: str | None = None) -> None:
    """ComfyUI and the pack in this process, as a server with these options has them."""
    if dynamic:
        begin_dynamic_vram()
    has_card = load_pack.cuda_is_available()
    if dynamic and not has_card:
        raise NotHereError("dynamic VRAM is for graphics cards")
    load_pack.prepare_engine(cpu=not has_card, base=arguments.base)
    if option is not None:
        from comfy.cli_args import args

        setattr(args, option, True)
    if dynamic:
        switch_to_dynamic_vram()
    load_pack.load_pack()
    from identity_edit_pack.demo_world import family
    from identity_edit_pack.pipelines.engine.edit_model import register_families

    register_families()  # both as the pack's entry point does
    family.register()


def as_comfyui_starts(arguments: argparse.Namespace, option: str | None = None) -> None:
    """With dynamic VRAM where ComfyUI would use it."""
    try:
        prepare(arguments, dynamic=True, option=option)
    except NotHereError:
        prepare(arguments, dynamic=False, option=option)


def node_rows(part: Part, names: list[str], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of real_sizes.py with the models of this process."""
    import comfy.model_management as management
    import torch
    from safetensors.torch import load_file

    from . import memory, real_sizes, real_sizes_nodes

    class Models(real_sizes_nodes.Models):
        """Whose nodes learn much at once, and whose results are sampled."""

        found: list[torch.Tensor]

        def clip_vision(self) -> Any:
            if self.family != TINY:
                return super().clip_vision()
            from identity_edit_pack.demo_world.clip_vision import load_clip_vision

            return load_clip_vision()

        def run(self, name: str, /, **inputs: Any) -> tuple[Any, ...]:
            if name in LEARNING_RATES:
                inputs = {"learning_rate": LEARNING_RATES[name], **inputs}
            outputs = super().run(name, **inputs)
            self.found += [tensor for tensor in real_sizes_nodes.tensors_in(outputs) if tensor.is_floating_point()]
            return outputs

    with torch.inference_mode():
        models = Models(part[1], real_sizes_nodes.CHOSEN_BY_COMFYUI)
        if part[0] == COMPILED:
            from comfy_extras.nodes_torch_compile import TorchCompileModel

            models.model = TorchCompileModel.execute(models.model, "inductor").args[0]
        for name in names:
            there = set(arguments.base.rglob("*.safetensors"))
            real_sizes.give_memory_back()
            row: Any = models.at_size(arguments.size or SIZES[part[1]])
            row.found = []
            row.memory_gib = management.get_free_memory() / 2**30
            with memory.PeakMemory() as peak:
                result = real_sizes.run_row(name, row)
            for path in sorted(set(arguments.base.rglob("*.safetensors")) - there):
                row.found += list(load_file(path).values())
                path.unlink()
            yield {"row": name, **result, "peak_memory_mib": round(peak.mib), "samples": samples_of(row.found)}


def samples_of(tensors: list[Any]) -> list[float]:
    """Some numbers of all that was found, evenly taken, to compare with another process's."""
    import torch

    parts = [tensor.detach().flatten()[:: max(1, tensor.numel() // SAMPLES)].float().cpu() for tensor in tensors]
    if not parts:
        return []
    together = torch.cat(parts)
    return [float(value) for value in together[:: max(1, together.numel() // SAMPLES)]]


def attention_rows(part: Part, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Evaluations with attention recorded, and with style attentions, beside plain ones in turn."""
    prepare(arguments, dynamic=False)
    from . import attention_capture as capture
    from . import memory
    from . import style_attention_cost as style

    width = part[1]
    capture.UNETS[TINY] = {**capture.UNETS["sd15"], "model_channels": 32}
    settings = argparse.Namespace(size=arguments.size or SIZES[width])
    model = capture.load(width)
    models = {name: capture.prepared(model, width, name) for name in capture.VARIANTS}
    trained: dict[Any, Any] = {}
    models |= {name: style.prepared(model, width, name, trained) for name in style.VARIANTS[1:]}
    ways = {name: partial(capture.evaluations, each, width, settings, STEPS) for name, each in models.items()}
    peaks = {}
    for name, way in ways.items():
        way()  # warms up
        with memory.PeakMemory() as peak:
            way()
        peaks[name] = round(peak.mib)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS):
        # In another order each time, so that a machine that slows down favors none.
        for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            seconds[name] += ways[name]()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    plain, kind = capture.PLAIN, capture.device_type()
    for name in ways:
        ratio, more = medians[name] / medians[plain], peaks[name] - peaks[plain]
        row: dict[str, Any] = {"row": name, "result": OK, "seconds": {"evaluation": medians[name]}}
        row |= {"relative": ratio, "peak_memory_mib": peaks[name]}
        if name == capture.BOTH:
            most = capture.GOALS.get(kind, capture.GOALS["cpu"])
            goal = f"{capture.BOTH}: at most {most:g} of plain sampling's time, {capture.MEMORY_GOAL} MiB more"
            row |= {"goal": goal, "holds": ratio <= most and more <= capture.MEMORY_GOAL}
        if name == style.ONE:
            most = style.GOALS.get(kind, style.GOALS["cpu"])
            row |= {"goal": f"{style.ONE}: at most {most:g} of plain sampling's time", "holds": ratio <= most}
        yield row


def null_text_rows(part: Part, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same image by the pack's methods and by the reference's loop."""
    prepare(arguments, dynamic=False)
    import torch

    from . import memory
    from . import null_text_speed as speed
    from .edits import embed

    width = part[1]
    model, clip, _ = load_checkpoint(checkpoint_of(width, arguments.base), model_options={"dtype": torch.float32})
    cells = (arguments.size or SIZES[width]) // 8
    latent = torch.randn(1, 4, cells, cells, generator=torch.Generator().manual_seed(0))
    positive, negative = (embed(clip, [text]) for text in ("a photo of a cat on a sofa", ""))
    pivot = speed.inversion.invert_image(model, latent, positive, steps=NULL_TEXT_STEPS[width])
    seconds: dict[str, float] = {}
    distances: dict[str, float] = {}
    for name, method in speed.METHODS.items():
        memory.synchronize()
        begin = time.perf_counter()
        with memory.PeakMemory() as peak:
            z_0, evaluations, updates = method(model, pivot, positive, negative, speed.null_text.GUIDANCE_SCALE)
        seconds[name] = time.perf_counter() - begin
        distances[name] = float((z_0.cpu() - latent).square().mean())
        relative = seconds[name] / seconds[speed.REFERENCE]
        row: dict[str, Any] = {"row": name, "result": OK, "seconds": {"optimization": seconds[name]}}
        row |= {"relative": relative, "peak_memory_mib": round(peak.mib)}
        row |= {"message": f"{evaluations} evaluations, {updates} updates, squared error {distances[name]:.3g}"}
        if name != speed.REFERENCE:
            better = distances[name] <= distances[speed.REFERENCE]
            row |= {"goal": f"{name}: at most {speed.GOAL:g} of the reference's time, no larger error"}
            row |= {"holds": relative <= speed.GOAL and better}
        yield row


def alone(arguments: argparse.Namespace) -> None:
    """The rows of a part, a line of JSON for each."""
    part: Part = tuple(arguments.alone)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what ComfyUI prints
    try:
        if part[0] == ATTENTION:
            rows = attention_rows(part, arguments)
        elif part[0] == NULL_TEXT:
            rows = null_text_rows(part, arguments)
        else:
            if part[0] == GRADIENTS:
                prepare(arguments, dynamic=part[2] == DYNAMIC)
            else:
                as_comfyui_starts(arguments, UNET_IN.get(part[2]))
            rows = node_rows(part, list(rows_of(part)), arguments)
        for row in rows:
            print(json.dumps(row), file=answers, flush=True)
    except NotHereError as error:
        for name in rows_of(part):
            print(json.dumps({"row": name, "result": NOT_RUN, "message": str(error)}), file=answers, flush=True)


# -- all of them -------------------------------------------------------------------------------------------------------


def checkpoint_of(width: str, base: Path) -> Path:
    return base / "models" / "checkpoints" / f"{width}.safetensors"


def write_files(tiny: bool, base: Path) -> None:
    """The checkpoints, and a CLIP vision beside them."""
    from . import real_sizes

    if tiny:
        path = checkpoint_of(TINY, base)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes((DEMO_CHECKPOINT).read_bytes())
        return
    for name in ("vision", *WIDE):
        real_sizes.write_checkpoint(name, argparse.Namespace(base=base, threads=os.cpu_count() or 1))


def measure(part: Part, arguments: argparse.Namespace, deadline: float) -> list[dict[str, Any]]:
    """The rows of a part; those that it does not come to are named with the reason."""
    found: list[dict[str, Any]] = []
    left = min(deadline - time.monotonic(), PART_SECONDS)
    reason = (NOT_RUN, f"the {arguments.minutes:g} minutes were over")
    if part[0] == COMPILED and part[1] == TINY:
        left, reason = 0.0, (NOT_RUN, "compiling takes minutes on a processor")
    if left > 0:
        command = [*command_of("gpu"), "--alone", *part, "--base", str(arguments.base)]
        command += ["--size", str(arguments.size or 0)]
        with (arguments.base / "last_part.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8", cwd=ROOT
            )
        timer = threading.Timer(left, process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            found.append(json.loads(line))
            show(part, found[-1])
        code = process.wait()
        if timer.is_alive():
            timer.cancel()
            last = (arguments.base / "last_part.log").read_text("utf-8", "replace").strip().splitlines()
            reason = (FAILED, f"the process ended with {code}: {last[-1] if last else ''}")
        elif deadline - time.monotonic() > 0:
            reason = (FAILED, f"stopped after {left:.0f} s")
    expected = [name for name in rows_of(part) if name not in {row["row"] for row in found}]
    if part[0] in (ATTENTION, NULL_TEXT) and found:
        expected = []
    for number, name in enumerate(expected):
        result, message = reason if number == 0 else (NOT_RUN, "the process had ended" if left > 0 else reason[1])
        found.append({"row": name, "result": result, "message": message})
        show(part, found[-1])
    return [{"part": part[0], "width": part[1], "setting": part[2], **row} for row in found]


def show(part: Part, row: dict[str, Any]) -> None:
    print(*(word for word in part if word), "|", row["row"], "|", row["result"], row.get("message", ""), flush=True)


def compare(rows: list[dict[str, Any]]) -> None:
    """How far what was learned under dynamic VRAM is from what was learned without it; samples are dropped."""
    whole = {(row["width"], row["row"]): row for row in rows if row["setting"] == WHOLE and row["result"] == OK}
    for row in rows:
        if row["setting"] != DYNAMIC or row["result"] != OK:
            continue
        row["goal"] = f"gradients, {TITLES[row['width']]}, {row['row']}: the same under dynamic VRAM"
        other = whole.get((row["width"], row["row"]))
        if other is None:
            row["holds"] = False
            row["message"] = "nothing to compare with"
            continue
        row["apart"] = distance(row["samples"], other["samples"])
        row["holds"] = row["apart"] <= APART
    for row in rows:
        row.pop("samples", None)


def distance(first: list[float], second: list[float]) -> float:
    if len(first) != len(second) or not first:
        return float("inf")
    apart = sum(abs(a - b) for a, b in zip(first, second, strict=True))
    return apart / max(sum(map(abs, second)), 1e-12)


def table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> list[str]:
    cells = []
    for row in rows:
        result = f"{row['result']}: {row['message']}" if row.get("message") else row["result"]
        spent = sum(row.get("seconds", {}).values())
        ratios = (f"{row[name]:.3g}" if name in row else "" for name in ("relative", "apart"))
        what = (row["part"], TITLES[row["width"]], row["setting"], row["row"], result.replace("|", "/"))
        cells.append((*what, f"{spent:.3g}" if spent else "", *ratios, row.get("peak_memory_mib", "")))
    load = "" if facts["load"] is None else f" at a load of {facts['load']:.1f}"
    lines = [
        f"# The pack on {facts['device']}",
        "",
        f"`{facts['command']}` at commit {facts['commit']}: ComfyUI {facts['comfyui']}, torch {facts['torch']}, "
        f"{facts['system']}, {facts['seconds']:.0f} s in all{load}; {facts['weights']}, all seeds fixed in the code.",
        "",
        *markdown(("part", "models", "setting", "row", "result", "seconds", "relative", "apart", "peak MiB"), cells),
    ]
    lines += [
        "",
        "Relative is the time to plain sampling's or to the reference's loop. Goals, of models of full width:",
        "",
    ]
    goals = [row for row in rows if "goal" in row]
    lines += [f"- {'holds' if row['holds'] else 'does not hold'}: {row['goal']}." for row in goals] or ["- none."]
    counts = {result: sum(row["result"] == result for row in rows) for result in {row["result"] for row in rows}}
    lines += ["", ", ".join(f"{count} rows {result}" for result, count in sorted(counts.items())) + "."]
    return lines


def run(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure what is asked for -> the rows, and on what they were measured."""
    import torch
    from engine import find_engine, version_of

    begin = time.monotonic()
    has_card = torch.cuda.is_available()
    tiny = arguments.tiny or not has_card
    chosen = [part for part in parts(tiny) if part[0] in (arguments.only or part[0])]
    with tempfile.TemporaryDirectory(prefix="identity-edit-gpu-") as temporary:
        arguments.base = arguments.base or Path(temporary)
        arguments.base.mkdir(parents=True, exist_ok=True)
        write_files(tiny, arguments.base)
        rows = [row for part in chosen for row in measure(part, arguments, begin + 60.0 * arguments.minutes)]
    compare(rows)
    return rows, {
        "command": command_line(),
        "commit": source_commit(),
        "device": torch.cuda.get_device_name() if has_card else "a processor, with the demo world's models",
        "comfyui": version_of(find_engine()),
        "torch": torch.__version__,
        "system": platform.system(),
        "seconds": time.monotonic() - begin,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "weights": "the demo checkpoint" if tiny else "random weights",
    }


OPTIONS: Options = {
    "minutes": (MINUTES, f"that it may take ({MINUTES:g})"),
    "only": (None, "parts to measure (all)", {"choices": PARTS, "nargs": "+"}),
    "size": (0, "images' width and height (512, 64 if tiny)"),
    "tiny": (False, "the demo world's small models, whatever the machine has"),
    "base": (None, "folder for the checkpoints, which stay there (a temporary one)", {"type": Path}),
    "alone": (None, argparse.SUPPRESS, {"nargs": 3}),
}


def main(arguments: argparse.Namespace) -> None:
    if arguments.alone:
        alone(arguments)
        return
    rows, facts = run(arguments)
    kind = "cpu" if facts["device"].startswith("a processor") else "cuda"
    write_results(f"gpu_{kind}", {**facts, "rows": rows}, table(rows, facts))
