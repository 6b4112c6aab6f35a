"""A process that is killed at a random moment while it saves leaves the old file or the new one, never half of one.

`IDENTITY_EDIT_KILLS` sets the number of kills for each kind of save, `IDENTITY_EDIT_KILLS_SEED` other moments.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import folder_paths
import pytest
import saving_loops
import torch
from environment import ROOT
from identity_edit_pack.nodes import saved_files
from identity_edit_pack.pipelines.mcdm.pair_folder import PairFolder
from identity_edit_pack.pipelines.shared import files

pytestmark = [pytest.mark.endurance, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")]

KILLS = int(os.environ.get("IDENTITY_EDIT_KILLS", "2"))
SEED = int(os.environ.get("IDENTITY_EDIT_KILLS_SEED", "0"))
LONGEST_SECONDS = 0.15
"""After the first save; a save takes a tenth of that or less, so that every moment of one is met."""
SERVE = (
    "import load_pack; load_pack.prepare_engine(cpu=True); load_pack.load_pack(); import saving_loops; "
    "saving_loops.serve()"
)
OLD = time.time() - 2 * files.ABANDONED_AFTER


class Savers:
    """The process that forks those that save."""

    def __init__(self) -> None:
        path = os.pathsep.join(str(ROOT / folder) for folder in ("scripts", "tests"))
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        while self.line() != "ready":  # what libraries print while they are loaded
            pass

    def line(self) -> str:
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        assert text, "the process that forks has ended"
        return text.strip()

    def kill_one(self, kind: str, folder: Path, seconds: float) -> None:
        """Start a process that saves, and kill it so many seconds after its first save."""
        assert self.process.stdin is not None
        (folder / "saved_once").unlink(missing_ok=True)
        self.process.stdin.write(f"{kind} {folder}\n")
        self.process.stdin.flush()
        child = int(self.line())
        try:
            deadline = time.monotonic() + 60
            while not (folder / "saved_once").exists():
                assert time.monotonic() < deadline, f"nothing was saved: {kind}"
                os.kill(child, 0)  # ProcessLookupError when it has failed; its own message is on the screen
                time.sleep(0.005)
            time.sleep(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            assert self.line() == "gone"


@pytest.fixture(scope="module")
def savers() -> Iterator[Savers]:
    made = Savers()
    yield made
    made.process.kill()
    made.process.wait()


@pytest.mark.parametrize("kind", saving_loops.KINDS)
def test_a_killed_save_leaves_a_whole_file(
    kind: str, savers: Savers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = random.Random(f"{SEED} {kind}")
    folder = tmp_path / "saved"
    folder.mkdir()
    for _ in range(KILLS):
        savers.kill_one(kind, folder, draws.uniform(0.0, LONGEST_SECONDS))
        saving_loops.KINDS[kind].read(folder)  # raises where something is half

    # What the killed ones left is in no list of a loader, and the next save sweeps it away once it is old.
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "input"))
    assert not [name for name in saved_files.loadable_files("saved") if ".tmp" in name or ".part" in name]
    left = [path for path in folder.rglob("*") if ".tmp" in str(path)]
    for path in sorted(left, reverse=True):  # what is inside first: to look into a folder does not change its time
        os.utime(path, (OLD, OLD))
    for version in (1, 2):  # the first may find a finished training, and write nothing
        saving_loops.KINDS[kind].save(folder, version)
    if kind == "pairs":
        PairFolder(folder).finished()
    assert not [path for path in folder.rglob("*") if ".tmp" in str(path)]


def test_young_temporary_files_are_left_alone_and_old_ones_of_others_too(tmp_path: Path) -> None:
    young, old = tmp_path / "a.safetensors.0123abcd.tmp", tmp_path / "b.safetensors.0123abcd.tmp"
    claim, foreign = tmp_path / "c.safetensors.claimed.tmp", tmp_path / "notes.tmp"
    for path in (young, old):
        path.mkdir()
        (path / ".tmpAbCdEf").write_bytes(b"half")
    for path in (claim, foreign):
        path.write_bytes(b"half")
    for path in (old / ".tmpAbCdEf", old, claim, foreign, young):
        os.utime(path, (OLD, OLD))  # the young one's file is still being written
    with files.atomic_write(str(tmp_path / "d.txt")) as temporary:
        Path(temporary).write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, "d.txt", foreign.name]


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_a_saved_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    files.write_tensors(str(tmp_path / "saved.safetensors"), {"a": torch.zeros(2)}, {"kind": "test"})
    (tmp_path / "other").touch()
    assert (tmp_path / "saved.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_two_that_save_under_one_prefix_get_two_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    with saved_files.new_path("folder/person", "x") as first, saved_files.new_path("folder/person", "x") as second:
        assert first != second
        Path(first).touch()
        Path(second).touch()
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        "person_00001_.safetensors",
        "person_00002_.safetensors",
    ]


def test_a_number_that_was_taken_meanwhile_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    asked: list[str] = []
    next_path = saved_files.next_path

    def late(prefix: str, example: str) -> str:
        asked.append(next_path(prefix, example))
        if len(asked) == 1:  # the other server writes and is done between the question and the claim
            Path(asked[0]).touch()
        return asked[-1]

    monkeypatch.setattr(saved_files, "next_path", late)
    with saved_files.new_path("person", "x") as path:
        assert path == asked[1] != asked[0]
    assert [name.name for name in tmp_path.iterdir()] == ["person_00001_.safetensors"]
