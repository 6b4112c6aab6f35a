"""Training of the demo world's CLIP vision on renders of training identities, half of them degraded.

The image embedding has two losses: linear heads, discarded afterward, predict every attribute, and CLIP's contrastive
loss makes two images of one identity (with another state, place and pose) more similar than images of different
identities.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .attributes import ATTRIBUTES_OF, IDENTITY_OF, Attributes, random_attributes
from .clip import CLIP_MEAN, CLIP_STD
from .clip_vision import CLIP_VISION_CONFIG, CLIP_VISION_PATH, CONFIG_KEY
from .export import write_weights
from .images import EVALUATION_SEED, HEADS, evaluation_set, labels_of, rendered, to_tensor
from .networks import initialize, transformer_layers
from .renderer import render
from .train_classifier import attribute_accuracy, attribute_loss, degrade
from .training import probe_accuracy, train

PORTRAIT_SHARE = 0.6
TEMPERATURE = 0.1


class IdentityPairs(IterableDataset):
    """An endless stream of two images [2, 3, 128, 128] in [-1, 1] of one identity, and their labels [2, heads]."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker = get_worker_info()
        # With the process id, a resumed run gets new images.
        generator = random.Random(f"identity pairs {self.seed} {worker.id if worker else 0} {os.getpid()}")
        while True:
            framing = "portrait" if generator.random() < PORTRAIT_SHARE else "figure"
            first = random_attributes(generator, framing)
            others = {
                n: generator.choice(c) for n, c in ATTRIBUTES_OF[framing].items() if n not in IDENTITY_OF[framing]
            }
            pair = (first, first.replace(**others))
            images = [to_tensor(render(attributes, generator.randrange(EVALUATION_SEED))[0]) for attributes in pair]
            yield torch.stack(images), torch.tensor([labels_of(attributes) for attributes in pair])


class ImageEncoder(nn.Module):
    """ComfyUI's CLIP image encoder, trainable."""

    def __init__(self) -> None:
        super().__init__()
        import comfy.clip_model
        import comfy.ops

        self.clip = comfy.clip_model.CLIPVisionModelProjection(
            dict(CLIP_VISION_CONFIG), torch.float32, "cpu", comfy.ops.disable_weight_init
        )
        initialize(self.clip)
        embeddings = self.clip.vision_model.embeddings
        nn.init.normal_(embeddings.class_embedding, std=0.02)
        nn.init.normal_(embeddings.position_embedding.weight, std=0.02)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, 128, 128] in [-1, 1] -> image embeddings [B, projection]."""
        model: Any = self.clip.vision_model
        x = model.pre_layrnorm(model.embeddings(((images + 1) / 2 - self.mean) / self.std))
        x = transformer_layers(model.encoder.layers, x, CLIP_VISION_CONFIG["num_attention_heads"], is_causal=False)
        embeds: torch.Tensor = self.clip.visual_projection(model.post_layernorm(x[:, 0]))
        return embeds


def identity_loss(embeds: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """InfoNCE over embeddings [B, 2, D]: each image is matched with the other one of its identity.

    Pairs of the same identity in one batch are not negatives of each other; ``labels`` are [B, 2, heads].
    """
    names = list(HEADS)
    kept = [names.index(name) for name in ("framing", *IDENTITY_OF["figure"], *IDENTITY_OF["portrait"])]
    # Closed eyes have no color label: take the label from the other image of the pair.
    identity = labels[..., kept].amax(dim=1)
    first, second = functional.normalize(embeds.float(), dim=-1).unbind(1)
    logits = first @ second.T / TEMPERATURE
    same = (identity[:, None] == identity[None]).all(-1) & ~torch.eye(len(identity), dtype=torch.bool)
    logits = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(identity))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def train_clip_vision(folder: Path, steps: int, pairs_per_batch: int, learning_rate: float) -> None:
    """Train, or resume, on training identities only, and write the file of ``load_clip_vision``."""
    torch.manual_seed(4)
    encoder = ImageEncoder().to(memory_format=torch.channels_last)
    heads = nn.ModuleDict({n: nn.Linear(CLIP_VISION_CONFIG["projection_dim"], len(c)) for n, c in HEADS.items()})
    batches = iter(DataLoader(IdentityPairs(seed=5), batch_size=pairs_per_batch, num_workers=1, prefetch_factor=8))

    def loss_of(step: int) -> torch.Tensor:
        images, labels = next(batches)
        shuffled = torch.randperm(2 * pairs_per_batch)
        shown = degrade(images.flatten(0, 1)[shuffled])[shuffled.argsort()]
        embeds = encoder(shown)
        flat = labels.flatten(0, 1)
        attributes = attribute_loss({name: head(embeds) for name, head in heads.items()}, flat) / len(flat)
        return attributes + identity_loss(embeds.unflatten(0, (pairs_per_batch, 2)), labels)

    held_out = evaluation_set(200, seed=11, held_out=True)
    shown_images = rendered(held_out)
    truth = torch.tensor([labels_of(attributes) for attributes, _ in held_out])

    @torch.no_grad()
    def accuracy() -> str:
        embeds = encoder(shown_images)
        return attribute_accuracy({name: head(embeds) for name, head in heads.items()}, truth)

    train(
        {"encoder": encoder, "heads": heads},
        loss_of,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=0.01,
        checkpoint=folder / "clip_vision_state.pt",
        on_checkpoint=accuracy,
    )
    metadata = {CONFIG_KEY: json.dumps(CLIP_VISION_CONFIG)}
    write_weights(CLIP_VISION_PATH, encoder.clip.state_dict(), "demo world CLIP vision", metadata)


def encode(samples: list[tuple[Attributes, int]]) -> torch.Tensor:
    """Image embeddings [N, 128] of renders by the committed encoder."""
    encoder = ImageEncoder()
    encoder.clip.load_state_dict({name: value.float() for name, value in load_file(CLIP_VISION_PATH).items()})
    with torch.no_grad():
        return torch.cat([encoder(rendered(samples[start : start + 32])) for start in range(0, len(samples), 32)])


def linear_probe(fitted: int = 1500, tested: int = 600) -> dict[str, float]:
    """Accuracy of ``probe_accuracy`` on the image embedding, by attribute.

    It is fitted on ``fitted`` renders of training identities and tested on ``tested`` renders of held-out identities,
    half of each framing.
    """

    def samples(count: int, seed: int, held_out: bool) -> list[tuple[Attributes, int]]:
        framings = [(f, offset) for offset, f in enumerate(ATTRIBUTES_OF)]
        return [s for f, o in framings for s in evaluation_set(count // 2, seed + o, held_out=held_out, framing=f)]

    train_samples, test_samples = samples(fitted, 21, held_out=False), samples(tested, 31, held_out=True)
    train_embeds, test_embeds = encode(train_samples), encode(test_samples)
    mean, std = train_embeds.mean(0), train_embeds.std(0)
    train_embeds, test_embeds = (train_embeds - mean) / std, (test_embeds - mean) / std
    train_labels = torch.tensor([labels_of(a) for a, _ in train_samples])
    test_labels = torch.tensor([labels_of(a) for a, _ in test_samples])
    shares = {}
    for index, (name, choices) in enumerate(HEADS.items()):
        shown, tested_rows = train_labels[:, index] >= 0, test_labels[:, index] >= 0
        shares[name] = probe_accuracy(
            train_embeds[shown],
            train_labels[shown, index],
            test_embeds[tested_rows],
            test_labels[tested_rows, index],
            len(choices),
        )
    return shares


def print_probe() -> None:
    print(", ".join(f"{name} {share:.3f}" for name, share in linear_probe().items()))
