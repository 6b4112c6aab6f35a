"""LPIPS: perceptual distance of two images (Zhang et al. 2018), version 0.1.

Two files, both the user's own below models/image_scores: the backbone as torchvision publishes it, and the linear heads
as the authors publish them (a few kilobytes). They are the same weights that the package `lpips` and torchmetrics use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d, conv2d

from ..networks.model_folders import loaded, read_checkpoint
from ..shared.errors import IdentityEditError
from .files import backbone_of_torchvision, find_file

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""Mean and deviation of colors in -1 to 1 that the heads were trained with."""
TINY = 1e-10
SMALLEST_SIDE = 32
"""Pixels along a side below which the backbones' last layers have nothing left."""


@dataclass(frozen=True)
class Backbone:
    """A network of torchvision whose features LPIPS compares.

    Attributes:
        architecture: its name in torchvision.models.
        file: the name that torchvision's file begins with.
        heads: the name of the heads' file, without its ending.
        layers: after which modules of its `features` they are taken.
    """

    architecture: str
    file: str
    heads: str
    layers: tuple[int, ...]


BACKBONES = {
    "AlexNet": Backbone("alexnet", "alexnet", "alex", (1, 4, 7, 9, 11)),
    "VGG-16": Backbone("vgg16", "vgg16", "vgg", (3, 8, 15, 22, 29)),
    "SqueezeNet": Backbone("squeezenet1_1", "squeezenet1_1", "squeeze", (1, 4, 7, 9, 10, 11, 12)),
}
"""By the names that users choose. AlexNet is the authors' advice for comparing, PIE-Bench uses SqueezeNet."""
EXAMPLES = {
    "AlexNet": "alexnet-owt-7be5be79.pth",
    "VGG-16": "vgg16-397923af.pth",
    "SqueezeNet": "squeezenet1_1-b8a52dc0.pth",
}


class Lpips(torch.nn.Module):
    """The distance of Zhang et al. 2018, eq. 1.

    Args:
        features: the backbone's convolutions, in order.
        layers: after which of them features are compared.
        heads: for each layer the weight [C] of its channels.
    """

    def __init__(self, features: Any, layers: tuple[int, ...], heads: list[torch.Tensor]) -> None:
        super().__init__()
        self.features = features
        self.layers = layers
        self.heads = torch.nn.ParameterList([torch.nn.Parameter(head, requires_grad=False) for head in heads])

    def forward(self, edited: torch.Tensor, source: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """[B] float64 distances on the CPU, 0 for equal images.

        Args:
            edited, source: [B, H, W, 3], 0 to 1.
            weights: [B, H, W]: how much each place counts in the mean over places, of which eq. 1 takes the plain one;
                averaged down to the size of each layer. NaN where all are zero.
        """
        total = torch.zeros(len(edited), dtype=torch.float64)
        pairs = zip(self._layers(edited), self._layers(source), self.heads, strict=True)
        for first, second, head in pairs:
            # Means are taken on the CPU, as not every device has float64.
            difference = conv2d((first - second).square(), head.view(1, -1, 1, 1))[:, 0].cpu().double()
            if weights is None:
                total += difference.mean(dim=(1, 2))
            else:
                size = (difference.shape[1], difference.shape[2])
                places = adaptive_avg_pool2d(weights.cpu().double().unsqueeze(1), size)[:, 0]
                total += (difference * places).sum(dim=(1, 2)) / places.sum(dim=(1, 2))
        return total

    def _layers(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Features [B, C, h, w] of each layer, of length 1 along the channels."""
        shift, scale = (torch.tensor(values).view(1, 3, 1, 1).to(images) for values in (SHIFT, SCALE))
        found = []
        values = (2.0 * images.movedim(-1, 1) - 1.0 - shift) / scale
        for number, module in enumerate(self.features):
            values = module(values)
            if number in self.layers:
                found.append(values / (values.square().sum(dim=1, keepdim=True).sqrt() + TINY))
        return found


@dataclass(frozen=True)
class LpipsScorer:
    """A loaded LPIPS; `name` is its backbone's."""

    name: str
    network: Lpips
    device: torch.device

    def distance(self, edited: torch.Tensor, source: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """[B] float64 distances of images [B, H, W, 3], 0 to 1; see `Lpips.forward`.

        Raises:
            IdentityEditError: when the images are too small.
        """
        if min(edited.shape[1:3]) < SMALLEST_SIDE:
            raise IdentityEditError(
                f"LPIPS cannot compare images of {edited.shape[2]}x{edited.shape[1]} pixels; give sides of "
                f"{SMALLEST_SIDE} or more, or leave lpips out."
            )
        return self.network(edited.float().to(self.device), source.float().to(self.device), weights)


@contextmanager
def open_lpips(name: str) -> Iterator[LpipsScorer]:
    """Context manager for LPIPS on a backbone of `BACKBONES`, from files in models/image_scores.

    Raises:
        IdentityEditError: naming the file that is missing or holds something else.
    """
    if name not in BACKBONES:
        raise IdentityEditError(f"lpips is {name!r}; choose one of {', '.join(BACKBONES)}.")
    kind = BACKBONES[name]
    path = find_file(kind.file, EXAMPLES[name], f"LPIPS on {name}", "a file of torchvision")
    heads_path = find_file(
        kind.heads, f"{kind.heads}.pth", f"LPIPS on {name}", "its linear heads, weights/v0.1 of lpips", whole_name=True
    )

    def load() -> tuple[Lpips, None]:
        features = backbone_of_torchvision(path, kind.architecture)
        return Lpips(features, kind.layers, _read_heads(heads_path, len(kind.layers))), None

    with loaded(path, load) as (network, _, device):
        yield LpipsScorer(name, network, device)


def _read_heads(path: str, count: int) -> list[torch.Tensor]:
    """The weights [C] of the linear heads, layer by layer."""
    state = read_checkpoint(path)
    names = [f"lin{number}.model.1.weight" for number in range(count)]
    if sorted(state) != sorted(names):
        raise IdentityEditError(
            f"{os.path.basename(path)} has not the {count} linear heads of LPIPS; copy {os.path.basename(path)} of the "
            f"folder weights/v0.1 of lpips."
        )
    return [state[name].flatten().float() for name in names]
