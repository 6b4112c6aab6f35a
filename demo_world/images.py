"""Images of the demo world: an endless stream for training, fixed sets for evaluation."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .attributes import ATTRIBUTES_OF, FRAMINGS, Attributes, random_attributes
from .renderer import render

# Seeds of evaluation images start here; those of training images are below.
EVALUATION_SEED = 1 << 40

# One classification head per attribute; -1 marks an attribute that the framing does not show.
HEADS: dict[str, tuple[str, ...]] = {"framing": FRAMINGS} | ATTRIBUTES_OF["figure"] | ATTRIBUTES_OF["portrait"]


def labels_of(attributes: Attributes, choices: dict[str, tuple[str, ...]] = HEADS) -> list[int]:
    """The class index of every head, -1 where the framing does not show the attribute."""
    shown = {"framing": attributes.framing, "size": attributes.size, "beside": attributes.beside, **attributes.visible}
    return [values.index(shown[name]) if name in shown else -1 for name, values in choices.items()]


def draw_every_identity(generator: random.Random) -> Attributes:
    """Of the demo world, held-out identities too."""
    return random_attributes(generator, held_out=None)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def rendered(samples: Iterable[tuple[Attributes, int]]) -> torch.Tensor:
    """Renders [N, 3, 128, 128] in [-1, 1] of (attributes, seed) pairs."""
    return torch.stack([to_tensor(render(attributes, seed)[0]) for attributes, seed in samples])


class TrainingImages(IterableDataset):
    """An endless stream of (image [3, 128, 128] in [-1, 1], subject mask [1, 128, 128] in [0, 1], labels)."""

    def __init__(
        self,
        seed: int,
        draw: Callable[[random.Random], Attributes] = random_attributes,
        choices: dict[str, tuple[str, ...]] = HEADS,
    ) -> None:
        self.seed, self.draw, self.choices = seed, draw, choices

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        worker = get_worker_info()
        generator = random.Random(self.seed * 64 + (worker.id if worker else 0))
        while True:
            attributes = self.draw(generator)
            image, mask = render(attributes, generator.randrange(EVALUATION_SEED))
            yield (
                to_tensor(image),
                torch.from_numpy(np.array(mask))[None].float() / 255,
                torch.tensor(labels_of(attributes, self.choices)),
            )


def evaluation_set(
    count: int, seed: int = 0, held_out: bool | None = None, framing: str | None = None
) -> list[tuple[Attributes, int]]:
    """``count`` (attributes, render seed) pairs that no training run renders."""
    generator = random.Random(f"evaluation {seed}")
    return [
        (random_attributes(generator, framing, held_out), EVALUATION_SEED + seed * 1_000_000 + index)
        for index in range(count)
    ]
