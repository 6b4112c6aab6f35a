"""Does every part of HiFi Tuner help? `python -m benchmarks hifi_tuner`.

Table 2 of Wang et al. 2023 in small, row by row, on subjects that the demo checkpoint has never seen:

- Textual Inversion: five word vectors in the place of the subject's name;
- + mask: the loss inside the subject's mask alone (eq. 5);
- + regularization: five rows of the text embedding, from and tied to those of the empty prompt (eq. 6);
- + step-wise: rows of their own for every DDIM step (eq. 7, algorithm 1);
- + reference guidance: a second pass led by a reference image (algorithm 2);
- DreamBooth: all attention weights, with prior preservation; and the same with reference guidance;
- Stable Diffusion: the checkpoint itself, with the class word (table 1).

Each learns from four images, one in each pose, with their true masks and the caption "a sks cat" (no word about pose
and place, as in the paper's "a photo of A"), and draws `PROMPTS`, which are to the demo world what the 25 templates of
the DreamBooth set are to photographs: places, costumes, poses and expressions. All rows start from the same noise. For
the second pass the subject in the first image is found by the model's own attention, the source image with the most
similar features is laid over it, and its DDIM inversion is the reference.

Subject similarity: whether the attribute classifier sees the subject's species, color and pattern (all three), and the
paper's DINO and CLIP-I in the form of `paper_scores.py`, mean over the source images. Text: the share of what the
prompt asks (place, pose, costume, expression, view) that the classifier sees, and CLIP-T of the prompt with the class
word.

Writes benchmarks/results/hifi_tuner.json, .md and .jpg (two prompts of each subject).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from identity_edit_pack.demo_world.attributes import Attributes, caption
from identity_edit_pack.demo_world.images import EVALUATION_SEED
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine.families.schedule import Schedule
from identity_edit_pack.pipelines.hifi_tuner.reference_alignment import align_reference
from identity_edit_pack.pipelines.hifi_tuner.reference_guidance import first_pass_latent, reference_guided_sampling
from identity_edit_pack.pipelines.hifi_tuner.reference_selection import histogram_features, select_reference
from identity_edit_pack.pipelines.hifi_tuner.subject_embedding import (
    OUTPUT,
    WORD,
    SubjectEmbedding,
    subject_conditioning,
    subject_table,
)
from identity_edit_pack.pipelines.hifi_tuner.train_subject_embedding import SubjectSettings, train_subject_embedding
from identity_edit_pack.pipelines.inversion.inversion import invert_image
from identity_edit_pack.pipelines.lipe.attention_segmentation import attention_masks
from identity_edit_pack.pipelines.lipe.identity_prompt import encode_identity_prompt
from identity_edit_pack.pipelines.shared.conditioning import Conditioning
from identity_edit_pack.pipelines.text.step_embeddings import StepEmbeddings, apply_step_embeddings
from identity_edit_pack.pipelines.training.images import TrainingImages, encode_images
from tqdm import tqdm

from .demo_worlds import PROMPTS, WORLD, world_of
from .edits import PAPER_SCORES, Sheet, embed, report_table
from .harness import CHECKPOINT, SEED, Options
from .hifi_subjects import Source, asked_of, draw_sources, render_source, score
from .lipe_edit import Checkpoint, caption_with, regularization_set, subjects_of_seeds, with_prior
from .orders import Cases, Claim, Published, orders_section, shared_options

TEXTUAL_INVERSION, MASK, REGULARIZATION = "Textual Inversion", "+ mask", "+ regularization"
STEP_WISE, GUIDED = "+ step-wise", "+ reference guidance"
DREAMBOOTH, DREAMBOOTH_GUIDED = "DreamBooth", "DreamBooth + reference guidance"
STABLE_DIFFUSION = "Stable Diffusion"
LADDER = (TEXTUAL_INVERSION, MASK, REGULARIZATION, STEP_WISE, GUIDED)
ROWS = (STABLE_DIFFUSION, *LADDER, DREAMBOOTH, DREAMBOOTH_GUIDED)


@dataclass(frozen=True)
class Way:
    """A model with the prompts of a batch: how one row of the table draws.

    Attributes:
        model: perhaps with per-step embeddings on its positive side.
        inverting: the model without it, with which a reference's caption can be evaluated.
        clip: that of both.
        positive: a prompt for each image.
    """

    model: Any
    inverting: Any
    clip: Any
    positive: Conditioning


@dataclass(frozen=True)
class Run:
    """What is the same for every row of a subject."""

    base: Checkpoint
    arguments: Any
    subject: Attributes
    sources: list[Source]
    asked: list[Attributes]
    start: torch.Tensor
    schedule: Schedule
    negative: Conditioning

    @property
    def species(self) -> str:
        return self.subject.species

    @property
    def name(self) -> str:
        return f"{self.arguments.token} {self.species}"


def begin(base: Checkpoint, subject: Attributes, arguments: Any) -> Run:
    family = engine.require(base.model)
    schedule = family.schedule(arguments.steps, end_at_zero=family.noise_path is engine.FLOW)
    empty = torch.zeros(arguments.prompts, 4, 16, 16)
    seeds = range(arguments.seed, arguments.seed + arguments.images)
    world = world_of(arguments)
    sources = draw_sources(subject, arguments.seed, world)
    return Run(
        base=base,
        arguments=arguments,
        subject=subject,
        sources=sources,
        asked=asked_of(sources, arguments.prompts, arguments.images, world.prompts),
        start=torch.cat([first_pass_latent(base.model, empty, schedule.sigmas, seed) for seed in seeds]),
        schedule=schedule,
        negative=embed(base.clip, [""]),
    )


def training_images(run: Run) -> TrainingImages:
    images = [source.image for source in run.sources]
    masks = [source.mask for source in run.sources]
    with torch.no_grad():
        return encode_images(run.base.vae, images, [f"a {run.name}"] * len(images), masks)


def learned(run: Run, images: TrainingImages, **settings: Any) -> SubjectEmbedding:
    arguments = run.arguments
    is_word = settings.get("kind") == WORD
    chosen = SubjectSettings(
        class_word=run.species,
        token=arguments.token,
        steps=arguments.training_steps,
        learning_rate=arguments.word_learning_rate if is_word else arguments.embedding_learning_rate,
        batch_size=arguments.batch_size,
        precision="float32",
        seed=arguments.seed,
        sampling_steps=arguments.steps,
        sample_steps=1,
        **settings,
    )
    return train_subject_embedding(run.base.model, run.base.clip, images, chosen)[0]


@torch.no_grad()
def way_of_subject(run: Run, subject: SubjectEmbedding) -> Way:
    """The plain checkpoint with a learned subject in every prompt."""
    model, clip = run.base.model, run.base.clip
    prompts = [caption_with(asked, run.name) for asked in run.asked]
    positive = torch.cat([subject_conditioning(clip, subject, prompt)[0][0] for prompt in prompts])
    if subject.step_vectors is not None:
        tables = {prompt: subject_table(model, clip, subject, prompt) for prompt in set(prompts)}
        rows = torch.cat([tables[prompt].embeddings for prompt in prompts], dim=1)
        model = apply_step_embeddings(model, StepEmbeddings(tables[prompts[0]].sigmas, rows), "positive")
    return Way(model, run.base.model, clip, [[positive, {}]])


def way_of_prior(run: Run, images: TrainingImages) -> Way:
    arguments = argparse.Namespace(**{**vars(run.arguments), "training_steps": run.arguments.prior_steps})
    regularization = regularization_set(run.base, run.species, arguments.seed, world_of(arguments))
    tuned = with_prior(run.base, images, regularization, run.species, arguments)
    positive = embed(tuned.clip, [caption_with(asked, run.name) for asked in run.asked])
    return Way(tuned.model, tuned.model, tuned.clip, positive)


def first_pass(run: Run, way: Way) -> torch.Tensor:
    sampler, sigmas = comfy.samplers.sampler_object("euler"), run.schedule.sigmas
    x = comfy.sample.sample_custom(
        way.model, torch.zeros_like(run.start), run.arguments.guidance_scale, sampler, sigmas, way.positive,
        run.negative, run.start, disable_pbar=True, seed=0,
    )  # fmt: skip
    return x / engine.require(run.base.model).noise_path.image_scale(sigmas[-1])


@torch.no_grad()
def found_masks(run: Run, latents: torch.Tensor) -> torch.Tensor:
    """M_g [B, 128, 128] as Segment Subject finds it without any further network."""
    identity = encode_identity_prompt(run.base.clip, run.species)
    conditioning = embed(run.base.clip, [f"a {run.species}"])
    return attention_masks(run.base.model, latents, identity, conditioning, (128, 128))


def second_pass(run: Run, way: Way, latents: torch.Tensor, words: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference-guided latents and the aligned references [B, 128, 128, 3].

    Args:
        words: what the reference's caption calls the subject; "" describes it in the words of this world, as a
            captioner would.
    """
    arguments = run.arguments
    with torch.no_grad():
        images = run.base.vae.decode(latents).cpu()
    references, masks, captions = [], [], []
    sources = run.sources
    for image, mask in zip(images, found_masks(run, latents), strict=True):
        choice = select_reference(
            [image], [source.image for source in sources], histogram_features,
            generated_masks=[mask], source_masks=[source.mask for source in sources],
        )  # fmt: skip
        reference = sources[choice.index]
        aligned = align_reference(reference.image, reference.mask, mask, image)
        references.append(aligned.image)
        masks.append(aligned.mask)
        captions.append(caption_with(reference.shown, words) if words else caption(reference.shown))
    stacked = torch.stack(references).clamp(0, 1)
    with torch.no_grad():
        encoded = run.base.vae.encode(stacked)
    inversion = invert_image(way.inverting, encoded, embed(way.clip, captions), steps=arguments.steps)
    found = reference_guided_sampling(
        way.model, run.start, inversion, torch.stack(masks), way.positive, run.negative,
        guidance_scale=arguments.guidance_scale, inner_steps=arguments.inner_steps,
        learning_rate=arguments.guidance_learning_rate,
    )  # fmt: skip
    return found.latent, stacked


def ladder(run: Run) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Latents of every row, and the aligned references of the guided ones."""
    arguments = run.arguments
    images = training_images(run)
    unmasked = learned(run, images, kind=WORD, masked=False, regularization_weight=0.0, updates_per_step=0)
    masked = learned(run, images, kind=WORD, masked=True, regularization_weight=0.0, updates_per_step=0)
    step_wise = learned(
        run, images, kind=OUTPUT, masked=True, regularization_weight=arguments.regularization_weight,
        updates_per_step=arguments.updates_per_step,
    )  # fmt: skip
    # The shared rows of the step-wise subject are those of a training without its second phase.
    shared = dataclasses.replace(step_wise, step_vectors=None, timesteps=())
    rows = {TEXTUAL_INVERSION: unmasked, MASK: masked, REGULARIZATION: shared, STEP_WISE: step_wise}
    ways = {row: way_of_subject(run, subject) for row, subject in rows.items()}
    ways[DREAMBOOTH] = way_of_prior(run, images)
    by_class = embed(run.base.clip, [caption_with(asked, run.species) for asked in run.asked])
    ways[STABLE_DIFFUSION] = Way(run.base.model, run.base.model, run.base.clip, by_class)
    latents = {row: first_pass(run, way) for row, way in ways.items()}
    references = {}
    for row, of, words in ((GUIDED, STEP_WISE, ""), (DREAMBOOTH_GUIDED, DREAMBOOTH, run.name)):
        latents[row], references[row] = second_pass(run, ways[of], latents[of], words)
    return latents, references


SCORES = {"DINO": "feature_similarity", "CLIP-I": "clip_i", "CLIP-T": "clip_t"}
PUBLISHED = (
    Published(
        "Table 1",
        SCORES,
        {
            "real images": (0.774, 0.885, None),
            STABLE_DIFFUSION: (0.393, 0.706, 0.337),
            TEXTUAL_INVERSION: (0.569, 0.780, 0.255),
            GUIDED: (0.665, 0.807, 0.291),
            DREAMBOOTH: (0.668, 0.803, 0.305),
            DREAMBOOTH_GUIDED: (0.680, 0.809, 0.317),
        },
        ((TEXTUAL_INVERSION, STABLE_DIFFUSION), (GUIDED, TEXTUAL_INVERSION), (DREAMBOOTH_GUIDED, DREAMBOOTH)),
    ),
    Published(
        "Table 2",
        SCORES,
        {
            TEXTUAL_INVERSION: (0.567, 0.786, 0.293),
            MASK: (0.606, 0.788, 0.292),
            REGULARIZATION: (0.612, 0.789, 0.294),
            STEP_WISE: (0.626, 0.790, 0.292),
            GUIDED: (0.665, 0.807, 0.291),
            DREAMBOOTH: (0.662, 0.803, 0.315),
            DREAMBOOTH_GUIDED: (0.680, 0.809, 0.317),
        },
        tuple(zip(LADDER[1:], LADDER[:-1], strict=True)),
        maintained=("clip_t",),
    ),
)
STEPS = (*zip(LADDER[1:], LADDER[:-1], strict=True), (DREAMBOOTH_GUIDED, DREAMBOOTH))
CLAIMS = tuple(Claim("table 2, by the classifier", better, worse, "identity_kept") for better, worse in STEPS)
TEXT_ORDERS = (
    (STABLE_DIFFUSION, TEXTUAL_INVERSION, "0.337 against 0.255"),
    (GUIDED, TEXTUAL_INVERSION, "0.291 against 0.255"),
    (DREAMBOOTH, TEXTUAL_INVERSION, "0.305 against 0.255"),
    (DREAMBOOTH_GUIDED, DREAMBOOTH, "0.317 against 0.305"),
)
HARDER_CLAIMS = (
    *CLAIMS,
    *(
        Claim("table 1, CLIP-T", better, worse, "text_similarity", published)
        for better, worse, published in TEXT_ORDERS
    ),
)
"""In the harder world, whose words and sizes the encoders of DINO's and CLIP's counterparts do not know."""


SUBJECT_OPTIONS: Options = {
    "subjects": (6, "unseen subjects (6)"),
    "steps": (15, "DDIM steps (15; the paper's are 50)"),
    "guidance_scale": (2.0, "of all sampling (2)"),
    "training_steps": (150, "of shared embeddings (the paper's: 1000)"),
    "updates_per_step": (5, "I of algorithm 1 (5; the paper's: 10)"),
    "batch_size": (2, "of the embeddings' training (2)"),
    "regularization_weight": (1e-6, "w_s of eq. 6 (1e-6, the node's default)"),
    "embedding_learning_rate": (2e-2, "of rows of the text embedding (the paper's: 5e-3)"),
    "token": ("sks", "the rare token"),
    **SEED,
    **CHECKPOINT,
}
"""The subjects, how their embeddings are learned and how images are drawn."""
OPTIONS: Options = {
    **shared_options(2, "hifi_tuner"),
    "prompts": (20, f"the first of {len(PROMPTS)} (20)"),
    "images": (1, "images for each prompt (1)"),
    "inner_steps": (4, "J of algorithm 2 (4; the paper's are 10)"),
    "guidance_learning_rate": (1e-2, "of algorithm 2 (1e-2)"),
    "word_learning_rate": (5e-3, "of word vectors"),
    "prior_steps": (150, "of DreamBooth (150)"),
    "learning_rate": (1e-4, "of DreamBooth"),
    **SUBJECT_OPTIONS,
    **WORLD,
    "subjects": (4, "unseen subjects for each seed (4)"),
}


SUBJECT_COLUMNS = {
    "identity_kept": "identity kept",
    "identity_attributes_kept": "of its attributes",
    "text_similarity": "text followed",
    "text_and_identity": "all of both",
    **{key: title for key, title in PAPER_SCORES.items() if key != "clip_d"},
}
HARDER_COLUMNS = {
    **{key: title for key, title in SUBJECT_COLUMNS.items() if key not in PAPER_SCORES},
    "text_followed": "all of the prompt",
}


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    world = world_of(arguments)
    base, classifier = Checkpoint(*world.checkpoint(arguments.checkpoint)), world.classifier()
    subjects = subjects_of_seeds(arguments)
    cases = Cases(arguments, list(subjects))
    sheet = Sheet(cases)
    for unit in tqdm(cases.left, unit="subject"):
        seed, subject = subjects[unit]
        run = begin(base, subject, argparse.Namespace(**{**vars(arguments), "seed": seed}))
        latents, references = ladder(run)
        with torch.no_grad():
            images = {row: base.vae.decode(made).cpu() for row, made in latents.items()}
        true = [render_source(asked, EVALUATION_SEED + index).image for index, asked in enumerate(run.asked)]
        images["renderer"] = torch.stack(true)
        sources = torch.stack([source.image for source in run.sources])
        prompts = [caption_with(asked, subject.species) for asked in run.asked]
        cases.add(
            {
                row: score(classifier, images[row], run.asked, sources, prompts, world.asked)
                for row in (*ROWS, "renderer")
            }
        )
        rows = {"sources": sources[:2]}
        for row in (*LADDER[:-1], "reference", GUIDED, DREAMBOOTH, "reference of DreamBooth", DREAMBOOTH_GUIDED):
            made = {"reference": references[GUIDED], "reference of DreamBooth": references[DREAMBOOTH_GUIDED]}.get(row)
            rows[row] = (images[row] if made is None else made)[[0, arguments.prompts // 2]]
        sheet.add(rows)
        yield cases.figures()


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    is_harder, title = arguments.world == "harder", world_of(arguments).title
    return [
        f"HiFi Tuner on unseen subjects of the {title}",
        f"{arguments.seeds} seeds from {arguments.seed} on, {arguments.subjects} subjects each, {arguments.prompts} "
        f"prompts, {arguments.images} images of each ({figures['cases']} images a row), learned from one image in each "
        f"pose; embeddings {arguments.training_steps} steps of batch {arguments.batch_size} at learning rate "
        f"{arguments.embedding_learning_rate:g} (words {arguments.word_learning_rate:g}) and "
        f"{arguments.updates_per_step} for each of {arguments.steps} DDIM steps, DreamBooth {arguments.prior_steps} "
        f"steps of the attention layers at {arguments.learning_rate:g}; guidance {arguments.guidance_scale:g}, J = "
        f"{arguments.inner_steps} at learning rate {arguments.guidance_learning_rate:g}; "
        f"{figures['minutes']:.0f} minutes.",
        *report_table(figures["rows"], HARDER_COLUMNS if is_harder else SUBJECT_COLUMNS),
        *orders_section(
            () if is_harder else PUBLISHED, HARDER_CLAIMS if is_harder else CLAIMS, figures, "Wang et al. 2023"
        ),
    ]
