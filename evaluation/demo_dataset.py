"""A dataset of edits drawn by the demo world, written in the form of PIE-Bench and read by its reader.

Its kinds of edit are those of PIE-Bench that the demo world can draw, and bear their names. Subjects are animals of
held-out identities, so that nothing was trained on them. Beside what PIE-Bench holds, the folder has the true edits
(`target_images`), four other images of each subject with captions (`reference_images`), and `subjects.json`, which
says for each case what its subject is called.
"""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from identity_edit_pack.demo_world.attributes import (
    CAPTION_TEMPLATES,
    COLORS,
    COSTUMES,
    EXPRESSIONS,
    IDENTITY_OF,
    PLACE_PHRASES,
    PLACES,
    POSE_PHRASES,
    POSES,
    Attributes,
    caption,
    random_attributes,
)
from identity_edit_pack.demo_world.images import EVALUATION_SEED
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.pipelines.subjects.words import with_token

from .cases import EditCase, save_image
from .datasets import PIE_BENCH_SIDE, TOKEN, encode_mask, images_in, read_json, read_pie_bench, text_of

REFERENCES = 4
WORN = [costume for costume in COSTUMES if costume != "none"]


@dataclass(frozen=True)
class Kind:
    """A kind of edit: its name and number in PIE-Bench, the attribute that changes, and between which values."""

    name: str
    attribute: str
    before: list[str]
    after: list[str]


KINDS = (
    Kind("1_change_object", "costume", WORN, WORN),
    Kind("2_add_object", "costume", ["none"], WORN),
    Kind("3_delete_object", "costume", WORN, ["none"]),
    Kind("4_change_attribute_content", "expression", list(EXPRESSIONS), list(EXPRESSIONS)),
    Kind("5_change_attribute_pose", "pose", list(POSES), list(POSES)),
    Kind("6_change_attribute_color", "color", list(COLORS), list(COLORS)),
    Kind("8_change_background", "place", list(PLACES), list(PLACES)),
)


def draw_edit(kind: Kind, generator: random.Random) -> tuple[Attributes, Attributes]:
    """A held-out animal before and after an edit; only a kind that edits the costume shows one."""
    while True:
        drawn = random_attributes(generator, "figure", held_out=True)
        if drawn.species == "person":
            continue  # a person's color is that of the clothes, which the class word does not name
        before = drawn.replace(**{"costume": "none"} | {kind.attribute: generator.choice(kind.before)})
        values = [value for value in kind.after if value != getattr(before, kind.attribute)]
        after = before.replace(**{kind.attribute: generator.choice(values)})
        if before.held_out:
            return before, after


def instruction_of(kind: Kind, before: Attributes, after: Attributes) -> str:
    """The edit as one would ask for it."""
    by_name = {
        "1_change_object": f"Replace the {before.costume} with a {after.costume}",
        "2_add_object": f"Let it wear a {after.costume}",
        "3_delete_object": f"Take away the {before.costume}",
        "4_change_attribute_content": f"Make it look {after.expression}",
        "5_change_attribute_pose": f"Let it be {POSE_PHRASES[after.pose]}",
        "6_change_attribute_color": f"Make it {after.color}",
        "8_change_background": f"Put it {PLACE_PHRASES[after.place]}",
    }
    return by_name[kind.name]


def editable(kind: Kind, mask_before: np.ndarray, mask_after: np.ndarray) -> np.ndarray:
    """Where an edit may change the image, bool [H, W]: the subject before and after it, or all but the subject."""
    if kind.attribute == "place":
        return ~((mask_before != 0) & (mask_after != 0))
    return (mask_before != 0) | (mask_after != 0)


def write_demo_dataset(folder: Path, count: int, seed: int = 0) -> None:
    """Draw `count` edits, one kind after the other; the same count and seed give the same dataset.

    Images have the demo world's 128 pixels; masks are encoded over PIE-Bench's 512.
    """
    generator = random.Random(f"demo edits {seed}")
    mapping, subjects = {}, {}
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        before, after = draw_edit(kind, generator)
        key = f"{kind.name[0]}{number:011}"
        image_path = f"{kind.name}/{key}.png"
        place = EVALUATION_SEED + generator.randrange(1 << 32)
        (image, mask_before), (edited, mask_after) = (render(attributes, place) for attributes in (before, after))
        save_image(as_tensor(image), folder / "annotation_images" / image_path)
        save_image(as_tensor(edited), folder / "target_images" / image_path)
        subject = "_".join(before.identity)
        write_references(before, folder / "reference_images" / subject, seed)
        repeats = PIE_BENCH_SIDE // len(image)
        mask = editable(kind, mask_before, mask_after).repeat(repeats, 0).repeat(repeats, 1)
        template = generator.randrange(CAPTION_TEMPLATES)
        mapping[key] = {
            "image_path": image_path,
            "original_prompt": caption(before, template),
            "editing_prompt": caption(after, template),
            "editing_instruction": instruction_of(kind, before, after),
            "editing_type_id": kind.name[0],
            "blended_word": "",
            "mask": encode_mask(mask),
        }
        subjects[key] = {"subject": subject, "class": before.species}
    for name, content in (("mapping_file.json", mapping), ("subjects.json", subjects)):
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_references(subject: Attributes, folder: Path, seed: int) -> None:
    """Four images of a subject in other states and places, each with a caption that calls it by token and class."""
    if folder.exists():
        return
    generator = random.Random(f"demo references {seed} {subject.identity}")
    kept = {name: getattr(subject, name) for name in IDENTITY_OF["figure"]} | {"costume": "none"}
    words = " ".join(word for word in (subject.pattern, subject.color, subject.species) if word != "plain")
    for number in range(REFERENCES):
        shown = random_attributes(generator, "figure", held_out=None).replace(**kept)
        image, _ = render(shown, EVALUATION_SEED + generator.randrange(1 << 32))
        path = save_image(as_tensor(image), folder / f"{number}.png")
        said = caption(shown, number % CAPTION_TEMPLATES).replace(f"an {words}", f"a {words}")
        said = with_token(said.replace(words, subject.species), subject.species, TOKEN)
        path.with_suffix(".txt").write_text(said + "\n", encoding="utf-8")


def as_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] -> [H, W, 3] in [0, 1]."""
    return torch.from_numpy(np.array(image)).float() / 255


def read_demo_dataset(folder: Path, masks: Path) -> list[EditCase]:
    """What `write_demo_dataset` wrote: PIE-Bench's reader, and what is known besides.

    Raises:
        IdentityEditError: naming what is missing or damaged.
    """
    subjects = read_json(folder / "subjects.json", dict, "a folder that score_edits.py --dataset demo has written")
    cases = []
    for case in read_pie_bench(folder, masks):
        item, where = subjects.get(case.name), f"{case.name} in subjects.json"
        image_path = case.image.relative_to(folder / "annotation_images")
        cases.append(
            dataclasses.replace(
                case,
                target=folder / "target_images" / image_path,
                references=images_in(folder / "reference_images" / text_of(item, "subject", where)),
                subject_word=TOKEN,
                class_word=text_of(item, "class", where),
            )
        )
    return cases
