"""Published datasets are read as their authors' own code reads them, and a damaged one is refused in one sentence."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from identity_edit_pack.demo_world.attributes import Attributes
from identity_edit_pack.evaluation import demo_dataset as demo
from identity_edit_pack.evaluation.cases import EditCase, load_square, save_image
from identity_edit_pack.evaluation.datasets import READERS, decode_mask, encode_mask, inside, read_dataset
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from PIL import Image

SIDE = 512


def write(path, size=(12, 8), color=(255, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def pie_bench(folder, **changes):
    item = {
        "image_path": "3_delete_object_80/1_artificial/2_human/311200000003.jpg",
        "original_prompt": "a woman with [a hat] and a dog",
        "editing_prompt": "a woman [] and a dog",
        "editing_instruction": "Remove the hat",
        "editing_type_id": "3",
        "blended_word": "",
        "mask": [SIDE * 10 + 20, 5, SIDE * 11 + 20, 7],
    } | changes
    write(folder / "annotation_images/3_delete_object_80/1_artificial/2_human/311200000003.jpg", (SIDE, SIDE))
    (folder / "mapping_file.json").write_text(json.dumps({"311200000003": item}))
    return folder


def dreambooth(folder):
    lines = ["Classes", "", "subject_name,class", "plush,stuffed animal", "cat2,cat", "", "Prompts", ""]
    for title, ending in (("Object Prompts", "on a mirror"), ("Live Subject Prompts", "in a chef outfit")):
        prompts = ["'a {0} {1} in the snow'", f"'a {{0}} {{1}} {ending}'", "'a red {0} {1}'"]
        lines += [title, "", "prompt_list = ["]
        lines += [f"{prompt}.format(unique_token, class_token)," for prompt in prompts] + ["]", ""]
    for subject in ("plush", "cat2"):
        for number in range(3):
            write(folder / "dataset" / subject / f"0{number}.jpg")
    (folder / "dataset/prompts_and_classes.txt").write_text("\n".join(lines))
    return folder


def tedbench(folder, image="zebra.jpeg"):
    write(folder / "originals/zebra.jpeg")
    (folder / "input_list.json").write_text(json.dumps([{"img_name": image, "target_text": "A photo of a horse."}]))
    return folder


def lipe(folder, **changes):
    write(folder / "rex/test.png")
    for number in range(3):
        write(folder / f"rex/references/{number}.png")
    item = {"class": "dog", "source_prompt": "a dog sitting", "target_prompts": ["a dog jumping", "a happy dog"]}
    (folder / "rex/subject.json").write_text(json.dumps(item | changes))
    return folder


def mask_of_the_authors(runs):
    """By the rule of PIE-Bench's authors, pixel by pixel."""
    flat = [0] * (SIDE * SIDE)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        for offset in range(min(length, SIDE * SIDE - start)):
            flat[start + offset] = 1
    mask = np.array(flat).reshape(SIDE, SIDE)
    mask[0, :] = mask[-1, :] = mask[:, 0] = mask[:, -1] = 1
    return mask


def test_pie_bench(tmp_path):
    (case,) = read_dataset("pie-bench", pie_bench(tmp_path / "data"), tmp_path / "masks")
    assert (case.name, case.group) == ("311200000003", "3_delete_object")
    assert case.source_prompt == "a woman with a hat and a dog" and case.target_prompt == "a woman  and a dog"
    assert case.instruction == "Remove the hat" and case.named() == case
    mask = case.load_mask(SIDE)
    assert mask.shape == (1, SIDE, SIDE)
    assert np.array_equal(mask[0].numpy(), mask_of_the_authors([SIDE * 10 + 20, 5, SIDE * 11 + 20, 7]))
    assert mask[0, 10, 20:25].all() and not mask[0, 10, 25]


@pytest.mark.parametrize("runs", [[], [0, SIDE * SIDE], [SIDE * SIDE - 3, 10], [700, 0, 900, 600]])
def test_masks_are_decoded_like_the_authors_do(runs):
    assert np.array_equal(decode_mask(runs, "a case").numpy(), mask_of_the_authors(runs))


def test_masks_are_encoded_as_they_are_decoded():
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(SIDE, SIDE, generator=generator) < 0.3).numpy()
    mask[0, :] = mask[-1, :] = mask[:, 0] = mask[:, -1] = True
    assert np.array_equal(decode_mask(encode_mask(mask), "a case").numpy() != 0, mask)


def test_tedbench_cases_are_named_like_the_authors_results(tmp_path):
    (case,) = read_dataset("tedbench", tedbench(tmp_path), tmp_path)
    assert case.name == "zebra.jpeg-A_photo_of_a_horse"
    assert case.target_prompt == "A photo of a horse." and case.source_prompt == "" and case.load_mask(8) is None


def test_lipe(tmp_path):
    first, second = read_dataset("lipe", lipe(tmp_path), tmp_path)
    assert [first.name, second.name] == ["rex-00", "rex-01"] and first.group == "rex"
    assert first.named().target_prompt == "a sks dog jumping" and first.named().source_prompt == "a sks dog sitting"
    assert len(first.references) == 3 and first.image.name == "test.png"
    (own, _) = read_dataset("lipe", lipe(tmp_path, token="ohwx"), tmp_path)
    assert own.named().target_prompt == "a ohwx dog jumping"


def test_dreambooth(tmp_path):
    cases = {case.name: case for case in read_dataset("dreambooth", dreambooth(tmp_path), tmp_path)}
    assert len(cases) == 6
    assert cases["plush-01"].target_prompt == "a stuffed animal on a mirror"
    assert cases["plush-01"].named().target_prompt == "a sks stuffed animal on a mirror"
    assert cases["cat2-01"].target_prompt == "a cat in a chef outfit"
    assert cases["cat2-02"].named().target_prompt == "a red sks cat"
    assert [path.name for path in cases["cat2-00"].references] == ["00.jpg", "01.jpg", "02.jpg"]
    # The folder may also be the one with the subjects itself.
    assert len(read_dataset("dreambooth", tmp_path / "dataset", tmp_path)) == 6


def test_people(tmp_path):
    for person in range(27):
        for number in range(10):
            write(tmp_path / f"person{person:02}" / f"{number}.jpg")
    (tmp_path / "person03/class_word.txt").write_text("woman\n")
    cases = read_dataset("people", tmp_path, tmp_path / "masks")
    assert len(cases) == 27 * 12 and all(len(case.references) == 10 for case in cases)
    of_third = [case for case in cases if case.group == "person03"]
    assert of_third[1].target_prompt == "a woman on the beach" and cases[1].target_prompt == "a person on the beach"
    assert of_third[1].named().target_prompt == "a sks woman on the beach"
    (tmp_path / "prompts.txt").write_text("{} at sea\n\na drawing of {}\n")
    assert [case.target_prompt for case in read_dataset("people", tmp_path, tmp_path)[6:8]] == [
        "woman at sea",
        "a drawing of woman",
    ]
    (tmp_path / "prompts.txt").write_text("a person\n")
    with pytest.raises(IdentityEditError, match=r"write \{\} for the class word"):
        read_dataset("people", tmp_path, tmp_path)


def test_images_are_the_center_square(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = load_square(tmp_path / "wide.png", 16)
    assert image.shape == (1, 16, 16, 3) and bool((image == 1).all())
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held upright
    turned.save(tmp_path / "turned.png", exif=exif)
    assert bool((load_square(tmp_path / "turned.png", 16) == 1).all())


BROKEN_MASKS = [None, "0 5", [3], [3, -1], [3.5, 2], [SIDE * SIDE + 1, 2]]


@pytest.mark.parametrize("mask", BROKEN_MASKS)
def test_broken_masks_are_refused(tmp_path, mask):
    refused("pie-bench", pie_bench(tmp_path, mask=mask), "mask of 311200000003")


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/passwd", "a/../../x.png", "C:\\x.png", "..\\x.png", "", "a\0b"]
)
def test_paths_do_not_leave_the_folder(tmp_path, path):
    write(tmp_path / "secret.png")
    refused("pie-bench", pie_bench(tmp_path / "data", image_path=path), "no path inside of")
    refused("tedbench", tedbench(tmp_path / "ted", image=path), "no path inside of")


def test_links_do_not_leave_the_folder(tmp_path):
    write(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(IdentityEditError, match="a link out of"):
        inside(tmp_path / "data", "link.png", "a case")


def test_damaged_datasets_are_refused(tmp_path):
    refused("pie-bench", tmp_path / "nowhere", "does not exist")
    refused("pie-bench", tmp_path, "mapping_file.json is missing")
    refused("tedbench", tmp_path, "input_list.json is missing")
    refused("lipe", tmp_path, "no SUBJECT/subject.json")
    refused("dreambooth", tmp_path, "prompts_and_classes.txt is missing")
    (tmp_path / "mapping_file.json").write_text('{"0": ')
    refused("pie-bench", tmp_path, "not sound JSON")
    (tmp_path / "mapping_file.json").write_text("[1]")
    refused("pie-bench", tmp_path, "does not hold a dict")
    (tmp_path / "mapping_file.json").write_bytes(b"\xff\xfe{")
    refused("pie-bench", tmp_path, "cannot be read as text")
    refused("pie-bench", pie_bench(tmp_path / "a", original_prompt=None), "no text original_prompt")
    refused("pie-bench", pie_bench(tmp_path / "b", image_path="0_random_140/gone.jpg"), "does not hold")
    refused("tedbench", tedbench(tmp_path / "c", image="gone.jpeg"), "does not hold")
    refused("lipe", lipe(tmp_path / "d", target_prompts=[]), "target_prompts")
    (dreambooth(tmp_path / "e") / "dataset/cat2").rename(tmp_path / "e/elsewhere")
    refused("dreambooth", tmp_path / "e", "cat2")


def test_two_cases_of_one_name_are_refused(tmp_path):
    folder = tedbench(tmp_path)
    listed = json.loads((folder / "input_list.json").read_text())
    (folder / "input_list.json").write_text(json.dumps(listed * 2))
    refused("tedbench", folder, "two cases")


def refused(name, folder, words):
    with pytest.raises(IdentityEditError) as caught:
        read_dataset(name, folder, folder / "masks")
    message = str(caught.value)
    assert words in message and message.endswith(".") and "\n" not in message.replace("\0", "")


def test_damaged_images_are_refused(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG no image")
    for name, words in (("bad.png", "cannot be read as an image"), ("gone.png", "is missing")):
        with pytest.raises(IdentityEditError, match=words):
            EditCase("a", "", tmp_path / name, "", "").load_image(8)


def test_saved_images_are_read_back(tmp_path):
    image = (torch.rand(8, 8, 3) * 255).round() / 255
    assert torch.equal(load_square(save_image(image, tmp_path / "new/a.png"), 8)[0], image)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_the_demo_dataset_is_what_the_renderer_knows(tmp_path):
    demo.write_demo_dataset(tmp_path / "demo", len(demo.KINDS))
    cases = demo.read_demo_dataset(tmp_path / "demo", tmp_path / "masks")
    assert [case.group for case in cases] == [kind.name for kind in demo.KINDS]
    for case in cases:
        before, after = case.load_image(128), case.load_target(128)
        changed = (before - after).abs().sum(-1) > 0
        allowed = case.load_mask(128).bool()
        assert changed.any() and not allowed.all()
        # The shadow of the figure alone lies outside of the subject.
        assert float((changed & ~allowed).float().mean()) < 0.05
        assert case.source_prompt != case.target_prompt and case.instruction
        assert len(case.references) == demo.REFERENCES
        assert all(f"sks {case.class_word}" in path.with_suffix(".txt").read_text() for path in case.references)
        assert f"sks {case.class_word}" in case.named().target_prompt


def test_the_demo_dataset_shows_held_out_subjects_only():
    for kind in demo.KINDS:
        for seed in range(20):
            before, after = demo.draw_edit(kind, random.Random(seed))
            assert before.held_out and before.species != "person"
            differing = {
                name for name in Attributes.__dataclass_fields__ if getattr(before, name) != getattr(after, name)
            }
            assert differing == {kind.attribute}


def test_the_same_seed_writes_the_same_demo_dataset(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        demo.write_demo_dataset(tmp_path / name, 3, seed)
    texts = [(tmp_path / name / "mapping_file.json").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_every_reader_has_a_name():
    assert list(READERS) == ["pie-bench", "tedbench", "lipe", "dreambooth", "people"]
