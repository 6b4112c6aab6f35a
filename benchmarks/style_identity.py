"""Does style cross-attention keep a face and follow the text? `python -m benchmarks style_identity`.

Tables 1 and 2 and figure 10 of Gu et al. 2025 in small, on people that neither the demo checkpoint nor the encoder of
W+ has ever seen. Each is known from six photos, in several places, moods and directions, with captions that call the
person "sks person" and say the rest. Four ways learn the person from the same photos:

- textual inversion: one word vector;
- identity prior: the attention's low-rank change of LIPE, with regularization images;
- parallel attention (PCA) and style cross-attention (SCA): this paper's, with the photos' W+ codes.

All draw `PROMPTS` from the same noise. Both attentions get the photos' mean styles, which leave mood and direction to
the text. Identity: whether the attribute classifier sees all five attributes of the person, and their mean share.
Text: the share of what the prompt asks that it sees. CLIP's scores and those in place of DINO's and LPIPS are those of
`paper_scores.py`, prompts with the class word.

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
from dataclasses import dataclass, replace
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

from .edits import PAPER_SCORES, embed, report_table, save_sheet
from .harness import CHECKPOINT, RESULTS, SEED, THREADS, Options, in_processes, load_checkpoint
from .hifi_subjects import seen
from .orders import Cases, Claim, Published, Rows, orders_section, shared_options
from .paper_scores import scores_of_subjects

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

SCORES = {"ID": "identity_kept", "LPIPS": "feature_distance", "CLIP-T": "clip_t"}
OF_SCA, OF_PCA, OF_PRIOR, OF_WORD = (f"methods: {name}" for name in (SCA, PCA, PRIOR, TEXTUAL_INVERSION))
OF_SIX = "photos: 6"
PUBLISHED = (
    Published(
        "Table 1",
        SCORES,
        {
            OF_WORD: (0.1123, 0.6717, 0.1063),
            "Custom Diffusion": (0.1284, 0.7331, 0.1557),
            "BLIP-Diffusion": (0.0947, 0.6159, 0.0859),
            OF_PRIOR: (0.2498, 0.6778, 0.1751),
            "ViCo": (0.2325, 0.6873, 0.1430),
            "IP-Adapter": (0.2858, 0.5947, 0.1623),
            "W+ adapter": (0.2668, 0.6774, 0.1935),
            OF_SCA: (0.3112, 0.5936, 0.1938),
        },
        ((OF_SCA, OF_WORD), (OF_SCA, OF_PRIOR)),
    ),
    Published(
        "Table 2, number of images",
        {"ID": "identity_kept", "CLIP-T": "clip_t"},
        {
            "photos: 4": (0.2457, 0.1410),
            OF_SIX: (0.3112, 0.1938),
            "photos: 8": (0.2888, 0.1663),
            "photos: 10": (0.2883, 0.1477),
        },
        ((OF_SIX, "photos: 4"), (OF_SIX, "photos: 8"), (OF_SIX, "photos: 10")),
    ),
    Published(
        "Table 2, structure",
        {"ID": "identity_kept", "CLIP-T": "clip_t"},
        {OF_PCA: (0.2235, 0.1468), OF_SCA: (0.3112, 0.1938)},
        ((OF_SCA, OF_PCA),),
    ),
)
"""The paper's DreamBooth stands beside the identity prior, which is DreamBooth on the attention layers."""
CLAIMS = (
    Claim("figure 10, the person is lost below 0.4", "strength: 0.4", "strength: 0.2", "identity_kept"),
    Claim("figure 10, the person is lost below 0.4", "strength: 0.4", "strength: 0.2", "feature_similarity"),
    Claim("figure 10, CLIP-T falls above 0.4", "strength: 0.4", "strength: 1", "clip_t"),
)


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
    rows = []
    papers = scores_of_subjects(images, photos, [caption_calling(each) for each in asked])
    for what, attributes, scores in zip(seen(load_classifier(), images), asked, papers, strict=True):
        identity = [what[name] == getattr(attributes, name) for name in IDENTITY_OF["portrait"]]
        text = [what[name] == getattr(attributes, name) for name in ASKED]
        rows.append(
            {
                "identity_kept": float(all(identity)),
                "identity_attributes": float(np.mean(identity)),
                "text_followed": float(np.mean(text)),
                "all_of_both": float(all(identity) and all(text)),
                **scores,
            }
        )
    return rows


_worker: Parts | None = None


def load(arguments: argparse.Namespace) -> None:
    """Load the networks in a worker process."""
    global _worker
    _worker = Parts(*load_checkpoint(arguments.checkpoint), load_w_plus_encoder(str(arguments.encoder)), arguments)


def measure_person(task: tuple[int, Attributes]) -> tuple[Rows, dict[str, np.ndarray]]:
    """Scores by row of the tables, and two images of each row of table 1, for a seed and a person."""
    assert _worker is not None
    seed, identity = task
    parts = replace(_worker, arguments=argparse.Namespace(**{**vars(_worker.arguments), "seed": seed}))
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
    columns = {key: PAPER_SCORES.get(key, key.replace("_", " ")) for key in next(iter(found.values()))}
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
    **shared_options(2, "style_identity"),
    "people": (4, "held-out people for each seed (4)"),
    "prompts": (len(PROMPTS), f"the first of {len(PROMPTS)} (all)"),
    "parts": (list(PARTS), "what is measured (all)", {"choices": PARTS}),
    "photos": ([4, 6, 8, 10], "numbers of photos (4 6 8 10)"),
    "training_steps": (300, "of both attentions (300; the paper's are 600)"),
    "learning_rate": (1e-3, "of both attentions (1e-3)"),
    "precision": (FLOAT32, "of all trainings (float32)", {"choices": tuple(PRECISIONS)}),
    "style_noise": (0.2, "of both attentions (0.2)"),
    "word_steps": (400, "of textual inversion (400)"),
    "word_learning_rate": (5e-3, "of textual inversion (5e-3)"),
    "prior_steps": (200, "of the identity prior (200)"),
    "prior_learning_rate": (5e-4, "of the identity prior (5e-4)"),
    "processes": (1, "that share the people (1)"),
    **SAMPLING,
}


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    people = [(seed, identity) for seed in seeds for identity in draw_people(arguments.people, seed)]
    units = {f"{seed} {' '.join(identity.identity)}": (seed, identity) for seed, identity in people}
    cases = Cases(arguments, list(units))
    sheet: dict[str, list[torch.Tensor]] = {}
    is_whole = cases.left == cases.units
    for scores, images in in_processes(measure_person, [units[unit] for unit in cases.left], arguments, load):
        cases.add(scores)
        for name, made in images.items():
            sheet.setdefault(name, []).append(torch.from_numpy(made))
        if len(sheet) > 1 and is_whole:  # a run that goes on leaves the sheet of the first people
            save_sheet(RESULTS / f"{arguments.name}.jpg", [torch.cat(each) for each in sheet.values()], columns=16)
        yield cases.figures()


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    return [
        "Style cross-attention on unseen people of the demo world",
        f"{arguments.seeds} seeds from {arguments.seed} on, {arguments.people} people each, {arguments.prompts} "
        f"prompts; attentions {arguments.training_steps} steps of batch 4 at learning rate "
        f"{arguments.learning_rate:g}, lambda {arguments.strength:g}; textual inversion {arguments.word_steps} "
        f"steps at {arguments.word_learning_rate:g}, identity prior {arguments.prior_steps} at "
        f"{arguments.prior_learning_rate:g}; {arguments.precision}; {arguments.steps} steps of DDIM, guidance "
        f"{arguments.guidance_scale:g}; {figures['minutes']:.0f} minutes.",
        *part_table(figures["rows"], "methods", "Ways to learn a person from six photos")[1:],
        *part_table(figures["rows"], "strength", "Lambda"),
        *part_table(figures["rows"], "photos", "Number of photos"),
        *orders_section(PUBLISHED, CLAIMS, figures, "Gu et al. 2025"),
    ]
