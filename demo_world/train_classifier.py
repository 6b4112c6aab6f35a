"""Training of the attribute classifier on renders, half of them degraded like generated images."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from . import harder
from .attributes import HARDER_ATTRIBUTES, Attributes
from .classifier import CLASSIFIER_PATH, AttributeClassifier, save_classifier
from .images import HEADS, TrainingImages, draw_every_identity, evaluation_set, labels_of, rendered
from .training import train


def degrade(images: torch.Tensor) -> torch.Tensor:
    """A quarter of the batch downscaled, a quarter blurred and noisy, the rest unchanged.

    The autoencoder is not used, so that it has no advantage when the classifier scores its reconstructions.
    """
    quarter = len(images) // 4
    size = images.shape[-2:]
    coarse = functional.interpolate(images[:quarter], scale_factor=0.4, mode="bilinear", antialias=True)
    coarse = functional.interpolate(coarse, size=size, mode="bilinear")
    blurred = functional.avg_pool2d(functional.pad(images[quarter : 2 * quarter], (1, 1, 1, 1), "replicate"), 3, 1)
    blurred = blurred + 0.15 * torch.rand(()) * torch.randn_like(blurred)
    return torch.cat([coarse, blurred, images[2 * quarter :]])


def attribute_loss(logits: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies of all heads on labels [B, heads], without the labels -1."""
    losses = [
        functional.cross_entropy(values.float(), labels[:, index], ignore_index=-1, reduction="sum")
        for index, values in enumerate(logits.values())
    ]
    return sum(losses[1:], losses[0])


def attribute_accuracy(logits: dict[str, torch.Tensor], labels: torch.Tensor) -> str:
    """Accuracy of every head on labels [N, heads], without the labels -1."""
    shares = []
    for index, (name, values) in enumerate(logits.items()):
        shown = labels[:, index] >= 0
        shares.append(f"{name} {(values.argmax(1) == labels[:, index])[shown].float().mean():.3f}")
    return ", ".join(shares)


class ClassifiedWorld(NamedTuple):
    """What a world's classifier is trained on and where its weights go."""

    choices: dict[str, tuple[str, ...]]
    draw: Callable[[random.Random], Attributes]
    evaluation_set: Callable[[int, int], list[tuple[Attributes, int]]]
    state: str
    path: Path


WORLDS = {
    "demo": ClassifiedWorld(HEADS, draw_every_identity, evaluation_set, "classifier_state.pt", CLASSIFIER_PATH),
    "harder": ClassifiedWorld(
        HARDER_ATTRIBUTES,
        harder.draw_any,
        harder.evaluation_set,
        "harder_classifier_state.pt",
        harder.CLASSIFIER_PATH,
    ),
}


def train_classifier(folder: Path, steps: int, batch_size: int, learning_rate: float, world: str = "demo") -> None:
    """Train, or resume, on all identities (including the held-out ones, which it scores) and save the weights.

    Args:
        world: ``"demo"``, or ``"harder"`` for all values and compositions of the harder world.
    """
    torch.manual_seed(2)
    choices, draw, evaluation, state, path = WORLDS[world]
    classifier = AttributeClassifier(choices).to(memory_format=torch.channels_last)
    batches = iter(DataLoader(TrainingImages(seed=3, draw=draw, choices=choices), batch_size=batch_size, num_workers=1))
    pairs = evaluation(400, 9)
    images = rendered(pairs)
    truth = torch.tensor([labels_of(attributes, choices) for attributes, _ in pairs])

    def loss_of(step: int) -> torch.Tensor:
        clean, _, labels = next(batches)
        shown = degrade(clean).contiguous(memory_format=torch.channels_last)
        return attribute_loss(classifier(shown), labels) / batch_size

    @torch.no_grad()
    def accuracy() -> str:
        classifier.eval()
        parts = [classifier(chunk) for chunk in images.split(50)]
        classifier.train()
        return attribute_accuracy({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, truth)

    train(
        {"classifier": classifier},
        loss_of,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=0.01,
        checkpoint=folder / state,
        on_checkpoint=accuracy,
    )
    print(accuracy())
    save_classifier(classifier, path)
