"""The subjects of `hifi_tuner`: source images, what the prompts ask, images of others, how each is scored."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from identity_edit_pack.demo_world.attributes import ATTRIBUTES_OF, IDENTITY_OF, Attributes, random_attributes
from identity_edit_pack.demo_world.classifier import AttributeClassifier, classify
from identity_edit_pack.demo_world.images import EVALUATION_SEED
from identity_edit_pack.demo_world.renderer import render

from .demo_worlds import ASKED, PROMPTS, WORLDS, World
from .edits import Pair, mean_psnr, render_pair
from .lipe_edit import SPECIES, as_subject
from .paper_scores import scores_of_subjects


@dataclass(frozen=True)
class Source:
    """An image of a subject [128, 128, 3] in [0, 1] with its true mask [128, 128]."""

    shown: Attributes
    image: torch.Tensor
    mask: torch.Tensor


def render_source(shown: Attributes, seed: int) -> Source:
    image, mask = render(shown, seed)
    return Source(shown, torch.from_numpy(image.copy()).float() / 255, torch.from_numpy(mask != 0).float())


def draw_sources(subject: Attributes, seed: int, world: World = WORLDS["demo"]) -> list[Source]:
    """The photographs of a subject: one in each pose, neutral, in any place and from either side."""
    generator = random.Random(f"hifi sources {seed} {subject.identity}")
    return [
        render_source(
            as_subject(subject, generator, world).replace(pose=pose, expression="neutral"),
            EVALUATION_SEED + generator.randrange(1 << 32),
        )
        for pose in ATTRIBUTES_OF["figure"]["pose"]
    ]


def asked_of(
    sources: list[Source], count: int, seeds: int, prompts: tuple[dict[str, str], ...] = PROMPTS
) -> list[Attributes]:
    """What the prompts ask of this subject: all prompts for the first seed, then for the next.

    The templates of the DreamBooth set ask for no view. Here a caption names one, so it is that of the photograph in
    the prompt's pose: a reference cannot show the details of a side that no photograph shows.
    """
    subject = sources[0].shown
    plain = Attributes(species=subject.species, color=subject.color, pattern=subject.pattern)
    facing = {source.shown.pose: source.shown.facing for source in sources}
    asked = [plain.replace(**what) for what in prompts[:count]]
    return [what.replace(facing=facing[what.pose]) for what in asked] * seeds


def draw_replacements(subject: Attributes, count: int, seed: int) -> list[Pair]:
    """Images of other animals, and the same with this subject."""
    generator = random.Random(f"hifi replacements {seed} {subject.identity}")
    pairs: list[Pair] = []
    while len(pairs) < count:
        shown = random_attributes(generator, "figure").replace(costume="none")
        if shown.species in SPECIES and shown.species != subject.species:
            target = shown.replace(species=subject.species, color=subject.color, pattern=subject.pattern)
            pairs.append(render_pair(shown, target, "species", EVALUATION_SEED + generator.randrange(1 << 32)))
    return pairs


def seen(classifier: AttributeClassifier, images: torch.Tensor) -> list[dict[str, str]]:
    """For each image the attributes that the classifier sees."""
    answers = classify(classifier, images)
    return [
        {head: values[int(answers[head][index])] for head, values in classifier.choices.items()}
        for index in range(len(images))
    ]


def score(
    classifier: AttributeClassifier,
    images: torch.Tensor,
    asked: list[Attributes],
    sources: torch.Tensor,
    prompts: list[str],
    heads: tuple[str, ...] = ASKED,
) -> list[dict[str, float]]:
    """Subject and text similarity of each image of one subject; prompts name it by its class and ask for `heads`."""
    rows = []
    papers = scores_of_subjects(images, sources, prompts)
    for what, attributes, scores in zip(seen(classifier, images), asked, papers, strict=True):
        identity = [what[head] == getattr(attributes, head) for head in IDENTITY_OF["figure"]]
        text = [what[head] == getattr(attributes, head) for head in heads]
        rows.append(
            {
                "identity_kept": float(all(identity)),
                "identity_attributes_kept": float(np.mean(identity)),
                "text_similarity": float(np.mean(text)),
                "text_followed": float(all(text)),
                "text_and_identity": float(all(identity) and all(text)),
                **scores,
            }
        )
    return rows


def score_replacement(
    classifier: AttributeClassifier, images: torch.Tensor, pairs: list[Pair]
) -> list[dict[str, float]]:
    rows = []
    for what, image, pair in zip(seen(classifier, images), images, pairs, strict=True):
        identity = [what[head] == getattr(pair.target, head) for head in IDENTITY_OF["figure"]]
        rows.append(
            {
                "subject_replaced": float(all(identity)),
                "species_replaced": float(what["species"] == pair.target.species),
                "identity_attributes": float(np.mean(identity)),
                "pose_kept": float(what["pose"] == pair.source.pose),
                "background_psnr_db": mean_psnr(image[pair.background], pair.before[pair.background]),
            }
        )
    return rows
