"""Trains the attribute classifier on renders, half of them degraded the way generated pictures are."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from .classifier import AttributeClassifier, save_classifier
from .networks import make_autoencoder
from .pictures import HEADS, TrainingPictures, evaluation_set, labels_of, to_tensor
from .renderer import render
from .training import train


def degrade(pictures: torch.Tensor, autoencoder: nn.Module) -> torch.Tensor:
    """A quarter of the batch through the autoencoder, a quarter blurred and noisy, the rest as it is."""
    quarter = len(pictures) // 4
    decoded = autoencoder.decode(autoencoder.encode(pictures[:quarter]))
    blurred = functional.avg_pool2d(functional.pad(pictures[quarter : 2 * quarter], (1, 1, 1, 1), "replicate"), 3, 1)
    blurred = blurred + 0.1 * torch.rand(()) * torch.randn_like(blurred)
    return torch.cat([decoded.clamp(-1, 1), blurred, pictures[2 * quarter :]])


def train_classifier(folder: Path, steps: int, batch_size: int, learning_rate: float) -> None:
    """Train, or go on training, on every identity (held-out ones too: it scores them) and save the weights."""
    torch.manual_seed(2)
    classifier = AttributeClassifier().to(memory_format=torch.channels_last)
    autoencoder = make_autoencoder().to(memory_format=torch.channels_last).requires_grad_(False)
    autoencoder.load_state_dict(torch.load(folder / "autoencoder.pt", weights_only=True))
    stream = TrainingPictures(seed=3, held_out=None)
    batches = iter(DataLoader(stream, batch_size=batch_size, num_workers=1))
    pairs = evaluation_set(400, seed=9)
    pictures = torch.stack([to_tensor(render(attributes, seed)[0]) for attributes, seed in pairs])
    truth = torch.tensor([labels_of(attributes) for attributes, _ in pairs])

    def loss_of(step: int) -> torch.Tensor:
        clean, _, labels = next(batches)
        with torch.no_grad():
            shown = degrade(clean.to(memory_format=torch.channels_last), autoencoder)
        losses = [
            functional.cross_entropy(logits.float(), labels[:, index], ignore_index=-1, reduction="sum")
            for index, logits in enumerate(classifier(shown).values())
        ]
        return sum(losses) / batch_size  # type: ignore[return-value]

    @torch.no_grad()
    def accuracy() -> str:
        classifier.eval()
        logits = [classifier(chunk) for chunk in pictures.split(50)]
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
