"""A subject's folder: what is read from it, and that a bad one is named exactly."""

from __future__ import annotations

import codecs
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from identity_edit_pack.pipelines.shared import images as image_forms
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.subjects import images as subjects
from PIL import Image


def noise_image(seed: int, width: int = 24, height: int = 16, mode: str = "RGB") -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode=mode)


def values(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.array(image, dtype=np.float64) / 255.0).float()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good images with captions; a mask for the second; a test image."""
    path = tmp_path / "dog"
    (path / "test").mkdir(parents=True)
    for number, caption in enumerate(("a sks dog sitting", "a running sks dog", "sks dog, from behind"), start=1):
        noise_image(number).save(path / f"{number}.png")
        (path / f"{number}.txt").write_text(caption + "\n", encoding="utf-8")
    mask = Image.new("L", (24, 16))
    mask.paste(255, (4, 2, 12, 10))
    mask.save(path / "2.mask.png")
    noise_image(9).save(path / "test" / "9.png")
    (path / "test" / "9.txt").write_text("a sks dog asleep", encoding="utf-8")
    return path


def load(folder: Path, **options: object) -> subjects.SubjectImages:
    return subjects.load_subject_folder(str(folder), "dog", "sks", **options)


def test_a_good_folder_is_read_as_it_is(folder: Path) -> None:
    subject = load(folder)
    assert subject.names == ["1.png", "2.png", "3.png"]
    assert subject.captions == ["a sks dog sitting", "a running sks dog", "sks dog, from behind"]
    for number, image in enumerate(subject.images, start=1):
        assert torch.equal(image, values(noise_image(number))) and image.dtype == torch.float32
    mask = torch.zeros(16, 24)
    mask[2:10, 4:12] = 1.0
    assert subject.masks[0] is None and subject.masks[2] is None
    assert torch.equal(subject.masks[1], mask)
    assert torch.equal(subject.test_image, values(noise_image(9)))
    assert subject.test_caption == "a sks dog asleep"
    assert subject.identity_prompt == "sks dog" and subject.notes == ()
    subjects.check_captions(subject)


def test_images_are_cut_and_scaled_together_with_their_masks(folder: Path) -> None:
    Image.new("RGB", (32, 16), "red").save(folder / "2.png")
    image = Image.open(folder / "2.png")
    image.paste((0, 0, 255), (8, 0, 24, 16))  # the centered square is all blue
    image.save(folder / "2.png")
    mask = Image.new("L", (32, 16))
    mask.paste(255, (8, 0, 16, 16))  # its left half
    mask.save(folder / "2.mask.png")
    subject = load(folder, size=8)
    assert all(image.shape == (8, 8, 3) for image in (*subject.images, subject.test_image))
    blue = torch.tensor([0.0, 0.0, 1.0])
    assert (subject.images[1] - blue).abs().max() < 0.1  # the filter looks a little beyond the square
    assert subject.masks[1][:, :3].min() > 0.8 and subject.masks[1][:, 5:].max() < 0.01
    assert subjects.image_batch(load(folder)).shape == (3, 16, 24, 3)  # image 2 is another size


def test_images_are_turned_upright(folder: Path) -> None:
    upright = Image.new("RGB", (16, 24), "white")
    upright.paste((200, 0, 0), (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees to be upright
    upright.rotate(90, expand=True).save(folder / "1.jpg", exif=exif, quality=95)
    (folder / "1.png").unlink()
    image = load(folder).images[0]
    assert (image - values(upright)).abs().mean() < 0.02


def test_transparency_becomes_white_and_a_mask(folder: Path) -> None:
    image = noise_image(5, mode="RGBA")
    opacity = Image.new("L", image.size)
    opacity.paste(255, (0, 0, 10, 16))
    image.putalpha(opacity)
    image.save(folder / "3.png")
    image.save(folder / "2.png")  # has a mask file, which comes first
    subject = load(folder)
    assert torch.equal(subject.masks[2], values(opacity))
    assert torch.equal(subject.images[2][:, 10:], torch.ones(16, 14, 3))
    assert torch.equal(subject.images[2][:, :10], values(image)[:, :10, :3])
    assert float(subject.masks[1].sum()) == 64.0


def test_other_kinds_of_images(folder: Path) -> None:
    deep = (np.arange(24 * 16).reshape(16, 24) * 170).astype(np.uint16)
    Image.fromarray(deep).save(folder / "1.png")
    noise_image(2, mode="L").save(folder / "3.png")
    subject = load(folder)
    assert (subject.images[0] - torch.tensor(deep / 65535.0).float()[..., None]).abs().max() < 0.003
    assert torch.equal(subject.images[2], values(noise_image(2, mode="L"))[..., None].expand(-1, -1, 3))


def break_image(folder: Path) -> None:
    data = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(data[: len(data) // 2])


def remove_images(folder: Path) -> None:
    for path in folder.glob("*.png"):
        path.unlink()


BAD = {
    "no folder": (shutil.rmtree, "does not exist; put 3 to 5 images"),
    "no image": (remove_images, "contains no image"),
    "half an image": (break_image, "The image 2.png cannot be read"),
    "no image at all": (lambda path: (path / "3.png").write_text("hello"), "The image 3.png cannot be read"),
    "0-byte caption": (lambda path: (path / "2.txt").write_bytes(b""), "The caption file 2.txt is empty; write what"),
    "blank caption": (lambda path: (path / "2.txt").write_text(" \n"), "The caption file 2.txt is empty"),
    "no caption": (lambda path: (path / "1.txt").unlink(), "1.png has no caption file 1.txt; write it"),
    "no UTF-8": (lambda path: (path / "1.txt").write_bytes(b"sks dog \xff"), "1.txt is not UTF-8 text"),
    "no token": (lambda path: (path / "3.txt").write_text("a dog"), "3.txt lacks the identity token 'sks'; write 'sks"),
    "token in a word": (lambda path: (path / "3.txt").write_text("who asks a dog"), "lacks the identity token"),
    "no class word": (lambda path: (path / "3.txt").write_text("a sks cat"), "3.txt lacks the class word 'dog'"),
    "class word in a word": (lambda path: (path / "3.txt").write_text("sks hotdog"), "lacks the class word"),
    "several of the class": (lambda path: (path / "3.txt").write_text("sks dogs"), "lacks the class word"),
    "empty mask": (lambda path: Image.new("L", (24, 16)).save(path / "2.mask.png"), "2.mask.png marks nothing"),
    "mask without image": (lambda path: (path / "2.png").unlink(), "The mask 2.mask.png has no image"),
    "one caption for two": (
        lambda path: noise_image(0).save(path / "1.jpg"),
        "1.jpg and 1.png would share the caption 1.txt",
    ),
    "two test images": (lambda path: noise_image(0).save(path / "test" / "8.jpg"), "test holds 2 images"),
    "bad test caption": (lambda path: (path / "test" / "9.txt").write_text("dog"), "test/9.txt lacks the identity"),
    "bad test image": (lambda path: (path / "test" / "9.png").write_bytes(b""), "The image test/9.png cannot be"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_named_exactly(name: str, folder: Path) -> None:
    change, message = BAD[name]
    change(folder)
    with pytest.raises(IdentityEditError, match=message.replace("(", r"\(")):
        load(folder)


@pytest.mark.parametrize(
    ("class_word", "token", "message"),
    [("", "sks", "class_word is empty"), ("dog", "s ks", "token is 's ks'"), ("sks dog", "sks", "contains the token")],
)
def test_bad_words_are_refused(class_word: str, token: str, message: str, folder: Path) -> None:
    with pytest.raises(IdentityEditError, match=message):
        subjects.load_subject_folder(str(folder), class_word, token)


def savable() -> list[tuple[str, str]]:
    """Every ending that is read and that Pillow can also write here, with its format."""
    Image.init()
    found = []
    for ending, name in sorted(image_forms.image_formats().items()):
        if name in {*Image.SAVE} - {"ICNS", "ICO"}:  # of their own sizes
            found.append((ending, name))
    return found


@pytest.mark.parametrize(("ending", "kind"), savable())
def test_images_of_every_ending_are_read(tmp_path: Path, ending: str, kind: str) -> None:
    image = Image.new("RGB", (24, 16), (200, 40, 40))
    image.paste((20, 60, 220), (12, 0, 24, 16))
    mode = {"BLP": "P", "MSP": "1", "PFM": "F", "SPIDER": "F", "XBM": "1"}.get(kind, "RGB")
    for name in (f"1{ending}", f"2{ending.upper()}"):
        image.convert(mode).save(tmp_path / name, format=kind)
        (tmp_path / f"{name[0]}.txt").write_text("a sks dog")
    subject = load(tmp_path)
    assert subject.names == [f"1{ending}", f"2{ending.upper()}"]
    wanted = values(image.convert(mode if mode != "F" else "L").convert("RGB"))
    for found in subject.images:
        assert (found - wanted)[2:-2, 2:10].abs().mean() < 0.03


def test_the_endings_of_load_image_are_among_them() -> None:
    usual = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
    known = image_forms.image_formats()
    assert usual <= set(known) and not {".eps", ".ps", ".pdf", ".mpg", ".h5", ".wmf"} & set(known)


def test_a_file_that_needs_another_program_is_no_image(folder: Path) -> None:
    noise_image(1).save(folder / "1.eps")
    (folder / "1.eps").replace(folder / "1.png")
    with pytest.raises(IdentityEditError, match=r"The image 1\.png cannot be read"):
        load(folder)


@pytest.mark.parametrize(("brightest", "one"), [(1.0, 1.0), (4.0, 1.0), (200.0, 255.0), (60000.0, 65535.0)])
def test_floating_point_files_are_told_by_their_values(folder: Path, brightest: float, one: float) -> None:
    levels = np.linspace(0.0, brightest, 24 * 16, dtype=np.float32).reshape(16, 24)
    Image.fromarray(levels).save(folder / "1.tiff")
    (folder / "1.png").unlink()
    found = load(folder).images[0][..., 0]
    torch.testing.assert_close(found, torch.from_numpy(levels / one).clamp(max=1.0), atol=0.003, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        "3.mask.png",
        "3-masklabel.png",
        "3_mask.webp",
        "3-mask.bmp",
        "3_Mask.PNG",
        "3.MASK.png",
        "mask/3.png",
        "Masks/3.png",
    ],
)
@pytest.mark.parametrize("size", [(24, 16), (48, 32), (12, 8), (64, 64)])
def test_masks_of_other_trainers_and_sizes_are_read(folder: Path, name: str, size: tuple[int, int]) -> None:
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    (folder / name).parent.mkdir(exist_ok=True)
    mask.save(folder / name, **({"lossless": True} if name.endswith("webp") else {}))
    subject = load(folder)
    assert subject.names == ["1.png", "2.png", "3.png"] and subject.notes == ()
    found = subject.masks[2]
    assert found.shape == (16, 24) and found[:, :11].min() > 0.9 and found[:, 13:].max() < 0.1


def test_a_mask_marks_nothing_where_it_is_transparent(folder: Path) -> None:
    """As one that was painted white on a transparent layer."""
    layer = Image.new("RGBA", (24, 16), (255, 255, 255, 0))
    layer.paste((255, 255, 255, 255), (0, 0, 12, 16))
    layer.save(folder / "3-mask.png")
    found = load(folder).masks[2]
    assert torch.equal(found[:, :12], torch.ones(16, 12)) and not found[:, 12:].any()


def test_an_image_whose_name_ends_like_a_mask_is_an_image(folder: Path) -> None:
    noise_image(4).save(folder / "dog_with_mask.png")
    noise_image(4).save(folder / "1-condlabel.png")
    (folder / "dog_with_mask.txt").write_text("a sks dog with a mask")
    subject = load(folder)
    assert "dog_with_mask.png" in subject.names and subject.masks[0] is None
    assert any("1-condlabel.png" in note for note in subject.notes)


def test_images_that_pillow_cannot_read_are_called_images(folder: Path) -> None:
    (folder / "4.heic").write_bytes(b"")
    notes = load(folder).notes
    assert any("Pillow cannot read them here: 4.heic" in note for note in notes)
    assert not any("neither image" in note for note in notes)
    for path in folder.glob("*.png"):
        path.unlink()
    with pytest.raises(IdentityEditError, match=r"contains no image, but 4\.heic, which Pillow cannot read here"):
        load(folder)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_captions_in_every_encoding_that_says_what_it_is(folder: Path, encoding: str) -> None:
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(encoding, b"")
    (folder / "1.txt").write_bytes(mark + "a sks dog, \u732b\r\n".encode(encoding))
    assert load(folder).captions[0] == "a sks dog, \u732b"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_a_caption_in_an_encoding_that_does_not_say_what_it_is(folder: Path, encoding: str) -> None:
    (folder / "1.txt").write_bytes("a sks dog at a caf\xe9".encode(encoding))
    with pytest.raises(IdentityEditError, match=r"^1\.txt is not UTF-8 text; save it as UTF-8"):
        load(folder)


def test_a_mask_outside_of_the_square_is_refused(folder: Path) -> None:
    mask = Image.new("L", (24, 16))
    mask.paste(255, (0, 0, 2, 16))
    mask.save(folder / "2.mask.png")
    with pytest.raises(IdentityEditError, match=r"2\.mask\.png marks nothing within the centered square of 2\.png"):
        load(folder, size=8)


def test_unknown_files_are_noted(folder: Path) -> None:
    (folder / "readme.md").write_text("hello")
    (folder / "4.txt").write_text("a caption without image")
    (folder / ".DS_Store").write_text("")
    (folder / "more").mkdir()
    (folder / "class_word.txt").write_text("dog\n")
    for number in (5, 6, 7):
        noise_image(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("sks dog")
    notes = subjects.load_subject_folder(str(folder)).notes
    assert notes == (
        "6 images; Liu et al. 2024 use 3 to 5.",
        "Ignored, because they are neither image, caption nor mask of one: 4.txt, more, readme.md.",
    )


def test_captions_from_elsewhere(folder: Path) -> None:
    (folder / "1.txt").unlink()
    (folder / "2.txt").write_text("A Dog and the dog's bowl")
    coarse = load(folder, captions=subjects.CLASS_WORD_ONLY)
    assert coarse.captions == ["a photo of sks dog"] * 3 and coarse.test_caption == "a photo of sks dog"
    later = load(folder, captions=subjects.NO_CAPTIONS_YET)
    assert later.captions == ["", "A Dog and the dog's bowl", "sks dog, from behind"]
    with pytest.raises(IdentityEditError, match=r"1\.png has no caption; connect Caption Images"):
        subjects.check_captions(later)
    (folder / "1.txt").write_text("dog on grass")
    assert load(folder, add_token=True).captions[:2] == ["sks dog on grass", "A sks Dog and the dog's bowl"]


def test_a_regularization_set_has_no_token(folder: Path) -> None:
    (folder / "1.txt").write_text("an old dog")
    subject = subjects.load_subject_folder(str(folder), "dog", "")
    assert subject.captions[0] == "an old dog" and subject.identity_prompt == "dog"
    with pytest.raises(IdentityEditError, match="have no token"):
        subjects.check_captions(subject)
    coarse = subjects.load_subject_folder(str(folder), "owl", "", captions=subjects.CLASS_WORD_ONLY)
    assert coarse.captions[0] == "a photo of an owl"


def test_tensors_become_a_subject() -> None:
    batch, masks = torch.rand(2, 6, 5, 3), torch.ones(2, 6, 5)
    subject = subjects.from_batch(batch, ["a cat", "my cat"], "cat", "sks", masks=masks, add_token=True)
    assert subject.captions == ["a sks cat", "my sks cat"] and subject.folder is None
    assert all(torch.equal(found, wanted) for found, wanted in zip(subject.images, batch, strict=True))
    assert all(torch.equal(mask, masks[0]) for mask in subject.masks)
    one_for_all = subjects.from_batch([batch, torch.rand(1, 4, 4, 3)], ["sks cat"], "cat")
    assert one_for_all.captions == ["sks cat"] * 3 and one_for_all.masks == [None] * 3
    assert subjects.from_batch(batch, [], "cat").captions == ["", ""]
    clear = torch.rand(1, 2, 2, 4)
    clear[..., 3] = 0.25
    expected = 0.25 * clear[0, ..., :3] + 0.75
    assert torch.allclose(subjects.from_batch(clear, [], "cat").images[0], expected)


def test_tensors_are_read_as_files_are() -> None:
    gray = torch.rand(1, 6, 5, 1)
    subject = subjects.from_batch([gray, torch.cat([gray, gray], -1)], [], "cat")
    assert torch.equal(subject.images[0], gray[0].expand(-1, -1, 3)) and subject.masks[0] is None
    torch.testing.assert_close(subject.images[1], (gray * gray + 1 - gray)[0].expand(-1, -1, 3))
    assert torch.equal(subject.masks[1], gray[0, ..., 0])
    cut_out = torch.rand(2, 6, 5, 4)
    assert torch.equal(subjects.from_batch(cut_out, [], "cat").masks[1], cut_out[1, ..., 3])
    given = [torch.zeros(1, 64, 64), torch.ones(12, 10)]  # the first as Load Image gives it
    masks = subjects.from_batch(cut_out, [], "cat", masks=given).masks
    assert torch.equal(masks[0], cut_out[0, ..., 3]) and torch.equal(masks[1], torch.ones(6, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": ["sks cat"] * 3}, "There are 3 captions for 2 images"),
        ({"captions": ["sks cat", "a cat"]}, "The caption of image 2 lacks the identity token"),
        ({"masks": torch.ones(3, 6, 5)}, "There are 3 masks for 2 images"),
        ({"masks": torch.zeros(2, 6, 5)}, "The mask of image 1 marks nothing"),
        ({"images": torch.full((2, 6, 5, 3), float("nan"))}, "NaN"),
        ({"images": torch.rand(2, 6, 5, 5)}, "1 to 4 channels"),
        ({"images": torch.rand(0, 6, 5, 3)}, "images must be images"),
    ],
)
def test_bad_tensors_are_refused(change: dict[str, object], message: str) -> None:
    arguments = {"images": torch.rand(2, 6, 5, 3), "captions": ["sks cat"], "class_word": "cat", **change}
    with pytest.raises(IdentityEditError, match=message):
        subjects.from_batch(**arguments)


def test_saved_captions_are_read_again_and_never_overwritten_unasked(folder: Path) -> None:
    (folder / "1.txt").unlink()
    subject = load(folder, captions=subjects.NO_CAPTIONS_YET)
    subject.captions[:2] = ["a sks dog, büro", "another sks dog"]
    assert subjects.save_captions(subject) == ["1.txt"]
    assert load(folder).captions == ["a sks dog, büro", "a running sks dog", "sks dog, from behind"]
    assert subjects.save_captions(subject, overwrite=True) == ["2.txt"]
    assert load(folder).captions[1] == "another sks dog"
    assert not list(folder.glob("*.tmp"))
    with pytest.raises(IdentityEditError, match="come from no folder"):
        subjects.save_captions(subjects.from_batch(torch.rand(1, 4, 4, 3), ["sks dog"], "dog"))


def test_a_failed_write_leaves_the_old_caption(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = load(folder)
    subject.captions[0] = "new sks dog"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(subjects.os, "replace", full)
    with pytest.raises(IdentityEditError, match=r"1\.txt cannot be written \(No space left on device\)"):
        subjects.save_captions(subject, overwrite=True)
    assert (folder / "1.txt").read_text() == "a sks dog sitting\n" and not list(folder.glob("*.tmp"))
