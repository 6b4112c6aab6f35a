"""Pairs on several headless workers: one of two is killed in the middle, and no pair is lost or doubled."""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from pathlib import Path

import generate_pairs
import pytest
from demo import read_workflow
from environment import ScriptError
from identity_edit_pack.pipelines.pair_folder import PairFolder

COUNT = 6


def workflow(count: int = COUNT):
    """The shipped workflow's Generate Pairs with what it needs, at two steps."""
    prompt = read_workflow("mcdm_generate_pairs")
    kept = {key: node for key, node in prompt.items() if node["class_type"] in (
        "CheckpointLoaderSimple", "ControlNetLoader", "IdentityEditDrawDemoPortraits", "KSamplerSelect",
        "BasicScheduler", generate_pairs.NODE)}  # fmt: skip
    for node in kept.values():
        if node["class_type"] == "BasicScheduler":
            node["inputs"]["steps"] = 2
    generate_pairs.node_of(kept)["count"] = count
    return kept


def dataset(folder: PairFolder) -> dict[int, dict]:
    return {number: facts["files"] for number, facts in folder.finished().items()}


@pytest.fixture(scope="module")
def on_one_worker(tmp_path_factory) -> PairFolder:
    folder = PairFolder(tmp_path_factory.mktemp("one"))
    results = generate_pairs.results_of_one_worker(workflow(), list(range(COUNT)), [])
    generate_pairs.collect(folder, results, COUNT)
    folder.write_index()
    return folder


def test_one_worker_makes_every_pair(on_one_worker) -> None:
    assert sorted(dataset(on_one_worker)) == list(range(COUNT))


def test_a_killed_worker_loses_and_doubles_nothing(on_one_worker, tmp_path, monkeypatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray keeps a token in the home folder
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
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

    results = generate_pairs.results_of_ray(workflow(), list(range(COUNT)), [], workers=2, on_worker=workers.append)
    generate_pairs.collect(folder, noted(results), COUNT)
    watcher.join(timeout=5)
    assert killed and len(workers) == 3, "one worker was killed and replaced"
    assert sorted(made) == list(range(COUNT))
    assert folder.write_index() == COUNT
    numbers = [json.loads(line)["number"] for line in (tmp_path / "index.jsonl").read_text().splitlines()]
    assert numbers == list(range(COUNT))
    # The same pairs as on one worker, whoever made them.
    assert dataset(folder) == dataset(on_one_worker)


def test_only_missing_pairs_are_asked_for(on_one_worker, monkeypatch, capsys) -> None:
    asked: list[int] = []

    def results(prompt, numbers, server_arguments):
        asked.extend(numbers)
        files = {file.name: file.read_bytes() for file in kept.iterdir()}
        yield numbers[0], files | {"dataset.json": (on_one_worker.path / "dataset.json").read_bytes()}

    pair = on_one_worker.path / "pairs" / "000002"
    kept = pair.rename(on_one_worker.path / "kept")
    path = on_one_worker.path / "workflow.json"
    path.write_text(json.dumps(workflow()))
    arguments = argparse.Namespace(
        workflow=str(path), set=[], output=Path(on_one_worker.path), workers=1, ray_address=None, gpus=0.0,
        server_argument=[],
    )  # fmt: skip
    monkeypatch.setattr(generate_pairs, "read_arguments", lambda: arguments)
    monkeypatch.setattr(generate_pairs.environment, "enter", lambda: None)
    monkeypatch.setattr("load_pack.prepare_engine", lambda cpu: None)
    monkeypatch.setattr(generate_pairs, "results_of_one_worker", results)
    generate_pairs.main()
    assert asked == [2]
    assert capsys.readouterr().out.startswith(f"{COUNT} pairs, 0 rejected")
    assert (on_one_worker.path / "contact_sheet.jpg").is_file()


def test_a_nodes_own_error_is_told_once(tmp_path) -> None:
    prompt = workflow(count=1)
    generate_pairs.node_of(prompt)["edits"] = "no arrow: here"
    with pytest.raises(ScriptError, match="cannot be read"):
        list(generate_pairs.results_of_one_worker(prompt, [0], []))


def test_a_workflow_without_the_node_is_refused() -> None:
    with pytest.raises(ScriptError, match="0 Generate Pairs nodes"):
        generate_pairs.node_of({})
