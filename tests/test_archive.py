"""The archive that is published: what git holds less .comfyignore, as `comfy node publish` packs it.

Nothing in it starts a process, installs a package, listens on a port or runs code that it read. The one module that
asks another program anything is the one for a language model at an address that the user names.
"""

from __future__ import annotations

import ast
import io
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from api_client import Client
from engine import Server, make_base

ROOT = Path(__file__).resolve().parents[1]
MEGABYTE = 10**6
MOST_PACKED, MOST_UNPACKED = 127 * MEGABYTE, 140 * MEGABYTE

FORBIDDEN_MODULES = {
    *("subprocess", "multiprocessing", "pty", "runpy", "code", "codeop", "ctypes", "webbrowser", "venv"),
    *("socket", "socketserver", "http", "xmlrpc", "ftplib", "smtplib", "telnetlib", "urllib.request", "aiohttp"),
    *("websocket", "websockets", "httpx", "pip", "ensurepip", "marshal", "shelve", "dill", "cloudpickle", "joblib"),
    *("huggingface_hub", "torch.multiprocessing", "torch.hub", "concurrent.futures.process"),
}
ALLOWED_MODULES = {"pipelines/subjects/regularization_prompts.py": {"requests"}, "scripts/ray_workers.py": {"ray"}}
"""Those that only the named file may import."""
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_OF_OS = ("system", "popen", "exec", "spawn", "fork", "posix_spawn", "startfile")


def git(*arguments: str) -> list[str]:
    command = ["git", "-C", str(ROOT), "ls-files", "-z", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this is no git checkout: {done.stderr.strip()}")
    return list(filter(None, done.stdout.split("\0")))


@pytest.fixture(scope="module")
def published() -> list[str]:
    """Paths of the files, by gitignore's own rules."""
    left_out = set(git("--cached", "--ignored", "--exclude-from=.comfyignore"))
    return [path for path in git() if path not in left_out and (ROOT / path).is_file()]


@pytest.fixture(scope="module")
def archive(published: list[str]) -> zipfile.ZipFile:
    packed = zipfile.ZipFile(io.BytesIO(), "w", zipfile.ZIP_DEFLATED)
    for path in published:
        packed.write(ROOT / path, path)
    return packed


def faults(path: str, text: str) -> Iterator[str]:
    """What of a module must not be published."""
    alone = set().union(*ALLOWED_MODULES.values()) - ALLOWED_MODULES.get(path, set())
    forbidden = FORBIDDEN_MODULES | alone
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if any(".".join(parts[:length]) in forbidden for length in range(1, len(parts) + 1)):
                yield f"{path}:{node.lineno} imports {name}"
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            yield f"{path}:{node.lineno} {node.id}"
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id == "os" and node.attr.startswith(FORBIDDEN_OF_OS):
            yield f"{path}:{node.lineno} os.{node.attr}"
        if node.value.id == "pickle" and node.attr != "UnpicklingError":
            yield f"{path}:{node.lineno} pickle.{node.attr}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "torch.load",
            "numpy.load",
            "np.load",
            "torch.jit.load",
        ):
            safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            is_safe = (
                safe.get("weights_only") == "True" if "torch" in ast.unparse(node.func) else "allow_pickle" not in safe
            )
            if not is_safe or "jit" in ast.unparse(node.func):
                yield f"{path}:{node.lineno} {ast.unparse(node)}"


def test_nothing_in_it_starts_processes_installs_listens_or_unpickles(published: list[str]) -> None:
    modules = [path for path in published if path.endswith(".py")]
    assert {"__init__.py", "extension.py", "scripts/generate_pairs.py", "scripts/train_mcdm.py"} <= set(modules)
    found = [fault for path in modules for fault in faults(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        *("import subprocess", "from os import path\nimport os\nos.execv('a', [])", "import os\nos.system('a')"),
        *(
            "from concurrent.futures import process",
            "import http.server",
            "from urllib import request",
            "import socket",
        ),
        *("eval('1')", "exec('1')", "run = compile", "import pickle\npickle.load(file)", "import requests, json"),
        *("import torch\ntorch.load(path)", "import torch\ntorch.load(path, weights_only=False)", "import pip"),
        *("import numpy as np\nnp.load(path, allow_pickle=True)", "def f():\n    from multiprocessing import Pool"),
    ],
)
def test_the_scan_finds_what_it_looks_for(text: str) -> None:
    assert list(faults("nodes/new.py", text)) != []


def test_the_scan_lets_plain_code_pass() -> None:
    text = "import os, re, pickle\nre.compile('a')\nos.path.join('a')\ntorch.load(path, weights_only=True)\nx.eval()\n"
    assert list(faults("nodes/new.py", text + "try:\n    pass\nexcept pickle.UnpicklingError:\n    pass\n")) == []


def test_it_holds_all_that_it_imports(published: list[str]) -> None:
    there = set(published)
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    for path in (path for path in published if path.endswith(".py")):
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            wanted: list[PurePosixPath] = []
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = PurePosixPath(path).parents[node.level - 1]
                base = folder.joinpath(*(node.module or "").split("."))
                wanted = [base] if node.module else [base / alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and path.startswith("scripts/") and node.module in scripts:
                wanted = [PurePosixPath("scripts") / node.module]
            elif isinstance(node, ast.Import) and path.startswith("scripts/"):
                wanted = [PurePosixPath("scripts") / alias.name for alias in node.names if alias.name in scripts]
            for module in wanted:
                assert {f"{module}.py", f"{module}/__init__.py"} & there, f"{path} imports {module}"


def test_its_size(archive: zipfile.ZipFile, record_property: Any) -> None:
    packed, unpacked = (
        sum(getattr(file, size) for file in archive.infolist()) for size in ("compress_size", "file_size")
    )
    folders: dict[str, int] = {}
    for file in archive.infolist():
        folder = file.filename.rpartition("/")[0] or "."
        folders[folder] = folders.get(folder, 0) + file.compress_size
    said = ", ".join(
        f"{name} {size / MEGABYTE:.1f}" for name, size in sorted(folders.items(), key=lambda it: -it[1])[:8]
    )
    print(f"{packed / MEGABYTE:.1f} MB packed, {unpacked / MEGABYTE:.1f} MB unpacked: {said}")
    assert packed <= MOST_PACKED and unpacked <= MOST_UNPACKED, said


@pytest.mark.engine
def test_comfyui_loads_it(archive: zipfile.ZipFile, tmp_path: Path, node_classes: dict[str, Any]) -> None:
    base = make_base(tmp_path, with_pack=False)
    archive.extractall(base / "custom_nodes" / "identityedit")
    with Server(base, with_pack=False, environment={"HF_HUB_OFFLINE": "1"}) as process:
        assert "(IMPORT FAILED)" not in process.log_text()
        client = Client(process.address)
        known = client.object_info()
        assert set(node_classes) <= set(known)
        assert "identityedit" in client.get("/workflow_templates").json()
        assert client.get("/api/workflow_templates/identityedit/reconstruct.json").json()["nodes"]
        assert client.get("/extensions/identityedit/docs/IdentityEditNoiseInversion.md").text.startswith("#")
        models = known["UNETLoader"]["input"]["required"]["unet_name"][0]
        assert any(name.startswith("identity-edit-demo-mcdm") for name in models)
