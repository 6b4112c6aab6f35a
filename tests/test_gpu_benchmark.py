"""The script for a graphics card, `python -m benchmarks gpu`, on a processor with the demo world's models; and the
commands of all benchmarks."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from identity_edit_pack.benchmarks import gpu, harness
from identity_edit_pack.benchmarks.harness import arguments_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


def row(setting: str, samples: list[float], **more: Any) -> dict[str, Any]:
    whole = {"part": gpu.GRADIENTS, "width": "sd15", "setting": setting, "row": "Train", "result": gpu.OK}
    return {**whole, "samples": samples, **more}


def test_every_part_runs_on_a_processor_or_says_why_not() -> None:
    rows, facts = gpu.run(arguments_of(gpu, ["--tiny", "--only", gpu.GRADIENTS, gpu.ATTENTION, gpu.COMPILED]))
    results = {(row["part"], row["setting"], row["row"]): row for row in rows}
    for name in gpu.WITH_GRADIENTS:
        assert results[gpu.GRADIENTS, gpu.WHOLE, name]["result"] == gpu.OK, results[gpu.GRADIENTS, gpu.WHOLE, name]
        without = results[gpu.GRADIENTS, gpu.DYNAMIC, name]
        assert without["result"] == gpu.NOT_RUN and "dynamic VRAM" in without["message"]
    assert all(row["result"] == gpu.NOT_RUN for row in rows if row["part"] == gpu.COMPILED)
    attention = [row for row in rows if row["part"] == gpu.ATTENTION]
    assert len(attention) == 6 and all(row["result"] == gpu.OK for row in attention), attention
    lines = "\n".join(gpu.table(rows, facts))
    assert lines.count("\n| ") == len(rows) + 1
    assert lines.count(": style cross-attention: at most") == 1, "the goal"


def test_what_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    arguments = arguments_of(gpu, ["--base", str(tmp_path)])
    rows = gpu.measure((gpu.PRECISION, gpu.TINY, "bfloat16"), arguments, time.monotonic() + 60)  # no checkpoint there
    assert [row["result"] for row in rows] == [gpu.FAILED, gpu.NOT_RUN, gpu.NOT_RUN]
    assert "tiny.safetensors" in rows[0]["message"]
    rows = gpu.measure((gpu.PRECISION, gpu.TINY, "bfloat16"), arguments, time.monotonic() - 1)
    assert {row["message"] for row in rows} == {"the 8 minutes were over"}


def test_what_was_learned_under_dynamic_vram_is_compared() -> None:
    rows = [row(gpu.WHOLE, [1.0, -2.0, 3.0]), row(gpu.DYNAMIC, [1.0, -2.0, 3.03])]
    gpu.compare(rows)
    assert rows[1]["apart"] == pytest.approx(0.03 / 6.0) and rows[1]["holds"] and "samples" not in rows[0]
    for wrong in ([1.0, -2.0, 0.0], [1.0, -2.0], [float("nan")] * 3, []):
        rows = [row(gpu.WHOLE, [1.0, -2.0, 3.0]), row(gpu.DYNAMIC, wrong)]
        gpu.compare(rows)
        assert not rows[1]["holds"]
    rows = [row(gpu.WHOLE, [], result=gpu.FAILED), row(gpu.DYNAMIC, [1.0])]
    gpu.compare(rows)
    assert not rows[1]["holds"]


def test_benchmarks_are_found_by_name() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "  gpu: The pack on a graphics card" in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--minutes" in done.stdout


def test_the_command_that_a_table_names_is_one_that_can_be_given() -> None:
    known = harness.benchmarks()
    tables = sorted(harness.RESULTS.glob("*.md"))
    commands = {table.name: re.search(r"`python -m benchmarks (\w+)([^`]*)`", table.read_text()) for table in tables}
    assert len(tables) > 40 and [name for name, command in commands.items() if command is None] == []
    for command in commands.values():
        name, words = command[1], command[2].split()
        module = importlib.import_module(f"identity_edit_pack.{known[name][0].replace('/', '.')}.{name}")
        arguments_of(module, words)  # ends the process for options that it does not have


def test_figures_are_written_with_the_command_each_time_there_are_some(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["python -m benchmarks things", "--count", "2", "/a/folder/models"])

    class Things:
        OPTIONS = {"count": (5, "how many"), "kinds": (["a"], "which")}

        @staticmethod
        def measure(arguments):
            for number in range(arguments.count):
                if number:  # what was written for the one before
                    assert json.loads((tmp_path / "Things.json").read_text())["number"] == number - 1
                yield {"number": number}

        @staticmethod
        def table(figures, arguments):
            return ["Things", f"{arguments.kinds}.", *harness.markdown(("", "b"), [("x", figures["number"])])]

    harness.run(Things, arguments_of(Things, ["--count", "2", "--kinds", "b", "c"]))
    lines = (tmp_path / "Things.md").read_text().splitlines()
    assert lines[0] == "# Things" and lines[4:] == ["| | b |", "|---|---|", "| x | 1 |"]
    assert re.fullmatch(r"`python -m benchmarks things --count 2 models` at commit .*: \['b', 'c'\]\.", lines[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Things.json", "Things.md"]
