"""W+ encoders and their files.

There are two architectures: e4e (`e4e.py`) and a small one. Both predict the offset from the latent average.

The pack's file format is safetensors: the network's tensors with the prefix "encoder.", `latent_avg` [N, C], and in the
header's `identity_edit` JSON: kind, architecture ("e4e" or "small"), config (the arguments of its class), name, and
training metadata. Published e4e checkpoints (.pt) are read with torch's weights-only reader, which executes no code.
"""

from __future__ import annotations

import hashlib
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from ..engine.managed_network import load_whole, managed
from ..shared.errors import IdentityEditError
from ..shared.files import (
    DESCRIPTION,
    checked_record,
    header_of,
    load_external,
    parsing_file,
    read_tensors,
    write_tensors,
)
from .e4e import E4E, from_published, with_weights
from .w_plus import WPlus, check_finite_styles

KIND = "encoder of W+"
FOLDER = "w_plus_encoders"
ENDINGS = (".pt", ".pth", ".safetensors")
NEEDED = "e4e_ffhq_encode.pt, or a .safetensors file of this pack"
BYTES_A_IMAGE = 600_000_000
"""Maximum memory of e4e's features per image; 0.5 GB measured on a CPU with batch size 1."""
_FINGERPRINT_VALUES = 64
_MOST_PARTS = 32


class SmallWPlusEncoder(nn.Module):
    """A small convolutional encoder: [B, 3, size, size] in -1 to 1 -> offset from the latent average [B, N, C].

    Stage i halves the image. Rows come in groups; each reads the features of one stage, so that coarse rows can see
    the whole image and fine ones small parts, as in e4e. A group pools its features to a grid, which keeps where
    something is, and two linear layers make its rows of it.

    Args:
        size: pixels along a side of the image, a multiple of 2 to the number of stages.
        groups: (number of rows, stage from 1) of each group, coarse rows first: ((3, 5), (4, 4), (11, 3)) is as in e4e.
        width: C, the width of a W+ code.
        channels: of the stages' features, multiples of 8.
        hidden: width between the two linear layers.
        grid: places along a side to which features are pooled.
    """

    architecture = "small"

    def __init__(
        self,
        size: int = 128,
        groups: Sequence[Sequence[int]] = ((5, 5), (4, 4), (4, 3), (5, 2)),
        width: int = 64,
        channels: Sequence[int] = (32, 48, 64, 96, 128),
        hidden: int = 256,
        grid: int = 4,
    ) -> None:
        super().__init__()
        if len(channels) > _MOST_PARTS or len(groups) > _MOST_PARTS:
            raise IdentityEditError(
                f"An encoder has at most {_MOST_PARTS} stages and groups, not {len(channels)} and {len(groups)}; "
                f"correct its configuration."
            )
        if size % 2 ** len(channels) or any(not 1 <= stage <= len(channels) for _, stage in groups):
            raise IdentityEditError(
                f"An encoder of {len(channels)} stages needs a size that they can halve and groups that read one of "
                f"them, not size {size} and groups {tuple(map(tuple, groups))}; correct its configuration."
            )
        self.size, self.width, self.grid, self.hidden = size, width, grid, hidden
        self.groups = tuple((int(rows), int(stage)) for rows, stage in groups)
        self.channels = tuple(channels)
        self.rows = sum(rows for rows, _ in self.groups)
        self.stages = nn.ModuleList()
        for before, count in zip((3, *self.channels), self.channels, strict=False):
            self.stages.append(
                nn.Sequential(
                    nn.Conv2d(before, count, kernel_size=3, stride=2, padding=1),
                    nn.GroupNorm(8, count),
                    nn.SiLU(),
                    nn.Conv2d(count, count, kernel_size=3, padding=1),
                    nn.GroupNorm(8, count),
                    nn.SiLU(),
                )
            )
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Linear(self.channels[stage - 1] * grid * grid, hidden), nn.SiLU(), nn.Linear(hidden, rows * width)
            )
            for rows, stage in self.groups
        )

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            "size": self.size,
            "groups": [list(group) for group in self.groups],
            "width": self.width,
            "channels": list(self.channels),
            "hidden": self.hidden,
            "grid": self.grid,
        }

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features, depths = images, []
        for stage in self.stages:
            features = stage(features)
            depths.append(features)
        rows = []
        for head, (_, depth) in zip(self.heads, self.groups, strict=True):
            pooled = adaptive_avg_pool2d(depths[depth - 1], self.grid).flatten(1)
            rows.append(head(pooled).unflatten(1, (-1, self.width)))
        return torch.cat(rows, dim=1)


ARCHITECTURES: dict[str, Any] = {network.architecture: network for network in (E4E, SmallWPlusEncoder)}


@dataclass(frozen=True)
class WPlusEncoder:
    """A loaded W+ encoder.

    Attributes:
        network: an `E4E` or a `SmallWPlusEncoder`, frozen, float32.
        average: [N, C] float32 CPU, the latent average.
        name: its name and the fingerprint of its weights.
        patcher: ModelPatcher with which ComfyUI loads the network (see `engine.managed_network`).
        training: training metadata.
    """

    network: Any
    average: torch.Tensor
    name: str
    patcher: Any = None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Side length of its input images in pixels."""
        return int(self.network.size)


def encode_w_plus(encoder: WPlusEncoder, images: torch.Tensor) -> WPlus:
    """The W+ codes of images: the latent average plus the network's output.

    Args:
        encoder: the encoder.
        images: [B, 3, S, S] in -1 to 1, S being the encoder's own size (256 for e4e); see `fitted`.

    Raises:
        IdentityEditError: for images of another size or range, or when the network gives no numbers.
    """
    size = encoder.size
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
        raise IdentityEditError(
            f"The W+ encoder takes color images of {size}x{size} pixels [B, 3, {size}, {size}], not "
            f"{tuple(images.shape)}; resize them first."
        )
    if float(images.min()) < -1.001 or float(images.max()) > 1.001:
        raise IdentityEditError("The W+ encoder takes images in -1 to 1; scale them to this range first.")
    device = torch.device("cpu")
    if encoder.patcher is not None:
        device = load_whole(encoder.patcher, memory=BYTES_A_IMAGE)
    # An image at a time: e4e's features of one take half a gigabyte, and more at once is no faster on a CPU.
    with torch.no_grad():
        offsets = torch.cat([encoder.network(image[None].to(device)).float().cpu() for image in images])
    check_finite_styles(offsets, "The W+ codes")
    with torch.inference_mode(False):  # trainings differentiate with these tensors
        return WPlus(offsets.clone() + encoder.average, encoder.average.clone(), encoder.name)


def fitted(images: torch.Tensor, size: int) -> torch.Tensor:
    """Images [B, S, S, 3] of 0 to 1 as an encoder takes them: [B, 3, size, size] in -1 to 1.

    Other sizes are resized, bilinear with antialiasing, as e4e's own preparation does.

    Raises:
        IdentityEditError: when the images are not square, which would distort the faces.
    """
    height, width = images.shape[1:3]
    if height != width:
        raise IdentityEditError(
            f"The images are {width}x{height}, and the encoder was trained on square images of aligned faces; use "
            f"Align Face first."
        )
    moved = images.movedim(-1, 1).float()
    if height != size:
        moved = interpolate(moved, size=(size, size), mode="bilinear", antialias=True)
    return moved.clamp(0.0, 1.0) * 2.0 - 1.0


# -- files -------------------------------------------------------------------------------------------------------------


def save_w_plus_encoder(
    path: str, network: Any, average: torch.Tensor, name: str, training: dict[str, Any] | None = None
) -> None:
    """Write an encoder, whole or not at all; see the top of this file for the form.

    Args:
        path: ends with .safetensors.
        network: an `E4E` or a `SmallWPlusEncoder`; tensors are written in their own dtype.
        average: [N, C], the latent average.
        name: what users shall know it by, such as "e4e_ffhq".
        training: what JSON can hold of how it was trained.

    Raises:
        IdentityEditError: when the file cannot be written.
    """
    tensors = {f"encoder.{key}": tensor for key, tensor in network.state_dict().items()}
    description = {
        "kind": KIND,
        "architecture": network.architecture,
        "config": network.config(),
        "name": name,
        "training": training or {},
    }
    write_tensors(path, {**tensors, "latent_avg": average}, description)


def load_w_plus_encoder(path: str) -> WPlusEncoder:
    """Read an encoder: a file of `save_w_plus_encoder`, or a published e4e.

    Raises:
        IdentityEditError: when the file is missing, damaged, holds code, or holds something else.
    """
    if not os.path.isfile(path):
        raise IdentityEditError(f"The file {path} does not exist; choose another, and press R.")
    name, training = os.path.splitext(os.path.basename(path))[0], {}
    _, metadata = header_of(path, "download it again")
    if DESCRIPTION in metadata:
        tensors, description = read_tensors(path, KIND)
        architecture = ARCHITECTURES.get(str(description.get("architecture", "")))
        average = tensors.pop("latent_avg", None)
        if architecture is None or average is None:
            raise IdentityEditError(
                f"The encoder in {path} is of an unknown kind ({description.get('architecture')}); update this pack, "
                f"or save it again."
            )
        own = {key.removeprefix("encoder."): tensor for key, tensor in tensors.items()}
        with parsing_file(path, "The encoder", "download it or save it again"):
            network = with_weights(architecture, description.get("config", {}), own, path)
            name, training = str(description.get("name", name)), checked_record(description.get("training", {}), ())
    else:
        # A namespace of the training's options is the one class besides tensors that published files hold.
        instead = "download e4e_ffhq_encode.pt from its authors, or choose a .safetensors file"
        content = load_external(path, "download it again", instead, (Namespace,), mmap=_is_zip(path))
        if not isinstance(content, dict):
            raise IdentityEditError(f"The file {path} contains no e4e encoder; choose one such as e4e_ffhq_encode.pt.")
        network, average = from_published(content, path)
    if tuple(average.shape) != (network.rows, network.width):
        raise IdentityEditError(
            f"The latent average {tuple(average.shape)} in {path} does not fit its encoder of {network.rows} rows of "
            f"{network.width}; download the file again."
        )
    with torch.inference_mode(False):
        average = average.float().clone()
    tag = f"{name} ({fingerprint(network, average)})"
    return WPlusEncoder(network, average, tag, managed(network), training)


def fingerprint(network: nn.Module, average: torch.Tensor) -> str:
    """Eight hexadecimal digits that tell encoders apart, from a few values of every tensor."""
    digest = hashlib.sha256()
    for key, tensor in sorted([*network.state_dict().items(), ("latent_avg", average)]):
        flat = tensor.detach().flatten().float().cpu()
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(flat[:: max(1, flat.shape[0] // _FINGERPRINT_VALUES)][:_FINGERPRINT_VALUES].numpy().tobytes())
    return digest.hexdigest()[:8]


def _is_zip(path: str) -> bool:
    """Files of torch 1.6 and later; the older ones cannot be read piece by piece."""
    import zipfile

    return zipfile.is_zipfile(path)
