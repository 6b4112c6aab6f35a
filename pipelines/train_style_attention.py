"""Training a style attention on a few pictures of one person (PIDiff, Gu et al. 2025: sections 2.2.1, 2.2.4, 3.1)."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..attention.style_cross_attention import (
    KINDS,
    SEQUENTIAL,
    layer_sizes,
    style_patches,
    text_layers,
)
from . import engine
from .engine.trainable import FLOAT32, PRECISIONS, TrainableNetworks, float32_weight, trainable_networks
from .errors import IdentityEditError
from .schedule import ddim_schedule, euler_step
from .style_attention import ROW_GROUPS, STRENGTH, RowGroups, StyleAttention, StyleNetwork, parse_row_groups
from .style_attention_files import in_file_precision
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
from .training_pictures import TrainingPictures, batch_indices, draw_batch, draw_noise, losses_of
from .w_plus import WPlus

STEPS = 600
BATCH_SIZE = 4
LEARNING_RATE = 1e-4
"""Our choice: the extracted text of Gu et al. 2025, section 3.1, has lost the number."""
WEIGHT_DECAY = 0.01
DROP = 0.5
STYLE_NOISE = 0.05
"""Our choice: Gu et al. 2025 add "random noise" to the styles and do not say how much."""
PLACE = "{}"
TEMPLATES = (
    "an image of {}",
    "a cropped photo of {}",
    "a photo of {}",
    "a close-up photo of {}",
    "a picture of {}",
    "a portrait of {}",
)
"""The first two are named in Gu et al. 2025, section 2.2.1; the others are in their manner."""

_WHAT = "style attention"
_NOT_OF_THE_RESULT = (
    "steps", "checkpoint_every", "sample_every", "checkpointing",
    "sample_prompt", "sample_strength", "sample_guidance_scale", "sample_steps",
)  # fmt: skip


@dataclass(frozen=True)
class StyleSettings:
    """What is learned and how it is told, beside `TrainingSettings`. The defaults are those of Gu et al. 2025.

    Attributes:
        pseudo_word: stands for the person in captions.
        templates: captions with PLACE for the pseudo-word, one drawn for each picture of a batch. None of them takes
            the pictures' own captions.
        kind: SEQUENTIAL, or PARALLEL for the paper's ablation (section 3.4.3).
        row_groups: of style rows, one token each, see `parse_row_groups`.
        text_drop, style_drop: how often a picture goes without its caption (an empty one) and without its styles (the
            encoder's mean style), each drawn on its own.
        style_noise: deviation of the noise that is added to the styles, in their own unit.
        masked: count the loss inside the masks only. The paper names no mask.
        batch_size: pictures in a batch.
        precision: a key of PRECISIONS, of the frozen networks; what is trained is float32.
        checkpointing: recompute blocks in the backward pass.
        sample_prompt: what the sample previews show; "" is the first template.
        sample_strength: lambda of the sample previews; it is 1 in training.
        sample_guidance_scale, sample_steps: of the sample previews, DDIM.
    """

    pseudo_word: str
    templates: tuple[str, ...] = TEMPLATES
    kind: str = SEQUENTIAL
    row_groups: str = ROW_GROUPS
    text_drop: float = DROP
    style_drop: float = DROP
    style_noise: float = STYLE_NOISE
    masked: bool = False
    batch_size: int = BATCH_SIZE
    precision: str = FLOAT32
    checkpointing: bool = False
    sample_prompt: str = ""
    sample_strength: float = STRENGTH
    sample_guidance_scale: float = 7.5
    sample_steps: int = 20

    def __post_init__(self) -> None:
        for name, choices in (("kind", KINDS), ("precision", tuple(PRECISIONS))):
            if getattr(self, name) not in choices:
                raise IdentityEditError(f"{name} is {getattr(self, name)}; choose one of {', '.join(choices)}.")
        if self.batch_size < 1:
            raise IdentityEditError(f"batch_size is {self.batch_size}; choose 1 or more.")
        for name in ("text_drop", "style_drop"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise IdentityEditError(f"{name} is {getattr(self, name):g}; choose a share from 0 to 1.")
        if not (self.style_noise >= 0.0 and math.isfinite(self.style_noise)):
            raise IdentityEditError(f"style_noise is {self.style_noise}; choose 0 or more.")
        if self.templates and not self.pseudo_word.strip():
            raise IdentityEditError("The pseudo-word is empty; write one rare word for the person, such as 'sks'.")
        for template in self.templates:
            if PLACE not in template:
                raise IdentityEditError(
                    f"The template '{template}' has no place for the pseudo-word; write {PLACE} where it goes."
                )

    def caption(self, template: str) -> str:
        return template.replace(PLACE, self.pseudo_word)


@dataclass
class _GivenStyles:
    """`Styles` that are handed over before each evaluation: tokens [B, n, C] for its rows, and lambda."""

    tokens: torch.Tensor | None = None
    strength: float = 1.0

    def __call__(self, rows: torch.Tensor, extra: Mapping[str, Any]) -> tuple[torch.Tensor, float] | None:
        return None if self.tokens is None else (self.tokens.to(rows.dtype), self.strength)


def train_style_attention(
    model: Any,
    clip: Any,
    pictures: TrainingPictures,
    w_plus: WPlus,
    settings: StyleSettings,
    training: TrainingSettings,
    *,
    checkpoint: Callable[[str], str] | None = None,
    progress: Progress | None = None,
) -> tuple[StyleAttention, TrainingRun]:
    """Learn a person's style attention: equation 5 of Gu et al. 2025.

    Only W'_q, W'_k, W'_v of every layer and the mapping network are trained; the former begin as the text
    cross-attention's own.

    Args:
        model: MODEL that predicts noise or velocity, frozen; LoRAs on it count as part of it.
        clip: its CLIP, frozen.
        pictures: of one person, six in the paper; further ones of another person add their style (section 2.2.2).
        w_plus: styles of the same pictures, in the same order.
        settings, training: see there. The paper has AdamW with weight decay 0.01 and 600 steps.
        checkpoint: gives the file of the checkpoint for a hash of the run, see `training.train`.
        progress: called after every step; samples are latents [1, C, h, w] in the scale of LATENT sockets, of the first
            picture's styles.

    Raises:
        IdentityEditError: when an input cannot be used, or as in `training.train`.
    """
    sampling = engine.require_noise_prediction_model(model)
    tag = engine.model_tag(model)
    groups = check_training_input(pictures.captions, pictures.masks, w_plus, settings)
    training = dataclasses.replace(training, bfloat16=settings.precision != FLOAT32)
    layers = text_layers(model.get_model_object("diffusion_model"))
    text_width = engine.context_channels(model)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed & 0x7FFFFFFFFFFFFFFF)
        network = StyleNetwork(groups, w_plus.width, text_width, layer_sizes(layers)).requires_grad_(False)
        rows, average = w_plus.rows.detach().clone(), w_plus.average.detach().clone()
    given = _GivenStyles()
    patched = model.clone()
    patches = style_patches(patched.get_model_object("diffusion_model"), network.attention, given, settings.kind)
    for name, patch in patches.items():
        patched.set_model_patch(patch, name)
    largest = max(pictures.latents, key=torch.Tensor.numel)
    with trainable_networks(
        patched,
        clip,
        [],
        [],
        precision=settings.precision,
        latent_shape=[settings.batch_size, *largest.shape],
        checkpointing=settings.checkpointing,
        modules=[network],
    ) as networks:
        # W'_q, W'_k and W'_v are initialised from W_q, W_k and W_v (section 2.2.4).
        with torch.no_grad():
            for key, layer in layers.items():
                for part in ("to_q", "to_k", "to_v"):
                    own, text = getattr(network.attention[key], part), getattr(layer.block.attn2, part)
                    named = f"{'.'.join(map(str, key))}.attn2.{part}"
                    own.weight.copy_(float32_weight(text, "weight", named, in_use=True))
        rows, average = rows.to(networks.device), average.to(networks.device)

        def losses(index: int) -> Iterator[torch.Tensor]:
            chosen = batch_indices(pictures, settings.batch_size, index, training.seed, _WHAT)
            batch = draw_batch(pictures, chosen, partial(engine.to_model_scale, model), networks.device)
            masks = batch.masks if settings.masked else torch.ones_like(batch.masks)
            generator = generator_of(training.seed, index, _WHAT)
            t, noise = draw_noise(batch, sampling.sigmas.shape[0], generator)
            captions = _captions(batch.captions, settings, generator)
            styles = rows[chosen] + settings.style_noise * torch.randn(rows[chosen].shape, generator=generator).to(rows)
            without = torch.rand(len(chosen), generator=generator).to(rows.device) < settings.style_drop
            styles = torch.where(without[:, None, None], average, styles)
            given.tokens, given.strength = network.mapping(styles, average), 1.0  # lambda is 1 (section 2.2.3)
            # E |eps - eps_theta(z_t, t, text, styles)|^2                                                    eq. 5
            denoise = partial(networks.denoised, text=networks.encode(captions))
            yield losses_of(denoise, sampling, tag.prediction, batch.latents, masks, t, noise).mean()

        def sample() -> torch.Tensor:
            given.tokens = network.mapping(torch.stack([rows[0], average]), average)
            given.strength = settings.sample_strength
            latent = _sample(networks, sampling, pictures.latents[0].shape, settings, pictures, training.seed)
            return engine.to_socket_scale(model, latent)

        run = run_hash(_description(model, clip, tag, pictures, w_plus, settings, training))
        record = train(
            dict(network.named_parameters()),
            losses,
            training,
            checkpoint=checkpoint(run) if checkpoint is not None else None,
            run=run,
            sample=sample,
            progress=progress,
        )
        given.tokens = None
    style = StyleAttention(
        network=in_file_precision(network),
        kind=settings.kind,
        style_rows=w_plus.count,
        style_width=w_plus.width,
        text_width=text_width,
        encoder=w_plus.encoder,
        pseudo_word=settings.pseudo_word,
        model=tag,
        training=training_facts(training, settings, run, pictures=len(pictures)),
    )
    return style, record


def _captions(own: list[str], settings: StyleSettings, generator: torch.Generator) -> list[str]:
    """A caption for each picture of a batch: a random template or the picture's own, or none."""
    captions = list(own)
    if settings.templates:
        drawn = torch.randint(len(settings.templates), (len(own),), generator=generator).tolist()
        captions = [settings.caption(settings.templates[number]) for number in drawn]
    without = (torch.rand(len(own), generator=generator) < settings.text_drop).tolist()
    return ["" if dropped else caption for caption, dropped in zip(captions, without, strict=True)]


def _sample(
    networks: TrainableNetworks,
    sampling: Any,
    size: torch.Size,
    settings: StyleSettings,
    pictures: TrainingPictures,
    seed: int,
) -> torch.Tensor:
    """DDIM with guidance by the networks as they are now -> latent [1, C, h, w] in the model's scale.

    The styles that are given are the person's for the first and the null style for the second row."""
    prompt = settings.sample_prompt
    if not prompt:
        prompt = settings.caption(settings.templates[0]) if settings.templates else pictures.captions[0]
    sigmas = ddim_schedule(sampling, settings.sample_steps, end_at_zero=True).sigmas.to(networks.device)
    x = sigmas[0] * torch.randn((1, *size), generator=generator_of(seed, 0, "sample")).to(networks.device)
    text = networks.encode([prompt, ""])
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        both = networks.denoised(torch.cat([x, x]), sigma.expand(2), text).float()
        denoised = both[1:] + settings.sample_guidance_scale * (both[:1] - both[1:])
        x = euler_step(x, denoised, sigma, sigma_next)
    return x


def check_training_input(
    captions: Sequence[str], masks: Sequence[torch.Tensor | None], w_plus: WPlus, settings: StyleSettings
) -> RowGroups:
    """The row groups, when pictures, styles and settings fit together.

    Args:
        captions, masks: of each picture.

    Raises:
        IdentityEditError: when they do not.
    """
    if len(w_plus.rows) != len(captions):
        raise IdentityEditError(
            f"There are {len(captions)} pictures and W+ styles of {len(w_plus.rows)}; encode the same pictures in the "
            f"same order."
        )
    if not settings.templates:
        for number, caption in enumerate(captions, start=1):
            if not caption.strip():
                raise IdentityEditError(f"Picture {number} has no caption and there are no templates; write either.")
    if settings.masked and all(mask is None for mask in masks):
        raise IdentityEditError("masked_loss is on but no picture has a mask; add masks, or switch it off.")
    return parse_row_groups(settings.row_groups, w_plus.count)


def _description(
    model: Any,
    clip: Any,
    tag: engine.ModelTag,
    pictures: TrainingPictures,
    w_plus: WPlus,
    settings: StyleSettings,
    training: TrainingSettings,
) -> dict[str, Any]:
    """Everything that the result of a step depends on; patches of others by their strengths."""
    optimisation = {**dataclasses.asdict(training), **dataclasses.asdict(settings)}
    for name in _NOT_OF_THE_RESULT:
        del optimisation[name]
    # Rounded, as encoding the same pictures on another device need not give the same bits.
    styles = torch.cat([w_plus.rows.flatten(), w_plus.average.flatten()])
    digest = hashlib.sha256((styles * 100).round().to(torch.int32).numpy().tobytes()).hexdigest()
    return {
        "what": _WHAT,
        "settings": optimisation,
        "model": dataclasses.asdict(tag),
        "patches": patch_strengths(model, clip.patcher),
        "layer": clip.layer_idx,
        "pictures": pictures.fingerprint,
        "styles": [digest, w_plus.encoder, *w_plus.rows.shape],
    }
