"""Where the pack and ComfyUI may lie: folders of any name, the pack twice, and a ComfyUI of the user's own; and a
ComfyUI that ends."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from api_client import Client
from engine import PACK_FOLDER, Server, find_engine
from user_comfyui import ScriptError

from .test_timestep_aware_edit import inversion_prompt, node, with_image

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = {"HF_HUB_OFFLINE": "1"}


def link_pack(base: Path, name: str) -> None:
    folder = base / "custom_nodes" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(ROOT, target_is_directory=True)


def small_prompt() -> dict[str, Any]:
    """Inverts an image in two steps and shows the inversion's end."""
    prompt = inversion_prompt()
    prompt["inversion"]["inputs"]["steps"] = 2
    return with_image(prompt, "inversion", output=1)


def our_modules(client: Client, node_classes: dict[str, Any]) -> set[str]:
    """Which custom node folders the nodes came from; all of them are there."""
    known = client.object_info()
    assert set(node_classes) <= set(known)
    return {known[key]["python_module"] for key in node_classes}


def test_the_folders_may_have_any_name(tmp_path: Path, node_classes: dict[str, Any]) -> None:
    """But ComfyUI serves no file of a pack whose folder's name a URL must escape."""
    name = "Identity Edit.v0.1 – Kopie (日本)"
    base = tmp_path / "Ordner mit Leerzeichen – 日本 #1 100%"
    link_pack(base, name)
    with Server(base, with_pack=False, environment=VARIABLES) as process:
        assert "(IMPORT FAILED)" not in process.log_text()
        client = Client(process.address)
        assert our_modules(client, node_classes) == {f"custom_nodes.{name}"}
        run = client.run(small_prompt())
        assert client.images(run, "inversion_shown")[0].size == (128, 128)
        assert "reconstruct" in client.get("/workflow_templates").json()[name]


def test_two_copies_are_named_and_work(tmp_path: Path, node_classes: dict[str, Any]) -> None:
    link_pack(tmp_path, "another copy")
    with Server(tmp_path, environment=VARIABLES) as process:
        log = process.log_text()
        assert "(IMPORT FAILED)" not in log
        (line,) = [line for line in log.splitlines() if "is loaded twice" in line]
        assert "another copy" in line and PACK_FOLDER in line.split("twice")[1]
        client = Client(process.address)
        assert len(our_modules(client, node_classes)) == 1
        client.run(small_prompt())
        loaders = client.object_info()
        checkpoints = loaders["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0]
        assert len(checkpoints) == len(set(checkpoints))


def test_a_server_that_ends_is_reported(tmp_path: Path) -> None:
    """As one does that the system ends for lack of memory."""
    with Server(tmp_path, environment=VARIABLES) as process:
        client = Client(process.address)
        with pytest.raises(ScriptError, match="ComfyUI ended before the workflow did"):
            client.run(small_prompt(), listener=lambda kind, data: process.kill())


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder below, with the hash of what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def test_a_comfyui_of_the_users_own_stays_as_it_is(tmp_path: Path) -> None:
    own = tmp_path / "Mein ComfyUI – 日本 (neu)"
    shutil.copytree(find_engine(), own, ignore=shutil.ignore_patterns("__pycache__"))
    before = tree(own)
    workflow = tmp_path / "small.json"
    prompt = small_prompt()
    prompt["inversion_shown"] = node("SaveImage", images=["inversion_image", 0], filename_prefix="own")
    workflow.write_text(json.dumps(prompt))
    # demo.py, but for making .venv: the tests run in the one that there is.
    code = "import environment; environment.enter = lambda: None; import demo; demo.main()"
    arguments = ["--workflow", str(workflow), "--output", str(tmp_path / "images")]
    variables = {**os.environ, **VARIABLES, "COMFYUI_PATH": str(own)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT / "scripts",
        env=variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "images" / "small" / "side_by_side.png").is_file()
    assert tree(own) == before
