"""Training of the personalized identity prior of LIPE (Liu et al. 2024, section 2.1 and appendix E.2.5)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import engine
from ..engine.trainable import trainable_networks
from ..engine.weights import first_numbers
from ..shared.comfy_types import Clip, Model
from ..shared.files import FILE_DTYPES
from ..shared.input_checks import check_choice, check_number
from ..training.images import Batch, TrainingImages, denoising_losses, draw_batch, guided_preview
from ..training.loop import (
    BFLOAT16,
    Progress,
    TrainingRun,
    TrainingSettings,
    generator_of,
    run_description,
    train,
    training_record,
)
from ..training.weights import ATTENTION, CLIP_ATTENTION, LOW_RANK, RANK, WEIGHTS
from .identity_prior import CLIP_PREFIX, MODEL_PREFIX, IdentityPrior, attention_keys

_REGULARIZATION = "regularisation"
"""Names the draws for the regularization set. The seed depends on it: in another spelling the draws would differ."""


@dataclass(frozen=True, kw_only=True)
class PriorSettings(TrainingSettings):
    """Training settings; the defaults are those of Liu et al. 2024.

    Attributes:
        token: V*, the rare token.
        class_word: the subject's class, such as "dog".
        batch_size: images per batch from each of the two sets.
        weight_decay: torch's and diffusers' default for AdamW; not given in the paper.
        regularization_weight: weight of the class images' loss; 1 in Ruiz et al. 2023.
        text_encoder: whether to train the text encoders.
        weights: one of `training.weights.WEIGHTS`. ATTENTION is LIPE's; ALL is DreamBooth (Ruiz et al. 2023) as in its
            baseline DreamCtrl (learning rate 5e-6) and in HiFi Tuner (400 steps).
        rank: r of the changes for LOW_RANK.
        masked: compute the identity images' loss only inside their masks.
        min_snr_gamma: see `denoising_losses`; 0 disables it.
        sample_prompt: "" for the token and the class word.
        file_dtype: data type of the saved weight difference, a key of FILE_DTYPES.
    """

    changes_no_step = TrainingSettings.changes_no_step | {"file_dtype"}
    token: str
    class_word: str
    steps: int = 1000
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    precision: str = BFLOAT16
    regularization_weight: float = 1.0
    text_encoder: bool = True
    weights: str = ATTENTION
    rank: int = RANK
    masked: bool = False
    min_snr_gamma: float = 0.0
    file_dtype: str = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.file_dtype, "file_dtype", FILE_DTYPES)
        check_choice(self.weights, "weights", WEIGHTS)
        check_number(self.rank, "rank", 1, None)


def train_identity_prior(
    model: Model,
    clip: Clip,
    identity: TrainingImages,
    regularization: TrainingImages | None,
    settings: PriorSettings,
    *,
    checkpoint: Callable[[str], str] | None = None,
    progress: Progress | None = None,
) -> tuple[IdentityPrior, TrainingRun]:
    """Train an identity prior.

    Every step uses one batch of the identity set and one of the regularization set:
    loss = mean |eps_theta - eps|^2 over the former + regularization_weight * the same over the latter.

    Args:
        model: MODEL that predicts noise or v, including its LoRAs.
        clip: its CLIP.
        identity: images of the subject.
        regularization: images of its class, or None.
        settings: see `PriorSettings`.
        checkpoint, progress: see `training.loop.train`; samples are latents [1, C, h, w] in the scale of LATENT
            sockets.
    """
    tag = engine.model_tag(model)
    model_keys, clip_keys = attention_keys(model, clip, settings.weights)
    sets = {"identity": (identity, 1.0)}
    if regularization is not None and settings.regularization_weight > 0.0:
        sets[_REGULARIZATION] = (regularization, settings.regularization_weight)
    encoder = first_numbers(clip.patcher, "clip_", CLIP_ATTENTION.fullmatch)
    description = run_description(
        settings,
        tag,
        model,
        clip.patcher,
        text_encoder=[list(encoder.values()), clip.layer_idx],
        identity=identity.fingerprint,
        regularization=None if regularization is None else regularization.fingerprint,
    )
    largest = max((images.largest for images, _ in sets.values()), key=math.prod)
    with trainable_networks(
        model,
        clip,
        model_keys,
        clip_keys if settings.text_encoder else [],
        dtype=settings.dtype,
        latent_shape=[settings.batch_size * len(sets), *largest],
        checkpointing=settings.checkpointing,
        rank=settings.rank if settings.weights == LOW_RANK else 0,
        seed=settings.seed,
    ) as networks:

        def losses(index: int) -> Iterator[torch.Tensor]:
            batches, weights = [], []
            for what, (images, weight) in sets.items():
                masked = settings.masked or what != "identity"
                generator = generator_of(settings.seed, index, f"noise of {what}")
                batches.append(draw_batch(networks, images, settings, index, what, masked=masked, generator=generator))
                weights.append(torch.full((settings.batch_size,), weight / settings.batch_size))
            if len({batch.latents.shape for batch in batches}) == 1:  # same size: one model call for both sets
                batches, weights = [_joined(batches)], [torch.cat(weights)]
            for batch, batch_weights in zip(batches, weights, strict=True):
                text = networks.encode(batch.captions)
                each = denoising_losses(networks, batch, text, min_snr_gamma=settings.min_snr_gamma)
                yield (batch_weights.to(each.device) * each).sum()

        def sample() -> torch.Tensor:
            text = networks.encode([settings.sample_prompt or f"{settings.token} {settings.class_word}", ""])
            return guided_preview(networks, identity.latents[0].shape, settings, lambda t: text)

        model_variables = {MODEL_PREFIX + key: value for key, value in networks.model_variables.items()}
        clip_variables = {CLIP_PREFIX + key: value for key, value in networks.clip_variables.items()}
        run = train(
            {**model_variables, **clip_variables},
            losses,
            settings,
            description=description,
            checkpoint=checkpoint,
            sample=sample,
            progress=progress,
            needed=model_variables,  # text encoder layers after the output layer get no gradient
        )
        model_change, clip_change = networks.changes(FILE_DTYPES[settings.file_dtype])
    facts = training_record(
        settings,
        run,
        identity_images=len(identity),
        regularization_images=0 if regularization is None else len(regularization),
        pack_version=_pack_version(),
    )
    return IdentityPrior(model_change, clip_change, settings.token, settings.class_word, tag, facts), run


def _joined(batches: Sequence[Batch]) -> Batch:
    latents, masks, t, noise = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("latents", "masks", "t", "noise")
    )
    return Batch(latents, masks, t, noise, [caption for batch in batches for caption in batch.captions])


def _pack_version() -> str:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    return match.group(1) if match else "unknown"
