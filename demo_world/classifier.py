"""The attribute classifier, used only to score images of the demo world."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .images import HEADS

# Not in the weights folder, whose files ComfyUI lists as checkpoints.
CLASSIFIER_PATH = Path(__file__).parent / "scoring" / "attribute-classifier.safetensors"


class AttributeClassifier(nn.Module):
    """A small residual network over 128x128 images in [-1, 1] with one linear head per attribute.

    Args:
        choices: the values of every attribute, by its name.
    """

    def __init__(self, choices: dict[str, tuple[str, ...]] | None = None) -> None:
        super().__init__()
        self.choices = choices or HEADS

        def down(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        self.features = nn.Sequential(
            *down(3, 32), *down(32, 64), Residual(64), *down(64, 128), Residual(128), *down(128, 192), Residual(192)
        )
        self.squeeze = nn.Sequential(nn.Conv2d(192, 24, 1), nn.Flatten(), nn.Linear(24 * 8 * 8, 256), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(values)) for name, values in self.choices.items()})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images [B, 3, 128, 128] -> logits [B, classes] of every head."""
        squeezed = self.squeeze(self.features(images))
        return {name: head(squeezed) for name, head in self.heads.items()}


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.layers(x))


def save_classifier(classifier: AttributeClassifier, path: Path = CLASSIFIER_PATH) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = classifier.state_dict()
    save_file({n: v.half().contiguous() if v.is_floating_point() else v for n, v in state.items()}, path)


def load_classifier(
    path: Path = CLASSIFIER_PATH, choices: dict[str, tuple[str, ...]] | None = None
) -> AttributeClassifier:
    """A committed classifier in float32."""
    classifier = AttributeClassifier(choices)
    classifier.load_state_dict(load_file(path))
    return classifier.float().eval().requires_grad_(False)


@torch.no_grad()
def classify(classifier: AttributeClassifier, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """ComfyUI images [B, 128, 128, 3] in [0, 1] -> the most likely class index [B] of every head."""
    logits = [classifier(chunk.permute(0, 3, 1, 2).float() * 2 - 1) for chunk in images.split(32)]
    return {name: torch.cat([part[name] for part in logits]).argmax(1) for name in classifier.choices}
