"""Learning a subject's embeddings from a few pictures (Wang et al. 2023, section 3.2)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import engine
from .engine.trainable import BFLOAT16, PRECISIONS, Text, TrainableNetworks, trainable_networks
from .errors import IdentityEditError
from .schedule import ddim_schedule, euler_step, rows_of
from .subject_embedding import (
    KINDS,
    OUTPUT,
    SubjectEmbedding,
    Tokens,
    Vectors,
    mark_subject,
    reach_warning,
    with_last_rows,
    with_word_vectors,
    without_token,
    word_table,
)
from .subject_words import has_word
from .training import (
    Progress,
    TrainingRun,
    TrainingSettings,
    generator_of,
    patch_strengths,
    run_hash,
    train,
    training_facts,
)
from .training_pictures import TrainingPictures, batch_indices, denoising_losses, draw_batch, draw_noise

STEPS = 1000
LEARNING_RATE = 5e-3
TOKENS = 5
SAMPLING_STEPS = 50
UPDATES_PER_STEP = 10
REGULARISATION_WEIGHT = 1e-4
MOST_TOKENS = 64


@dataclass(frozen=True)
class SubjectSettings:
    """What is learned and how it is told, beside `TrainingSettings`. The defaults are those of Wang et al. 2023.

    The rows of the paper's table 2 are settings. "Baseline (Textual Inversion)": the kind WORD, `masked` off,
    `regularisation_weight` 0, `updates_per_step` 0. "+ mask": `masked`. "+ regularization": the kind OUTPUT with a
    `regularisation_weight`. "+ step-wise representations": `updates_per_step` 10. The paper does not say at which row
    it goes from words to the encoder's output; equation 2 replaces a word's embedding, and phi_s, to which equation 6
    ties c_s, is defined as rows of the output, so it is the third.

    Attributes:
        class_word: what the subject is.
        token: the rare word by which captions call the subject beside the class word. The kind OUTPUT takes it out of
            the captions, the kind WORD puts the vectors in its place; "" leaves captions as they are.
        kind: OUTPUT or WORD, see `subject_embedding`.
        tokens: n, rows or word vectors.
        regularisation_weight: w_s of equation 6 on the mean squared distance to the start; 0 does not tie. The paper
            gives no value.
        masked: count the loss inside the masks only (equation 5).
        sampling_steps: T of Algorithm 1, the DDIM steps that get vectors of their own.
        updates_per_step: I of Algorithm 1; 0 leaves it out, and the subject has shared vectors only.
        batch_size: pictures in a batch.
        precision: a key of PRECISIONS.
        checkpointing: recompute blocks in the backward pass: a fraction of the memory for a third more time.
        sample_prompt: what the sample previews show; "" is the subject's name.
        sample_guidance_scale, sample_steps: of the sample previews, DDIM.
    """

    class_word: str
    token: str = ""
    kind: str = OUTPUT
    tokens: int = TOKENS
    regularisation_weight: float = REGULARISATION_WEIGHT
    masked: bool = True
    sampling_steps: int = SAMPLING_STEPS
    updates_per_step: int = UPDATES_PER_STEP
    batch_size: int = 1
    precision: str = BFLOAT16
    checkpointing: bool = False
    sample_prompt: str = ""
    sample_guidance_scale: float = 5.0
    sample_steps: int = 20

    def __post_init__(self) -> None:
        for name, choices in (("kind", KINDS), ("precision", tuple(PRECISIONS))):
            if getattr(self, name) not in choices:
                raise IdentityEditError(f"{name} is {getattr(self, name)}; choose one of {', '.join(choices)}.")
        for name, least in (("batch_size", 1), ("sampling_steps", 1), ("updates_per_step", 0)):
            if getattr(self, name) < least:
                raise IdentityEditError(f"{name} is {getattr(self, name)}; choose {least} or more.")
        if not 1 <= self.tokens <= MOST_TOKENS:
            raise IdentityEditError(f"tokens is {self.tokens}; choose a number from 1 to {MOST_TOKENS}.")
        if not (self.regularisation_weight >= 0.0 and math.isfinite(self.regularisation_weight)):
            raise IdentityEditError(f"regularisation_weight is {self.regularisation_weight}; choose 0 or more.")
        if not self.class_word.strip():
            raise IdentityEditError("class_word is empty; write what the subject is, such as 'dog'.")


_NOT_OF_THE_RUN = ("steps", "checkpoint_every", "sample_every")
_NOT_OF_THE_SUBJECT = ("sample_prompt", "sample_guidance_scale", "sample_steps", "checkpointing")
_OF_THE_SECOND_PHASE = ("sampling_steps", "updates_per_step")
"""Settings that change no step's result in the first phase."""


def train_subject_embedding(
    model: Any,
    clip: Any,
    pictures: TrainingPictures,
    settings: SubjectSettings,
    training: TrainingSettings,
    *,
    checkpoint: Callable[[str], str] | None = None,
    progress: Progress | None = None,
) -> tuple[SubjectEmbedding, TrainingRun]:
    """Learn a subject's embeddings (Wang et al. 2023, section 3.2, equation 6 and Algorithm 1).

    First c_s is learned at all timesteps in `training.steps` steps, then c_s^t for each DDIM timestep from the highest
    to the lowest, each from the one before it. The networks are frozen. For the kind OUTPUT the text encoder runs once
    for each caption; for the kind WORD the gradient passes through it at every step.

    Args:
        model: MODEL that predicts noise or velocity; LoRAs and identity priors on it count as part of it.
        clip: its CLIP.
        pictures: pictures of the subject, with masks and with captions that name it.
        settings, training: see there. The paper has Adam without weight decay at 5e-3, 1000 steps.
        checkpoint: gives the file of a phase's checkpoint for a hash of the run, see `training.train`.
        progress: called after every step of both phases; samples are latents [1, C, h, w] in the scale of LATENT
            sockets.

    Returns:
        the subject and the record of both phases one after the other.

    Raises:
        IdentityEditError: when an input cannot be used, or as in `training.train`.
    """
    sampling = engine.require_noise_prediction_model(model)
    tag = engine.model_tag(model)
    check_training_captions(clip, pictures.captions, settings)
    if settings.masked and all(mask is None for mask in pictures.masks):
        raise IdentityEditError("masked_loss is on but no picture has a mask; add masks, or switch it off.")
    training = dataclasses.replace(training, bfloat16=settings.precision == BFLOAT16)
    timesteps: list[int] = []
    if settings.updates_per_step:
        timesteps = ddim_schedule(sampling, settings.sampling_steps).timesteps.tolist()
    total = training.steps + len(timesteps) * settings.updates_per_step
    largest = max(pictures.latents, key=torch.Tensor.numel)
    with trainable_networks(
        model,
        clip,
        [],
        [],
        precision=settings.precision,
        latent_shape=[settings.batch_size, *largest.shape],
        checkpointing=settings.checkpointing,
    ) as networks:
        encoder = (_OutputEncoder if settings.kind == OUTPUT else _WordEncoder)(networks, clip, settings)
        prompt = settings.sample_prompt or f"{settings.token} {settings.class_word}".strip()
        encoder.prepare([*pictures.captions, prompt])
        phi_s = encoder.initial()

        def loss_of(vectors: Vectors, index: int, what: str, timestep: int | None = None) -> torch.Tensor:
            chosen = batch_indices(pictures, settings.batch_size, index, training.seed, what)
            batch = draw_batch(pictures, chosen, partial(engine.to_model_scale, model), networks.device)
            if not settings.masked:
                batch = dataclasses.replace(batch, masks=torch.ones_like(batch.masks))
            t, noise = draw_noise(batch, sampling.sigmas.shape[0], generator_of(training.seed, index, what))
            if timestep is not None:
                t = rows_of(sampling, [timestep]).expand_as(t)
            # L_s(c_s) = |M (eps_theta(x_t, [c, c_s]) - eps)|^2 + w_s |c_s - phi_s|^2                            # eq. 6
            each = denoising_losses(encoder.with_vectors(vectors), sampling, tag.prediction, batch, t, noise)
            if settings.regularisation_weight == 0.0:
                return each.mean()
            distance = torch.cat([(vectors[name] - phi_s[name]).flatten() for name in vectors]).square().mean()
            return each.mean() + settings.regularisation_weight * distance

        def sample(vectors_at: Callable[[int], Vectors]) -> torch.Tensor:
            latent = _sample(encoder, sampling, pictures.latents[0].shape, prompt, vectors_at, settings, training.seed)
            return engine.to_socket_scale(model, latent)

        # c_s at all timesteps, from phi_s
        c_s = {name: phi.clone().requires_grad_(True) for name, phi in phi_s.items()}

        def shared_losses(index: int) -> Iterator[torch.Tensor]:
            yield loss_of(c_s, index, "shared vectors")

        run = run_hash(_description(model, clip, tag, pictures, settings, training, second_phase=False))
        # The last step is in a checkpoint too, so that an interrupted second phase repeats nothing of the first.
        every = math.gcd(training.checkpoint_every, training.steps) if training.checkpoint_every else 0
        record = train(
            c_s,
            shared_losses,
            dataclasses.replace(training, checkpoint_every=every),
            checkpoint=checkpoint(run) if checkpoint is not None else None,
            run=run,
            sample=lambda: sample(lambda t: c_s),
            progress=_continued(progress, 0, total),
        )

        # Algorithm 1: C_s = {}, c_s^{T+1} = c_s
        c_s_of = [
            {name: vector.detach().clone().requires_grad_(True) for name, vector in c_s.items()} for _ in timesteps
        ]
        reached = 0

        def step_wise_losses(index: int) -> Iterator[torch.Tensor]:
            nonlocal reached
            reached, update = divmod(index // training.accumulation, settings.updates_per_step)  # for t = T, ..., 1
            if update == 0 and index % training.accumulation == 0:
                before = c_s_of[reached - 1] if reached else c_s
                with torch.no_grad():
                    for name, vector in c_s_of[reached].items():
                        vector.copy_(before[name])  # c_s^t = c_s^{t+1}
            # for i = 1, ..., I: c_s^t = c_s^t - eta grad L_s(c_s^t)
            yield loss_of(c_s_of[reached], index, "step-wise vectors", timesteps[reached])

        def learned_at(t: int) -> Vectors:
            nearest = min(range(len(timesteps)), key=lambda place: abs(timesteps[place] - t))
            return c_s_of[min(nearest, reached)]

        if settings.updates_per_step:
            # Each c_s^t is a variable of its own, so that Adam begins anew with each.
            variables = {f"{place}.{name}": v for place, part in enumerate(c_s_of) for name, v in part.items()}
            run = run_hash(_description(model, clip, tag, pictures, settings, training, second_phase=True))
            second = train(
                variables,
                step_wise_losses,
                dataclasses.replace(training, steps=total - training.steps),
                checkpoint=checkpoint(run) if checkpoint is not None else None,
                run=run,
                sample=lambda: sample(learned_at),
                progress=_continued(progress, training.steps, total),
                needed=(),  # a batch is of one step
            )
            record = TrainingRun(
                losses=record.losses + second.losses,
                samples=record.samples + [(training.steps + step, picture) for step, picture in second.samples],
                resumed_at=record.resumed_at + second.resumed_at,
            )
        vectors = {name: vector.detach().float().cpu().clone() for name, vector in c_s.items()}
        step_vectors = {
            name: torch.stack([part[name].detach().float().cpu() for part in c_s_of]) for name in vectors if c_s_of
        }
        distance = {name: float((vectors[name] - phi.cpu()).square().mean().sqrt()) for name, phi in phi_s.items()}
    subject = SubjectEmbedding(
        kind=settings.kind,
        vectors=vectors,
        step_vectors=step_vectors or None,
        timesteps=tuple(timesteps),
        class_word=settings.class_word,
        token=settings.token,
        model=tag,
        training=training_facts(training, settings, run, pictures=len(pictures), distance_from_start=distance),
    )
    return subject, record


def check_training_captions(clip: Any, captions: list[str], settings: SubjectSettings) -> None:
    """Check that every caption names the subject and leaves the last positions to it.

    Raises:
        IdentityEditError: naming the first picture whose caption cannot be used.
    """
    words = [word for word in (settings.token, settings.class_word) if word]
    for number, caption in enumerate(captions, start=1):
        if not any(has_word(caption, word) for word in words):
            raise IdentityEditError(
                f"The caption of picture {number} names the subject neither by its token nor by its class word; write "
                f"'{' '.join(words)}' in it."
            )
        text = without_token(caption, settings.token, settings.class_word)
        reached = reach_warning(clip, text, settings.tokens) if settings.kind == OUTPUT else None
        if reached is not None:
            raise IdentityEditError(f"The caption of picture {number} is too long: {reached[0].lower()}{reached[1:]}")


class _Encoder:
    """The frozen networks, whose captions hold the subject's vectors: what `denoising_losses` evaluates."""

    def __init__(self, networks: TrainableNetworks, clip: Any, settings: SubjectSettings) -> None:
        self.networks = networks
        self.clip = clip
        self.settings = settings
        self.vectors: Vectors = {}

    def with_vectors(self, vectors: Vectors) -> Any:
        """The same, with these vectors from now on."""
        self.vectors = vectors
        return self

    def denoised(self, x: torch.Tensor, sigma: torch.Tensor, text: Text) -> torch.Tensor:
        return self.networks.denoised(x, sigma, text)

    def null(self) -> Text:
        """phi: the null prompt, without the subject."""
        return self.networks.encode([""])


class _OutputEncoder(_Encoder):
    """Captions as [c, c_s]: the last n rows of the text encoder's output replaced."""

    def prepare(self, captions: list[str]) -> None:
        """Run the text encoder once for each caption; the networks keep what it gives."""
        for caption in ("", *captions):
            self.networks.encode([self._text(caption)])

    def initial(self) -> Vectors:
        """phi_s, the last n rows of the null prompt's embedding."""
        embedding, _ = self.null()
        return {OUTPUT: embedding[0, -self.settings.tokens :].to(self.networks.device, torch.float32, copy=True)}

    def encode(self, captions: list[str]) -> Text:
        """[c, c_s] [B, T, C] and pooled outputs [B, P] of captions."""
        texts = [self.networks.encode([self._text(caption)]) for caption in captions]
        rows = self.vectors[OUTPUT]
        return _batched([(with_last_rows(embedding.to(rows), rows), pooled) for embedding, pooled in texts])

    def _text(self, caption: str) -> str:
        return without_token(caption, self.settings.token, self.settings.class_word)


class _WordEncoder(_Encoder):
    """Captions with word vectors at the place of the subject's name, through the text encoder."""

    def prepare(self, captions: list[str]) -> None:
        """Tokenise each caption once."""
        name = self.settings.token, self.settings.class_word, self.settings.tokens
        self._marked: dict[str, Tokens] = {
            caption: mark_subject(self.clip, *name, caption, disable_weights=True) for caption in captions
        }
        self.null()

    def initial(self) -> Vectors:
        """The class word's vectors, over again until there are n."""
        vectors: Vectors = {}
        tables = word_table(self.clip)
        tokens = self.clip.tokenize(self.settings.class_word, return_word_ids=True, disable_weights=True)
        for encoder, chunks in tokens.items():
            words = [token for token, _, word in chunks[0] if word != 0]
            rows = [words[place % len(words)] for place in range(self.settings.tokens)]
            table = tables[f"clip_{encoder}"].detach()
            vectors[f"clip_{encoder}"] = table[rows].to(self.networks.device, torch.float32, copy=True)
        return vectors

    def encode(self, captions: list[str]) -> Text:
        """Embeddings [B, T, C] and pooled outputs [B, P] of captions; each different one is encoded once."""
        encoder = self.clip.cond_stage_model
        encoder.reset_clip_options()
        if self.clip.layer_idx is not None:  # CLIP Set Last Layer
            encoder.set_clip_options({"layer": self.clip.layer_idx})
        texts = {
            caption: encoder.encode_token_weights(with_word_vectors(self._marked[caption], self.vectors))[:2]
            for caption in dict.fromkeys(captions)
        }
        return _batched([texts[caption] for caption in captions])


def _batched(texts: list[tuple[torch.Tensor, torch.Tensor | None]]) -> Text:
    """One batch; embeddings of fewer chunks are repeated, which changes no cross-attention."""
    length = math.lcm(*(embedding.shape[1] for embedding, _ in texts))
    embeddings = [embedding.repeat(1, length // embedding.shape[1], 1) for embedding, _ in texts]
    pooled = [row for _, row in texts if row is not None]
    return torch.cat(embeddings), torch.cat(pooled) if len(pooled) == len(texts) else None


def _sample(
    encoder: _OutputEncoder | _WordEncoder,
    sampling: Any,
    size: torch.Size,
    prompt: str,
    vectors_at: Callable[[int], Vectors],
    settings: SubjectSettings,
    seed: int,
) -> torch.Tensor:
    """DDIM with guidance and the vectors of each timestep (equation 7) -> latent [1, C, h, w], the model's scale."""
    device = encoder.networks.device
    schedule = ddim_schedule(sampling, settings.sample_steps, end_at_zero=True)
    noise = torch.randn((1, *size), generator=generator_of(seed, 0, "sample")).to(device)
    sigmas = schedule.sigmas.to(device)
    x = sigmas[0] * noise
    for t, sigma, sigma_next in zip(schedule.timesteps.tolist(), sigmas[:-1], sigmas[1:], strict=True):
        with_subject = encoder.with_vectors(vectors_at(t)).encode([prompt])
        text = _batched([_on(device, with_subject), _on(device, encoder.null())])
        both = encoder.denoised(torch.cat([x, x]), sigma.expand(2), text).float()
        denoised = both[1:] + settings.sample_guidance_scale * (both[:1] - both[1:])
        x = euler_step(x, denoised, sigma, sigma_next)
    return x


def _on(device: torch.device, text: Text) -> Text:
    embedding, pooled = text
    return embedding.to(device), None if pooled is None else pooled.to(device)


def _continued(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of one phase as that of the whole."""
    if progress is None:
        return None
    return lambda done, _, loss, sample: progress(before + done, total, loss, sample)


def _description(
    model: Any,
    clip: Any,
    tag: engine.ModelTag,
    pictures: TrainingPictures,
    settings: SubjectSettings,
    training: TrainingSettings,
    second_phase: bool,
) -> dict[str, Any]:
    """Everything that the result of a phase's step depends on; patches of others by their strengths."""
    optimisation = {**dataclasses.asdict(training), **dataclasses.asdict(settings)}
    for name in (*_NOT_OF_THE_RUN, *_NOT_OF_THE_SUBJECT, *(() if second_phase else _OF_THE_SECOND_PHASE)):
        del optimisation[name]
    words = {name: table.detach().flatten()[:16].float().cpu().tolist() for name, table in word_table(clip).items()}
    return {
        "phase": "step-wise vectors" if second_phase else "shared vectors",
        "shared_steps": training.steps if second_phase else None,
        "settings": optimisation,
        "model": dataclasses.asdict(tag),
        "patches": patch_strengths(model, clip.patcher),
        "text_encoder": [words, clip.layer_idx],
        "pictures": pictures.fingerprint,
    }
