"""Training the identity encoder on images of many people (Chen et al. 2024, supplement 1.1; Wei et al. 2023)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .. import engine
from ..engine.trainable import trainable_networks
from ..shared.errors import IdentityEditError
from ..subjects.word_vectors import with_word_vectors, word_table, word_vectors
from ..subjects.words import has_word
from ..training.images import TrainingImages, check_masks, denoising_losses, draw_batch
from ..training.loop import Progress, TrainingRun, TrainingSettings, run_description, train, training_record
from .identity_words import MOST_WORDS, WORDS, IdentityEncoder, IdentityWords, image_features, mark_identity

_WHAT = "identity words"


@dataclass(frozen=True, kw_only=True)
class IdentitySettings(TrainingSettings):
    """Training settings.

    The learning rate of Wei et al. 2023 (1e-6) is for hundreds of thousands of steps; our defaults were tested on the
    demo world.

    Attributes:
        class_word: class word of all images, such as "person"; captions contain it, and the words go before it.
        words: number of identity words.
        regularization_weight: L1 regularization weight of the words; 0.01 in Wei et al. 2023.
        masked: compute the loss inside the masks only. Chen et al. 2024 do not mention masks.
    """

    class_word: str
    words: int = WORDS
    steps: int = 2000
    learning_rate: float = 1e-4
    batch_size: int = 4
    regularization_weight: float = 0.01
    masked: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.class_word.strip():
            raise IdentityEditError("class_word is empty; write what the images show, such as 'person'.")
        if not 1 <= self.words <= MOST_WORDS:
            raise IdentityEditError(f"words is {self.words}; choose a number from 1 to {MOST_WORDS}.")
        if not (self.regularization_weight >= 0.0 and math.isfinite(self.regularization_weight)):
            raise IdentityEditError(f"regularization_weight is {self.regularization_weight}; choose 0 or more.")


def features_of(clip_vision: Any, images: list[torch.Tensor]) -> torch.Tensor:
    """CLIP vision features [P, N, C] float32 CPU of P images [H, W, 3], 0 to 1."""
    found = []
    with torch.no_grad():
        for image in images:
            # crop=False: a face may be anywhere.
            seen = clip_vision.encode_image(image[None, ..., :3], crop=False)
            found.append(image_features(seen, "The CLIP vision"))
    with torch.inference_mode(False), torch.no_grad():
        return torch.cat([each.clone() for each in found])


def train_identity_words(
    model: Any,
    clip: Any,
    images: TrainingImages,
    features: torch.Tensor,
    settings: IdentitySettings,
    *,
    checkpoint: Callable[[str], str] | None = None,
    progress: Progress | None = None,
) -> tuple[IdentityWords, TrainingRun]:
    """Train an identity encoder: each image is denoised with its identity words in its caption.

    Args:
        model: MODEL that predicts noise or v, frozen.
        clip: its CLIP, frozen; the gradient passes through it.
        images: images of many people, one in each, with captions that contain the class word.
        features: [P, N, C] of the same images, from `features_of`.
        settings: see `IdentitySettings`.
        checkpoint, progress: see `training.loop.train`; there are no previews.

    Raises:
        IdentityEditError: when an input cannot be used, or as in `training.loop.train`.
    """
    tag = engine.model_tag(model)
    _check(images, features, settings)
    widths = {name: int(table.shape[-1]) for name, table in word_table(clip).items()}
    with trainable_networks(
        model,
        clip,
        dtype=settings.dtype,
        latent_shape=[settings.batch_size, *images.largest],
        checkpointing=settings.checkpointing,
    ) as networks:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed & 0x7FFFFFFFFFFFFFFF)
            encoder = IdentityEncoder(features.shape[-1], widths, settings.words)
        own = word_vectors(clip, settings.class_word)
        encoder.begin_with({name: vectors.float().mean(0).cpu() for name, vectors in own.items()})
        encoder = encoder.to(networks.device).train()
        features = features.detach().clone()
        marked = {
            caption: mark_identity(clip, settings.class_word, settings.words, caption, disable_weights=True)
            for caption in dict.fromkeys(images.captions)
        }

        def losses(index: int) -> Iterator[torch.Tensor]:
            batch = draw_batch(networks, images, settings, index, _WHAT, masked=settings.masked)
            words = encoder(features[batch.chosen].to(networks.device))
            prompts = [
                with_word_vectors(marked[caption], {name: vectors[row] for name, vectors in words.items()})
                for row, caption in enumerate(batch.captions)
            ]
            loss = denoising_losses(networks, batch, networks.encode_tokens(prompts)).mean()
            size = torch.stack([vectors.float().abs().mean() for vectors in words.values()]).mean()
            yield loss + settings.regularization_weight * size

        # Rounded, as encoding the same images on another device need not give the same bits.
        seen = hashlib.sha256((features.mean(dim=(1, 2)) * 100).round().to(torch.int32).numpy().tobytes()).hexdigest()
        run = train(
            dict(encoder.named_parameters()),
            losses,
            settings,
            description=run_description(
                settings, tag, what=_WHAT, images=images.fingerprint, features=[seen, *features.shape]
            ),
            checkpoint=checkpoint,
            progress=progress,
        )
        encoder = encoder.cpu().eval().requires_grad_(False)
    learned = IdentityWords(
        encoder=encoder,
        words=settings.words,
        widths=widths,
        features=(int(features.shape[1]), int(features.shape[2])),
        class_word=settings.class_word,
        model=tag,
        training=training_record(settings, run, images=len(images)),
    )
    return learned, run


def _check(images: TrainingImages, features: torch.Tensor, settings: IdentitySettings) -> None:
    if features.ndim != 3 or len(features) != len(images):
        raise IdentityEditError(
            f"There are {len(images)} images and CLIP vision features for {len(features)}; encode the same ones."
        )
    for number, caption in enumerate(images.captions, start=1):
        if not has_word(caption, settings.class_word):
            raise IdentityEditError(
                f"The caption of image {number}, '{caption}', does not contain the class word '{settings.class_word}'; "
                f"write it there, or choose another class word."
            )
    check_masks(images.masks, settings.masked)
