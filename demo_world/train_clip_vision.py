"""Trains the demo world's CLIP vision on renders of training identities, half of them degraded as for the classifier.

Two losses on the image embedding, both through parts that are thrown away afterwards or have no weights at all: linear
heads predict every attribute, and two images of one identity (in other states, places and poses) are told from
images of other identities by their cosine similarity (CLIP's own contrastive loss, with the identity in the
caption's place).
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
from .clip_vision import CLIP_VISION_CONFIG, CLIP_VISION_PATH, CONFIG_KEY
from .export import write_weights
from .images import EVALUATION_SEED, HEADS, evaluation_set, labels_of, to_tensor
from .networks import initialize
from .renderer import render
from .train_classifier import degrade
from .training import train

PORTRAIT_SHARE = 0.6
TEMPERATURE = 0.1
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class IdentityPairs(IterableDataset):
    """An endless stream of two images [2, 3, 128, 128] in [-1, 1] of one identity, and their labels [2, heads]."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker = get_worker_info()
        # The process id: a run that goes on from a checkpoint sees other images.
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
        """Images [B, 3, 128, 128] in [-1, 1] -> image embeddings [B, projection].

        Written out over the model's own layers because their forward pass adds in place, which cannot be trained
        through.
        """
        model: Any = self.clip.vision_model
        x = model.embeddings(((images + 1) / 2 - self.mean) / self.std)
        x = model.pre_layrnorm(x)
        batch, length, width = x.shape
        heads = CLIP_VISION_CONFIG["num_attention_heads"]
        for layer in model.encoder.layers:
            h = layer.layer_norm1(x)
            attention = layer.self_attn
            q, k, v = (
                project(h).view(batch, length, heads, -1).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            h = functional.scaled_dot_product_attention(q, k, v)
            x = x + attention.out_proj(h.transpose(1, 2).reshape(batch, length, width))
            x = x + layer.mlp(layer.layer_norm2(x))
        embeds: torch.Tensor = self.clip.visual_projection(model.post_layernorm(x[:, 0]))
        return embeds


def identity_loss(embeds: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """InfoNCE over embeddings [B, 2, D]: each image finds the other of its identity among the batch.

    Identities that a batch happens to show twice are not held against each other; ``labels`` are [B, 2, heads].
    """
    names = list(HEADS)
    kept = [names.index(name) for name in ("framing", *IDENTITY_OF["figure"], *IDENTITY_OF["portrait"])]
    # The color of closed eyes has no label: it comes from the image of the pair that shows it.
    identity = labels[..., kept].amax(dim=1)
    first, second = functional.normalize(embeds.float(), dim=-1).unbind(1)
    logits = first @ second.T / TEMPERATURE
    same = (identity[:, None] == identity[None]).all(-1) & ~torch.eye(len(identity), dtype=torch.bool)
    logits = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(identity))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def train_clip_vision(folder: Path, steps: int, pairs_per_batch: int, learning_rate: float) -> None:
    """Train, or go on training, on training identities only and write the file that ``load_clip_vision`` reads."""
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
        losses = [
            functional.cross_entropy(head(embeds).float(), flat[:, index], ignore_index=-1, reduction="sum")
            for index, head in enumerate(heads.values())
        ]
        attributes = sum(losses) / len(flat)
        return attributes + identity_loss(embeds.unflatten(0, (pairs_per_batch, 2)), labels)

    held_out = evaluation_set(200, seed=11, held_out=True)
    shown_images = torch.stack([to_tensor(render(attributes, seed)[0]) for attributes, seed in held_out])
    truth = torch.tensor([labels_of(attributes) for attributes, _ in held_out])

    @torch.no_grad()
    def accuracy() -> str:
        embeds = encoder(shown_images)
        shares = []
        for index, (name, head) in enumerate(heads.items()):
            shown = truth[:, index] >= 0
            right = (head(embeds).argmax(1) == truth[:, index])[shown]
            shares.append(f"{name} {right.float().mean():.3f}")
        return ", ".join(shares)

    train(
        {"encoder": encoder, "heads": heads},
        loss_of,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=0.01,
        checkpoint=folder / "clip_vision_state.pt",
        on_checkpoint=accuracy,
    )
    save_clip_vision(encoder)


def save_clip_vision(encoder: ImageEncoder, path: Path = CLIP_VISION_PATH) -> None:
    """Write the encoder in fp16 with its configuration in the metadata, whole or not at all."""
    metadata = {CONFIG_KEY: json.dumps(CLIP_VISION_CONFIG)}
    write_weights(path, encoder.clip.state_dict(), "demo world CLIP vision", metadata)


def encode(samples: list[tuple[Attributes, int]]) -> torch.Tensor:
    """Image embeddings [N, 128] of renders by the file that ``load_clip_vision`` reads."""
    encoder = ImageEncoder()
    encoder.clip.load_state_dict({name: value.float() for name, value in load_file(CLIP_VISION_PATH).items()})
    embeds = []
    with torch.no_grad():
        for start in range(0, len(samples), 32):
            images = [to_tensor(render(attributes, seed)[0]) for attributes, seed in samples[start : start + 32]]
            embeds.append(encoder(torch.stack(images)))
    return torch.cat(embeds)


def linear_probe(fitted: int = 1500, tested: int = 600) -> dict[str, float]:
    """Accuracy per attribute of a logistic regression on the image embedding (L-BFGS, L2 1e-4).

    Fitted on ``fitted`` renders of training identities, tested on ``tested`` renders of held-out identities, half of
    each framing.
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
        head = nn.Linear(train_embeds.shape[1], len(choices))
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")
        shown = train_labels[:, index] >= 0
        inputs, targets = train_embeds[shown], train_labels[shown, index]

        def closure(
            head: nn.Linear = head,
            optimizer: torch.optim.LBFGS = optimizer,
            inputs: torch.Tensor = inputs,
            targets: torch.Tensor = targets,
        ) -> torch.Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(head(inputs), targets) + 1e-4 * head.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        tested_rows = test_labels[:, index] >= 0
        with torch.no_grad():
            right = head(test_embeds).argmax(1) == test_labels[:, index]
        shares[name] = float(right[tested_rows].float().mean())
    return shares
