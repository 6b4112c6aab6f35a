"""What every benchmark shares: how it is found and started, its arguments, and the table it writes.

A benchmark is a file with a docstring, `add_arguments(parser)` where it has options, and `main(arguments)`. Its table
says the command and the commit that made it. Those of editing whole datasets are in evaluation/, those that do the same
work many times over in tests/endurance/.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FOLDERS = ("benchmarks", "evaluation", "tests/endurance")
ON_THE_PROCESSOR = ("align_reference", "dynamic_vram", "face_identity", "quantized_weights")
"""Benchmarks that take no accelerator where there is one."""
WITHOUT_COMFYUI = (  # fmt: skip
    "busy_core",
    "engines",
    "gpu",
    "interrupts",
    "launch_options",
    "page_load",
    "processors",
    "random_graphs",
    "real_sizes",
    "soak",
    "startup",
)
"""Benchmarks that start servers or other processes, or that choose ComfyUI's options themselves."""
DEMO_CHECKPOINT = ROOT / "demo_world/weights/identity-edit-demo.safetensors"


def benchmarks() -> dict[str, tuple[str, str]]:
    """By name, the folder of a benchmark and what it says it does."""
    known = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            has_main = any(isinstance(part, ast.FunctionDef) and part.name == "main" for part in tree.body)
            if has_main and path != Path(__file__):
                known[path.stem] = folder, (ast.get_docstring(tree) or "").splitlines()[0]
    return known


def main() -> None:
    """`python -m benchmarks NAME [options]`; without a name, the list of benchmarks."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    known = benchmarks()
    if name not in known:
        lines = "\n".join(f"  {each}: {does}" for each, (_, does) in known.items())
        sys.exit(f"usage: python -m benchmarks NAME [options]\n{lines}")
    sys.path += [str(ROOT / "scripts"), str(ROOT / "tests")]
    import load_pack
    from user_comfyui import PACK_NAME, ScriptError

    if name not in WITHOUT_COMFYUI:
        load_pack.prepare_engine(cpu=name in ON_THE_PROCESSOR or not load_pack.cuda_is_available())
    # The pack by its folder: its entry point, which would import ComfyUI, has nothing to register here.
    package = ModuleType(PACK_NAME)
    package.__path__ = [str(ROOT)]
    sys.modules[PACK_NAME] = package
    module = importlib.import_module(f"{PACK_NAME}.{known[name][0].replace('/', '.')}.{name}")
    sys.argv = [f"python -m benchmarks {name}", *sys.argv[2:]]
    from identity_edit_pack.attention.errors import IdentityEditError

    try:
        module.main(arguments_of(module, sys.argv[1:]))
    except (ScriptError, IdentityEditError) as error:
        sys.exit(f"error: {error}")


def arguments_of(module: Any, words: list[str]) -> argparse.Namespace:
    """A benchmark's options, from what stands behind its name on the command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {module.__name__.rpartition('.')[2]}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    getattr(module, "add_arguments", lambda parser: None)(parser)
    return parser.parse_args(words)


def command_of(name: str, python: str = sys.executable) -> list[str]:
    """The beginning of a command that runs a benchmark in a process of its own; it is run in `ROOT`."""
    return [python, "-m", "benchmarks", name]


def command_line() -> str:
    """The command that is running, as its table says it."""
    return " ".join(sys.argv)


def source_commit() -> str:
    """The commit of the working tree, "+" after it when files are changed."""
    import load_pack

    return load_pack.source_commit()


def made_by() -> str:
    """The beginning of a table's first paragraph: the command and the commit."""
    return f"`{command_line()}` at commit {source_commit()}"


def read_results(name: str) -> dict[str, Any]:
    """The figures of an earlier run in results/NAME.json, for benchmarks that go on or keep rows; {} without one."""
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def write_results(name: str, figures: dict[str, Any], lines: list[str]) -> None:
    """Write results/NAME.json, with command and commit, and results/NAME.md, whole or not at all; print the lines."""
    figures = {"command": command_line(), "commit": source_commit(), **figures}
    RESULTS.mkdir(exist_ok=True)
    for suffix, text in ((".json", json.dumps(figures, indent=2)), (".md", "\n".join(lines))):
        temporary = RESULTS / f"{name}{suffix}.tmp"
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, RESULTS / f"{name}{suffix}")
    print("\n".join(lines))
