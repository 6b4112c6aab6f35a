"""Training a style attention on a few images of one person (PIDiff, Gu et al. 2025: sections 2.2.1, 2.2.4, 3.1)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...attention.style_cross_attention import KINDS, SEQUENTIAL, layer_sizes, style_patches, text_layers
from .. import engine
from ..engine.trainable import float32_weight, trainable_networks
from ..shared.errors import IdentityEditError
from ..shared.input_checks import check_choice
from ..training.images import TrainingImages, check_masks, denoising_losses, draw_batch, guided_preview
from ..training.loop import (
    Progress,
    TrainingRun,
    TrainingSettings,
    generator_of,
    run_description,
    train,
    training_record,
)
from .style_attention import ROW_GROUPS, STRENGTH, RowGroups, StyleAttention, StyleNetwork, parse_row_groups
from .style_attention_files import in_file_precision
from .w_plus import WPlus

PLACE = "{}"
TEMPLATES = (
    "an image of {}",
    "a cropped photo of {}",
    "a photo of {}",
    "a close-up photo of {}",
    "a picture of {}",
    "a portrait of {}",
)
"""The first two are from Gu et al. 2025, section 2.2.1; the others are similar."""

_WHAT = "style attention"


@dataclass(frozen=True, kw_only=True)
class StyleSettings(TrainingSettings):
    """Training settings; the defaults are those of Gu et al. 2025.

    Attributes:
        pseudo_word: placeholder token of the person in captions.
        templates: captions with PLACE for the placeholder token; one is drawn for each image of a batch. () uses the
            images' captions.
        kind: SEQUENTIAL, or PARALLEL for the paper's ablation (section 3.4.3).
        row_groups: groups of W+ code rows, one token each; see `parse_row_groups`.
        learning_rate: our default; not reported in the paper.
        text_drop, style_drop: probabilities that an image's caption is replaced by the empty prompt, and its W+ code by
            the encoder's latent average, drawn independently.
        style_noise: standard deviation of the noise added to the W+ codes, in their units. Our default: the paper adds
            "random noise" without its size.
        masked: compute the loss inside the masks only. The paper does not mention masks.
        sample_prompt: "" for the first template.
        sample_strength: lambda of the previews; it is 1 in training.
    """

    changes_no_step = TrainingSettings.changes_no_step | {"sample_strength"}
    pseudo_word: str
    templates: tuple[str, ...] = TEMPLATES
    kind: str = SEQUENTIAL
    row_groups: str = ROW_GROUPS
    steps: int = 600
    learning_rate: float = 1e-4
    batch_size: int = 4
    weight_decay: float = 0.01
    gradient_clip: float = 0.0
    text_drop: float = 0.5
    style_drop: float = 0.5
    style_noise: float = 0.05
    masked: bool = False
    sample_strength: float = STRENGTH
    sample_guidance_scale: float = 7.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.kind, "kind", KINDS)
        for name in ("text_drop", "style_drop"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise IdentityEditError(f"{name} is {getattr(self, name):g}; choose a share from 0 to 1.")
        if not (self.style_noise >= 0.0 and math.isfinite(self.style_noise)):
            raise IdentityEditError(f"style_noise is {self.style_noise}; choose 0 or more.")
        if self.templates and not self.pseudo_word.strip():
            raise IdentityEditError(
                "The placeholder token is empty; write one rare word for the person, such as 'sks'."
            )
        for template in self.templates:
            if PLACE not in template:
                raise IdentityEditError(
                    f"The template '{template}' has no place for the placeholder token; write {PLACE} where it belongs."
                )

    def caption(self, template: str) -> str:
        return template.replace(PLACE, self.pseudo_word)


def train_style_attention(
    model: Any,
    clip: Any,
    images: TrainingImages,
    w_plus: WPlus,
    settings: StyleSettings,
    *,
    checkpoint: Callable[[str], str] | None = None,
    progress: Progress | None = None,
) -> tuple[StyleAttention, TrainingRun]:
    """Train a person's style attention: equation 5 of Gu et al. 2025.

    Only the mapping network and W'_q, W'_k, W'_v of every layer are trained.

    Args:
        model: MODEL that predicts noise or v, frozen, including its LoRAs.
        clip: its CLIP, frozen.
        images: images of one person, six in the paper; images of another person add their style (section 2.2.2).
        w_plus: W+ codes of the same images, in the same order.
        settings: see `StyleSettings`.
        checkpoint, progress: see `training.loop.train`; previews are latents [1, C, h, w] in the scale of LATENT
            sockets, of the first image's W+ code.

    Raises:
        IdentityEditError: when an input cannot be used, or as in `training.loop.train`.
    """
    tag = engine.model_tag(model)
    groups = check_training_input(images.captions, images.masks, w_plus, settings)
    layers = text_layers(model.get_model_object("diffusion_model"))
    text_width = engine.require(model).text_width
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed & 0x7FFFFFFFFFFFFFFF)
        network = StyleNetwork(groups, w_plus.width, text_width, layer_sizes(layers)).requires_grad_(False)
        rows, average = w_plus.rows.detach().clone(), w_plus.average.detach().clone()
    style = _CurrentStyle()
    patched = model.clone()
    patches = style_patches(patched.get_model_object("diffusion_model"), network.attention, style, settings.kind)
    for name, patch in patches.items():
        patched.set_model_patch(patch, name)
    with trainable_networks(
        patched,
        clip,
        dtype=settings.dtype,
        latent_shape=[settings.batch_size, *images.largest],
        checkpointing=settings.checkpointing,
        modules=[network],
    ) as networks:
        _initialize(network, layers)
        rows, average = rows.to(networks.device), average.to(networks.device)

        def losses(index: int) -> Iterator[torch.Tensor]:
            generator = generator_of(settings.seed, index, _WHAT)
            batch = draw_batch(networks, images, settings, index, _WHAT, masked=settings.masked, generator=generator)
            captions = _captions(batch.captions, settings, generator)
            styles = _styles(rows[batch.chosen], average, settings, generator)
            style.tokens, style.strength = network.mapping(styles, average), 1.0
            # E |eps - eps_theta(z_t, t, text, styles)|^2                                                    eq. 5
            yield denoising_losses(networks, batch, networks.encode(captions)).mean()

        def sample() -> torch.Tensor:
            prompt = settings.sample_prompt
            if not prompt:
                prompt = settings.caption(settings.templates[0]) if settings.templates else images.captions[0]
            # The person's style with the prompt, the null style with the empty prompt.
            style.tokens = network.mapping(torch.stack([rows[0], average]), average)
            style.strength = settings.sample_strength
            text = networks.encode([prompt, ""])
            return guided_preview(networks, images.latents[0].shape, settings, lambda t: text)

        run = train(
            dict(network.named_parameters()),
            losses,
            settings,
            description=run_description(
                settings,
                tag,
                model,
                clip.patcher,
                what=_WHAT,
                layer=clip.layer_idx,
                images=images.fingerprint,
                styles=[_digest(w_plus), w_plus.encoder, *w_plus.rows.shape],
            ),
            checkpoint=checkpoint,
            sample=sample,
            progress=progress,
        )
        style.tokens = None
    trained = StyleAttention(
        network=in_file_precision(network),
        kind=settings.kind,
        style_rows=w_plus.count,
        style_width=w_plus.width,
        text_width=text_width,
        encoder=w_plus.encoder,
        pseudo_word=settings.pseudo_word,
        model=tag,
        training=training_record(settings, run, images=len(images)),
    )
    return trained, run


class _CurrentStyle:
    """Style tokens v and lambda of the current model call, for the attention patches."""

    tokens: torch.Tensor | None = None
    strength = 1.0  # lambda (section 2.2.3)

    def __call__(self, hidden: torch.Tensor, extra: Mapping[str, Any]) -> tuple[torch.Tensor, float] | None:
        return None if self.tokens is None else (self.tokens.to(hidden.dtype), self.strength)


def _initialize(network: StyleNetwork, layers: Mapping[Any, Any]) -> None:
    """W'_q, W'_k and W'_v are initialized from W_q, W_k and W_v (section 2.2.4)."""
    with torch.no_grad():
        for key, layer in layers.items():
            for part in ("to_q", "to_k", "to_v"):
                name = f"{'.'.join(map(str, key))}.attn2.{part}"
                weight = float32_weight(getattr(layer.block.attn2, part), "weight", name, in_use=True)
                getattr(network.attention[key], part).weight.copy_(weight)


def _styles(
    rows: torch.Tensor, average: torch.Tensor, settings: StyleSettings, generator: torch.Generator
) -> torch.Tensor:
    """The batch's W+ codes with noise, some replaced by the latent average."""
    styles = rows + settings.style_noise * torch.randn(rows.shape, generator=generator).to(rows)
    dropped = torch.rand(len(styles), generator=generator).to(rows.device) < settings.style_drop
    return torch.where(dropped[:, None, None], average, styles)


def _digest(w_plus: WPlus) -> str:
    """Hash of W+ codes, rounded because encoding on another device may give slightly different values."""
    styles = torch.cat([w_plus.rows.flatten(), w_plus.average.flatten()])
    return hashlib.sha256((styles * 100).round().to(torch.int32).numpy().tobytes()).hexdigest()


def _captions(captions: Sequence[str], settings: StyleSettings, generator: torch.Generator) -> list[str]:
    """The batch's captions: a random template or the image's caption, some replaced by the empty prompt."""
    if settings.templates:
        drawn = torch.randint(len(settings.templates), (len(captions),), generator=generator).tolist()
        captions = [settings.caption(settings.templates[number]) for number in drawn]
    dropped = (torch.rand(len(captions), generator=generator) < settings.text_drop).tolist()
    return ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]


def check_training_input(
    captions: Sequence[str], masks: Sequence[torch.Tensor | None], w_plus: WPlus, settings: StyleSettings
) -> RowGroups:
    """Check that images, W+ codes and settings fit together, and return the row groups.

    Raises:
        IdentityEditError: when they do not.
    """
    if len(w_plus.rows) != len(captions):
        raise IdentityEditError(
            f"There are {len(captions)} images and W+ codes of {len(w_plus.rows)}; encode the same images in the same "
            f"order."
        )
    if not settings.templates:
        for number, caption in enumerate(captions, start=1):
            if not caption.strip():
                raise IdentityEditError(
                    f"Image {number} has no caption and there are no templates; write a caption or a template."
                )
    check_masks(masks, settings.masked)
    return parse_row_groups(settings.row_groups, w_plus.count)
