"""How much of a reference should be blended in? `python -m benchmarks reference_blending`.

Reference guidance (algorithm 2 of Wang et al. 2023) on the flow checkpoint, of subjects with a pattern that it has
never seen. Nothing is learned: the prompts of `hifi_tuner` say the subject's species and color, and its pattern has to
come from a photograph in the prompt's pose. The subject in the first pass is found by the model's attention, the
photograph is laid over it, inverted by the fixed point, and leads a second pass from the same noise. At guidance scale
1, as with distilled guidance, a share of the reference's estimate is blended into each guided step; the rows differ in
this share alone. With true guidance the unconditional embedding is optimized with the adaptive step size instead.
Scores as of `hifi_tuner`.
Writes benchmarks/results/reference_blending.json, .md and .jpg (two prompts of each subject).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from identity_edit_pack.demo_world.attributes import COLORS, PATTERNS, PLACE_PHRASES, Attributes, caption
from identity_edit_pack.demo_world.classifier import load_classifier
from identity_edit_pack.demo_world.images import EVALUATION_SEED
from identity_edit_pack.pipelines.hifi_tuner.reference_alignment import align_reference
from identity_edit_pack.pipelines.hifi_tuner.reference_guidance import reference_guided_sampling
from identity_edit_pack.pipelines.inversion.inversion import invert_image
from identity_edit_pack.pipelines.inversion.methods import FIXED_POINT
from identity_edit_pack.pipelines.lipe.attention_segmentation import attention_masks
from identity_edit_pack.pipelines.lipe.identity_prompt import identity_in_caption
from tqdm import tqdm

from .demo_worlds import PROMPTS
from .edits import Sheet, embed, report_table
from .harness import ROOT, SEED, Options, load_checkpoint
from .hifi_subjects import render_source, score
from .hifi_tuner import SUBJECT_COLUMNS, Run, Way, begin, first_pass
from .lipe_edit import SPECIES, Checkpoint, subjects_of_seeds
from .orders import Cases, shared_options

FLOW_CHECKPOINT = ROOT / "demo_world/weights/identity-edit-demo-flow.safetensors"
OPTIONS: Options = {
    **shared_options(2, "reference_blending"),
    "subjects": (4, "unseen subjects for each seed (4)"),
    "prompts": (8, f"the first of {len(PROMPTS)} (8)"),
    "images": (1, "images for each prompt (1)"),
    "steps": (20, "Euler steps (20)"),
    "guidance_scale": (4.0, "of true guidance (4)"),
    "inner_steps": (4, "J of algorithm 2 (4)"),
    "blending": ([0.0, 0.1, 0.25, 0.5, 0.75, 1.0], "shares of the reference in each guided step"),
    "checkpoint": (FLOW_CHECKPOINT, "a checkpoint of the demo world with a flow model"),
    **SEED,
}


def blended_row(share: float) -> str:
    return f"guidance 1, blending {share:g}"


def rows_of(arguments: argparse.Namespace) -> list[str]:
    scale = f"guidance {arguments.guidance_scale:g}"
    blended = [blended_row(share) for share in arguments.blending]
    return ["guidance 1, first pass", *blended, f"{scale}, first pass", f"{scale}, optimized", f"{scale}, blending 0.5"]


def patterned_subjects(count: int, seed: int) -> list[Attributes]:
    """Different held-out subjects with a pattern; there are seven."""
    every = itertools.product(SPECIES, COLORS, PATTERNS)
    found = [Attributes(species=species, color=color, pattern=pattern) for species, color, pattern in every]
    patterned = [subject for subject in found if subject.held_out and subject.pattern != "plain"]
    return random.Random(f"blended subjects {seed}").sample(patterned, count)


def without_pattern(asked: Attributes) -> str:
    return caption(asked.replace(pattern="plain"))


@torch.no_grad()
def found_masks(run: Run, latents: torch.Tensor) -> torch.Tensor:
    """M_g [B, 128, 128] as Segment Subject finds it, with the subject's word of the prompt against the place's."""
    masks = []
    for latent, asked in zip(latents, run.asked, strict=True):
        text = without_pattern(asked)
        identity = identity_in_caption(run.base.clip, run.species, text, PLACE_PHRASES[asked.place])
        masks.append(attention_masks(run.base.model, latent[None], identity, embed(run.base.clip, [text]), (128, 128)))
    return torch.cat(masks)


def aligned_references(run: Run, images: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each image the photograph in its pose, laid over the subject [B, 128, 128, 3], and its mask [B, 128, 128]."""
    by_pose = {source.shown.pose: source for source in run.sources}
    found = [
        align_reference(by_pose[asked.pose].image, by_pose[asked.pose].mask, mask, image)
        for asked, mask, image in zip(run.asked, masks, images, strict=True)
    ]
    return torch.stack([each.image for each in found]).clamp(0, 1), torch.stack([each.mask for each in found])


def second_passes(
    run: Run, way: Way, latents: torch.Tensor, settings: list[dict[str, Any]]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Images of a second pass for each of some settings of `reference_guided_sampling`, and the references."""
    base, arguments = run.base, run.arguments
    with torch.no_grad():
        images = base.vae.decode(latents).cpu()
    references, masks = aligned_references(run, images, found_masks(run, latents))
    with torch.no_grad():
        encoded = base.vae.encode(references)
    by_pose = {source.shown.pose: source.shown for source in run.sources}
    prompts = embed(base.clip, [caption(by_pose[asked.pose]) for asked in run.asked])
    inversion = invert_image(base.model, encoded, prompts, sigmas=run.schedule.sigmas, method=FIXED_POINT)
    made = []
    for each in settings:
        found = reference_guided_sampling(
            base.model, run.start, inversion, masks, way.positive, run.negative,
            guidance_scale=arguments.guidance_scale, **each,
        )  # fmt: skip
        with torch.no_grad():
            made.append(base.vae.decode(found.latent).cpu())
    return [images, *made], references


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base = Checkpoint(*load_checkpoint(arguments.checkpoint))
    classifier = load_classifier()
    subjects = subjects_of_seeds(arguments, patterned_subjects)
    cases = Cases(arguments, list(subjects))
    sheet = Sheet(cases)
    for unit in tqdm(cases.left, unit="subject"):
        seed, subject = subjects[unit]
        run = begin(base, subject, argparse.Namespace(**{**vars(arguments), "seed": seed}))
        prompts = [without_pattern(asked) for asked in run.asked]
        way = Way(base.model, base.model, base.clip, embed(base.clip, prompts))
        made, references = [], []
        for scale, settings in (
            (1.0, [{"blending": share} for share in arguments.blending]),
            (arguments.guidance_scale, [{"inner_steps": arguments.inner_steps}, {"inner_steps": 0, "blending": 0.5}]),
        ):
            guided = dataclasses.replace(
                run, arguments=argparse.Namespace(**{**vars(run.arguments), "guidance_scale": scale})
            )
            drawn, aligned = second_passes(guided, way, first_pass(guided, way), settings)
            made += drawn
            references.append(aligned)
        sources = torch.stack([source.image for source in run.sources])
        images = dict(zip(rows_of(arguments), made, strict=True))
        true = [render_source(asked, EVALUATION_SEED + index).image for index, asked in enumerate(run.asked)]
        images["renderer"] = torch.stack(true)
        cases.add({row: score(classifier, shown, run.asked, sources, prompts) for row, shown in images.items()})
        rows = {"sources": sources, "references": references[0], **images}
        sheet.add({row: shown[[0, len(shown) // 2]] for row, shown in rows.items()})
        yield cases.figures()


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    return [
        "Reference guidance on a flow model",
        f"{arguments.seeds} seeds from {arguments.seed} on, {arguments.subjects} subjects each, {arguments.prompts} "
        f"prompts without the pattern ({figures['cases']} images a row), a reference in each prompt's pose; "
        f"{arguments.steps} steps of Euler's method, J = {arguments.inner_steps} with the adaptive step size; "
        f"{figures['minutes']:.0f} minutes.",
        *report_table(figures["rows"], SUBJECT_COLUMNS),
        "",
        f"![sources; references of guidance 1; the rows of the table]({arguments.name}.jpg)",
    ]
