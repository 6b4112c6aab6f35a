"""ComfyUI and the pack inside this process, without a server: for the tests and the benchmarks.

ComfyUI loads a custom node pack as a package whose name comes from its folder. Here the same is done under the fixed
name `identity_edit_pack`, so that `from identity_edit_pack.pipelines import schedule` works whatever the clone's name.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from engine import find_engine, make_base
from environment import ROOT
from user_comfyui import PACK_NAME, declare_torchvision_operators

_base = None  # keeps the temporary base folder until the process ends


def prepare_engine(*, cpu: bool = True, base: Path | None = None) -> Path:
    """Put ComfyUI first on `sys.path` and set its options; call this before the first `import comfy`.

    cpu: whether ComfyUI computes on the CPU (as with its `--cpu`).
    base: the folder for models, input, output and user files; a temporary one by default, removed at the end. A second
        call without one changes nothing.
    Returns the engine's folder.
    """
    global _base
    path = find_engine()
    if base is None and _base is not None:
        return path
    sys.path.insert(0, str(path))
    if base is None:
        _base = tempfile.TemporaryDirectory(prefix="identity-edit-")
        base = Path(_base.name)
    make_base(base, with_pack=False)

    from comfy.cli_args import args  # reads no command line unless asked to

    args.cpu = cpu
    args.base_directory = str(base)
    declare_torchvision_operators()
    return path


def load_pack() -> ModuleType:
    """Run the pack's `__init__.py` as ComfyUI does and return the package; its submodules can be imported afterwards.

    When `__init__.py` fails, its error is raised, and the package stays registered all the same, so that the modules
    which are sound can still be imported.
    """
    if PACK_NAME in sys.modules:
        return sys.modules[PACK_NAME]
    spec = importlib.util.spec_from_file_location(
        PACK_NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK_NAME] = module
    spec.loader.exec_module(module)
    return module


def cuda_is_available() -> bool:
    """Whether the installed torch can compute on a GPU of this machine."""
    import torch

    return torch.cuda.is_available()


def source_commit() -> str:
    """The commit of the working tree, for benchmark results: a short hash, "+" after it when files are changed."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
