"""Trains the attribute classifier on renders, half of them degraded the way generated images are."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from .classifier import AttributeClassifier, save_classifier
from .images import HEADS, TrainingImages, evaluation_set, labels_of, to_tensor
from .renderer import render
from .training import train


def degrade(images: torch.Tensor) -> torch.Tensor:
    """A quarter of the batch coarse, a quarter blurred and noisy, the rest as it is.

    Nothing of the autoencoder goes in, so that what the classifier says of its reconstructions is no home match.
    """
    quarter = len(images) // 4
    size = images.shape[-2:]
    coarse = functional.interpolate(images[:quarter], scale_factor=0.4, mode="bilinear", antialias=True)
    coarse = functional.interpolate(coarse, size=size, mode="bilinear")
    blurred = functional.avg_pool2d(functional.pad(images[quarter : 2 * quarter], (1, 1, 1, 1), "replicate"), 3, 1)
    blurred = blurred + 0.15 * torch.rand(()) * torch.randn_like(blurred)
    return torch.cat([coarse, blurred, images[2 * quarter :]])


def train_classifier(folder: Path, steps: int, batch_size: int, learning_rate: float) -> None:
    """Train, or go on training, on every identity (held-out ones too: it scores them) and save the weights."""
    torch.manual_seed(2)
    classifier = AttributeClassifier().to(memory_format=torch.channels_last)
    stream = TrainingImages(seed=3, held_out=None)
    batches = iter(DataLoader(stream, batch_size=batch_size, num_workers=1))
    pairs = evaluation_set(400, seed=9)
    images = torch.stack([to_tensor(render(attributes, seed)[0]) for attributes, seed in pairs])
    truth = torch.tensor([labels_of(attributes) for attributes, _ in pairs])

    def loss_of(step: int) -> torch.Tensor:
        clean, _, labels = next(batches)
        shown = degrade(clean).contiguous(memory_format=torch.channels_last)
        losses = [
            functional.cross_entropy(logits.float(), labels[:, index], ignore_index=-1, reduction="sum")
            for index, logits in enumerate(classifier(shown).values())
        ]
        return sum(losses) / batch_size  # type: ignore[return-value]

    @torch.no_grad()
    def accuracy() -> str:
        classifier.eval()
        logits = [classifier(chunk) for chunk in images.split(50)]
        shares = []
        for index, name in enumerate(HEADS):
            shown = truth[:, index] >= 0
            predicted = torch.cat([part[name] for part in logits]).argmax(1)
            shares.append(f"{name} {(predicted == truth[:, index])[shown].float().mean():.3f}")
        classifier.train()
        return ", ".join(shares)

    train(
        {"classifier": classifier},
        loss_of,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=0.01,
        checkpoint=folder / "classifier_state.pt",
        on_checkpoint=accuracy,
    )
    print(accuracy())
    save_classifier(classifier)
