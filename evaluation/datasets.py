"""Published datasets of edits, read from their folders as they are published, each into a list of EditCase.

    pie-bench    Ju et al. 2024: 700 images of ten kinds of edit, with masks
    tedbench     Kawar et al. 2023 (Imagic): 100 non-rigid edits of images without source prompts
    lipe         subjects with references, a test image and target prompts, as Liu et al. 2024 (section 3.1) describe
                 theirs; the folder form is this project's own, for that dataset is not published
    dreambooth   Ruiz et al. 2023: 30 subjects, 25 prompts each
    people       Gu et al. 2025: 27 people with ten photos each, 12 prompts; a folder for each person

Nothing is downloaded. No path that a dataset's file names leads out of the dataset's folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from identity_edit_pack.pipelines.shared.errors import IdentityEditError

from .cases import EditCase, save_image

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TOKEN = "sks"
PIE_BENCH_SIDE = 512


def read_pie_bench(folder: Path, masks: Path) -> list[EditCase]:
    """PIE-Bench: `mapping_file.json` and the images in `annotation_images` (Ju et al. 2024, PnPInversion).

    The brackets that mark differences are taken out of the prompts, as in the authors' evaluation/evaluate.py. A case
    is named by its key, and grouped by the folder of its kind of edit without the number of images
    ("3_delete_object").

    Args:
        masks: the folder that the masks are written to, as PNG, for the dataset keeps them run-length encoded.

    Raises:
        IdentityEditError: naming what is missing or damaged.
    """
    mapping = read_json(folder / "mapping_file.json", dict, "the folder that holds annotation_images")
    cases = []
    for key, item in mapping.items():
        where = f"{key} in mapping_file.json"
        image_path = text_of(item, "image_path", where)
        image = file_inside(folder / "annotation_images", image_path, where)
        mask = decode_mask(item.get("mask"), where)
        cases.append(
            EditCase(
                name=file_name(key),
                group=re.sub(r"_\d+$", "", PurePosixPath(image_path).parts[0]),
                image=image,
                source_prompt=without_brackets(text_of(item, "original_prompt", where)),
                target_prompt=without_brackets(text_of(item, "editing_prompt", where)),
                instruction=text_of(item, "editing_instruction", where),
                mask=save_image(mask[..., None].expand(-1, -1, 3), masks / f"{file_name(key)}.png"),
            )
        )
    return cases


def without_brackets(prompt: str) -> str:
    return prompt.replace("[", "").replace("]", "")


def decode_mask(encoded: Any, where: str, side: int = PIE_BENCH_SIDE) -> torch.Tensor:
    """A run-length encoded mask: start and length of every run in turn, over the rows of [side, side].

    The outermost pixels are set to 1, as the authors do against errors of annotation at the border.

    Returns:
        [side, side], 1 where the image may change and 0 elsewhere.

    Raises:
        IdentityEditError: when the numbers are no such runs.
    """
    is_runs = isinstance(encoded, list) and len(encoded) % 2 == 0
    if not is_runs or not all(isinstance(number, int) and number >= 0 for number in encoded):
        raise IdentityEditError(
            f"The mask of {where} is not a list of starts and lengths of runs; download the dataset again."
        )
    flat = torch.zeros(side * side)
    for start, length in zip(encoded[::2], encoded[1::2], strict=True):
        if start > side * side:
            raise IdentityEditError(
                f"The mask of {where} has a run at {start}, outside of {side} x {side} pixels; download the dataset "
                f"again."
            )
        flat[start : start + length] = 1
    mask = flat.view(side, side)
    mask[0, :] = mask[-1, :] = mask[:, 0] = mask[:, -1] = 1
    return mask


def encode_mask(mask: np.ndarray) -> list[int]:
    """The runs of a bool mask [H, W], as `decode_mask` reads them."""
    padded = np.concatenate([[False], mask.reshape(-1), [False]])
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    return np.stack([edges[::2], edges[1::2] - edges[::2]], axis=1).reshape(-1).tolist()


def read_tedbench(folder: Path) -> list[EditCase]:
    """TEdBench (Kawar et al. 2023, section 4.1), as its authors publish it: `input_list.json` and `originals`.

    `input_list.json` is a list of {"img_name", "target_text"}. There are no source prompts and no masks. A case is
    named like the authors' own results ("zebra.jpeg-A_photo_of_a_horse"), so that those can be scored as they lie in
    the dataset's folder `imagic`.

    Raises:
        IdentityEditError: naming what is missing or damaged.
    """
    listed = read_json(folder / "input_list.json", list, "the folder tedbench, which holds originals")
    cases = []
    for number, item in enumerate(listed):
        where = f"entry {number} of input_list.json"
        image, text = text_of(item, "img_name", where), text_of(item, "target_text", where)
        cases.append(
            EditCase(
                name=file_name(f"{image}-{text.removesuffix('.').replace(' ', '_')}"),
                group="",
                image=file_inside(folder / "originals", image, where),
                source_prompt="",
                target_prompt=text,
            )
        )
    return cases


def read_lipe(folder: Path) -> list[EditCase]:
    """Subjects with references and one test image each, and prompts for it (the protocol of Liu et al. 2024, 3.1).

    Their dataset is not published. The form of the folder is this project's own:

        SUBJECT/subject.json      {"class": "dog", "source_prompt": "a dog sitting on the grass",
                                   "target_prompts": ["a dog jumping on the grass", ...], "token": "sks"}
        SUBJECT/test.png          the image to edit
        SUBJECT/references/*.png  3 to 5 others, each with its caption in a .txt beside it where there is one

    Prompts call the subject by its class word; methods that have learned the subject put the token before it. "token"
    may be left out, "sks" then. An image may be .png, .jpg, .jpeg, .webp or .bmp.

    Raises:
        IdentityEditError: naming what is missing or damaged.
    """
    cases = []
    for described in sorted(folder.glob("*/subject.json")):
        subject, where = described.parent, f"{described.parent.name}/subject.json"
        item = read_json(described, dict, "")
        targets = item.get("target_prompts")
        if not isinstance(targets, list) or not targets or not all(isinstance(text, str) for text in targets):
            raise IdentityEditError(f"{where} has no list of target_prompts; write at least one.")
        tests = [subject / f"test{suffix}" for suffix in IMAGES if (subject / f"test{suffix}").is_file()]
        if not tests:
            raise IdentityEditError(f"{subject} has no test image; add test.png, the image to edit.")
        references = images_in(subject / "references")
        cases += [
            EditCase(
                name=file_name(f"{subject.name}-{number:02}"),
                group=subject.name,
                image=tests[0],
                source_prompt=text_of(item, "source_prompt", where),
                target_prompt=target,
                references=references,
                subject_word=text_of(item | {"token": item.get("token", TOKEN)}, "token", where),
                class_word=text_of(item, "class", where),
            )
            for number, target in enumerate(targets)
        ]
    if not cases:
        raise IdentityEditError(f"{folder} holds no SUBJECT/subject.json; choose the folder that holds the subjects.")
    return cases


LIVE_CLASSES = ("cat", "dog")


def read_dreambooth(folder: Path) -> list[EditCase]:
    """DreamBooth (Ruiz et al. 2023, section 4): 30 subjects, 25 prompts each, as in the repository google/dreambooth.

    Read are `prompts_and_classes.txt` and the subjects' folders beside it (or in `dataset`). Cats and dogs get the
    prompts for live subjects, the other 21 subjects those for objects. The references are all images of a subject:
    DINO and CLIP-I are means over them, CLIP-T is against the prompt; the authors draw four images for each prompt,
    so make four runs with other seeds for their figures. The dataset asks for new images of a subject and has none
    to edit: the case's image is the subject's first.

    Prompts come without the token ("a dog in the jungle"), which `EditCase.named` adds.

    Raises:
        IdentityEditError: naming what is missing or damaged.
    """
    folder = folder / "dataset" if (folder / "dataset").is_dir() else folder
    listed = folder / "prompts_and_classes.txt"
    lines = [line.strip() for line in read_text(listed, "the folder dataset of google/dreambooth").splitlines()]
    classes, objects, live = parse_prompts_and_classes(lines)
    if not classes or not objects or not live:
        raise IdentityEditError(f"{listed} lacks classes or prompts; download the dataset again.")
    cases = []
    for subject, class_word in classes.items():
        references = images_in(folder_inside(folder, subject, listed.name))
        prompts = live if class_word in LIVE_CLASSES else objects
        cases += [
            EditCase(
                name=file_name(f"{subject}-{number:02}"),
                group=subject,
                image=references[0],
                source_prompt=f"a {class_word}",
                target_prompt=" ".join(prompt.format("", class_word).split()),
                references=references,
                subject_word=TOKEN,
                class_word=class_word,
            )
            for number, prompt in enumerate(prompts)
        ]
    return cases


PEOPLE, PHOTOS = "people", 6
"""Photos that a person is learned from in Gu et al. 2025 (section 3.4.2), of ten."""
PEOPLE_PROMPTS = (
    "a photo of a {}",
    "a {} on the beach",
    "a {} in the snow",
    "a {} reading a book in a library",
    "a {} wearing a red hat",
    "a {} wearing a suit and a tie",
    "a {} wearing sunglasses and a leather jacket",
    "a {} riding a bicycle",
    "a {} sitting on a chair, arms crossed",
    "a {} and a friend in a cafe",
    "a {} with a dog and a cat",
    "a {} at a table with a cake and a cup of coffee",
)
"""Ours, in the paper's manner: "single people, multiple people, and multiple objects, as well as requirements for
clothing and poses" (section 3.3.1). The paper does not print its twelve."""


def read_people(folder: Path) -> list[EditCase]:
    """People with photos and prompts, in the form of Gu et al. 2025 (section 2.3): 27 people, ten photos, 12 prompts.

        PERSON/*.jpg            photos of one person, in the order of their names
        PERSON/class_word.txt   "woman", "man", "boy" ...; "person" without it
        prompts.txt             a prompt a line with {} for the class word; PEOPLE_PROMPTS without it

    The dataset asks for new images and has none to edit: the case's image is the person's first.

    Raises:
        IdentityEditError: naming what is missing or damaged.
    """
    listed = folder / "prompts.txt"
    lines = read_text(listed, "the folder of the people").splitlines() if listed.exists() else PEOPLE_PROMPTS
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts or not all("{}" in prompt for prompt in prompts):
        raise IdentityEditError(f"{listed} has a line without {{}}, or none; write {{}} for the class word in each.")
    cases = []
    for person in sorted(path for path in folder.iterdir() if path.is_dir()):
        references, word = images_in(person), person / "class_word.txt"
        class_word = read_text(word, "").strip() if word.exists() else "person"
        cases += [
            EditCase(
                name=file_name(f"{person.name}-{number:02}"),
                group=person.name,
                image=references[0],
                source_prompt=f"a {class_word}",
                target_prompt=prompt.replace("{}", class_word),
                references=references,
                subject_word=TOKEN,
                class_word=class_word,
            )
            for number, prompt in enumerate(prompts)
        ]
    if not cases:
        raise IdentityEditError(f"{folder} holds no folder of a person; choose the folder that holds them.")
    return cases


def parse_prompts_and_classes(lines: Sequence[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """(class word by subject, prompts for objects, prompts for live subjects); a prompt has {0} for the token and {1}
    for the class word."""
    classes: dict[str, str] = {}
    prompts: dict[str, list[str]] = {"Object Prompts": [], "Live Subject Prompts": []}
    section = ""
    for line in lines:
        quoted = re.match(r"""['"](.*\{0\} \{1\}.*)['"]\.format""", line)
        if line in ("Classes", *prompts):
            section = line
        elif section == "Classes" and "," in line and line != "subject_name,class":
            subject, class_word = line.split(",", 1)
            classes[subject.strip()] = class_word.strip()
        elif section in prompts and quoted:
            prompts[section].append(quoted[1])
    return classes, prompts["Object Prompts"], prompts["Live Subject Prompts"]


READERS: dict[str, Callable[[Path, Path], list[EditCase]]] = {
    "pie-bench": read_pie_bench,
    "tedbench": lambda folder, masks: read_tedbench(folder),
    "lipe": lambda folder, masks: read_lipe(folder),
    "dreambooth": lambda folder, masks: read_dreambooth(folder),
    PEOPLE: lambda folder, masks: read_people(folder),
}
"""By the dataset's name: reader of (its folder, a folder for masks)."""


def read_dataset(name: str, folder: Path, masks: Path) -> list[EditCase]:
    """All cases of a dataset in its own order, their names unique.

    Raises:
        IdentityEditError: naming what is missing or damaged.
    """
    if not folder.is_dir():
        raise IdentityEditError(f"The folder {folder} does not exist; choose the folder of the dataset {name}.")
    cases = READERS[name](folder, masks)
    names: set[str] = set()
    for case in cases:
        if case.name.lower() in names:
            raise IdentityEditError(f"{folder} holds two cases named {case.name}; download the dataset again.")
        names.add(case.name.lower())
    return cases


# -- files ----------------------------------------------------------------------------------------------------------


def read_text(path: Path, choose: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise IdentityEditError(f"{path} is missing; choose {choose}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise IdentityEditError(f"{path} cannot be read as text; download the dataset again.") from error


def read_json(path: Path, kind: type, choose: str) -> Any:
    """What a JSON file holds, a dict or a list with something in it."""
    try:
        content = json.loads(read_text(path, choose))
    except (ValueError, RecursionError) as error:
        if isinstance(error, IdentityEditError):
            raise
        raise IdentityEditError(f"{path} is not sound JSON; download the dataset again.") from error
    if not isinstance(content, kind) or not content:
        raise IdentityEditError(f"{path} does not hold a {kind.__name__} of entries; download the dataset again.")
    return content


def text_of(item: Any, key: str, where: str) -> str:
    """A text of an entry."""
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(value, str):
        raise IdentityEditError(f"{where} has no text {key}; download the dataset again.")
    return value


def file_name(name: str) -> str:
    """The name of a case as a file name on every system."""
    return re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", name) or "_"


def inside(folder: Path, relative: str, where: str) -> Path:
    """A path below the folder, links followed."""
    parts = (*PurePosixPath(relative).parts, *PureWindowsPath(relative).parts)
    is_absolute = PurePosixPath(relative).is_absolute() or bool(PureWindowsPath(relative).anchor)
    path = folder / relative
    if not relative or "\0" in relative or is_absolute or ".." in parts:
        raise IdentityEditError(f"{where} names {relative!r}, which is no path inside of {folder}; correct it there.")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise IdentityEditError(f"{where} names {relative!r}, a link out of {folder}; put the file itself there.")
    return path


def file_inside(folder: Path, relative: str, where: str) -> Path:
    path = inside(folder, relative, where)
    if not path.is_file():
        raise IdentityEditError(f"{where} names {relative}, which {folder} does not hold; download the dataset again.")
    return path


def folder_inside(folder: Path, relative: str, where: str) -> Path:
    path = inside(folder, relative, where)
    if not path.is_dir():
        raise IdentityEditError(
            f"{where} names the folder {relative}, which {folder} does not hold; download it again."
        )
    return path


def images_in(folder: Path) -> tuple[Path, ...]:
    """The images of a folder by name, at least one."""
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGES and path.is_file())
    if not found:
        raise IdentityEditError(f"{folder} contains no images; add the subject's.")
    return tuple(found)
