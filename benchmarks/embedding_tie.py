"""What does HiFi Tuner's regularization (eq. 6) buy? `python -m benchmarks embedding_tie`.

Five rows of the text embedding learn a subject that the demo checkpoint has never seen from four images in one and the
same place, without a mask, so that the place can enter them, and draw the subject in the other places. The rows of the
table differ in the weight w_s of the squared distance to the empty prompt's embedding alone; all start from the same
noise. Wang et al. 2023 have no table for it; they say that it keeps the subject's embedding from overfitting.
Scores as of `hifi_tuner`, and the share of images in whose place the attribute classifier sees the photographs'.
Writes benchmarks/results/embedding_tie.json, .md and .jpg (two prompts of each subject, then two photographs).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from identity_edit_pack.demo_world.images import EVALUATION_SEED
from identity_edit_pack.pipelines.hifi_tuner.subject_embedding import OUTPUT
from tqdm import tqdm

from .demo_worlds import PROMPTS, WORLD, world_of
from .edits import PAPER_SCORES, Sheet, report_table
from .harness import Options
from .hifi_subjects import render_source, score, seen
from .hifi_tuner import (
    HARDER_COLUMNS,
    SUBJECT_COLUMNS,
    SUBJECT_OPTIONS,
    Run,
    begin,
    first_pass,
    learned,
    training_images,
    way_of_subject,
)
from .lipe_edit import Checkpoint, caption_with, subjects_of_seeds
from .orders import Cases, Claim, orders_section, shared_options


def row_of(weight: float) -> str:
    return f"w_s {weight:g}"


CLAIMS = tuple(
    Claim("equation 6", row_of(weight), row_of(0.0), score)
    for weight in (1e-6, 1e-5)
    for score in ("text_similarity", "clip_t", "identity_kept", "feature_similarity")
)
"""The last two are the price."""


OPTIONS: Options = {
    **shared_options(2, "embedding_tie"),
    **SUBJECT_OPTIONS,
    **WORLD,
    "subjects": (4, "unseen subjects for each seed (4)"),
    "prompts": (len(PROMPTS), f"the first of {len(PROMPTS)}, less those in the photographs' place (all)"),
    "weights": ([0.0, 1e-6, 1e-5], "w_s (0, 1e-6, 1e-5)"),
    "images": (1, "images for each prompt (1)"),
}


def in_one_place(run: Run) -> Run:
    """Photographs that all show the place of the first, and the prompts that ask for another."""
    place = run.sources[0].shown.place
    shown = [source.shown.replace(place=place) for source in run.sources]
    sources = [render_source(each, EVALUATION_SEED + index) for index, each in enumerate(shown)]
    elsewhere = [index for index, asked in enumerate(run.asked) if asked.place != place]
    return dataclasses.replace(
        run, sources=sources, asked=[run.asked[index] for index in elsewhere], start=run.start[elsewhere]
    )


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    world = world_of(arguments)
    base, classifier = Checkpoint(*world.checkpoint(arguments.checkpoint)), world.classifier()
    subjects = subjects_of_seeds(arguments)
    cases = Cases(arguments, list(subjects))
    sheet = Sheet(cases)
    for unit in tqdm(cases.left, unit="subject"):
        seed, subject = subjects[unit]
        run = in_one_place(begin(base, subject, argparse.Namespace(**{**vars(arguments), "seed": seed})))
        images, sources = training_images(run), torch.stack([source.image for source in run.sources])
        prompts = [caption_with(asked, subject.species) for asked in run.asked]
        rows, shown = {}, {}
        for weight in arguments.weights:
            found = learned(run, images, kind=OUTPUT, masked=False, regularization_weight=weight, updates_per_step=0)
            with torch.no_grad():
                made = base.vae.decode(first_pass(run, way_of_subject(run, found))).cpu()
            rows[row_of(weight)] = [
                {**scores, "place_of_photographs": float(what["place"] == run.sources[0].shown.place)}
                for scores, what in zip(
                    score(classifier, made, run.asked, sources, prompts, world.asked),
                    seen(classifier, made),
                    strict=True,
                )
            ]
            shown[row_of(weight)] = made[[0, len(made) // 2]]
        cases.add(rows)
        sheet.add({**shown, "photographs": sources[:2]})
        yield cases.figures()


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    is_harder = arguments.world == "harder"
    columns = (HARDER_COLUMNS if is_harder else SUBJECT_COLUMNS) | {"place_of_photographs": "place of the photographs"}
    claims = [claim for claim in CLAIMS if not (is_harder and claim.score in PAPER_SCORES)]
    return [
        f"The regularization of HiFi Tuner's embeddings on unseen subjects of the {world_of(arguments).title}",
        f"{arguments.seeds} seeds from {arguments.seed} on, {arguments.subjects} subjects each, learned from four "
        f"images in one place without a mask in {arguments.training_steps} steps of batch {arguments.batch_size} at "
        f"learning rate {arguments.embedding_learning_rate:g}, and drawn in other places ({figures['cases']} images a "
        f"row); {arguments.steps} steps of DDIM, guidance {arguments.guidance_scale:g}; {figures['minutes']:.0f} "
        "minutes.",
        *report_table(figures["rows"], columns),
        *orders_section((), claims, figures, "Wang et al. 2023"),
    ]
