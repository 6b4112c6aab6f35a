"""Names and places of files that nodes write: nothing is written elsewhere, nothing half, and every refusal is said."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import safetensors.torch
import torch
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests.nodes.good_inputs import CLASSES, World, good, world_in
from identity_edit_pack.tests.nodes.test_bad_inputs import complaint_about_message

pytestmark = pytest.mark.fuzz

WRITERS = {
    "SaveInversion": "filename_prefix",
    "SaveIdentityPriorAsLoRA": "filename_prefix",
    "SaveWPlusEncoder": "filename_prefix",
    "SaveWPlus": "filename_prefix",
    "SavePair": "folder",
    "SaveSubjectAsEmbedding": "name",
}
"""Nodes that write files, and the input that says where."""
TRAININGS = [name for name in CLASSES if name.startswith("Train") and name != "TrainingSettings"]
REFUSED = {
    "empty": "",
    "blank": "  ",
    "the folder itself": ".",
    "upwards": "../x",
    "upwards inside": "a/../../x",
    "far upwards": "../" * 30 + "tmp/x",
    "absolute": "/nowhere/x",
    "absolute in the home folder": os.path.expanduser("~/x"),
    "a folder that is a file": "blocked/x",
    "below a file": "blocked/a/b/x",
    "too long": "x" * 300,
    "a folder too long": "x" * 300 + "/a",
    "unicode too long": "猫" * 100,
    "NUL": "a\0b",
    "half a character": "a\ud83d",
    "a device of Windows": "CON",
    "a device of Windows with an ending": "loras/nul.x",
    "a device of Windows as a folder": "COM1/x",
}
TAKEN = {
    "unicode": "猫 Äpfel",
    "spaces inside": "my cat/the first one",
    "backslashes upwards": "..\\..\\x",
    "a drive": "C:\\x",
    "dots": "...x",
    "a date": "%year%/x",
    "percent signs": "%s%d%n",
    "a tilde": "~x",
    "a dollar": "$HOME",
}
"""Odd, and no harm here: what is written lies below the folder. A node may refuse it too."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("comfyui")
        made = world_in(root, patch)
        for folder in (root / "output", root / "models" / "embeddings"):
            (folder / "blocked").write_text("a file, no folder")
        yield made


def files() -> set[Path]:
    """All that lies in and beside ComfyUI's folders."""
    return set(Path(folder_paths.get_output_directory()).parents[1].rglob("*"))


def execute(name: str, inputs: dict[str, Any]) -> None:
    with torch.inference_mode():
        CLASSES[name].execute(**inputs)


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", [*WRITERS, *TRAININGS])
def test_no_file_is_written_where_none_may_be(name: str, kind: str, world: World) -> None:
    where = WRITERS.get(name, "filename_prefix")
    inputs = {**good(world, name), where: REFUSED[kind]}
    before = files()
    with pytest.raises(IdentityEditError, match=where if "file" in where else "name|folder|embedding") as error:
        execute(name, inputs)
    assert complaint_about_message(str(error.value)) is None
    assert files() == before


@pytest.mark.parametrize("kind", TAKEN)
@pytest.mark.parametrize("name", WRITERS)
def test_odd_names_stay_below_the_folder(name: str, kind: str, world: World) -> None:
    inputs = {**good(world, name), WRITERS[name]: TAKEN[kind]}
    output, embeddings = (
        Path(folder) for folder in (folder_paths.get_output_directory(), folder_paths.get_folder_paths("embeddings")[0])
    )
    before = files()
    try:
        execute(name, inputs)
    except IdentityEditError as error:
        assert complaint_about_message(str(error)) is None
        assert files() == before
    for path in files() - before:
        assert path.is_relative_to(output) or path.is_relative_to(embeddings), path


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "SavePair"])
def test_a_full_disk_leaves_nothing(name: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: str, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    inputs = good(world, name)
    folder = Path(folder_paths.get_output_directory())
    before = {path for path in files() if path.is_file()}
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(IdentityEditError, match=r"No space left on device.*free disk space"):
        execute(name, inputs)
    assert {path for path in files() if path.is_file()} == before
    assert not list(folder.rglob("*.tmp"))


def test_a_full_disk_leaves_no_half_pair(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {**good(world, "SavePair"), "folder": "pairs/full"}

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(IdentityEditError, match="No space left on device"):
        execute("SavePair", inputs)
    left = [path for path in Path(folder_paths.get_output_directory(), "pairs", "full").rglob("*") if path.is_file()]
    assert left == []
