"""Training of the demo world's W+ encoder on renders of training identities, half of them degraded.

As in StyleGAN, its 18 rows encode a portrait from coarse to fine, in four groups (PIDiff, Gu et al. 2025, section
2.2.2), so that mixing the rows of two people has a ground truth. `GROUPS` assigns each attribute to one group.

A group should encode its own attributes and nothing else. Linear probes on noisy rows enforce only the first: other
information would remain in the rows with a small scale, and a later network could read it. Therefore the rows are also
regressed to a fixed code: a random table has rows for every value of an attribute, and the target of a portrait is the
sum over the attributes of its group (a center loss, Wen et al. 2016, with fixed centers). The target is the same for
all images of a person with one pose and expression.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from ..pipelines.pidiff.w_plus_encoder import SmallWPlusEncoder, load_w_plus_encoder, save_w_plus_encoder
from .attributes import PORTRAIT_ATTRIBUTES, Attributes, random_attributes
from .images import EVALUATION_SEED, evaluation_set, rendered
from .renderer import layout_of, render
from .train_classifier import attribute_accuracy, attribute_loss, degrade
from .training import probe_accuracy, train

W_PLUS_PATH = Path(__file__).parent / "w_plus" / "identity-edit-demo-w-plus.safetensors"
GROUPS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (5, ("facing", "face_shape")),
    (4, ("hair_style", "skin")),
    (4, ("expression",)),
    (5, ("hair_color", "eye_color")),
)
"""Number of rows and attributes of each group, from coarse to fine: the paper's rows 1-5, 6-9, 10-13 and 14-18.

Rows 1-5 also encode the position and size of the head, three numbers."""
NAMES = tuple(name for _, names in GROUPS for name in names)
POSITION = 3
WIDTH = 8
STAGES = (4, 4, 4, 3)
CHANNELS = (16, 32, 64, 96)
NOISE = 1.0
"""Standard deviation of the noise before the probes, relative to that of the rows."""


def make_encoder() -> SmallWPlusEncoder:
    groups = [(rows, stage) for (rows, _), stage in zip(GROUPS, STAGES, strict=True)]
    return SmallWPlusEncoder(groups=groups, width=WIDTH, channels=CHANNELS, hidden=128)


def labels_of(attributes: Attributes) -> list[int]:
    """The class index of every attribute of ``NAMES``, -1 where it is not visible (the color of closed eyes)."""
    shown = attributes.visible
    return [PORTRAIT_ATTRIBUTES[n].index(shown[n]) if n in shown else -1 for n in NAMES]


def position_of(seed: int) -> list[float]:
    """Position and size of a portrait's head, each with standard deviation 1 over all seeds."""
    layout = layout_of(seed)
    spans = ((layout.shift_x, -6.0, 6.0), (layout.shift_y, -3.0, 3.0), (layout.scale, 0.93, 1.05))
    return [(2 * (value - low) / (high - low) - 1) * 3**0.5 for value, low, high in spans]


class Code(nn.Module):
    """The target code: labels [B, attributes] and positions [B, 3] -> [B, 18, WIDTH] with mean 0 and deviation 1.

    It is not trained. An attribute that is not visible adds 0, the mean over its values.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(6)
        for name in NAMES:
            rows = next(rows for rows, names in GROUPS if name in names)
            table = torch.randn(len(PORTRAIT_ATTRIBUTES[name]), rows * WIDTH, generator=generator)
            table = table - table.mean(0)
            self.register_buffer(name, table / table.square().mean().sqrt())
        table = torch.randn(POSITION, GROUPS[0][0] * WIDTH, generator=generator) / POSITION**0.5
        self.register_buffer("position", table)

    def forward(self, labels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        groups = []
        for _, names in GROUPS:
            parts = []
            for name in names:
                label = labels[:, NAMES.index(name)]
                parts.append(self.get_buffer(name)[label.clamp(min=0)] * (label >= 0)[:, None])
            if "facing" in names:
                parts.append(positions @ self.get_buffer("position"))
            groups.append(sum(parts) / len(parts) ** 0.5)
        return torch.cat(groups, dim=1).unflatten(1, (-1, WIDTH))


def groups_of(rows: torch.Tensor) -> list[torch.Tensor]:
    """Rows [B, 18, WIDTH] -> the flattened rows of each group."""
    return [part.flatten(1) for part in rows.split([rows for rows, _ in GROUPS], dim=1)]


class Portraits(IterableDataset):
    """``count`` training portraits as uint8 [128, 128, 3], their labels and positions."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for index in range(self.count):
            generator = random.Random(f"portrait of W+ {index}")
            attributes = random_attributes(generator, "portrait")
            seed = generator.randrange(EVALUATION_SEED)
            image = torch.from_numpy(np.array(render(attributes, seed)[0]))
            yield image, torch.tensor(labels_of(attributes)), torch.tensor(position_of(seed))


def training_set(path: Path, count: int) -> dict[str, torch.Tensor]:
    """Render the portraits, or read the file of an earlier run."""
    if not path.exists():
        batches = list(tqdm(DataLoader(Portraits(count), batch_size=64), total=-(-count // 64), mininterval=10))
        names = ("images", "labels", "positions")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: torch.cat(parts) for name, parts in zip(names, zip(*batches, strict=True), strict=True)}, path)
    return load_file(path)


def as_input(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 128, 128, 3] -> [B, 3, 128, 128] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_w_plus(folder: Path, steps: int, batch_size: int, learning_rate: float, count: int) -> None:
    """Train on training identities only, and write the file that Load W+ Encoder lists.

    An interrupted run resumes from ``folder/w_plus_state.pt``.
    """
    torch.manual_seed(6)
    data = training_set(folder / "w_plus_portraits.safetensors", count)
    encoder = make_encoder().to(memory_format=torch.channels_last)
    code = Code()
    own = [(group, name) for group, (_, names) in enumerate(GROUPS) for name in names]
    sizes = [rows * WIDTH for rows, _ in GROUPS]
    probes = nn.ModuleDict({name: nn.Linear(sizes[group], len(PORTRAIT_ATTRIBUTES[name])) for group, name in own})

    def loss_of(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(0, len(data["labels"]), (batch_size,), generator=generator)
        labels, positions = data["labels"][chosen], data["positions"][chosen]
        rows = encoder(degrade(as_input(data["images"][chosen])).to(memory_format=torch.channels_last)).float()
        unexplained = (rows - code(labels, positions)).square().mean()
        noisy = groups_of(rows + NOISE * torch.randn(rows.shape, generator=generator))
        attributes = attribute_loss({name: probes[name](noisy[group]) for group, name in own}, labels)
        return unexplained + 0.1 * attributes / batch_size

    held_out = evaluation_set(120, seed=61, held_out=True, framing="portrait")
    shown = rendered(held_out)
    truth = torch.tensor([labels_of(attributes) for attributes, _ in held_out])

    @torch.no_grad()
    def accuracy() -> str:
        groups = groups_of(encoder(shown))
        return attribute_accuracy({name: probes[name](groups[group]) for group, name in own}, truth)

    train(
        {"encoder": encoder, "probes": probes},
        loss_of,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=0.01,
        checkpoint=folder / "w_plus_state.pt",
        on_checkpoint=accuracy,
    )
    facts = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "portraits": count}
    save_encoder(encoder, data["images"], facts)


@torch.no_grad()
def save_encoder(
    encoder: SmallWPlusEncoder, images: torch.Tensor, facts: dict[str, Any], path: Path = W_PLUS_PATH
) -> None:
    """Write the encoder in fp16, with its mean over ``images`` as `latent_avg` and outputs relative to that mean."""
    encoder = encoder.to(memory_format=torch.contiguous_format)
    average = torch.cat([encoder(as_input(part)) for part in images.split(64)]).mean(0)
    for head, part in zip(encoder.heads, groups_of(average[None]), strict=True):
        last = head.get_submodule("2")
        assert isinstance(last, nn.Linear)
        last.bias.sub_(part[0])
    save_w_plus_encoder(str(path), encoder.half(), average, "identity-edit-demo", facts)


@torch.no_grad()
def encode(samples: list[tuple[Attributes, int]], path: Path = W_PLUS_PATH) -> torch.Tensor:
    """W+ codes [N, 18, WIDTH] of renders by the committed encoder."""
    encoder = load_w_plus_encoder(str(path))
    batches = [rendered(samples[start : start + 32]) for start in range(0, len(samples), 32)]
    return torch.cat([encoder.network(images) + encoder.average for images in batches])


class LinearProbe:
    """Accuracy of ``probe_accuracy`` on the rows of the committed encoder.

    It is fitted on renders of training identities and tested on renders of held-out identities, without crying people:
    their closed eyes have no color, which would reveal the expression.
    """

    def __init__(self, fitted: int = 800, tested: int = 400) -> None:
        self.known, self.unknown = self.portraits(fitted, 21, held_out=False), self.portraits(tested, 31, held_out=True)
        self.known_rows, self.unknown_rows = encode(self.known), encode(self.unknown)

    @staticmethod
    def portraits(count: int, seed: int, held_out: bool) -> list[tuple[Attributes, int]]:
        samples = evaluation_set(2 * count, seed, held_out=held_out, framing="portrait")
        return [sample for sample in samples if sample[0].expression != "crying"][:count]

    def accuracy(self, noise: float = 0.0) -> dict[str, list[float]]:
        """The accuracies in rows 1-5, 6-9, 10-13 and 14-18, by attribute.

        Args:
            noise: standard deviation of noise added to the rows, like ``style_noise`` of Train Style Attention.
        """
        generator = torch.Generator().manual_seed(0)
        known, unknown = (
            groups_of(rows + noise * torch.randn(rows.shape, generator=generator))
            for rows in (self.known_rows, self.unknown_rows)
        )
        shares = {}
        for name, choices in PORTRAIT_ATTRIBUTES.items():
            known_labels, unknown_labels = (
                torch.tensor([choices.index(getattr(attributes, name)) for attributes, _ in samples])
                for samples in (self.known, self.unknown)
            )
            shares[name] = [
                probe_accuracy(group, known_labels, other, unknown_labels, len(choices))
                for group, other in zip(known, unknown, strict=True)
            ]
        return shares


def print_probe() -> None:
    probe = LinearProbe()
    for noise in (0.0, 0.05, 0.5):
        print(f"accuracy in rows 1-5 / 6-9 / 10-13 / 14-18, with noise of standard deviation {noise}:")
        for name, shares in probe.accuracy(noise).items():
            print(f"  {name}: " + " / ".join(f"{share:.3f}" for share in shares))
