"""What every benchmark shares: its command, its options, the engine, and the table that it writes.

A benchmark is a file with a docstring and

- `measure(arguments)`: the figures as a dict that JSON can hold. A generator yields them so far, and the table is
  written each time, so that a run that is stopped leaves what it had. "name" among them names the files of results;
- `table(figures, arguments)`: the title, what was measured, and the lines below it;
- `OPTIONS`, where it has some: by name, the default and the help text, and perhaps what else argparse takes;
- `alone(arguments)`, where it measures parts in processes of their own: what one of them finds (see `memory`).

One that cannot have this form has `main(arguments)` instead, and may have `add_arguments(parser)`. The dataset
evaluation is in evaluation/, and what does the same work many times over in tests/endurance/.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FOLDERS = ("benchmarks", "evaluation", "tests/endurance")
ON_THE_PROCESSOR = ("align_reference", "dynamic_vram", "face_identity", "quantized_weights")
"""Benchmarks that take no accelerator where there is one."""
WITHOUT_COMFYUI = (
    "busy_core", "engines", "gpu", "interrupts", "launch_options", "mutations", "page_load", "photo_workflows",
    "processors", "random_graphs", "real_sizes", "soak", "startup",
)  # fmt: skip
"""Benchmarks that start servers or other processes, or that choose ComfyUI's options themselves."""
DEMO_CHECKPOINT = ROOT / "demo_world/weights/identity-edit-demo.safetensors"
DEMO_MCDM = ROOT / "demo_world/diffusion_models/identity-edit-demo-mcdm.safetensors"
SCORED = (
    "demo_world", "embedding_tie", "flow_editing", "hifi_tuner", "lipe_edit", "portrait_edit", "style_identity",
    "style_mixing", "subject_replacement", "timestep_aware_edit",
)  # fmt: skip
"""Benchmarks that score images and hold no times."""
COMFYUI_OPTIONS = {
    **dict.fromkeys(SCORED, ("use_pytorch_cross_attention", "force_channels_last")),
    "joint_attention_cost": ("use_pytorch_cross_attention",),
}
"""ComfyUI's own options that a benchmark runs with. Both together take a quarter off the time on a processor;
PyTorch's attention is what ComfyUI chooses on NVIDIA cards."""

Options = dict[str, tuple[Any, ...]]
CHECKPOINT = {"checkpoint": (DEMO_CHECKPOINT, "the checkpoint (the demo world's)")}
THREADS = {"threads": (0, "of PyTorch (as many as it chooses)")}
SEED = {"seed": (0, "draws what is edited, and all noise")}


def benchmarks() -> dict[str, tuple[str, str]]:
    """By name, the folder of a benchmark and what it says it does."""
    known = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            functions = {part.name for part in tree.body if isinstance(part, ast.FunctionDef)}
            if path != Path(__file__) and ("main" in functions or functions >= {"measure", "table"}):
                known[path.stem] = folder, (ast.get_docstring(tree) or "").splitlines()[0]
    return known


def main() -> None:
    """`python -m benchmarks NAME [options]`; without a name, the list of benchmarks."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    known = benchmarks()
    if name not in known:
        lines = "\n".join(f"  {each}: {does}" for each, (_, does) in known.items())
        sys.exit(f"usage: python -m benchmarks NAME [options]\n{lines}")
    prepare(cpu=name in ON_THE_PROCESSOR, engine=name not in WITHOUT_COMFYUI, options=COMFYUI_OPTIONS.get(name, ()))
    from identity_edit_pack.attention.errors import IdentityEditError
    from user_comfyui import ScriptError

    module = importlib.import_module(f"identity_edit_pack.{known[name][0].replace('/', '.')}.{name}")
    sys.argv = [f"python -m benchmarks {name}", *sys.argv[2:]]
    try:
        run(module, arguments_of(module, sys.argv[1:]))
    except (ScriptError, IdentityEditError) as error:
        sys.exit(f"error: {error}")


def prepare(*, cpu: bool = False, engine: bool = True, options: Iterable[str] = ()) -> None:
    """ComfyUI and the pack in this process; the pack by its folder, for its entry point would import ComfyUI."""
    sys.path += [str(ROOT / "scripts"), str(ROOT / "tests")]
    import load_pack
    from user_comfyui import PACK_NAME

    if PACK_NAME in sys.modules:
        return  # as in a test
    if engine:
        load_pack.prepare_engine(cpu=cpu or not load_pack.cuda_is_available())
        from comfy.cli_args import args

        for option in options:
            setattr(args, option, True)
    package = ModuleType(PACK_NAME)
    package.__path__ = [str(ROOT)]
    sys.modules[PACK_NAME] = package


def run(module: Any, arguments: argparse.Namespace) -> None:
    """Measure, and write the table each time there are figures."""
    if hasattr(arguments, "threads"):
        import torch

        arguments.threads = arguments.threads or torch.get_num_threads()
        torch.set_num_threads(arguments.threads)
    if hasattr(module, "main"):
        module.main(arguments)
    elif getattr(arguments, "only", None) and hasattr(module, "alone"):
        print(json.dumps(module.alone(arguments)))
    else:
        begin = time.perf_counter()
        found = module.measure(arguments)
        for figures in found if isinstance(found, Iterator) else (found,):
            minutes = figures.pop("minutes_before", 0.0) + (time.perf_counter() - begin) / 60
            figures = {**figures, "minutes": minutes}
            name = figures.pop("name", module.__name__.rpartition(".")[2])
            title, about, *lines = module.table(figures, arguments)
            write_results(name, figures, [f"# {title}", "", f"{made_by()}: {about}", "", *lines])


def arguments_of(module: Any, words: list[str]) -> argparse.Namespace:
    """A benchmark's options, from what stands behind its name on the command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {module.__name__.rpartition('.')[2]}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if hasattr(module, "add_arguments"):
        module.add_arguments(parser)
        return parser.parse_args(words)
    for name, (default, text, *more) in getattr(module, "OPTIONS", {}).items():
        settings: dict[str, Any] = {"default": default, "help": text, **(more[0] if more else {})}
        if isinstance(default, bool):
            settings["action"] = "store_true"
        elif "type" not in settings:
            one = default
            if isinstance(default, list):
                settings["nargs"], one = "+", default[0]
            settings["type"] = Path if isinstance(one, Path) else str if one is None else type(one)
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    return parser.parse_args(words)


def command_of(name: str, python: str = sys.executable) -> list[str]:
    """The beginning of a command that runs a benchmark in a process of its own; it is run in `ROOT`."""
    return [python, "-m", "benchmarks", name]


def command_line() -> str:
    """The command that is running, as its table says it: of absolute paths the last part, which says what they are."""
    return " ".join(Path(word).name if Path(word).is_absolute() else word for word in sys.argv)


def source_commit() -> str:
    """The commit of the working tree, "+" after it when files are changed."""
    import load_pack

    return load_pack.source_commit()


def made_by() -> str:
    """The beginning of a table's first paragraph: the command and the commit."""
    return f"`{command_line()}` at commit {source_commit()}"


def in_processes(
    work: Callable[[Any], Any], items: list[Any], arguments: argparse.Namespace, load: Callable[[Any], None]
) -> Iterator[Any]:
    """The work on each item in order, shared by `arguments.processes` processes, each of which calls `load` first."""
    if arguments.processes == 1:
        load(arguments)
        yield from tqdm(map(work, items), total=len(items))
        return
    # By this name, which a new process finds; that of the pack is known when it has begun.
    begin = importlib.import_module("benchmarks.harness").begin_process
    spawn, given = multiprocessing.get_context("spawn"), (load.__module__, load.__name__, arguments)
    with ProcessPoolExecutor(arguments.processes, spawn, initializer=begin, initargs=given) as pool:
        yield from tqdm(pool.map(work, items), total=len(items))


def begin_process(module: str, load: str, arguments: argparse.Namespace) -> None:
    prepare(options=COMFYUI_OPTIONS.get(module.rpartition(".")[2], ()))
    import torch

    torch.set_num_threads(arguments.threads)
    getattr(importlib.import_module(module), load)(arguments)


def read_results(name: str) -> dict[str, Any]:
    """The figures of an earlier run in results/NAME.json, for benchmarks that go on or keep rows; {} without one."""
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def write_results(name: str, figures: dict[str, Any], lines: list[str]) -> None:
    """Write results/NAME.json, with command and commit, and results/NAME.md, whole or not at all; print the lines."""
    figures = {"command": command_line(), "commit": source_commit(), **figures}
    RESULTS.mkdir(exist_ok=True)
    compact = re.sub(r"\[[^\[\]{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), json.dumps(figures, indent=2))
    for suffix, text in ((".json", compact), (".md", "\n".join(lines))):
        temporary = RESULTS / f"{name}{suffix}.tmp"
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, RESULTS / f"{name}{suffix}")
    print("\n".join(lines))


def markdown(headings: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """A table in Markdown."""
    named = list(headings)
    lines = [f"| {' | '.join(map(str, cells))} |".replace("|  |", "| |") for cells in (named, *rows)]
    return [lines[0], "|" + "---|" * len(named), *lines[1:]]


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of every figure, over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: sum(values) / len(values) for name in names if (values := [r[name] for r in rows if name in r])}


def load_checkpoint(path: Path = DEMO_CHECKPOINT, **options: Any) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE by ComfyUI's own loader, which is told of the demo world's family."""
    import comfy.sd
    from identity_edit_pack.demo_world import family

    family.register()
    return tuple(comfy.sd.load_checkpoint_guess_config(str(path), **options)[:3])
