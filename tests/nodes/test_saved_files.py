"""Lists of files: what they name, what they look at, and that a name outside of them loads."""

from __future__ import annotations

import inspect
import os
import shutil
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from identity_edit_pack.nodes import NODE_CLASSES, saved_files
from identity_edit_pack.nodes.hifi_tuner import subject_embedding
from identity_edit_pack.nodes.inversion.noise_inversion import NoiseInversion
from identity_edit_pack.nodes.inversion.saved_inversions import LoadInversion, SaveInversion
from identity_edit_pack.nodes.lipe import identity_prior
from identity_edit_pack.nodes.mcdm import identity_words
from identity_edit_pack.nodes.pidiff import style_attention, w_plus
from identity_edit_pack.nodes.subjects.images import LoadSubjectImages
from identity_edit_pack.tests import tiny_models

NODES_WITH_FILES = [
    identity_prior.LoadIdentityPrior,
    identity_prior.SaveIdentityPriorAsLoRA,
    identity_words.LoadIdentityWords,
    LoadInversion,
    style_attention.LoadStyleAttention,
    subject_embedding.StepWiseEmbeddingLoader,
    w_plus.LoadWPlus,
]


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path / "input"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are read from here on."""
    seen: list[str] = []
    scandir, listdir = os.scandir, os.listdir
    monkeypatch.setattr(os, "scandir", lambda path=".": seen.append(str(path)) or scandir(path))
    monkeypatch.setattr(os, "listdir", lambda path=".": seen.append(str(path)) or listdir(path))
    return seen


def age(folder: Path) -> None:
    """As if nothing below it had changed for a minute."""
    for path in [folder, *folder.rglob("*")]:
        then = path.stat().st_mtime - 60.0
        os.utime(path, (then, then))


def invert(model: Any) -> Any:
    latent = {"samples": tiny_models.latent(4, 1)}
    return NoiseInversion.execute(model, tiny_models.conditioning(1), latent, "DDIM", 2, 1.0, False, 5, 0.5, 0).args[0]


def test_a_list_holds_the_input_folder_itself_and_the_nodes_own_folders(inputs: Path) -> None:
    for name in ("a.safetensors", "photo.png", "inversions/b.safetensors", "inversions/x/c.safetensors"):
        (inputs / name).parent.mkdir(parents=True, exist_ok=True)
        (inputs / name).touch()
    shutil.copytree(inputs, inputs.parent / "output", dirs_exist_ok=True)
    for name in ("elsewhere/d.safetensors", "inversions/checkpoints/e.safetensors"):
        (inputs / name).parent.mkdir(parents=True)
        (inputs / name).touch()
    assert saved_files.loadable_files("inversions", without="checkpoints") == [
        "a.safetensors",
        "inversions/b.safetensors",
        "inversions/x/c.safetensors",
        "inversions/b.safetensors [output]",
        "inversions/x/c.safetensors [output]",
    ]


def test_a_file_in_another_folder_still_validates_and_loads(inputs: Path) -> None:
    model = tiny_models.sd1()
    made = invert(model)
    path = SaveInversion.execute(made, "inversions/cat").args[0]
    (inputs / "projects" / "2024").mkdir(parents=True)
    shutil.copy(path, inputs / "projects" / "2024" / "cat.safetensors")
    name = "projects/2024/cat.safetensors"
    assert name not in saved_files.loadable_files("inversions")
    assert LoadInversion.validate_inputs(name) is True
    assert torch.equal(LoadInversion.execute(model, name, 0).args[0].trajectory, made.trajectory)


@pytest.mark.parametrize("node", NODES_WITH_FILES, ids=lambda node: node.__name__)
@pytest.mark.parametrize("file", ["gone.safetensors", "../secret.safetensors", "", "notes.txt", "folder.safetensors"])
def test_what_is_no_such_file_is_refused(node: Any, file: str, inputs: Path) -> None:
    (inputs.parent / "secret.safetensors").touch()
    (inputs / "notes.txt").touch()
    (inputs / "folder.safetensors").mkdir()
    assert isinstance(node.validate_inputs(file), str)


def test_the_page_is_given_its_lists_without_reading_folders_again(inputs: Path, opened: list[str]) -> None:
    for number in range(30):
        (inputs / f"images {number}").mkdir()
        (inputs / f"images {number}" / "1.png").touch()
    age(inputs)
    opened.clear()
    for node in NODE_CLASSES:
        node.define_schema()
    of_files = [node for node in NODE_CLASSES if node is not LoadSubjectImages]
    below = [path for path in opened if path.startswith(str(inputs))]
    assert sorted(below) == sorted(str(path) for path in [inputs, *inputs.glob("images *")])  # once each
    saved_files._listings.clear()
    opened.clear()
    for node in of_files:
        node.define_schema()
    assert [path for path in opened if path.startswith(str(inputs))] == [str(inputs)]


def test_new_files_and_folders_are_listed_at_once(inputs: Path) -> None:
    age(inputs)
    for number in range(5):
        (inputs / f"{number}.safetensors").touch()
        (inputs / f"set {number}").mkdir()
        assert len(saved_files.loadable_files("inversions")) == number + 1
        assert len(saved_files.folders_below(str(inputs))) == number + 1
    age(inputs)
    assert len(saved_files.loadable_files("inversions")) == 5
    (inputs / "0.safetensors").unlink()
    assert len(saved_files.loadable_files("inversions")) == 4


def test_links_to_folders_are_no_folders_of_images_as_in_comfyui(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "drive" / "deep").mkdir(parents=True)
    (inputs / "linked").symlink_to(tmp_path / "drive", target_is_directory=True)
    (inputs / "own" / "test").mkdir(parents=True)
    assert saved_files.folders_below(str(inputs)) == folder_paths.get_input_subfolders() == ["own", "own/test"]


def test_a_run_makes_no_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    NoiseInversion.GET_SCHEMA()

    def define_schema(cls: Any) -> Any:
        raise AssertionError("made again")

    monkeypatch.setattr(NoiseInversion, "define_schema", classmethod(define_schema))
    assert invert(tiny_models.sd1()).steps == 2


def test_a_linked_combo_is_not_known_before_the_run(inputs: Path) -> None:
    """ComfyUI gives None for it, to `validate_inputs` and `fingerprint_inputs`."""
    checked = [node for node in NODE_CLASSES if "validate_inputs" in vars(node)]
    assert len(checked) > 15
    for node in checked:
        assert node.validate_inputs(**dict.fromkeys(inspect.signature(node.validate_inputs).parameters)) is True, node
    for node in [node for node in NODE_CLASSES if "fingerprint_inputs" in vars(node)]:
        required = inspect.signature(node.fingerprint_inputs).parameters.values()
        node.fingerprint_inputs(**{each.name: None for each in required if each.kind is not each.VAR_KEYWORD})
