"""Does style cross-attention keep a face and follow the text? `python -m benchmarks style_identity`.

Tables 1 and 2 and figure 10 of Gu et al. 2025 in small, on people that neither the demo checkpoint nor the encoder of
W+ has ever seen. Each is known from six photos, in several places, moods and directions, with captions that call the
person "sks person" and say the rest. Four ways learn the person from the same photos:

- textual inversion: one word vector;
- identity prior: the attention's low-rank change of LIPE, with regularization images;
- parallel attention (PCA) and style cross-attention (SCA): this paper's, with the photos' W+ styles.

All draw `PROMPTS` from the same noise. Both attentions get the photos' mean styles, which leave mood and direction to
the text. Identity: whether the attribute classifier sees all five attributes of the person, their mean share, and the
cosine similarity of its features to the photos'. Text: the share of what the prompt asks that it sees.

- `--parts methods` is table 1;
- `strength` draws SCA for lambda 0 to 1 (figure 10);
- `photos` learns SCA from 4, 6, 8 and 10 photos (table 2).

Writes benchmarks/results/style_identity.json, .md, and with the methods .jpg (two prompts of each person); `--name`
gives a run of some parts a name of its own.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.sample
import numpy as np
import torch
from identity_edit_pack.attention.style_cross_attention import PARALLEL, SEQUENTIAL
from identity_edit_pack.demo_world.attributes import (
    IDENTITY_OF,
    PLACES,
    PORTRAIT_ATTRIBUTES,
    Attributes,
    caption,
    random_attributes,
)
from identity_edit_pack.demo_world.classifier import load_classifier
from identity_edit_pack.demo_world.images import EVALUATION_SEED
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.demo_world.train_style_attention import caption_calling
from identity_edit_pack.demo_world.train_w_plus import W_PLUS_PATH
from identity_edit_pack.pipelines.hifi_tuner.subject_embedding import WORD, subject_conditioning
from identity_edit_pack.pipelines.hifi_tuner.train_subject_embedding import SubjectSettings, train_subject_embedding
from identity_edit_pack.pipelines.lipe.identity_prior import apply_identity_prior
from identity_edit_pack.pipelines.lipe.train_identity_prior import PriorSettings, train_identity_prior
from identity_edit_pack.pipelines.pidiff.style_attention import StyleAttention, apply_style_attention
from identity_edit_pack.pipelines.pidiff.train import StyleSettings, train_style_attention
from identity_edit_pack.pipelines.pidiff.w_plus import WPlus, average_styles
from identity_edit_pack.pipelines.pidiff.w_plus_encoder import WPlusEncoder, encode_w_plus, fitted, load_w_plus_encoder
from identity_edit_pack.pipelines.shared.conditioning import Conditioning
from identity_edit_pack.pipelines.training.images import TrainingImages, encode_images
from identity_edit_pack.pipelines.training.loop import FLOAT32, PRECISIONS

from .edits import embed, report_table, save_sheet
from .harness import CHECKPOINT, RESULTS, SEED, THREADS, Options, in_processes, load_checkpoint, means
from .hifi_subjects import features, seen

PROMPTS: tuple[dict[str, str], ...] = (
    {"place": "snow", "costume": "santa hat", "facing": "left"},
    {"place": "beach", "expression": "smiling", "facing": "right"},
    {"place": "night", "costume": "crown", "facing": "left"},
    {"place": "room", "expression": "angry", "facing": "right"},
    {"place": "grass", "costume": "scarf", "expression": "smiling", "facing": "left"},
    {"place": "beach", "costume": "crown", "facing": "right"},
    {"place": "snow", "expression": "smiling", "facing": "right"},
    {"place": "room", "costume": "santa hat", "expression": "angry", "facing": "left"},
    {"place": "night", "facing": "right"},
    {"place": "grass", "expression": "angry", "facing": "left"},
    {"place": "beach", "costume": "scarf", "facing": "left"},
    {"place": "room", "costume": "crown", "expression": "smiling", "facing": "right"},
)
"""What each prompt asks; where it is silent the person is neutral, without a costume. Nobody cries: closed eyes have no
color that could be kept."""
ASKED = ("place", "costume", "expression", "facing")
TOKEN = "sks"
NAME = f"{TOKEN} person"
TEXTUAL_INVERSION, PRIOR, PCA, SCA = "textual inversion", "identity prior", "parallel attention", "SCA"
STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
PARTS = ("methods", "strength", "photos")
REGULARIZATION = 16

Rows = dict[str, list[dict[str, float]]]


@dataclass(frozen=True)
class Parts:
    """What a process loads once."""

    model: Any
    clip: Any
    vae: Any
    encoder: WPlusEncoder
    arguments: argparse.Namespace


@dataclass(frozen=True)
class Person:
    """A person with photos [n, 128, 128, 3], what they show, their latents and their styles."""

    identity: Attributes
    images: torch.Tensor
    encoded: TrainingImages
    styles: WPlus


def draw_people(count: int, seed: int) -> list[Attributes]:
    """Different held-out people."""
    generator = random.Random(f"style people {seed}")
    found: dict[tuple[str, ...], Attributes] = {}
    while len(found) < count:
        attributes = random_attributes(generator, "portrait", held_out=True)
        found.setdefault(attributes.identity, attributes)
    return list(found.values())


def photograph(parts: Parts, identity: Attributes, count: int) -> Person:
    """Photos of a person: in turn every place, both directions, neutral, smiling and angry; no costume."""
    generator = random.Random(f"style photos {parts.arguments.seed} {identity.identity}")
    shown, images = [], []
    for index in range(count):
        facing = PORTRAIT_ATTRIBUTES["facing"][index % 2]
        expression = ("neutral", "smiling", "angry")[index % 3]
        place = PLACES[index % len(PLACES)]
        shown.append(identity.replace(place=place, facing=facing, expression=expression, costume="none"))
        image, _ = render(shown[-1], EVALUATION_SEED + generator.randrange(1 << 32))
        images.append(torch.from_numpy(image.copy()).float() / 255)
    stacked = torch.stack(images)
    styles = encode_w_plus(parts.encoder, fitted(stacked, parts.encoder.size))
    with torch.no_grad():
        encoded = encode_images(parts.vae, images, [caption_calling(each, NAME) for each in shown])
    return Person(identity, stacked, encoded, styles)


def asked_of(identity: Attributes, count: int) -> list[Attributes]:
    plain = identity.replace(expression="neutral", costume="none")
    return [plain.replace(**what) for what in PROMPTS[:count]]


def noise_of(parts: Parts, images: int) -> torch.Tensor:
    return torch.randn(images, 4, 16, 16, generator=torch.Generator().manual_seed(parts.arguments.seed))


@torch.no_grad()
def drawn(parts: Parts, model: Any, clip: Any, positive: Conditioning) -> torch.Tensor:
    """Images [B, 128, 128, 3] of a prompt for each."""
    arguments = parts.arguments
    noise = noise_of(parts, len(positive[0][0]))
    latents = comfy.sample.sample(
        model, noise, arguments.steps, arguments.guidance_scale, "ddim", "ddim_uniform", positive, embed(clip, [""]),
        torch.zeros_like(noise), disable_pbar=True, seed=arguments.seed,
    )  # fmt: skip
    return parts.vae.decode(latents).cpu().clamp(0, 1)


def by_style(parts: Parts, style: StyleAttention, styles: WPlus, prompts: list[str], strength: float) -> torch.Tensor:
    model = apply_style_attention(parts.model, style, styles, strength=strength)
    return drawn(parts, model, parts.clip, embed(parts.clip, prompts))


def learned_style(parts: Parts, person: Person, kind: str) -> StyleAttention:
    arguments = parts.arguments
    settings = StyleSettings(
        pseudo_word=TOKEN, templates=(), kind=kind, style_noise=arguments.style_noise, precision=arguments.precision,
        steps=arguments.training_steps, learning_rate=arguments.learning_rate, seed=arguments.seed, sample_steps=1,
    )  # fmt: skip
    return train_style_attention(parts.model, parts.clip, person.encoded, person.styles, settings)[0]


def by_word(parts: Parts, person: Person, prompts: list[str]) -> torch.Tensor:
    arguments = parts.arguments
    settings = SubjectSettings(
        class_word="person", token=TOKEN, kind=WORD, masked=False, regularization_weight=0.0, updates_per_step=0,
        batch_size=4, precision=arguments.precision, sample_steps=1, steps=arguments.word_steps,
        learning_rate=arguments.word_learning_rate, seed=arguments.seed,
    )  # fmt: skip
    subject, _ = train_subject_embedding(parts.model, parts.clip, person.encoded, settings)
    with torch.no_grad():
        positive = torch.cat([subject_conditioning(parts.clip, subject, prompt)[0][0] for prompt in prompts])
    return drawn(parts, parts.model, parts.clip, [[positive, {}]])


def by_prior(parts: Parts, person: Person, prompts: list[str]) -> torch.Tensor:
    arguments = parts.arguments
    generator = random.Random(f"style regularization {arguments.seed}")
    others = [caption(random_attributes(generator, "portrait")) for _ in range(REGULARIZATION)]
    with torch.no_grad():
        images = drawn(parts, parts.model, parts.clip, embed(parts.clip, others))
        regularization = encode_images(parts.vae, list(images), others)
    settings = PriorSettings(
        token=TOKEN, class_word="person", precision=arguments.precision, weight_decay=0.0, steps=arguments.prior_steps,
        learning_rate=arguments.prior_learning_rate, seed=arguments.seed,
    )  # fmt: skip
    prior, _ = train_identity_prior(parts.model, parts.clip, person.encoded, regularization, settings)
    model, clip = apply_identity_prior(parts.model, parts.clip, prior)
    return drawn(parts, model, clip, embed(clip, prompts))


def score(images: torch.Tensor, asked: list[Attributes], photos: torch.Tensor) -> list[dict[str, float]]:
    classifier = load_classifier()
    alike = (features(classifier, images) @ features(classifier, photos).T).mean(dim=1).tolist()
    rows = []
    for what, attributes, cosine in zip(seen(classifier, images), asked, alike, strict=True):
        identity = [what[name] == getattr(attributes, name) for name in IDENTITY_OF["portrait"]]
        text = [what[name] == getattr(attributes, name) for name in ASKED]
        rows.append(
            {
                "identity_kept": float(all(identity)),
                "identity_attributes": float(np.mean(identity)),
                "feature_similarity": cosine,
                "text_followed": float(np.mean(text)),
                "all_of_both": float(all(identity) and all(text)),
            }
        )
    return rows


_worker: Parts | None = None


def load(arguments: argparse.Namespace) -> None:
    """Load the networks in a worker process."""
    global _worker
    _worker = Parts(*load_checkpoint(arguments.checkpoint), load_w_plus_encoder(str(arguments.encoder)), arguments)


def measure_person(identity: Attributes) -> tuple[Rows, dict[str, np.ndarray]]:
    """Scores by row of the tables, and two images of each row of table 1."""
    assert _worker is not None
    parts = _worker
    arguments = parts.arguments
    person = photograph(parts, identity, 6)
    asked = asked_of(identity, arguments.prompts)
    prompts = [caption_calling(each, NAME) for each in asked]
    rows: Rows = {}
    images: dict[str, torch.Tensor] = {}
    mean = average_styles([person.styles])
    style = None
    if {"methods", "strength"} & set(arguments.parts):
        style = learned_style(parts, person, SEQUENTIAL)
    if "methods" in arguments.parts:
        assert style is not None
        images[TEXTUAL_INVERSION] = by_word(parts, person, prompts)
        images[PRIOR] = by_prior(parts, person, prompts)
        parallel = learned_style(parts, person, PARALLEL)
        images[PCA] = by_style(parts, parallel, mean, prompts, arguments.strength)
        images[SCA] = by_style(parts, style, mean, prompts, arguments.strength)
        truth = [render(each, EVALUATION_SEED + index)[0] for index, each in enumerate(asked)]
        images["renderer"] = torch.stack([torch.from_numpy(each.copy()).float() / 255 for each in truth])
        rows |= {f"methods: {name}": score(made, asked, person.images) for name, made in images.items()}
    if "strength" in arguments.parts:
        assert style is not None
        for strength in STRENGTHS:
            made = by_style(parts, style, mean, prompts, strength)
            rows[f"strength: {strength:g}"] = score(made, asked, person.images)
    if "photos" in arguments.parts:
        for count in arguments.photos:
            if style is not None and count == len(person.images):
                album, own = person, style
            else:
                album = photograph(parts, identity, count)
                own = learned_style(parts, album, SEQUENTIAL)
            made = by_style(parts, own, average_styles([album.styles]), prompts, arguments.strength)
            rows[f"photos: {count}"] = score(made, asked, person.images)
    shown = {"photos": person.images[:2]} | {name: made[:: len(made) // 2 or 1][:2] for name, made in images.items()}
    return rows, {name: made.numpy() for name, made in shown.items()}


def part_table(rows: dict[str, dict[str, float]], part: str, heading: str) -> list[str]:
    """The rows of one part with its heading; nothing where it was not measured."""
    found = {name.removeprefix(f"{part}: "): each for name, each in rows.items() if name.startswith(f"{part}: ")}
    if not found:
        return []
    columns = {key: key.replace("_", " ") for key in next(iter(found.values()))}
    return ["", f"## {heading}", "", *report_table(found, columns)]


SAMPLING: Options = {
    "steps": (20, "DDIM steps (20)"),
    "guidance_scale": (3.0, "of all sampling (3)"),
    "strength": (1.0, "lambda of the attentions, and of mixes (1)"),
    **SEED,
    **CHECKPOINT,
    "encoder": (W_PLUS_PATH, "of W+ (the demo world's)"),
    **THREADS,
}
OPTIONS: Options = {
    "people": (8, "held-out people (8)"),
    "prompts": (len(PROMPTS), f"the first of {len(PROMPTS)} (all)"),
    "parts": (list(PARTS), "what is measured (all)", {"choices": PARTS}),
    "photos": ([4, 6, 8, 10], "numbers of photos (4 6 8 10)"),
    "name": ("style_identity", "of the files of results (style_identity)"),
    "training_steps": (600, "of both attentions (the paper's 600)"),
    "learning_rate": (1e-3, "of both attentions (1e-3)"),
    "precision": (FLOAT32, "of all trainings (float32)", {"choices": tuple(PRECISIONS)}),
    "style_noise": (0.2, "of both attentions (0.2)"),
    "word_steps": (600, "of textual inversion (600)"),
    "word_learning_rate": (5e-3, "of textual inversion (5e-3)"),
    "prior_steps": (300, "of the identity prior (300)"),
    "prior_learning_rate": (5e-4, "of the identity prior (5e-4)"),
    "processes": (1, "that share the people (1)"),
    **SAMPLING,
}


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    people = draw_people(arguments.people, arguments.seed)
    rows: Rows = {}
    sheet: dict[str, list[torch.Tensor]] = {}
    for number, (scores, images) in enumerate(in_processes(measure_person, people, arguments, load), start=1):
        for name, each in scores.items():
            rows.setdefault(name, []).extend(each)
        for name, made in images.items():
            sheet.setdefault(name, []).append(torch.from_numpy(made))
        if len(sheet) > 1:
            save_sheet(RESULTS / f"{arguments.name}.jpg", [torch.cat(each) for each in sheet.values()], columns=16)
        yield {"name": arguments.name, "people": number, "rows": {n: means(each) for n, each in rows.items()}}


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    return [
        "Style cross-attention on unseen people of the demo world",
        f"{figures['people']} people, {arguments.prompts} prompts, seed {arguments.seed}; "
        f"attentions {arguments.training_steps} steps of batch 4 at learning rate {arguments.learning_rate:g}, lambda "
        f"{arguments.strength:g}; textual inversion {arguments.word_steps} "
        f"steps at {arguments.word_learning_rate:g}, identity prior {arguments.prior_steps} at "
        f"{arguments.prior_learning_rate:g}; {arguments.precision}; {arguments.steps} steps of DDIM, guidance "
        f"{arguments.guidance_scale:g}; {figures['minutes']:.0f} minutes.",
        *part_table(figures["rows"], "methods", "Ways to learn a person from six photos")[1:],
        *part_table(figures["rows"], "strength", "Lambda"),
        *part_table(figures["rows"], "photos", "Number of photos"),
    ]
