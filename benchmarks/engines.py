"""The pack on other versions of ComfyUI: `python -m benchmarks engines FOLDER [FOLDER ...]`.

Each FOLDER holds a ComfyUI of some version: `git -C ComfyUI worktree add ../comfyui-0.33.0 v0.33.0` makes one. Nothing
is written into it. What its requirements.txt asks for is installed into an environment of its own below
.venv/engines, on top of the packages of .venv and with their torch; an environment that is there already is used again.

On each version a real server is started with the pack. Asked is whether it says that the pack is loaded, whether every
node is registered, whether shipped workflows run (with few steps), and how much their images differ from those of the
version that the pack is developed on, `engine.ENGINE_VERSION`. `--tests` names tests to run there as well.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import engine
from environment import ScriptError, make_environment

from .harness import ROOT, command_of, markdown, read_results, source_commit, write_results

WORKFLOWS = (
    "timestep_aware_edit", "nima_only", "prompt_to_prompt", "pidiff_generate", "flow_edit", "flow_timestep_aware_edit",
    "flow_nima", "flow_prompt_to_prompt",
)  # fmt: skip
"""Together they use what a ComfyUI may have changed: gradients, recorded and exchanged attention, added layers, and
the same of a flow model."""

COMMAND = "python -m benchmarks engines FOLDER [FOLDER ...] --tests tests/engine/test_server.py"
MOST_STEPS = 6
"""Sampling, inversion and optimization steps are cut down to this number."""


def cheaper(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with every number of steps or iterations cut down to MOST_STEPS."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if type(value) is int and ("steps" in name or "iterations" in name):
                node["inputs"][name] = min(value, MOST_STEPS)
    return prompt


def probe(destination: Path, workflows: list[str]) -> dict[str, Any]:
    """What the ComfyUI named by COMFYUI_PATH does with the pack; its images are saved below `destination`."""
    from api_client import Client, PromptError

    expected = {path.stem for path in (ROOT / "web" / "docs").glob("IdentityEdit*.md")}
    found: dict[str, Any] = {"starts": False, "says": "", "nodes": 0, "expected_nodes": len(expected), "workflows": {}}
    with tempfile.TemporaryDirectory(prefix="identity-edit-") as base:
        server = engine.Server(Path(base))
        try:
            server.start(timeout=600)
        except ScriptError as error:
            lines = str(error).strip().splitlines()
            return {**found, "says": lines[-1] if lines else "it did not start"}
        try:
            found["starts"] = True
            found["says"] = server.pack_failure() or ""
            client = Client(server.address)
            found["nodes"] = len(expected & set(client.object_info()))
            if found["says"] or found["nodes"] < len(expected):
                return found
            for name in workflows:
                prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
                prompt = cheaper(prompt)
                try:
                    run = client.run(prompt)
                except PromptError as error:
                    found["workflows"][name] = str(error)
                    continue
                for node in run.outputs:
                    for number, image in enumerate(client.images(run, node)):
                        image.convert("RGB").save(destination / f"{name}_{node}_{number}.png")
                found["workflows"][name] = ""
        finally:
            server.stop()
    return found


def largest_difference(folder: Path, reference: Path, workflow: str) -> int | None:
    """The largest difference of any pixel of a workflow's images from the reference's, of 255; None without such."""
    import numpy as np
    from PIL import Image

    ours = {path.name: path for path in folder.glob(f"{workflow}_*.png")}
    theirs = {path.name: path for path in reference.glob(f"{workflow}_*.png")}
    if not theirs or set(ours) != set(theirs):
        return None
    differences = []
    for name, path in ours.items():
        one, two = (np.asarray(Image.open(each), dtype=np.int16) for each in (path, theirs[name]))
        if one.shape != two.shape:
            return None
        differences.append(int(np.abs(one - two).max()))
    return max(differences)


def examine(folder: Path, images: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about one version of ComfyUI."""
    version = engine.version_of(folder)
    print(f"ComfyUI {version} ...", flush=True)
    python = make_environment(folder, version)
    variables = {**os.environ, "COMFYUI_PATH": str(folder), "HF_HUB_OFFLINE": "1"}
    destination = images / version
    destination.mkdir()
    command = [*command_of("engines", str(python)), "--probe", str(destination), "--workflows", *arguments.workflows]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise ScriptError(f"ComfyUI {version} could not be asked: {done.stderr.strip().splitlines()[-1]}")
    found = {"version": version, **json.loads((destination / "found.json").read_text())}
    # Results name no folder of the machine that they were measured on.
    found["says"] = re.sub(r"[^\s(]*custom_nodes", "custom_nodes", found["says"].replace(str(folder), "ComfyUI"))
    if arguments.tests and found["nodes"] == found["expected_nodes"]:
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments.tests]
        tests = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", tests.stdout.splitlines()[-1])
        found["tests"] = ", ".join(counts)
        found["failed_tests"] = re.findall(r"^(?:FAILED|ERROR) (.*)", tests.stdout, re.MULTILINE)
    print(json.dumps(found, indent=2), flush=True)
    return found


def table(found: list[dict[str, Any]], arguments: argparse.Namespace) -> list[str]:
    def cell(one: dict[str, Any], name: str) -> str:
        difference = one["differences"].get(name)
        runs = "runs" if difference is None else f"runs, {difference}"
        return "fails" if one["workflows"].get(name) else runs if name in one["workflows"] else ""

    rows = [
        (one["version"], "yes" if one["starts"] else "no", f"{one['nodes']} of {one['expected_nodes']}",
         *(cell(one, name) for name in arguments.workflows), one.get("tests", ""), one["commit"])
        for one in found
    ]  # fmt: skip
    lines = [
        "# The pack on other versions of ComfyUI",
        "",
        f"`{COMMAND}`. Workflows with at most {MOST_STEPS} steps; beside each run, the largest difference of any",
        f"pixel (of 255) from the image of ComfyUI {engine.ENGINE_VERSION}. A version that is not run keeps its row.",
        "",
        *markdown(("ComfyUI", "starts", "nodes", *arguments.workflows, "tests", "commit"), rows),
        "",
    ]
    for one in found:
        said = [one["says"], *(f"{name}: {text}" for name, text in one["workflows"].items() if text)]
        said += [f"test failed: {name}" for name in one.get("failed_tests", [])]
        lines += [f"- {one['version']}: {text}" for text in said if text]
    return lines + (["", f"Tests: `{' '.join(arguments.tests)}`."] if arguments.tests else [])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="a ComfyUI (default: the usual one)")
    parser.add_argument("--workflows", nargs="*", default=list(WORKFLOWS), help="shipped workflows to run")
    parser.add_argument("--tests", nargs="*", default=[], help="tests to run on each version, as pytest takes them")
    parser.add_argument("--probe", type=Path, help=argparse.SUPPRESS)  # this script's call of itself


def main(arguments: argparse.Namespace) -> None:
    if arguments.probe:
        answer = probe(arguments.probe, arguments.workflows)
        (arguments.probe / "found.json").write_text(json.dumps(answer))
        return
    folders = [folder.resolve() for folder in arguments.folders] or [engine.find_engine()]
    with tempfile.TemporaryDirectory(prefix="identity-edit-") as temporary:
        images = Path(temporary)
        found = [examine(folder, images, arguments) for folder in folders]
        for one in found:
            one["differences"] = {
                name: largest_difference(images / one["version"], images / engine.ENGINE_VERSION, name)
                for name in arguments.workflows
            }
            one["commit"] = source_commit()
    kept = {one["version"]: one for one in [*read_results("engines").get("engines", []), *found]}
    found = sorted(kept.values(), key=lambda one: [int(part) for part in one["version"].split(".")])
    result = {"command": COMMAND, "reference": engine.ENGINE_VERSION, "engines": found}
    write_results("engines", result, table(found, arguments))
