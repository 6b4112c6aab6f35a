"""The subject's nodes without a server: folders, sockets, and what the user is shown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from identity_edit_pack.nodes.subjects.captioning import (
    DO_NOT_SAVE,
    NO_MODEL,
    OVERWRITE,
    SAVE_NEW,
    CaptionImages,
    SaveImagesWithCaptions,
)
from identity_edit_pack.nodes.subjects.images import LoadSubjectImages, SubjectFromImages
from identity_edit_pack.nodes.subjects.regularization_prompts import ENDPOINT, SHIPPED_LIST, RegularizationPrompts
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.subjects import captioning
from identity_edit_pack.pipelines.subjects import images as subject_images
from identity_edit_pack.pipelines.subjects import regularization_prompts as prompts
from identity_edit_pack.pipelines.subjects.images import CAPTION_FILES, NO_CAPTIONS_YET, SubjectImages
from identity_edit_pack.tests import tiny_language_models as tiny
from PIL import Image

QUESTION = "photo of a dog"


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Input, output and model folders of the test's own; a subject's folder is in the first."""
    for name in ("output", "input", "models"):
        (tmp_path / name).mkdir()
    for name in ("output", "input"):
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.delitem(folder_paths.folder_names_and_paths, "LLM", raising=False)
    save_subject(tmp_path / "input" / "rex")
    return tmp_path


def save_subject(folder: Path, captions: bool = True, test: bool = True) -> None:
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (32 + 8 * number, 24), (80 * number, 20, 10)).save(folder / f"{number}.png")
        if captions:
            (folder / f"{number}.txt").write_text(f"sks dog {number}")
    if test:
        (folder / "test").mkdir()
        Image.new("RGB", (32, 32), "white").save(folder / "test" / "t.png")


def options(node: Any, name: str) -> list[str]:
    return next(item for item in node.define_schema().inputs if item.id == name).options


def load(folder: str = "rex", captions: str = CAPTION_FILES, size: int = 16) -> tuple[Any, ...]:
    return LoadSubjectImages.execute(folder, "dog", "sks", captions, False, size).args


def caption(subject: SubjectImages, **changes: Any) -> tuple[Any, ...]:
    settings = {
        "model": NO_MODEL,
        "instruction": QUESTION,
        "captions": "",
        "keep_existing": True,
        "save": DO_NOT_SAVE,
        "max_new_tokens": 6,
        "temperature": 0.0,
        "seed": 0,
    }
    return CaptionImages.execute(subject, **{**settings, **changes}).args


def test_a_subject_is_loaded_into_stock_sockets() -> None:
    subject, images, captions, test_image, test_caption, report = load()
    assert images.shape == (3, 16, 16, 3) and torch.equal(images, torch.stack(subject.images))
    assert captions == ["sks dog 0", "sks dog 1", "sks dog 2"] and test_caption == ""
    assert torch.equal(test_image, torch.ones(1, 16, 16, 3))
    assert "3 images of 'sks dog'" in report and "1.png (16x16): sks dog 1" in report
    subject, images, *_ = load(size=0)
    assert [tuple(image.shape) for image in subject.images] == [(24, 32, 3), (24, 40, 3), (24, 48, 3)]
    assert images.shape == (3, 24, 32, 3)


def test_without_a_test_image_only_its_branch_stops(own_folders: Path) -> None:
    save_subject(own_folders / "input" / "tom", test=False)
    blocked = load("tom")[3]
    assert isinstance(blocked, ExecutionBlocker) and "put the image to edit into tom/test" in blocked.message


def test_only_known_folders_are_read(own_folders: Path) -> None:
    save_subject(own_folders / "output" / "regularization" / "dogs")
    save_subject(own_folders / "output" / "private")
    listed = options(LoadSubjectImages, "folder")
    assert listed == ["regularization/dogs [output]", "rex"]
    for folder in listed:
        assert LoadSubjectImages.validate_inputs(folder) is True
        assert len(load(folder)[0].images) == 3
    for folder in ("../output/private", str(own_folders / "output" / "private"), "gone", "", "../private [output]"):
        assert "create it there" in str(LoadSubjectImages.validate_inputs(folder))


@pytest.mark.parametrize("file", ["0.png", "0.txt", "test/t.png"])
def test_a_changed_file_is_read_again(file: str, own_folders: Path) -> None:
    before = LoadSubjectImages.fingerprint_inputs("rex")
    assert LoadSubjectImages.fingerprint_inputs("rex", size=8) == before
    path = own_folders / "input" / "rex" / file
    os.utime(path, ns=(1, 1))
    assert LoadSubjectImages.fingerprint_inputs("rex") != before


def test_images_and_lines_become_a_subject() -> None:
    images = [torch.rand(2, 8, 8, 3), torch.rand(1, 4, 6, 3)]
    masks = [torch.ones(2, 8, 8), torch.ones(1, 4, 6)]
    execute = SubjectFromImages.execute
    subject, report = execute(images, ["sks cat\n\n a cat asleep\n", "sks cat"], ["cat"], ["sks"], [True], masks).args
    assert subject.captions == ["sks cat", "a sks cat asleep", "sks cat"]
    assert [tuple(image.shape[:2]) for image in subject.images] == [(8, 8), (8, 8), (4, 6)]
    assert "image 3 (6x4, mask): sks cat" in report
    subject, report = execute(images, [""], ["cat"], ["sks"], [False]).args
    assert subject.captions == [""] * 3 and "no caption yet" in report
    with pytest.raises(IdentityEditError, match="The caption of image 1 lacks the identity token"):
        execute(images, ["a cat"], ["cat"], ["sks"], [False])


def test_captions_are_shown_saved_and_edited(own_folders: Path) -> None:
    folder = own_folders / "input" / "tom"
    save_subject(folder, captions=False)
    (folder / "1.txt").write_text("a dog on grass")
    subject = load("tom", NO_CAPTIONS_YET)[0]
    captioned, captions, test_caption, text = caption(
        subject, captions="one dog\n\nthree dogs\na dog asleep\n", save=SAVE_NEW
    )
    assert captions == ["one sks dog", "a sks dog on grass", "sks dog, three dogs"] == captioned.captions
    assert test_caption == "a sks dog asleep" and text.splitlines() == [*captions, test_caption]
    assert (folder / "1.txt").read_text() == "a dog on grass", "not overwritten unasked"
    assert (folder / "0.txt").read_text() == "one sks dog\n"
    assert (folder / "test" / "t.txt").read_text() == "a sks dog asleep\n"
    # The text that is shown can be put into the field as it is.
    assert caption(subject, captions=text, save=OVERWRITE)[1] == captions
    assert load("tom")[2] == captions, "what was saved loads without a complaint"


def test_captions_are_not_lost_when_they_cannot_be_saved(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise IdentityEditError("The caption 0.txt cannot be written (No space left on device).")

    monkeypatch.setattr(subject_images, "save_captions", full)
    result = CaptionImages.execute(load()[0], NO_MODEL, "", "", True, OVERWRITE, 1, 0.0, 0)
    assert result.args[1] == ["sks dog 0", "sks dog 1", "sks dog 2"]
    assert "No space left" in str(result.ui.as_dict())


def test_saved_images_are_loaded_with_their_captions() -> None:
    """The prompts of a list, each saved with its image, as the workflow regularization_images does it."""
    levels = torch.arange(256).view(16, 16, 1).expand(-1, -1, 3) / 255
    images = {"a dog lying, 狗": levels, "a dog running": levels.flip(0)}
    for text, image in images.items():
        SaveImagesWithCaptions.execute(image[None], text, "regularization/dog/dog")
    loaded = LoadSubjectImages.execute("regularization/dog [output]", "dog", "", CAPTION_FILES, False, 16).args
    assert tuple(loaded[0].captions) == tuple(images)
    assert torch.equal(loaded[1], torch.stack(list(images.values())))
    with pytest.raises(IdentityEditError, match="outside the output folder"):
        SaveImagesWithCaptions.execute(levels[None], "a dog", "../dog")


def test_images_without_a_folder_are_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = SubjectFromImages.execute([torch.rand(1, 8, 8, 3)], [""], ["dog"], ["sks"], [False]).args[0]
    monkeypatch.setattr(captioning, "caption_images", lambda *_, **__: pytest.fail("must not be asked"))
    with pytest.raises(IdentityEditError, match="come from no folder"):
        caption(subject, save=SAVE_NEW)


def test_models_are_found_in_their_folder(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert options(CaptionImages, "model") == [NO_MODEL], "there need not be a folder"
    root = own_folders / "models" / "LLM"
    tiny.save_llava(root / "maker" / "llava")
    tiny.save_gpt2(root / "writer", words=("dog", "runs"))
    (root / "empty").mkdir()
    assert options(CaptionImages, "model") == [NO_MODEL, "maker/llava", "writer"]
    assert options(RegularizationPrompts, "source")[3:] == ["maker/llava", "writer"]
    assert CaptionImages.validate_inputs("maker/llava") is True
    assert CaptionImages.validate_inputs(NO_MODEL) is True
    for model in ("empty", "../../input/rex", "gone"):
        message = CaptionImages.validate_inputs(model)
        assert f"'{model}' is not in {root}; put it there (config.json" in message
        with pytest.raises(IdentityEditError, match=r"put it there \(config.json"):
            caption(load()[0], model=model)
    by_model = caption(load()[0], model="maker/llava", keep_existing=False)[1]
    expected, _ = captioning.caption_images(
        load()[0],
        model_path=str(root / "maker" / "llava"),
        instruction=QUESTION,
        keep_existing=False,
        max_new_tokens=6,
    )
    assert by_model == expected.captions
    elsewhere = own_folders / "elsewhere"
    tiny.save_gpt2(elsewhere / "other")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "LLM", ([str(elsewhere)], set()))
    assert options(CaptionImages, "model") == [NO_MODEL, "other"]


def write(source: str, count: int, seed: int = 0) -> tuple[Any, ...]:
    return RegularizationPrompts.execute("dog", source, count, "animal", "a {keyword}", "", 20, 1.0, seed).args


def test_prompts_come_with_seeds(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, seeds, report = write(SHIPPED_LIST, 5, seed=2**64 - 2)
    assert found == prompts.shipped_prompts("dog", 5, 2**64 - 2)
    assert seeds == [2**64 - 2, 2**64 - 1, 0, 1, 2]
    assert all(prompt in report for prompt in found)
    outputs = {item.id: item for item in RegularizationPrompts.define_schema().outputs}
    assert outputs["prompt_list"].is_output_list and outputs["seed_list"].is_output_list
    tiny.save_gpt2(own_folders / "models" / "LLM" / "writer", words=("dog", "runs"))
    found, seeds, _ = write("writer", 2)
    assert len(found) == len(seeds) == 2 and all("dog" in prompt for prompt in found)
    monkeypatch.delenv(prompts.URL_VARIABLE, raising=False)
    with pytest.raises(IdentityEditError, match="IDENTITY_EDIT_LLM_URL is not set"):
        write(ENDPOINT, 1)


@pytest.mark.parametrize("source", [SHIPPED_LIST, "writer"])
def test_nothing_is_sent_unless_the_endpoint_is_chosen(
    source: str, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    tiny.save_gpt2(own_folders / "models" / "LLM" / "writer", words=("dog", "runs"))
    monkeypatch.setenv(prompts.URL_VARIABLE, "http://127.0.0.1:1/v1")
    monkeypatch.setenv(prompts.MODEL_VARIABLE, "writer")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))
    assert write(source, 1)[0]
