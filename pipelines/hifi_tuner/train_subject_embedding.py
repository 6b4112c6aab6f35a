"""Training of a subject's embeddings from a few images (Wang et al. 2023, section 3.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import engine
from ..engine.families.schedule import ddim_schedule, rows_of
from ..engine.trainable import Text, TrainableNetworks, joined_texts, trainable_networks
from ..shared.comfy_types import Clip, Model
from ..shared.errors import IdentityEditError
from ..shared.input_checks import check_choice, check_number
from ..subjects.word_vectors import mark_subject, with_word_vectors, word_table, word_vectors
from ..subjects.words import has_word
from ..training.images import TrainingImages, check_masks, denoising_losses, draw_batch, guided_preview
from ..training.loop import (
    BFLOAT16,
    CONSTANT,
    Progress,
    TrainingRun,
    TrainingSettings,
    run_description,
    train,
    training_record,
)
from .subject_embedding import KINDS, OUTPUT, SubjectEmbedding, reach_warning, with_last_rows, without_token

MOST_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class SubjectSettings(TrainingSettings):
    """Training settings; the defaults are those of Wang et al. 2023.

    The rows of the paper's table 2 correspond to settings. "Baseline (Textual Inversion)": the kind WORD, `masked` off,
    `regularization_weight` 0, `updates_per_step` 0. "+ mask": `masked`. "+ regularization": the kind OUTPUT with a
    `regularization_weight`. "+ step-wise representations": `updates_per_step` 10. The paper does not say which row
    switches from words to the encoder's output; equation 2 replaces a word's embedding, and phi_s of equation 6 is
    defined as rows of the output, so it is the third.

    Attributes:
        class_word: the subject's class, such as "dog".
        token: the subject's rare token in captions. The kind OUTPUT removes it from captions, the kind WORD replaces it
            with the vectors; "" leaves captions unchanged.
        kind: OUTPUT or WORD, see `subject_embedding`.
        tokens: n, number of rows or word vectors.
        steps: steps for the shared vectors; the step-wise ones are trained afterwards.
        regularization_weight: w_s of equation 6, weight of the squared distance to the initial vectors, a sum over all
            numbers, beside a denoising loss that is a mean; 0 disables it. Not given in the paper. [choice] At the
            default, the squared distances that trainings end at without it (some thousands) cost some thousandths: as
            much as the vectors lower the loss.
        masked: compute the loss only inside the masks (equation 5).
        sampling_steps: T of Algorithm 1, the number of DDIM steps with separate vectors.
        updates_per_step: I of Algorithm 1; 0 skips it, and the subject has only shared vectors.
        sample_prompt: "" for the subject's name.
    """

    class_word: str
    token: str = ""
    kind: str = OUTPUT
    tokens: int = 5
    steps: int = 1000
    learning_rate: float = 5e-3
    optimizer: str = "Adam"
    gradient_clip: float = 0.0
    precision: str = BFLOAT16
    regularization_weight: float = 1e-6
    masked: bool = True
    sampling_steps: int = 50
    updates_per_step: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.kind, "kind", KINDS)
        check_number(self.sampling_steps, "sampling_steps", 1, None)
        check_number(self.updates_per_step, "updates_per_step", 0, None)
        check_number(self.tokens, "tokens", 1, MOST_TOKENS)
        check_number(self.regularization_weight, "regularization_weight", 0.0, None)
        if not self.class_word.strip():
            raise IdentityEditError("class_word is empty; write what the subject is, such as 'dog'.")


def train_subject_embedding(
    model: Model,
    clip: Clip,
    images: TrainingImages,
    settings: SubjectSettings,
    *,
    checkpoint: Callable[[str], str] | None = None,
    progress: Progress | None = None,
) -> tuple[SubjectEmbedding, TrainingRun]:
    """Train a subject's embeddings (equation 6 and Algorithm 1).

    First c_s is trained at all timesteps for `settings.steps` steps, then c_s^t for each DDIM timestep from the highest
    to the lowest, each initialized from the previous one. The networks are frozen. For the kind OUTPUT each caption is
    encoded once; for the kind WORD the gradient passes through the text encoder at every step.

    Args:
        model: MODEL that predicts noise or v, including its LoRAs and identity priors.
        clip: its CLIP.
        images: images of the subject, with masks and captions that name it.
        settings: see `SubjectSettings`.
        checkpoint, progress: see `training.loop.train`, for both phases; samples are latents [1, C, h, w] in the scale
            of LATENT sockets.
    """
    sampling = engine.require(model, engine.Capability.TRAINING).sampling
    tag = engine.model_tag(model)
    check_training_captions(clip, images.captions, settings)
    check_masks(images.masks, settings.masked)
    timesteps: list[int] = []
    if settings.updates_per_step:
        timesteps = ddim_schedule(sampling, settings.sampling_steps).timesteps.tolist()
    updates = len(timesteps) * settings.updates_per_step
    with trainable_networks(
        model,
        clip,
        dtype=settings.dtype,
        latent_shape=[settings.batch_size, *images.largest],
        checkpointing=settings.checkpointing,
    ) as networks:
        subject = _Subject(networks, clip, images, settings)
        first, second = _descriptions(model, clip, tag, images, settings)
        c_s = {name: phi.clone().requires_grad_(True) for name, phi in subject.phi_s.items()}
        run = train(
            c_s,
            lambda index: [subject.loss(c_s, index, "shared vectors")],
            settings,
            description=first,
            checkpoint=checkpoint,
            sample=lambda: subject.sample(lambda t: c_s),
            progress=_continued(progress, 0, settings.steps + updates),
        )
        step_wise = _StepWise(subject, c_s, timesteps)
        if timesteps:
            second_run = train(
                step_wise.variables,
                step_wise.losses,
                # A schedule or an EMA would train the last sampling steps less than the first.
                dataclasses.replace(
                    settings, steps=updates, learning_rate_schedule=CONSTANT, warmup_steps=0, ema_decay=0.0
                ),
                description=second,
                checkpoint=checkpoint,
                sample=lambda: subject.sample(step_wise.learned_at),
                progress=_continued(progress, settings.steps, settings.steps + updates),
                needed=(),  # each batch trains a single step's vectors
            )
            run = TrainingRun(
                losses=run.losses + second_run.losses,
                samples=run.samples + [(settings.steps + step, image) for step, image in second_run.samples],
                resumed_at=run.resumed_at + second_run.resumed_at,
                name=second_run.name,
            )
        vectors = {name: vector.detach().float().cpu().clone() for name, vector in c_s.items()}
        distance = {
            name: float((vectors[name] - phi.cpu()).square().mean().sqrt()) for name, phi in subject.phi_s.items()
        }
    learned = SubjectEmbedding(
        kind=settings.kind,
        vectors=vectors,
        step_vectors=step_wise.learned() if timesteps else None,
        timesteps=tuple(timesteps),
        class_word=settings.class_word,
        token=settings.token,
        model=tag,
        training=training_record(
            settings, run, images=len(images), distance_from_start=distance, regularization="squared norm"
        ),
    )
    return learned, run


def check_training_captions(clip: Clip, captions: list[str], settings: SubjectSettings) -> None:
    """Raise `IdentityEditError` for the first caption that lacks the subject's name or leaves no room for its rows."""
    words = [word for word in (settings.token, settings.class_word) if word]
    for number, caption in enumerate(captions, start=1):
        if not any(has_word(caption, word) for word in words):
            raise IdentityEditError(
                f"The caption of image {number} names the subject neither by its token nor by its class word; write "
                f"'{' '.join(words)}' in it."
            )
        text = without_token(caption, settings.token, settings.class_word)
        warning = reach_warning(clip, text, settings.tokens) if settings.kind == OUTPUT else None
        if warning is not None:
            raise IdentityEditError(f"The caption of image {number} is too long: {warning[0].lower()}{warning[1:]}")


class _Subject:
    """Loss (equation 6) and previews for a subject's vectors c_s, by the names of `SubjectEmbedding.vectors`.

    Attributes:
        phi_s: initial value of c_s.
    """

    def __init__(
        self, networks: TrainableNetworks, clip: Clip, images: TrainingImages, settings: SubjectSettings
    ) -> None:
        self.networks, self.images, self.settings = networks, images, settings
        self.prompt = settings.sample_prompt or f"{settings.token} {settings.class_word}".strip()
        self.null = networks.encode([""])
        encoder = _output_encoder if settings.kind == OUTPUT else _word_encoder
        self.encode, self.phi_s = encoder(networks, clip, settings, [*images.captions, self.prompt])

    def loss(self, c_s: dict[str, torch.Tensor], index: int, what: str, timestep: int | None = None) -> torch.Tensor:
        """L_s(c_s) on batch `index`, at a specific timestep or at random ones."""
        networks, weight = self.networks, self.settings.regularization_weight
        batch = draw_batch(networks, self.images, self.settings, index, what, masked=self.settings.masked)
        if timestep is not None:
            t = rows_of(networks.sampling, [timestep]).expand(len(batch.chosen)).to(batch.t.device)
            batch = dataclasses.replace(batch, t=t)
        # L_s(c_s) = |M (eps_theta(x_t, [c, c_s]) - eps)|^2 + w_s |c_s - phi_s|^2                                # eq. 6
        loss = denoising_losses(networks, batch, self.encode(c_s, batch.captions)).mean()
        if weight == 0.0:
            return loss
        return loss + weight * sum((c_s[name] - self.phi_s[name]).square().sum() for name in c_s)

    def sample(self, vectors_at: Callable[[int], dict[str, torch.Tensor]]) -> torch.Tensor:
        """A preview with the vectors of each timestep (equation 7)."""

        def text_at(t: int) -> Text:
            return joined_texts([self.encode(vectors_at(t), [self.prompt]), self.null])

        return guided_preview(self.networks, self.images.latents[0].shape, self.settings, text_at)


class _StepWise:
    """Algorithm 1: C_s = {}, c_s^{T+1} = c_s; for t = T, ..., 1: c_s^t = c_s^{t+1}, and I updates of it.

    Each c_s^t is a separate variable, so that Adam starts fresh for each.
    """

    def __init__(self, subject: _Subject, c_s: dict[str, torch.Tensor], timesteps: list[int]) -> None:
        self.subject, self.timesteps = subject, timesteps
        self.c_s_of = [
            {name: vector.detach().clone().requires_grad_(True) for name, vector in c_s.items()} for _ in timesteps
        ]
        self.variables = {f"{place}.{name}": v for place, part in enumerate(self.c_s_of) for name, v in part.items()}
        self._before = [c_s, *self.c_s_of]
        self._reached = 0

    def losses(self, index: int) -> list[torch.Tensor]:
        settings = self.subject.settings
        self._reached, update = divmod(index // settings.accumulation, settings.updates_per_step)
        c_s_t = self.c_s_of[self._reached]  # for t = T, ..., 1
        if update == 0 and index % settings.accumulation == 0:
            with torch.no_grad():
                for name, vector in c_s_t.items():
                    vector.copy_(self._before[self._reached][name])  # c_s^t = c_s^{t+1}
        # for i = 1, ..., I: c_s^t = c_s^t - eta grad L_s(c_s^t)
        return [self.subject.loss(c_s_t, index, "step-wise vectors", self.timesteps[self._reached])]

    def learned_at(self, t: int) -> dict[str, torch.Tensor]:
        """c_s^t of the nearest trained timestep."""
        nearest = min(range(len(self.timesteps)), key=lambda place: abs(self.timesteps[place] - t))
        return self.c_s_of[min(nearest, self._reached)]

    def learned(self) -> dict[str, torch.Tensor]:
        """All c_s^t [T, n, C] by name, float32 on the CPU."""
        names = self.c_s_of[0]
        return {name: torch.stack([part[name].detach().float().cpu() for part in self.c_s_of]) for name in names}


_Encode = Callable[[dict[str, torch.Tensor], Sequence[str]], Text]
"""Encodes captions with the vectors c_s in them."""


def _output_encoder(
    networks: TrainableNetworks, clip: Clip, settings: SubjectSettings, captions: Sequence[str]
) -> tuple[_Encode, dict[str, torch.Tensor]]:
    """[c, c_s]: replaces the last n rows of the text encoder's cached output; and phi_s, the last n rows of the null
    prompt's embedding."""
    encoded = {
        caption: networks.encode([without_token(caption, settings.token, settings.class_word)]) for caption in captions
    }

    def encode(c_s: dict[str, torch.Tensor], captions: Sequence[str]) -> Text:
        rows, texts = c_s[OUTPUT], [encoded[caption] for caption in captions]
        return joined_texts([(with_last_rows(embedding.to(rows), rows), pooled) for embedding, pooled in texts])

    null, _ = networks.encode([""])
    return encode, {OUTPUT: null[0, -settings.tokens :].to(torch.float32, copy=True)}


def _word_encoder(
    networks: TrainableNetworks, clip: Clip, settings: SubjectSettings, captions: Sequence[str]
) -> tuple[_Encode, dict[str, torch.Tensor]]:
    """Encodes captions with word vectors in place of the subject's name; and phi_s, the class word's vectors,
    repeated to n."""
    name = settings.token, settings.class_word, settings.tokens
    marked = {caption: mark_subject(clip, *name, caption, disable_weights=True) for caption in captions}

    def encode(c_s: dict[str, torch.Tensor], captions: Sequence[str]) -> Text:
        texts = {
            caption: networks.encode_tokens([with_word_vectors(marked[caption], c_s)])
            for caption in dict.fromkeys(captions)
        }
        return joined_texts([texts[caption] for caption in captions])

    phi_s = {}
    for encoder, words in word_vectors(clip, settings.class_word).items():
        rows = words[[place % len(words) for place in range(settings.tokens)]]
        phi_s[encoder] = rows.to(networks.device, torch.float32, copy=True)
    return encode, phi_s


def _continued(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of one phase as part of the whole."""
    if progress is None:
        return None
    return lambda done, _, loss, sample: progress(before + done, total, loss, sample)


def _descriptions(
    model: Model, clip: Clip, tag: engine.ModelTag, images: TrainingImages, settings: SubjectSettings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run descriptions of the first and the second phase."""
    words = {name: table.detach().flatten()[:16].float().cpu().tolist() for name, table in word_table(clip).items()}
    second = run_description(
        settings,
        tag,
        model,
        clip.patcher,
        text_encoder=[words, clip.layer_idx],
        images=images.fingerprint,
        regularization="squared norm",  # former runs: the mean square
    )
    first_settings = {k: v for k, v in second["settings"].items() if k not in ("sampling_steps", "updates_per_step")}
    first = {**second, "phase": "shared vectors", "shared_steps": None, "settings": first_settings}
    return first, {**second, "phase": "step-wise vectors", "shared_steps": settings.steps}
