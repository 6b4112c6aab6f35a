"""Loading the pack changes nothing of ComfyUI, Python or torch but what its entry point says that it registers.

In a process of its own, everything that an import could change behind its user's back is noted before and after.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]

NOTE = '''
import asyncio, atexit, builtins, json, locale, logging, os, random, signal, sys, threading, warnings
from pathlib import Path

sys.path.append(os.getcwd())
import load_pack

load_pack.prepare_engine(base=Path(os.environ["BASE"]))
import comfy.options
import nodes  # ComfyUI's
import numpy
import torch

import folder_paths

asyncio.run(nodes.init_builtin_extra_nodes())
ENGINE = ("comfy", "nodes", "node_helpers", "folder_paths", "execution", "latent_preview")


def attributes():
    """What every name of the engine's modules and of their classes stands for, and of torch's first floor."""
    found = {}
    for name, module in list(sys.modules.items()):
        ours = name.split(".")[0].startswith("comfy") or name.split(".")[0] in ENGINE
        if module is None or not (ours or name in ("torch", "torch.nn.functional", "builtins")):
            continue
        for key, value in list(vars(module).items()):
            if type(value).__name__ == "module":
                continue  # a submodule that somebody imports for the first time becomes an attribute
            found[f"{name}.{key}"] = id(value)
            if ours and isinstance(value, type):
                found |= {f"{name}.{key}.{part}": id(inner) for part, inner in vars(value).items()}
    # Dispatch tables and caches that Python and torch fill as they go.
    return {key: value for key, value in found.items() if not key.endswith(("__abc_impl", "_abc_impl"))}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def loggers():
    found = {"root": logging.getLogger(), **logging.root.manager.loggerDict}
    return {
        name: [logger.level, list(map(repr, logger.handlers)), logger.propagate, logger.disabled]
        for name, logger in found.items()
        if isinstance(logger, logging.Logger) and (logger.handlers or logger.level or name == "root")
    }


def torch_state():
    backends = torch.backends
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32 products": torch.get_float32_matmul_precision(),
        "cudnn": [backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic],
        "tf32": [backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32],
        "scaled dot product": [
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
        ],
        "mkldnn": backends.mkldnn.enabled,
        "anomalies": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "random numbers": torch.get_rng_state().sum().item(),
        "cuda": torch.cuda.is_initialized(),
    }


def note():
    return {
        "sys.path": list(sys.path),
        "import hooks": [list(map(repr, hooks)) for hooks in (sys.meta_path, sys.path_hooks)],
        "environment": dict(os.environ),
        "working folder": os.getcwd(),
        "torch": torch_state(),
        "random": [hash(random.getstate()), hash(numpy.random.get_state()[1].tobytes())],
        "numpy errors": numpy.geterr(),
        "warnings": list(map(repr, warnings.filters)),
        "loggers": loggers(),
        "signals": {int(number): repr(signal.getsignal(number)) for number in signal.valid_signals()},
        "hooks": list(map(id, (sys.excepthook, sys.displayhook, threading.excepthook, sys.stdout, sys.stderr))),
        "recursion limit": sys.getrecursionlimit(),
        "locale": locale.setlocale(locale.LC_ALL),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "at exit": atexit._ncallbacks(),
        "attributes": attributes(),
        "nodes": sorted(nodes.NODE_CLASS_MAPPINGS),
        "families": [family.__name__ for family in __import__("comfy.supported_models").supported_models.models],
        "folders": {name: list(paths[0]) for name, paths in folder_paths.folder_names_and_paths.items()},
        "extensions": {name: sorted(paths[1]) for name, paths in folder_paths.folder_names_and_paths.items()},
        "files": {name: files(os.environ[name]) for name in ("BASE", "HOME", "TMPDIR")},
    }


attributes()  # looking itself fills some lazy attributes
before = note()
pack = load_pack.load_pack()
extension = asyncio.run(pack.comfy_entrypoint())
assert len(asyncio.run(extension.get_node_list())) > 50
first = note()
asyncio.run(pack.comfy_entrypoint())
print("NOTED", json.dumps([before, first, note()]))
'''


@pytest.fixture(scope="module")
def noted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Before the pack is loaded, after it, and after its entry point was called once more."""
    folders = {name: str(tmp_path_factory.mktemp(name.lower())) for name in ("BASE", "HOME", "TMPDIR")}
    variables = {**os.environ, **folders, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", NOTE], cwd=ROOT / "scripts", env=variables, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("NOTED"))
    before, first, second = json.loads(line.removeprefix("NOTED"))
    return before, first, second


REGISTERED = {"folders", "extensions", "families", "attributes"}
"""What the entry point changes; the tests below say how."""


def test_nothing_else_is_changed(noted: Any) -> None:
    before, after, _ = noted
    changed = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    assert {key: value for key, value in changed.items() if key not in REGISTERED} == {}


def test_every_name_of_the_engine_keeps_its_meaning(noted: Any) -> None:
    before, after, _ = (one["attributes"] for one in noted)
    assert len(before) > 10_000, "the engine was not looked at"
    assert sorted(key for key in before if after.get(key) != before[key]) == []
    # Modules that are imported here for the first time may appear, new names in the others may not.
    modules = {key.rpartition(".")[0] for key in before}
    assert sorted(key for key in after if key not in before and key.rpartition(".")[0] in modules) == []


def test_only_the_documented_folders_are_registered(noted: Any) -> None:
    before, after, _ = noted
    models, output = Path("models"), Path("output")
    demo_world = ROOT / "demo_world"
    expected = {
        "checkpoints": [demo_world / "weights"],
        "diffusion_models": [demo_world / "diffusion_models"],
        "controlnet": [demo_world / "control"],
        "subject_embeddings": [models / "subject_embeddings"],
        "style_attention": [models / "style_attention", demo_world / "style_attention"],
        "w_plus_encoders": [models / "w_plus_encoders", output / "w_plus_encoders", demo_world / "w_plus"],
        "insightface": [models / "insightface"],
        "rembg": [models / "rembg"],
        "image_scores": [models / "image_scores"],
        "image_encoders": [models / "image_encoders", demo_world / "scoring"],
    }
    base = Path(after["environment"]["BASE"])
    added = {
        name: [path for path in paths if path not in before["folders"].get(name, [])]
        for name, paths in after["folders"].items()
    }
    assert {name: paths for name, paths in added.items() if paths} == {
        name: [str(base / path) for path in paths] for name, paths in expected.items()
    }
    for name, paths in before["folders"].items():
        assert after["folders"][name][: len(paths)] == paths, f"the user's folders of {name} come no longer first"
        assert after["extensions"][name] == before["extensions"][name]


def test_only_four_model_families_are_added(noted: Any) -> None:
    before, after, _ = (one["families"] for one in noted)
    added = ["SD20InstructPix2Pix", "DemoWorldInstructPix2Pix", "DemoWorld", "DemoWorldFlow"]
    assert [family for family in after if family not in added] == before
    assert [family for family in after if family in added] == added


def test_calling_the_entry_point_again_changes_nothing(noted: Any) -> None:
    _, first, second = noted
    assert {key for key in first if first[key] != second[key]} == set()
