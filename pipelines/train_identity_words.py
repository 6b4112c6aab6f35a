"""Training the identity encoder on pictures of many people (Chen et al. 2024, supplement 1.1; Wei et al. 2023)."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import engine
from .engine.trainable import BFLOAT16, FLOAT32, PRECISIONS, Text, joined_texts, trainable_networks
from .errors import IdentityEditError
from .identity_words import (
    MOST_WORDS,
    WORDS,
    IdentityEncoder,
    IdentityWords,
    image_features,
    mark_identity,
)
from .subject_embedding import Vectors, with_word_vectors, word_table
from .subject_words import has_word
from .training import Progress, TrainingRun, TrainingSettings, generator_of, run_hash, train, training_facts
from .training_pictures import TrainingPictures, batch_indices, draw_batch, draw_noise, losses_of

STEPS = 2000
BATCH_SIZE = 4
LEARNING_RATE = 1e-4
REGULARISATION_WEIGHT = 0.01
"""Wei et al. 2023 weight the words' mean absolute value by this. Their steps and learning rate (1e-6) are for hundreds
of thousands of steps; ours are a start that was tried on the demo world."""


@dataclass(frozen=True)
class IdentitySettings:
    """What is learned and how it is told, beside `TrainingSettings`.

    Attributes:
        class_word: what all pictures show, "person"; captions hold it, and the words go before it.
        words: how many identity words.
        regularisation_weight: of the mean absolute value of the words, beside the loss.
        masked: count the loss inside the masks only. Chen et al. 2024 name no mask.
        batch_size: pictures in a batch.
        precision: a key of PRECISIONS, of the frozen networks; the encoder is float32.
        checkpointing: recompute blocks in the backward pass.
    """

    class_word: str
    words: int = WORDS
    regularisation_weight: float = REGULARISATION_WEIGHT
    masked: bool = False
    batch_size: int = BATCH_SIZE
    precision: str = FLOAT32
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if not self.class_word.strip():
            raise IdentityEditError("class_word is empty; write what the pictures show, such as 'person'.")
        if not 1 <= self.words <= MOST_WORDS:
            raise IdentityEditError(f"words is {self.words}; choose a number from 1 to {MOST_WORDS}.")
        if self.batch_size < 1:
            raise IdentityEditError(f"batch_size is {self.batch_size}; choose 1 or more.")
        if not (self.regularisation_weight >= 0.0 and math.isfinite(self.regularisation_weight)):
            raise IdentityEditError(f"regularisation_weight is {self.regularisation_weight}; choose 0 or more.")
        if self.precision not in PRECISIONS:
            raise IdentityEditError(f"precision is {self.precision}; choose one of {', '.join(PRECISIONS)}.")


def features_of(clip_vision: Any, pictures: list[torch.Tensor]) -> torch.Tensor:
    """The image encoder's features [P, N, C] of P pictures [H, W, 3] in [0, 1], float32 CPU."""
    found = []
    with torch.no_grad():
        for picture in pictures:
            # crop=False: a face may be anywhere.
            seen = clip_vision.encode_image(picture[None, ..., :3], crop=False)
            found.append(image_features(seen, "The CLIP vision"))
    with torch.inference_mode(False), torch.no_grad():
        return torch.cat([each.clone() for each in found])


def train_identity_words(
    model: Any,
    clip: Any,
    pictures: TrainingPictures,
    features: torch.Tensor,
    settings: IdentitySettings,
    training: TrainingSettings,
    *,
    checkpoint: Callable[[str], str] | None = None,
    progress: Progress | None = None,
) -> tuple[IdentityWords, TrainingRun]:
    """Learn an identity encoder: each picture is denoised with its own words in its caption.

    Args:
        model: MODEL that predicts noise or velocity, frozen.
        clip: its CLIP, frozen; the gradient passes through it.
        pictures: many people, one of them in each picture, with captions that hold the class word.
        features: of the same pictures [P, N, C], from `features_of`.
        settings, training: see there.
        checkpoint: gives the file of the checkpoint for a hash of the run, see `training.train`.
        progress: called after every step; there are no samples.

    Raises:
        IdentityEditError: when an input cannot be used, or as in `training.train`.
    """
    sampling = engine.require_noise_prediction_model(model)
    tag = engine.model_tag(model)
    _check(pictures, features, settings)
    training = dataclasses.replace(training, bfloat16=settings.precision == BFLOAT16)
    largest = max(pictures.latents, key=torch.Tensor.numel)
    widths = {name: int(table.shape[-1]) for name, table in word_table(clip).items()}
    with trainable_networks(
        model,
        clip,
        [],
        [],
        precision=settings.precision,
        latent_shape=[settings.batch_size, *largest.shape],
        checkpointing=settings.checkpointing,
    ) as networks:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed & 0x7FFFFFFFFFFFFFFF)
            encoder = IdentityEncoder(features.shape[-1], widths, settings.words)
        encoder.begin_with(_class_word_vectors(clip, settings.class_word))
        encoder = encoder.to(networks.device).train()
        marked = {
            caption: mark_identity(clip, settings.class_word, settings.words, caption, disable_weights=True)
            for caption in dict.fromkeys(pictures.captions)
        }
        features = features.detach().clone()

        def losses(index: int) -> Iterator[torch.Tensor]:
            chosen = batch_indices(pictures, settings.batch_size, index, training.seed, "identity words")
            batch = draw_batch(pictures, chosen, partial(engine.to_model_scale, model), networks.device)
            if not settings.masked:
                batch = dataclasses.replace(batch, masks=torch.ones_like(batch.masks))
            t, noise = draw_noise(batch, sampling.sigmas.shape[0], generator_of(training.seed, index, "identity words"))
            words = encoder(features[chosen].to(networks.device))
            captions = [marked[pictures.captions[number]] for number in chosen]
            text = _encode(clip, [with_word_vectors(c, _row(words, i)) for i, c in enumerate(captions)])
            denoise = partial(networks.denoised, text=text)
            each = losses_of(denoise, sampling, tag.prediction, batch.latents, batch.masks, t, noise)
            size = torch.stack([vectors.float().abs().mean() for vectors in words.values()]).mean()
            yield each.mean() + settings.regularisation_weight * size

        run = run_hash(_description(tag, pictures, features, settings, training))
        record = train(
            dict(encoder.named_parameters()),
            losses,
            training,
            checkpoint=checkpoint(run) if checkpoint is not None else None,
            run=run,
            progress=progress,
        )
        encoder = encoder.cpu().eval().requires_grad_(False)
    words = IdentityWords(
        encoder=encoder,
        words=settings.words,
        widths=widths,
        features=(int(features.shape[1]), int(features.shape[2])),
        class_word=settings.class_word,
        model=tag,
        training=training_facts(training, settings, run, pictures=len(pictures)),
    )
    return words, record


def _row(words: Vectors, index: int) -> Vectors:
    return {name: vectors[index] for name, vectors in words.items()}


def _encode(clip: Any, prompts: list[Any]) -> Text:
    encoder = clip.cond_stage_model
    encoder.reset_clip_options()
    if clip.layer_idx is not None:  # CLIP Set Last Layer
        encoder.set_clip_options({"layer": clip.layer_idx})
    return joined_texts([encoder.encode_token_weights(tokens)[:2] for tokens in prompts])


def _class_word_vectors(clip: Any, class_word: str) -> Vectors:
    """The mean of the class word's own embeddings, for each text encoder."""
    tables = word_table(clip)
    vectors: Vectors = {}
    for encoder, chunks in clip.tokenize(class_word, return_word_ids=True, disable_weights=True).items():
        tokens = [token for token, _, word in chunks[0] if word != 0]
        vectors[f"clip_{encoder}"] = tables[f"clip_{encoder}"].detach()[tokens].float().mean(0).cpu().clone()
    return vectors


def _check(pictures: TrainingPictures, features: torch.Tensor, settings: IdentitySettings) -> None:
    if features.ndim != 3 or len(features) != len(pictures):
        raise IdentityEditError(
            f"There are {len(pictures)} pictures and CLIP vision features for {len(features)}; encode the same ones."
        )
    for number, caption in enumerate(pictures.captions, start=1):
        if not has_word(caption, settings.class_word):
            raise IdentityEditError(
                f"The caption of picture {number}, '{caption}', does not hold the class word '{settings.class_word}'; "
                f"write it there, or choose another class word."
            )
    if settings.masked and all(mask is None for mask in pictures.masks):
        raise IdentityEditError("masked_loss is on but no picture has a mask; add masks, or switch it off.")


def _description(
    tag: engine.ModelTag,
    pictures: TrainingPictures,
    features: torch.Tensor,
    settings: IdentitySettings,
    training: TrainingSettings,
) -> dict[str, Any]:
    """Everything that the result of a step depends on."""
    optimisation = {**dataclasses.asdict(training), **dataclasses.asdict(settings)}
    for name in ("steps", "checkpoint_every", "sample_every", "checkpointing"):
        del optimisation[name]
    # Rounded, as encoding the same pictures on another device need not give the same bits.
    seen = hashlib.sha256((features.mean(dim=(1, 2)) * 100).round().to(torch.int32).numpy().tobytes()).hexdigest()
    return {
        "what": "identity words",
        "settings": optimisation,
        "model": dataclasses.asdict(tag),
        "pictures": pictures.fingerprint,
        "features": [seen, *features.shape],
    }
