"""Edit a published dataset with the methods of the field and score the results: one command, one table.

    python -m benchmarks score_edits --dataset demo --methods ddim null-text-7.5 masactrl
    python -m benchmarks score_edits --dataset pie-bench --folder data --checkpoint sd-v1-4.safetensors \\
        --methods img2img masactrl prompt-to-prompt --clip clip-vit-large-patch14 --structure dino-vitb8 \\
        --models ComfyUI/models --lpips SqueezeNet --keep kept
    python -m benchmarks score_edits --dataset tedbench --folder tedbench --edited tedbench/imagic \\
        --clip clip-vit-large-patch14

`--dataset` is one of pie-bench, tedbench, lipe, dreambooth, people (folders in their published form, see datasets.py;
nothing is downloaded) and demo, which the demo world draws: edits of subjects that nothing was trained on, with the
true edits known. `--methods` are those of methods.py; `--list` names them. `--edited` scores images that exist already,
found by the names of the cases. Every table has the unchanged source image as a row, and the true edit where it is
known. With `--keep` a run that was stopped goes on. `--ray` spreads the edits over several processes of this machine,
`--ray ADDRESS` over a Ray cluster (`ray start` on every machine; the pack and the images are sent to them, the
checkpoint and COMFYUI_PATH are in the same place on all). Scores need the networks that are given, local folders in the
form of transformers (`--clip`, `--dino`, `--dinov2`, `--structure`) or files of `--models` (a ComfyUI models folder):
`--lpips`, `--fid` and `--aesthetic` of its image_scores, `--arcface` and `--face-detector` of its insightface. The demo
dataset is scored by the demo world's own CLIP, whose figures say nothing beside those of a published CLIP.

Parts of images are compared by PIE-Bench's rule for pie-bench, else by the mean over the part (`--rule`).

Published figures to compare with, each with the papers' own checkpoints, images and scorers; this command has not
measured them:

- LIPE (Liu et al. 2024, table 2, on their dataset with SDXL), DINOv2-I / CLIP-I / CLIP-T / CLIP-D: LIPE .8848 / .9247 /
  .2331 / .0807; DreamCtrl .7804 / .8517 / .2304 / .0433; Imagic .6961 / .7356 / .2310 / .0138; MasaCtrl .6027 / .7425 /
  .2628 / .0178.
- HiFi Tuner (Wang et al. 2023, on the DreamBooth dataset with Stable Diffusion 1.4), DINO / CLIP-I / CLIP-T: textual
  inversion .569 / .780 / .255, with HiFi Tuner .665 / .807 / .291; DreamBooth .668 / .803 / .305, with HiFi Tuner
  .680 / .809 / .317.
- MCDM (Chen et al. 2024, on their portraits), SSIM / LPIPS / FID: costumes .791 / .633 / 52.56, expressions .943 / .400
  / 22.09; DiffEdit .722 / .721 / 93.52.
- PIDiff (Gu et al. 2025, on 27 people), ArcFace ID / LPIPS / CLIP-T: textual inversion .1123 / .6717 / .1063;
  DreamBooth .2498 / .6778 / .1751; PIDiff .3112 / .5936 / .1938.

Writes benchmarks/results/NAME.json (the values of every case), NAME.md and NAME.jpg (the first cases).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from identity_edit_pack.demo_world.clip import CLIP_FOLDER
from identity_edit_pack.pipelines.faces.detection import load_detector
from identity_edit_pack.pipelines.faces.similarity import load_recognizer
from identity_edit_pack.pipelines.scores.definitions import PIE_BENCH_PARTS, PLAIN_PARTS
from identity_edit_pack.pipelines.scores.edit_scores import PIE_BENCH, PLAIN, RULES, open_networks
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from tqdm import tqdm

from ..benchmarks import edits
from ..benchmarks.harness import RESULTS, Options, made_by, markdown, write_results
from . import demo_dataset as edit_dataset_demo
from .cases import EditCase
from .datasets import PEOPLE, PHOTOS, READERS, read_dataset
from .editing import FILES, HERE, NUMBERS, Editor, Task, add_model_folders
from .methods import METHODS
from .scoring import (
    SOURCE,
    TARGET,
    EditedFolder,
    Images,
    KeptImages,
    MethodScores,
    figure,
    figures_of,
    means_by_group,
    score_case,
    set_scores,
    sheet,
    table,
)

DEMO = "demo"
DEMO_SIZE, USUAL_SIZE = 128, 512
SHEET_SIDE, SHEET_COLUMNS = 128, 12
NEW_IMAGES = ("dreambooth", PEOPLE)
"""Datasets that ask for new images of a subject, not for edits."""
PARTS = {PLAIN: PLAIN_PARTS, PIE_BENCH: PIE_BENCH_PARTS}


OPTIONS: Options = {
    "list": (False, "name the methods, and stop"),
    "dataset": (DEMO, "what is edited", {"choices": (*READERS, DEMO)}),
    "folder": (None, "the dataset's folder; for demo where it is written (temporary)", {"type": Path}),
    "cases": (None, "how many cases (all; demo: 21)", {"type": int}),
    "start": (0, "the first of them (0)"),
    "checkpoint": (None, "an SD 1.x, 2.x or XL checkpoint (the demo world's)", {"type": Path}),
    "size": (None, "width and height of the images (512; demo: 128)", {"type": int}),
    "methods": ([], "see --list", {"type": str, "nargs": "*", "metavar": "METHOD"}),
    "edited": ([], "folders of images that exist already", {"type": Path, "nargs": "*"}),
    "keep": (None, "keep the made images here, and go on with what it holds", {"type": Path}),
    "seed": (0, "of all noise (0)"),
    "set": ([], f"any of {', '.join(sorted(NUMBERS))}", {"type": str, "nargs": "*", "metavar": "NAME=NUMBER"}),
    "ray": (None, "spread edits over workers by Ray: of the cluster ADDRESS, or of this machine",
            {"nargs": "?", "const": HERE, "metavar": "ADDRESS"}),
    "workers": (2, "with --ray, how many at once (2)"),
    "gpus": (0.0, "with --ray, GPUs for each worker"),
    **{name: (None, f"the {what} that some methods need", {"type": Path}) for name, what in FILES.items()},
    "references": (None, "a subject's images that methods learn from (all; people: 6)", {"type": int}),
    **{name: (None, "folder of the network (transformers)", {"type": Path})
       for name in ("clip", "dino", "dinov2", "structure")},
    "models": (None, "a ComfyUI models folder with image_scores and insightface", {"type": Path}),
    **dict.fromkeys(("lpips", "fid", "aesthetic", "arcface", "face_detector"), (None, "a network's name in --models")),
    "rule": (None, "how parts are compared (pie-bench: PIE-Bench)", {"choices": RULES}),
    "name": (None, "of the results (edits_DATASET)"),
}  # fmt: skip


def read_cases(arguments: argparse.Namespace, temporary: Path) -> list[EditCase]:
    """The chosen cases."""
    masks = temporary / "masks"
    start, stop = arguments.start, None if arguments.cases is None else arguments.start + arguments.cases
    if arguments.dataset == DEMO:
        folder = arguments.folder or temporary / "demo"
        stop = stop or start + 3 * len(edit_dataset_demo.KINDS)
        edit_dataset_demo.write_demo_dataset(folder, stop)
        cases = edit_dataset_demo.read_demo_dataset(folder, masks)
    elif arguments.folder is None:
        raise IdentityEditError(f"--folder is missing; give the folder of the dataset {arguments.dataset}.")
    else:
        cases = read_dataset(arguments.dataset, arguments.folder, masks)
    chosen = cases[start:stop]
    if not chosen:
        raise IdentityEditError(f"--start {start} leaves none of {len(cases)} cases; choose a smaller number.")
    count = arguments.references or (PHOTOS if arguments.dataset == PEOPLE else None)
    return [dataclasses.replace(case, references=case.references[:count]) for case in chosen]


def made_images(arguments: argparse.Namespace, cases: list[EditCase], size: int, keep: Path) -> dict[str, Images]:
    """Edit all cases by all methods; what reads the images, by method."""
    editor = Editor(arguments, size)
    kept = KeptImages(keep, editor.settings_of_images())
    tasks, left_out = [], {}
    for case in cases:
        for name in arguments.methods:
            if lacking := METHODS[name].lacks(case, editor.settings):
                left_out[name] = ", ".join(lacking)
            elif not kept.path(name, case).exists():
                tasks.append(Task(name, case))
    for task, image in tqdm(editor.images(tasks), total=len(tasks), unit="edit", disable=not tasks):
        kept.add(task.method, task.case, image)
    for name, lacking_words in left_out.items():
        print(f"{name} is left out where it lacks {lacking_words}.")
    return {name: functools.partial(kept.load, name, size=size) for name in arguments.methods}


def existing_images(arguments: argparse.Namespace, cases: list[EditCase], size: int) -> dict[str, Images]:
    """What reads the images of --edited, by the folder's name."""
    found: dict[str, Images] = {}
    for folder in arguments.edited:
        edited = EditedFolder(folder)
        if not any(case.name in edited.paths for case in cases):
            raise IdentityEditError(f"{folder} holds no image named like a case, as {cases[0].name} is; rename them.")
        found[folder.name] = functools.partial(edited.load, size=size)
    return found


@contextlib.contextmanager
def networks_of(arguments: argparse.Namespace) -> Any:
    """What scores; the demo world's CLIP for its dataset where no other is given."""
    add_model_folders(arguments)
    clip = arguments.clip or (CLIP_FOLDER if arguments.dataset == DEMO else None)
    folders = {name: getattr(arguments, name) for name in ("dino", "dinov2", "structure")} | {"clip": clip}
    with open_networks(
        **{name: None if folder is None else str(folder) for name, folder in folders.items()},
        lpips=arguments.lpips,
        aesthetic=arguments.aesthetic,
        inception=arguments.fid,
        face_recognizer=None if arguments.arcface is None else load_recognizer(arguments.arcface),
        face_detector=None if arguments.face_detector is None else load_detector(arguments.face_detector),
    ) as networks:
        yield networks


def scored(
    arguments: argparse.Namespace, cases: list[EditCase], rows: dict[str, Images], size: int, rule: str
) -> tuple[dict[str, MethodScores], dict[str, dict[str, float]]]:
    """Score every row of images; methods without any are left out."""
    methods = {name: MethodScores() for name in rows}
    others: list[torch.Tensor] = []
    with networks_of(arguments) as networks:
        inception, networks = networks.inception, dataclasses.replace(networks, inception=None)
        for case in tqdm(cases, unit="case", desc="scoring"):
            if inception is not None:
                others.append(inception.features([case.load_image(size)[0]]))
            for name, images in rows.items():
                edited = images(case)
                if edited is None:
                    continue
                compare_source = arguments.dataset not in NEW_IMAGES
                scores = score_case(edited, case, networks, size=size, rule=rule, compare_source=compare_source)
                methods[name].add(case, scores)
                if inception is not None:
                    methods[name].features.append(inception.features([edited[0]]))
    found = {name: scores for name, scores in methods.items() if scores.values}
    return found, {name: set_scores(scores, others) for name, scores in found.items()}


def write_report(arguments: argparse.Namespace, cases: list[EditCase], rows: dict[str, Images], size: int) -> None:
    """Score every row of images, and write the results."""
    rule = arguments.rule or (PIE_BENCH if arguments.dataset == "pie-bench" else PLAIN)
    methods, sets = scored(arguments, cases, rows, size, rule)
    rows = {name: rows[name] for name in methods}
    lines = [
        f"# Edits of {arguments.dataset}, scored",
        "",
        f"{made_by()}: {len(cases)} cases from number {arguments.start} on, {size} pixels. Inside and outside of a "
        f"mask: {PARTS[rule]}.",
        "",
        *table(methods, sets),
    ]
    by_group = list(means_by_group(methods, cases))
    shown = [name for name in ("CLIP-T", "CLIP-D", "SSIM", "PSNR outside") if any(name in row[3] for row in by_group)]
    if by_group and arguments.dataset not in NEW_IMAGES:
        groups = (
            (group, count, name, *(figure(score, means.get(score, float("nan"))) for score in shown))
            for group, count, name, means in by_group
        )
        lines += ["", *markdown(("kind of edit", "cases", "method", *shown), groups)]
    lines += ["", f"Rows of the sheet: {', '.join(rows)}; the first cases."]
    figures = {"dataset": arguments.dataset, "seed": arguments.seed, "size": size, "rule": rule}
    name = arguments.name or f"edits_{arguments.dataset.replace('-', '_')}"
    write_results(name, {**figures, "methods": figures_of(methods, sets)}, lines)
    edits.save_sheet(RESULTS / f"{name}.jpg", sheet(rows, cases[:SHEET_COLUMNS], SHEET_SIDE), SHEET_COLUMNS)


def main(arguments: argparse.Namespace) -> None:
    if arguments.list:
        for name, method in METHODS.items():
            needs = f" (needs {', '.join(method.needs)})" if method.needs else ""
            print(f"{name}: {method.description} [{method.source}]{needs}")
        return
    size = arguments.size or (DEMO_SIZE if arguments.dataset == DEMO else USUAL_SIZE)
    with tempfile.TemporaryDirectory(prefix="score-edits-") as temporary:
        cases = read_cases(arguments, Path(temporary))
        rows: dict[str, Images] = {SOURCE: functools.partial(EditCase.load_image, size=size)}
        if cases[0].target is not None:
            rows[TARGET] = functools.partial(EditCase.load_target, size=size)
        with networks_of(arguments):
            pass  # what is missing is said before any image is made; the memory is free for making them
        rows |= made_images(arguments, cases, size, arguments.keep or Path(temporary) / "kept")
        rows |= existing_images(arguments, cases, size)
        write_report(arguments, cases, rows, size)
