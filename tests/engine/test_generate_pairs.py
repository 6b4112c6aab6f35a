"""Pairs made by the command that is installed with the pack: in its own process, and on several workers of which one is
killed in the middle, so that no pair is lost or doubled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import generate_pairs
import pytest
from api_workflows import read_workflow
from engine import find_engine, make_base
from identity_edit_pack.pipelines.mcdm.pair_folder import PairFolder
from user_comfyui import ScriptError

COUNT = 6


def workflow(count: int = COUNT):
    """The shipped workflow's Generate Pairs with what it needs, at two steps."""
    prompt = read_workflow("mcdm_generate_pairs")
    kept = {key: node for key, node in prompt.items() if node["class_type"] in (
        "CheckpointLoaderSimple", "ControlNetLoader", "IdentityEditDrawDemoPortraits", "KSamplerSelect",
        "BasicScheduler", "IdentityEditPairPrompts", "IdentityEditPairConditions", generate_pairs.NODE)}  # fmt: skip
    for node in kept.values():
        if node["class_type"] == "BasicScheduler":
            node["inputs"]["steps"] = 2
    generate_pairs.node_of(kept)["count"] = count
    return kept


def dataset(folder: PairFolder) -> dict[int, dict]:
    return {number: facts["files"] for number, facts in folder.finished().items()}


def command(folder: Path, base: Path, prompt) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, who has COMFYUI_PATH name their ComfyUI."""
    make_base(base, with_pack=False)
    workflow = base / "workflow.json"
    workflow.write_text(json.dumps(prompt))
    options = [f"--comfyui-argument={option}" for option in ("--base-directory", str(base))]
    return subprocess.run(
        [sys.executable, generate_pairs.__file__, "--workflow", str(workflow), "--output", str(folder), *options],
        env={**os.environ, "COMFYUI_PATH": str(find_engine())},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def on_one_worker(tmp_path_factory) -> PairFolder:
    folder = PairFolder(tmp_path_factory.mktemp("one"))
    done = command(folder.path, tmp_path_factory.mktemp("base"), workflow())
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"{COUNT} pairs, 0 rejected: {folder.path}"
    return folder


def test_one_worker_makes_every_pair(on_one_worker) -> None:
    assert sorted(dataset(on_one_worker)) == list(range(COUNT))


def test_a_killed_worker_loses_and_doubles_nothing(on_one_worker, tmp_path, tmp_path_factory, monkeypatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray keeps a token in the home folder
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("COMFYUI_PATH", str(find_engine()))
    folder = PairFolder(tmp_path)
    workers: list[int] = []
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 500
        while time.monotonic() < deadline:
            if len(workers) >= 2 and 1 <= len(folder.finished()) < COUNT - 2:
                os.kill(workers[0], signal.SIGKILL)
                killed.append(workers[0])
                return
            time.sleep(0.05)

    watcher = threading.Thread(target=kill_one, daemon=True)
    watcher.start()
    made: list[int] = []

    def noted(results):
        for number, files in results:
            made.append(number)
            yield number, files

    options = ["--base-directory", str(make_base(tmp_path_factory.mktemp("base"), with_pack=False))]
    numbers = list(range(COUNT))
    results = generate_pairs.results_of_ray(workflow(), numbers, options, workers=2, on_worker=workers.append)
    generate_pairs.collect(folder, noted(results), COUNT)
    watcher.join(timeout=5)
    assert killed and len(workers) == 3, "one worker was killed and replaced"
    assert sorted(made) == list(range(COUNT))
    assert folder.write_index() == COUNT
    numbers = [json.loads(line)["number"] for line in (tmp_path / "index.jsonl").read_text().splitlines()]
    assert numbers == list(range(COUNT))
    # The same pairs as on one worker, whoever made them.
    assert dataset(folder) == dataset(on_one_worker)


def test_only_missing_pairs_are_made(on_one_worker, tmp_path) -> None:
    before = dataset(on_one_worker)
    pair = on_one_worker.path / "pairs" / "000002"
    pair.rename(tmp_path / "moved away")
    written = {path: path.stat().st_mtime_ns for path in on_one_worker.path.glob("pairs/*/*")}
    done = command(on_one_worker.path, tmp_path, workflow())
    assert done.returncode == 0, done.stderr[-3000:]
    assert dataset(on_one_worker) == before
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert (on_one_worker.path / "contact_sheet.jpg").is_file()


def test_a_nodes_own_error_is_told_in_one_line(tmp_path) -> None:
    prompt = workflow(count=1)
    prompts = next(node for node in prompt.values() if node["class_type"] == "IdentityEditPairPrompts")
    prompts["inputs"]["edits"] = "no arrow: here"
    done = command(tmp_path / "pairs", tmp_path, prompt)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: Pair Prompts: ")
    assert "cannot be read" in done.stderr.splitlines()[-1]


def test_a_workflow_without_the_node_is_refused() -> None:
    with pytest.raises(ScriptError, match="0 Generate Pairs nodes"):
        generate_pairs.node_of({})
