"""DINO-I, DINOv2-I and the structure distance, from features of vision transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.nn.functional import interpolate, normalize

from ..networks.image_encoders import IMAGENET_DEVIATION, IMAGENET_MEAN, encoder_of_folder
from ..networks.model_folders import opened_folder, read_config
from ..shared.images import to_pillow

NEEDED_DINO = "config.json, model.safetensors and preprocessor_config.json of DINO (ViT-S/16), transformers or timm"
NEEDED_DINOV2 = "config.json, model.safetensors and preprocessor_config.json of DINOv2, transformers or timm"
NEEDED_STRUCTURE = "config.json, model.safetensors and preprocessor_config.json of DINO (ViT-B/8), transformers"
_KINDS = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
STRUCTURE_SIDE = 224
LONGEST_STRUCTURE_SIDE = 480
"""Pixels along the shorter and at most along the longer side of images whose structure is compared (PIE-Bench)."""


class ImageEncoder(Protocol):
    """Features [n, D] of n images [h, w, 3], 0 to 1; `name` is what the report calls it."""

    name: str

    def __call__(self, images: Sequence[torch.Tensor]) -> torch.Tensor: ...


def cosines(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Cosine similarity [n1, n2] float64 of features [n1, D] and [n2, D]."""
    return normalize(first.double(), dim=1) @ normalize(second.double(), dim=1).T


class ClassToken:
    """A loaded vision transformer of transformers; gives its class token after the last layer."""

    def __init__(self, name: str, network: Any, processor: Any, device: torch.device) -> None:
        self.name = name
        self._network, self._processor, self._device = network, processor, device

    def __call__(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        found = []
        for image in images:
            prepared = self._processor(images=to_pillow(image), return_tensors="pt").to(self._device)
            found.append(self._network(**prepared).last_hidden_state[:, 0].float().cpu())
        return torch.cat(found)


class FolderEncoder:
    """An encoder of any other kind that `image_encoders.encoder_of_folder` reads, loaded at each use."""

    def __init__(self, path: str) -> None:
        self.name = _name(path)
        self._encode = encoder_of_folder(path)

    def __call__(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        return self._encode(images)


@contextmanager
def open_encoder(path: str, needed: str = NEEDED_DINO) -> Iterator[ImageEncoder]:
    """Context manager for an image encoder from a local folder, for DINO-I and DINOv2-I (Ruiz et al. 2023, section
    4.1).

    Raises:
        IdentityEditError: when files are missing or the folder holds another kind of network.
    """
    if read_config(path, needed).get("model_type") not in _KINDS:
        yield FolderEncoder(path)
        return
    with opened_folder(path, needed, _KINDS, "", "AutoModel", "AutoImageProcessor") as opened:
        yield ClassToken(_name(path), *opened)


class Structure:
    """Self-similarity of an image's patches by a DINO's keys (Tumanyan et al. 2022, section 3)."""

    def __init__(self, name: str, network: Any, device: torch.device) -> None:
        self.name = name
        self._network, self._device = network, device

    def distance(self, edited: torch.Tensor, source: torch.Tensor, *, as_pie_bench: bool = False) -> torch.Tensor:
        """Mean squared difference [B] of the two images' self-similarities.

        Args:
            edited, source: [B, H, W, 3], 0 to 1.
            as_pie_bench: as the published figures of PIE-Bench were made: its code leaves pixels at 0 to 255 where
                DINO takes 0 to 1, and the torchvision that it names (0.13.1) scales tensors without smoothing.
        """
        found = [
            (self._self_similarity(first, as_pie_bench) - self._self_similarity(second, as_pie_bench)).square().mean()
            for first, second in zip(edited, source, strict=True)
        ]
        return torch.stack(found).cpu().double()

    def _self_similarity(self, image: torch.Tensor, as_pie_bench: bool) -> torch.Tensor:
        """Cosines [t, t] of the last layer's keys, all heads concatenated, of the class token and every patch."""
        scaled = image.float().permute(2, 0, 1)[None].to(self._device)
        scaled = interpolate(
            scaled, size=structure_size(*scaled.shape[2:]), mode="bilinear", antialias=not as_pie_bench
        ) * (255.0 if as_pie_bench else 1.0)
        mean, deviation = (
            torch.tensor(values).view(1, 3, 1, 1).to(scaled) for values in (IMAGENET_MEAN, IMAGENET_DEVIATION)
        )
        keys: list[torch.Tensor] = []
        handle = _last_keys(self._network).register_forward_hook(lambda module, given, output: keys.append(output[0]))
        try:
            self._network((scaled - mean) / deviation, interpolate_pos_encoding=True)
        finally:
            handle.remove()
        unit = normalize(keys[0].float(), dim=1)
        return unit @ unit.T


def structure_size(height: int, width: int) -> tuple[int, int]:
    """Size at which structures are compared: the shorter side 224 pixels, the longer one at most 480."""
    short, long = sorted((height, width))
    new_short, new_long = STRUCTURE_SIDE, int(STRUCTURE_SIDE * long / short)
    if new_long > LONGEST_STRUCTURE_SIDE:
        new_short, new_long = int(LONGEST_STRUCTURE_SIDE * new_short / new_long), LONGEST_STRUCTURE_SIDE
    return (new_short, new_long) if height <= width else (new_long, new_short)


@contextmanager
def open_structure(path: str) -> Iterator[Structure]:
    """Context manager for a DINO from a folder in transformers format.

    Raises:
        IdentityEditError: when files are missing or the folder holds another kind of network.
    """
    otherwise = ", and the structure distance needs a DINO in the form of transformers; choose one such as DINO ViT-B/8"
    with opened_folder(path, NEEDED_STRUCTURE, ("vit",), otherwise, "AutoModel", "AutoImageProcessor") as opened:
        network, _, device = opened
        yield Structure(_name(path), network, device)


def _last_keys(network: Any) -> Any:
    """The layer that computes the last block's keys, under any of its names in transformers."""
    return [module for name, module in network.named_modules() if name.endswith(("attention.key", ".k_proj"))][-1]


def _name(path: str) -> str:
    return os.path.basename(os.path.normpath(path))
