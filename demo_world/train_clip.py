"""Training of the demo world's CLIP on renders of training identities, half of them degraded, and their captions.

The loss is CLIP's (Radford et al. 2021, section 2.3), with hard negatives: each batch contains every image before and
after a change of one attribute, and every caption also with one wrong attribute. Half of the captions omit something,
like prompts do. The image encoder starts from the demo world's CLIP vision.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .attributes import (
    ATTRIBUTES_OF,
    CAPTION_TEMPLATES,
    PLACE_PHRASES,
    POSE_PHRASES,
    Attributes,
    caption,
    random_attributes,
)
from .clip import image_embeddings, make_clip, make_tokenizer, save_clip, text_embeddings
from .clip_vision import CLIP_VISION_PATH
from .images import EVALUATION_SEED, evaluation_set, rendered, to_tensor
from .networks import initialize
from .renderer import render
from .train_classifier import degrade
from .training import train

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

PORTRAIT_SHARE = 0.3
WRONG_CAPTIONS = 3
HARD = {"species": 3, "pose": 2, "pattern": 2}
"""Relative frequency with which these attributes change (1 for the others): at equal frequency they were learned last,
with an accuracy of 0.58 to 0.84 on 60 images after 200 steps, when most others were above 0.95."""
LEFT_OUT = ("facing", "costume", "place", "pose")
"""Attributes that a caption may omit."""


@dataclasses.dataclass(frozen=True)
class Wording:
    """Wording of a caption: its template, and the omitted attributes."""

    template: int
    left_out: tuple[str, ...] = ()

    def say(self, attributes: Attributes) -> str:
        text = caption(attributes, self.template)
        phrases = {
            "facing": f"facing {attributes.facing}",
            "costume": f"wearing a {attributes.costume}",
            "place": PLACE_PHRASES[attributes.place],
            "pose": POSE_PHRASES[attributes.pose],
        }
        for name in self.left_out:
            text = text.replace(phrases[name], "")
        return " ".join(text.split()).removeprefix(", ")


def with_one_change(attributes: Attributes, generator: random.Random) -> Attributes:
    """The attributes with another value of one visible attribute, without held-out identities."""
    names = [name for name in attributes.visible for _ in range(HARD.get(name, 1))]
    changed = None
    while changed is None or changed.held_out:
        name = generator.choice(names)
        others = [value for value in ATTRIBUTES_OF[attributes.framing][name] if value != getattr(attributes, name)]
        changed = attributes.replace(**{name: generator.choice(others)})
    return changed


class CaptionedEdits(IterableDataset):
    """An endless stream of (two images [2, 3, 128, 128] in [-1, 1] that differ in one attribute, their captions, each
    with ``WRONG_CAPTIONS`` wrong ones)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, list[list[str]]]]:
        worker = get_worker_info()
        # With the process id, a resumed run gets new images.
        generator = random.Random(f"captioned edits {self.seed} {worker.id if worker else 0} {os.getpid()}")
        while True:
            framing = "portrait" if generator.random() < PORTRAIT_SHARE else "figure"
            before = random_attributes(generator, framing)
            after = with_one_change(before, generator)
            left_out = tuple(name for name in LEFT_OUT if generator.random() < 0.25) if generator.random() < 0.5 else ()
            wording = Wording(generator.randrange(CAPTION_TEMPLATES), left_out)
            seed = generator.randrange(EVALUATION_SEED)
            images, captions = [], []
            for attributes in (before, after):
                images.append(to_tensor(render(attributes, seed)[0]))
                wrong = [wording.say(with_one_change(attributes, generator)) for _ in range(WRONG_CAPTIONS)]
                captions.append([wording.say(attributes), *wrong])
            yield torch.stack(images), captions


def collate(samples: list[tuple[torch.Tensor, list[list[str]]]]) -> tuple[torch.Tensor, list[str], list[str]]:
    """Images [2 * pairs, 3, 128, 128], their captions, and all wrong captions."""
    texts = [captions for _, pair in samples for captions in pair]
    images = torch.cat([images for images, _ in samples])
    return images, [captions[0] for captions in texts], [wrong for captions in texts for wrong in captions[1:]]


def contrastive_loss(
    images: torch.Tensor, texts: torch.Tensor, captions: list[str], wrong: list[str], scale: torch.Tensor
) -> torch.Tensor:
    """CLIP's loss: the mean of the cross-entropies of captions by image and of images by caption.

    Args:
        images: [B, D], of length 1.
        texts: [B + W, D], of length 1: of ``captions``, then of ``wrong``.
        captions, wrong: B and W texts; those equal to an image's caption are not its negatives.
        scale: the inverse temperature.
    """
    every = [*captions, *wrong]
    same = torch.tensor([[text == right for text in every] for right in captions])
    same[:, : len(captions)] &= ~torch.eye(len(captions), dtype=torch.bool)
    logits = scale * images @ texts.T
    target = torch.arange(len(captions))
    by_image = functional.cross_entropy(logits.masked_fill(same, float("-inf")), target)
    square = slice(0, len(captions))
    by_caption = functional.cross_entropy(logits[:, square].T.masked_fill(same[:, square], float("-inf")), target)
    return (by_image + by_caption) / 2


@torch.no_grad()
def attribute_choices(
    images: torch.Tensor, samples: list[tuple[Attributes, int]], clip: tuple[CLIPModel, PreTrainedTokenizerBase]
) -> dict[str, tuple[float, float]]:
    """For each attribute: the share of images that are more similar to their caption than to its variants with another
    value of this attribute, and the share expected by chance.

    Args:
        images: [N, D] embeddings of the samples' images, of length 1.
    """
    model, tokenizer = clip
    found: dict[str, list[tuple[bool, float]]] = {}
    for image, (attributes, seed) in zip(images, samples, strict=True):
        variants = [(name, value) for name in attributes.visible for value in ATTRIBUTES_OF[attributes.framing][name]]
        texts = [caption(attributes.replace(**{name: value}), seed % CAPTION_TEMPLATES) for name, value in variants]
        similarities = (text_embeddings(model, tokenizer, texts) @ image).tolist()
        for name in attributes.visible:
            rows = [(s, value) for s, (other, value) in zip(similarities, variants, strict=True) if other == name]
            found.setdefault(name, []).append((max(rows)[1] == getattr(attributes, name), 1 / len(rows)))
    return {
        name: (sum(right for right, _ in rows) / len(rows), sum(chance for _, chance in rows) / len(rows))
        for name, rows in found.items()
    }


def train_clip(folder: Path, steps: int, pairs_per_batch: int, learning_rate: float) -> None:
    """Train, or resume, on training identities only, and write the folder of ``load_clip``."""
    torch.manual_seed(8)
    tokenizer = make_tokenizer()
    model = make_clip(tokenizer)
    initialize(model.text_model)
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.3)
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.1)
    start = {name: value.float() for name, value in load_file(CLIP_VISION_PATH).items()}
    missing, unexpected = model.load_state_dict(start, strict=False)
    if unexpected or any(name.startswith("vision") for name in missing):
        raise ValueError(f"{CLIP_VISION_PATH.name} does not fit the image encoder: retrain clip_vision, then this")
    model = model.to(memory_format=torch.channels_last)
    nn.init.constant_(model.logit_scale, math.log(1 / 0.1))
    batches = iter(
        DataLoader(
            CaptionedEdits(seed=9), batch_size=pairs_per_batch, num_workers=1, prefetch_factor=4, collate_fn=collate
        )
    )

    def loss_of(step: int) -> torch.Tensor:
        images, captions, wrong = next(batches)
        shuffled = torch.randperm(len(images))
        shown = degrade(images[shuffled])[shuffled.argsort()]
        embedded = image_embeddings(model, shown)
        texts = text_embeddings(model, tokenizer, [*captions, *wrong])
        with torch.autocast("cpu", enabled=False):
            # The published bound on the scale (section 2.5).
            return contrastive_loss(embedded, texts, captions, wrong, model.logit_scale.exp().clamp(max=100))

    held_out = evaluation_set(60, seed=12, held_out=True)
    shown_images = rendered(held_out)

    @torch.no_grad()
    def accuracy() -> str:
        shares = attribute_choices(image_embeddings(model, shown_images), held_out, (model, tokenizer))
        return ", ".join(f"{name} {share:.2f}" for name, (share, _) in shares.items())

    train(
        {"clip": model},
        loss_of,
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=30,
        weight_decay=0.01,
        checkpoint=folder / "clip_state.pt",
        on_checkpoint=accuracy,
    )
    save_clip(model, tokenizer)
