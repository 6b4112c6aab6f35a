"""Does another subject take the place of an image's? `python -m benchmarks subject_replacement`.

Algorithm 3 of Wang et al. 2023 on images of other animals of the demo world, whose caption names the animal alone,
with subjects that the demo checkpoint has never seen, learned as in hifi_tuner.py ("+ step-wise").

The attribute classifier must see the new subject (its species, color and pattern) in the pose of the old one, and the
background (outside of the true masks of both) must be the image's. Beside the algorithm as the paper has it, with the
image's attention at every step: the same for the first part of the steps, and the same noise and null-text
embeddings without any attention control.
Writes benchmarks/results/subject_replacement.json, .md and .jpg (two images of each subject).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from identity_edit_pack.demo_world.classifier import load_classifier
from identity_edit_pack.pipelines.hifi_tuner.subject_embedding import OUTPUT, SubjectEmbedding, apply_subject
from identity_edit_pack.pipelines.hifi_tuner.subject_replacement import subject_replacement
from identity_edit_pack.pipelines.inversion.inversion import Inversion, invert_image, sample_inversion
from identity_edit_pack.pipelines.inversion.null_text import ADAPTIVE, null_text_optimization
from tqdm import tqdm

from .edits import Pair, Sheet, embed, report_table
from .harness import Options, load_checkpoint
from .hifi_subjects import draw_replacements, score_replacement
from .hifi_tuner import SUBJECT_OPTIONS, begin, learned, training_images
from .lipe_edit import Checkpoint, caption_with, subjects_of_seeds
from .orders import Cases, Claim, orders_section, shared_options

WITHOUT_CONTROL, ALGORITHM_3 = "without attention control", "algorithm 3"


def row_name(share: float) -> str:
    return ALGORITHM_3 if share == 1.0 else f"{ALGORITHM_3}, in the first {share:.0%} of the steps"


CLAIMS = (
    Claim("algorithm 3, the rest of the image", ALGORITHM_3, WITHOUT_CONTROL, "background_psnr_db"),
    Claim("algorithm 3, the new subject", ALGORITHM_3, WITHOUT_CONTROL, "subject_replaced"),
    Claim("this pack's cross_replace_steps", row_name(0.4), ALGORITHM_3, "subject_replaced"),
    Claim("this pack's cross_replace_steps", row_name(0.4), WITHOUT_CONTROL, "background_psnr_db"),
)
"""The paper shows images of replacements, and no figures."""


def replace_subjects(
    base: Checkpoint, species: str, subject: SubjectEmbedding, pairs: list[Pair], arguments: Any
) -> dict[str, torch.Tensor]:
    """Latents of every row."""
    source_prompts = [caption_with(pair.source, pair.source.species) for pair in pairs]
    with torch.no_grad():
        encoded = base.vae.encode(torch.stack([pair.before for pair in pairs]))
    positive, negative = embed(base.clip, source_prompts), embed(base.clip, [""])
    plain = invert_image(base.model, encoded, positive, steps=arguments.steps)
    null_text = null_text_optimization(
        base.model, plain, positive, negative, guidance_scale=arguments.guidance_scale, method=ADAPTIVE
    )
    inversion = plain.with_embeddings(null_text.embeddings)
    made: dict[str, list[torch.Tensor]] = {}
    for index, (pair, source_prompt) in enumerate(zip(pairs, source_prompts, strict=True)):
        own = one_image(inversion, index)
        prompt = caption_with(pair.target, species)
        with torch.no_grad():
            model, target, _ = apply_subject(base.model, base.clip, subject, prompt)
        plainly = sample_inversion(model, own, target, negative, guidance_scale=arguments.guidance_scale)
        made.setdefault(WITHOUT_CONTROL, []).append(plainly)
        for share in arguments.cross_replace_steps:
            replaced = subject_replacement(
                model, base.clip, own, source_prompt, prompt, target, subject_words=species,
                subject_tokens=subject.tokens, cross_replace_steps=share,
            )  # fmt: skip
            made.setdefault(row_name(share), []).append(replaced.latent)
    return {name: torch.cat(latents) for name, latents in made.items()}


def one_image(inversion: Inversion, index: int) -> Inversion:
    """The inversion of one image of a batch."""
    table = inversion.embeddings
    assert table is not None
    pooled = None if table.pooled is None else table.pooled[:, index : index + 1]
    own = dataclasses.replace(table, embeddings=table.embeddings[:, index : index + 1], pooled=pooled)
    return dataclasses.replace(inversion, trajectory=inversion.trajectory[:, index : index + 1], embeddings=own)


OPTIONS: Options = {
    "replacements": (6, "images of others a subject (6)"),
    "cross_replace_steps": ([1.0, 0.4], "shares of the steps (1 0.4)"),
    **shared_options(2, "subject_replacement"),
    **SUBJECT_OPTIONS,
    "subjects": (4, "unseen subjects for each seed (4)"),
    "guidance_scale": (1.5, "of all sampling (1.5)"),
}


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    arguments.prompts = arguments.images = 1  # of `begin`; nothing is drawn from prompts here
    base = Checkpoint(*load_checkpoint(arguments.checkpoint))
    classifier = load_classifier()
    subjects = subjects_of_seeds(arguments)
    cases = Cases(arguments, list(subjects))
    sheet = Sheet(cases)
    for unit in tqdm(cases.left, unit="subject"):
        seed, of = subjects[unit]
        run = begin(base, of, argparse.Namespace(**{**vars(arguments), "seed": seed}))
        subject = learned(
            run, training_images(run), kind=OUTPUT, masked=True, updates_per_step=arguments.updates_per_step,
            regularization_weight=arguments.regularization_weight,
        )  # fmt: skip
        pairs = draw_replacements(of, arguments.replacements, seed)
        latents = replace_subjects(base, of.species, subject, pairs, arguments)
        with torch.no_grad():
            images = {name: base.vae.decode(made).cpu() for name, made in latents.items()}
        images["renderer"] = torch.stack([pair.after for pair in pairs])
        cases.add({name: score_replacement(classifier, made, pairs) for name, made in images.items()})
        before = torch.stack([pair.before for pair in pairs])
        rows = {"subject": run.sources[0].image.expand(2, -1, -1, -1), "before": before, **images}
        sheet.add({name: made[:2] for name, made in rows.items()})
        yield cases.figures()


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    columns = {
        "subject_replaced": "subject replaced",
        "species_replaced": "species",
        "identity_attributes": "attributes",
        "pose_kept": "pose kept",
        "background_psnr_db": "background PSNR",
    }
    return [
        "Subject replacement on unseen subjects of the demo world",
        f"{arguments.seeds} seeds from {arguments.seed} on, {arguments.subjects} subjects each, {figures['cases']} "
        f"images a row; embeddings {arguments.training_steps} steps of batch {arguments.batch_size} at learning rate "
        f"{arguments.embedding_learning_rate:g} and {arguments.updates_per_step} for each of {arguments.steps} DDIM "
        f"steps; guidance {arguments.guidance_scale:g}; {figures['minutes']:.0f} minutes.",
        *report_table(figures["rows"], columns),
        *orders_section((), CLAIMS, figures, "Wang et al. 2023"),
        "",
        "Rows of the image: the subject, the image, and the rows of the table in their order.",
    ]
