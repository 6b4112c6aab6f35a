"""Does a personalized identity prior with identity-aware masks edit better? `python -m benchmarks lipe_edit`.

Tables 1 and 2 and figure 7 of Liu et al. 2024 in small. For each of a few subjects that the demo checkpoint has never
seen, identity priors are learned from four images, with editing-oriented captions and with plain ones; then new
images of the subject are edited (pose, expression, view) by

- Imagic: the checkpoint fine-tuned to the one image, and an optimized embedding;
- MasaCtrl: mutual self-attention on the checkpoint as it is;
- DreamCtrl: the prior of plain captions (DreamBooth, of attention layers), and mutual self-attention;
- the prior of plain captions, and NIMA ("without editing-oriented captions");
- the prior of editing-oriented captions, sampled without masks ("without NIMA");
- LIPE: the prior of editing-oriented captions, and NIMA.

All but Imagic start from the same edit-friendly DDPM inversion (same noise), as in the paper. Prompts name the subject
by its class word alone, with the rare token where a prior has learned it; MasaCtrl is shown once more with the subject
described in words, which this world's captions can do completely. The regularization set is sampled by the checkpoint
itself. Scores as in `timestep_aware_edit.py`, prompts of the CLIP scores with the class word. The masks that LIPE found
are compared with the renderer's for every lambda of equation 2 and a few thresholds.
Writes benchmarks/results/lipe_edit.json, .md, and .jpg (the first subject's pairs).
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.sample
import torch
from identity_edit_pack.attention.identity_mask import identity_mask
from identity_edit_pack.demo_world.attributes import (
    CAPTION_TEMPLATES,
    Attributes,
    caption,
    random_attributes,
)
from identity_edit_pack.demo_world.images import EVALUATION_SEED
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.pipelines.attention_control.mutual_self_attention import mutual_self_attention
from identity_edit_pack.pipelines.inversion.edit_friendly import edit_friendly_ddpm_inversion
from identity_edit_pack.pipelines.inversion.inversion import Inversion, sample_inversion
from identity_edit_pack.pipelines.lipe.identity_mask_blend import BlendSettings, identity_mask_blend
from identity_edit_pack.pipelines.lipe.identity_prior import apply_identity_prior
from identity_edit_pack.pipelines.lipe.identity_prompt import encode_identity_prompt
from identity_edit_pack.pipelines.lipe.train_identity_prior import PriorSettings, train_identity_prior
from identity_edit_pack.pipelines.timestep_aware.text_optimization import optimize_text_embedding
from identity_edit_pack.pipelines.training.images import TrainingImages, encode_images
from tqdm import tqdm

from .demo_worlds import WORLD, WORLDS, World, world_of
from .edits import PAPER_SCORES, Pair, edits_table, embed, render_pair, save_sheet, score_edits
from .harness import CHECKPOINT, RESULTS, SEED, Options, markdown
from .imagic import IMAGIC, IMAGIC_OPTIONS, imagic
from .orders import Cases, Claim, Published, Rows, orders_section, shared_options

SPECIES = ("cat", "dog", "bear", "rabbit")
"""A person's color and pattern are those of the clothes, which no class word names."""
POWERS = (0, 1, 2, 4, 8)
THRESHOLDS = (0.3, 0.4, 0.5)
BLEND_UNTIL = 0.8
"""Of the shipped workflows: the last steps smooth the border that the blend leaves."""
REFERENCES = 4
DREAMCTRL = "DreamCtrl (prior + MasaCtrl)"
REGULARIZATION = 16


Overlaps = dict[tuple[str, float, int], list[float]]
"""By mask (source or target), threshold and lambda: the overlap with the true mask of every pair."""


@dataclass(frozen=True)
class Checkpoint:
    """MODEL, CLIP and VAE, with or without a prior."""

    model: Any
    clip: Any
    vae: Any


def subject_of(attributes: Attributes) -> str:
    return " ".join(word for word in (attributes.pattern, attributes.color, attributes.species) if word != "plain")


def caption_with(attributes: Attributes, name: str, template: int = 0) -> str:
    """The caption with the words for the subject replaced by a name of it."""
    text = caption(attributes, template)
    subject = subject_of(attributes)
    if subject not in text:
        raise ValueError(f"no {subject!r} in {text!r}")
    return text.replace("an " + subject, "a " + name).replace(subject, name)


def draw_subjects(count: int, seed: int) -> list[Attributes]:
    """Different held-out subjects."""
    generator = random.Random(f"lipe subjects {seed}")
    found: dict[tuple[str, ...], Attributes] = {}
    while len(found) < count:
        attributes = random_attributes(generator, "figure", held_out=True)
        if attributes.species in SPECIES:
            found.setdefault(attributes.identity, attributes)
    return list(found.values())


def subjects_of_seeds(
    arguments: Any, draw: Callable[[int, int], list[Attributes]] = draw_subjects
) -> dict[str, tuple[int, Attributes]]:
    """Subjects of every seed, with it, by the names of the units in which a table is measured."""
    return {
        f"{seed} {subject_of(subject)}": (seed, subject)
        for seed in range(arguments.seed, arguments.seed + arguments.seeds)
        for subject in draw(arguments.subjects, seed)
    }


def as_subject(subject: Attributes, generator: random.Random, world: World = WORLDS["demo"]) -> Attributes:
    """The subject in any pose, place and mood, without a costume."""
    shown = world.draw(generator)
    return shown.replace(species=subject.species, color=subject.color, pattern=subject.pattern, costume="none")


def draw_pairs(subject: Attributes, count: int, seed: int, world: World = WORLDS["demo"]) -> list[Pair]:
    generator = random.Random(f"lipe pairs {seed} {subject.identity}")
    pairs = []
    for index in range(count):
        target = source = as_subject(subject, generator, world)
        edited = world.edits[index % len(world.edits)]
        for name in edited:
            others = [choice for choice in world.choices[name] if choice != getattr(source, name)]
            target = target.replace(**{name: generator.choice(others)})
        seed_of_layout = EVALUATION_SEED + generator.randrange(1 << 32)
        pairs.append(render_pair(source, target, " and ".join(edited), seed_of_layout))
    return pairs


@torch.no_grad()
def regularization_set(base: Checkpoint, species: str, seed: int, world: World = WORLDS["demo"]) -> TrainingImages:
    """Images of the class that the checkpoint draws for detailed prompts (Liu et al. 2024, figure 2 b)."""
    generator = random.Random(f"lipe regularization {seed} {species}")
    shown: list[Attributes] = []
    while len(shown) < REGULARIZATION:
        attributes = world.draw_trained(generator).replace(species=species)
        if not attributes.held_out:
            shown.append(attributes)
    prompts = [caption(attributes, index % CAPTION_TEMPLATES) for index, attributes in enumerate(shown)]
    noise = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    positive, negative = embed(base.clip, prompts), embed(base.clip, [""])
    latents = comfy.sample.sample(
        base.model, noise, 30, 3.0, "ddim", "ddim_uniform", positive, negative, torch.zeros_like(noise),
        disable_pbar=True, seed=0,
    )  # fmt: skip
    return encode_images(base.vae, list(base.vae.decode(latents).cpu()), prompts)


def references(
    subject: Attributes, name: str, detailed: bool, seed: int, world: World = WORLDS["demo"]
) -> list[tuple[torch.Tensor, str]]:
    """Images [128, 128, 3] of a subject with editing-oriented captions, or with "a sks cat" alone (DreamBooth, Ruiz
    et al. 2023)."""
    generator = random.Random(f"lipe references {seed} {subject.identity}")
    found = []
    for index in range(REFERENCES):
        attributes = as_subject(subject, generator, world)
        image, _ = render(attributes, EVALUATION_SEED + generator.randrange(1 << 32))
        text = caption_with(attributes, name, index % CAPTION_TEMPLATES) if detailed else f"a {name}"
        found.append((torch.from_numpy(image.copy()).float() / 255, text))
    return found


def identity_set(base: Checkpoint, subject: Attributes, name: str, detailed: bool, arguments: Any) -> TrainingImages:
    shown = references(subject, name, detailed, arguments.seed, world_of(arguments))
    images, captions = zip(*shown, strict=True)
    with torch.no_grad():
        return encode_images(base.vae, images, captions)


def with_prior(
    base: Checkpoint, identity: TrainingImages, regularization: TrainingImages, species: str, arguments: Any
) -> Checkpoint:
    """With a prior of the attention layers.

    All weights were tried on one subject with plain captions (learning rates 1e-5 to 3e-4, and the UNet alone at 1e-4):
    they fit "a sks cat", to a third of the loss, and draw another cat for every prompt that says more.
    """
    settings = PriorSettings(
        token=arguments.token, class_word=species, precision="float32", weight_decay=0.0,
        steps=arguments.training_steps, learning_rate=arguments.learning_rate, seed=arguments.seed,
    )  # fmt: skip
    prior, _ = train_identity_prior(base.model, base.clip, identity, regularization, settings)
    return Checkpoint(*apply_identity_prior(base.model, base.clip, prior), base.vae)


class Editor:
    """Edits a batch of images of one subject from their inversion by one checkpoint, with one way of naming it."""

    def __init__(
        self, checkpoint: Checkpoint, pairs: list[Pair], name: Callable[[Attributes, int], str], arguments: Any
    ) -> None:
        self.checkpoint, self.pairs, self.arguments = checkpoint, pairs, arguments
        clip = checkpoint.clip
        self.source = embed(clip, [name(pair.source, 0) for pair in pairs])
        self.target = embed(clip, [name(pair.target, 0) for pair in pairs])
        self.negative = embed(clip, [""])
        with torch.no_grad():
            self.latent = checkpoint.vae.encode(torch.stack([pair.before for pair in pairs]))
        self.inversion: Inversion = edit_friendly_ddpm_inversion(
            checkpoint.model, self.latent, self.source, self.negative,
            steps=arguments.steps, guidance_scale=arguments.source_guidance_scale, seed=arguments.seed,
        )  # fmt: skip

    def sampled(self, model: Any = None) -> torch.Tensor:
        return sample_inversion(
            model or self.checkpoint.model, self.inversion, self.target, self.negative,
            guidance_scale=self.arguments.guidance_scale, skip=self.first_step,
        )  # fmt: skip

    @property
    def first_step(self) -> int:
        return round(self.arguments.skip * self.arguments.steps)

    def imagic(self) -> torch.Tensor:
        model, steps = self.checkpoint.model, self.arguments.steps
        optimized = optimize_text_embedding(model, self.latent, self.target).embedding
        return imagic(model, self.latent, optimized, self.target, self.negative, steps, self.arguments)

    def masactrl(self) -> torch.Tensor:
        return self.sampled(mutual_self_attention(self.checkpoint.model, self.inversion, self.source, self.negative))

    def nima(self, identity_prompt: str, blend_until: float = 1.0) -> Any:
        return identity_mask_blend(
            self.checkpoint.model, self.inversion, self.source, self.target,
            encode_identity_prompt(self.checkpoint.clip, identity_prompt), self.negative,
            guidance_scale=self.arguments.guidance_scale,
            settings=BlendSettings(skip=self.arguments.skip, blend_until=blend_until),
        )  # fmt: skip


def mask_overlap(found: torch.Tensor, truth: torch.Tensor) -> list[float]:
    """Intersection over union of found masks [B, 16, 16] with the renderer's [B, 128, 128], on the latent's grid: a
    cell belongs to the subject where at least half of its pixels do."""
    cells = torch.nn.functional.avg_pool2d(truth.float()[:, None], 8)[:, 0] >= 0.5
    found = found > 0.5
    both, either = (found & cells).sum((1, 2)), (found | cells).sum((1, 2)).clamp(min=1)
    return (both / either).tolist()


def edit_subject(
    base: Checkpoint, subject: Attributes, pairs: list[Pair], arguments: Any
) -> tuple[dict[str, torch.Tensor], Overlaps]:
    """Images of every method, and the overlap of LIPE's masks with the true ones."""
    species = subject.species
    identity_name = f"{arguments.token} {species}"
    regularization = regularization_set(base, species, arguments.seed, world_of(arguments))
    detailed, plain = (
        with_prior(base, identity_set(base, subject, identity_name, captions, arguments), regularization, species,
                   arguments)
        for captions in (True, False)
    )  # fmt: skip

    def by_class(attributes: Attributes, template: int) -> str:
        return caption_with(attributes, species, template)

    def by_token(attributes: Attributes, template: int) -> str:
        return caption_with(attributes, identity_name, template)

    on_base = Editor(base, pairs, by_class, arguments)
    described = Editor(base, pairs, caption, arguments)
    on_plain = Editor(plain, pairs, by_token, arguments)
    on_detailed = Editor(detailed, pairs, by_token, arguments)
    lipe = on_detailed.nima(identity_name)
    latents = {
        IMAGIC: on_base.imagic(),
        MASACTRL: on_base.masactrl(),
        "MasaCtrl, subject described": described.masactrl(),
        DREAMCTRL: on_plain.masactrl(),
        WITHOUT_CAPTIONS: on_plain.nima(identity_name).latent,
        WITHOUT_NIMA: on_detailed.sampled(),
        LIPE: lipe.latent,
        f"LIPE, blended in the first {BLEND_UNTIL * 100:.0f} % of the steps": on_detailed.nima(
            identity_name, BLEND_UNTIL
        ).latent,
    }
    with torch.no_grad():
        images = {name: base.vae.decode(latent).cpu() for name, latent in latents.items()}
    overlaps: Overlaps = {}
    for side, attention, truth in (
        ("source", lipe.source_attention, [pair.mask_before for pair in pairs]),
        ("target", lipe.target_attention, [pair.mask_after for pair in pairs]),
    ):
        for power, threshold in itertools.product(POWERS, THRESHOLDS):
            mask = identity_mask(attention, 16, 16, threshold, power)
            overlaps[side, threshold, power] = mask_overlap(mask, torch.stack(truth))
    return images, overlaps


MASACTRL, LIPE = "MasaCtrl", "LIPE"
WITHOUT_CAPTIONS, WITHOUT_NIMA = "LIPE without editing-oriented captions", "LIPE without NIMA"
COMPARED = ((LIPE, IMAGIC), (LIPE, MASACTRL), (LIPE, DREAMCTRL), (DREAMCTRL, MASACTRL))
PUBLISHED = (
    Published(
        "Table 1",
        {"identity": "identity_kept", "background": "background_psnr_db", "editing": "edit_done"},
        {
            IMAGIC: (0.4545, 0.5908, 0.1818),
            MASACTRL: (0.1785, 0.4714, 0.3964),
            DREAMCTRL: (0.7535, 0.6892, 0.6464),
            "MyStyle": (0.7500, 0.8100, 0.4400),
            LIPE: (0.9464, 0.8857, 0.7357),
        },
        COMPARED,
    ),
    Published(
        "Table 2",
        {"DINOv2-I": "feature_similarity", "CLIP-I": "clip_i", "CLIP-T": "clip_t", "CLIP-D": "clip_d"},
        {
            IMAGIC: (0.6961, 0.7356, 0.2310, 0.0138),
            MASACTRL: (0.6027, 0.7425, 0.2628, 0.0178),
            DREAMCTRL: (0.7804, 0.8517, 0.2304, 0.0433),
            "MyStyle": (0.8148, 0.7371, 0.1892, 0.0251),
            LIPE: (0.8848, 0.9247, 0.2331, 0.0807),
        },
        COMPARED,
    ),
)
CLAIMS = (
    Claim("figure 7", LIPE, WITHOUT_CAPTIONS, "edit_done"),
    Claim("figure 7", LIPE, WITHOUT_CAPTIONS, "identity_kept"),
    Claim("figure 7", LIPE, WITHOUT_NIMA, "background_psnr_db"),
)
HARDER_CLAIMS = (*PUBLISHED[0].claims(), *CLAIMS)
"""In the harder world, whose words and sizes the encoders of table 2 do not know."""

OPTIONS: Options = {
    **shared_options(2, "lipe_edit"),
    "subjects": (4, "unseen subjects for each seed (4)"),
    "edits": (6, "of each subject, a third of each kind (6)"),
    "steps": (40, "DDPM steps (40)"),
    "source_guidance_scale": (2.0, "of the inversion"),
    "guidance_scale": (4.0, "of the target prompt"),
    "skip": (0.1, "share of the first steps that is left out"),
    "training_steps": (150, "of each prior (150)"),
    "learning_rate": (1e-4, "of the priors (1e-4; the paper's is 5e-4)"),
    "token": ("sks", "the rare token"),
    **IMAGIC_OPTIONS,
    **WORLD,
    **SEED,
    **CHECKPOINT,
}


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    world = world_of(arguments)
    base, classifier = Checkpoint(*world.checkpoint(arguments.checkpoint)), world.classifier()
    subjects = subjects_of_seeds(arguments)
    cases = Cases(arguments, list(subjects))
    for unit in tqdm(cases.left, unit="subject"):
        seed, subject = subjects[unit]
        pairs = draw_pairs(subject, arguments.edits, seed, world)
        own = argparse.Namespace(**{**vars(arguments), "seed": seed})
        images, overlaps = edit_subject(base, subject, pairs, own)
        images["true edit (renderer)"] = torch.stack([pair.after for pair in pairs])
        if unit == cases.units[0]:
            befores = torch.stack([pair.before for pair in pairs])
            save_sheet(RESULTS / f"{arguments.name}.jpg", [befores, *images.values()])
        prompts, sources = (
            [caption_with(shown, subject.species) for shown in side]
            for side in ([pair.target for pair in pairs], [pair.source for pair in pairs])
        )
        rows: Rows = {name: score_edits(made, pairs, prompts, sources, classifier) for name, made in images.items()}
        for (side, threshold, power), values in overlaps.items():
            for row, value in zip(rows[LIPE], values, strict=True):
                row[f"{side}, {threshold}, lambda {power}"] = value
        cases.add(rows)
        yield cases.figures()


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    lipe = figures["rows"][LIPE]
    overlaps = (
        (f"{side}, {threshold}", *(f"{lipe[f'{side}, {threshold}, lambda {power}']:.2f}" for power in POWERS))
        for side in ("source", "target")
        for threshold in THRESHOLDS
    )
    is_harder, title = arguments.world == "harder", world_of(arguments).title
    return [
        f"Personalized identity prior and identity-aware masks on unseen subjects of the {title}",
        f"{arguments.seeds} seeds from {arguments.seed} on, {arguments.subjects} subjects each, {figures['cases']} "
        f"edits, edit-friendly DDPM inversion with {arguments.steps} steps (source guidance "
        f"{arguments.source_guidance_scale:g}, target guidance {arguments.guidance_scale:g}, skip {arguments.skip:g}), "
        f"priors of {arguments.training_steps} steps from {REFERENCES} images at learning rate "
        f"{arguments.learning_rate:g} (attention layers), Imagic {arguments.imagic_steps} steps at "
        f"{arguments.imagic_learning_rate:g}; "
        f"{figures['minutes']:.0f} minutes.",
        *edits_table(figures["rows"], {} if is_harder else PAPER_SCORES),
        "",
        "Overlap (intersection over union) of the masks that LIPE found with the true ones:",
        "",
        *markdown(("mask, threshold", *(f"lambda {power}" for power in POWERS)), overlaps),
        *orders_section(
            () if is_harder else PUBLISHED, HARDER_CLAIMS if is_harder else CLAIMS, figures, "Liu et al. 2024"
        ),
    ]
