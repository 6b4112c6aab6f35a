"""What CLIP says about an edit: CLIP-T, CLIP-I and CLIP-D, cosines of its embeddings of images and prompts.

Two ways lead to an embedder: a folder of CLIP in the form of transformers, or ComfyUI's CLIP and CLIP_VISION sockets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.nn.functional import normalize

from ..networks.model_folders import opened_folder
from ..shared.errors import IdentityEditError
from ..shared.images import to_pillow

NEEDED = (
    "config.json, model.safetensors, preprocessor_config.json and the tokenizer's files of a CLIP with its text "
    "encoder, such as CLIP ViT-L/14, in the form of transformers"
)
LONGEST_PROMPT = 77
"""Tokens that CLIP reads, with its two marks; what is longer is cut, as everywhere where CLIP scores prompts."""


class ClipEmbedder(Protocol):
    """A CLIP with both of its encoders; `name` is what the report calls it."""

    name: str

    def images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """[n, D] float64 of length 1, of images [h, w, 3], 0 to 1: each scaled to the encoder's size along its
        shorter side, and its middle square taken, as CLIP's authors do."""
        ...

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """[n, D] float64 of length 1."""
        ...


def text_similarity(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """CLIP-T: cosine [n] of images' and prompts' embeddings [n, D] of length 1 (Ruiz et al. 2023, section 4.1).

    Multiplied by 100 it is the CLIP similarity of PIE-Bench, multiplied by 2.5 the CLIPScore of Hessel et al. 2021;
    both take 0 for what is below.
    """
    return (images * texts).sum(dim=1)


def direction_similarity(
    edited: torch.Tensor, source: torch.Tensor, target_texts: torch.Tensor, source_texts: torch.Tensor
) -> torch.Tensor:
    """CLIP-D: cosine [n] of the change between images and the change between prompts (Gal et al. 2022; Brooks et al.
    2023, section 3.1.2).

    Args:
        edited, source, target_texts, source_texts: embeddings [n, D] of length 1.

    Returns:
        [n] float64, -1 to 1; NaN where the images or the prompts are the same, as nothing has no direction.
    """
    images, texts = edited - source, target_texts - source_texts
    return (images * texts).sum(dim=1) / (images.norm(dim=1) * texts.norm(dim=1))


class FolderClip:
    """A CLIP of transformers that is loaded."""

    def __init__(self, name: str, network: Any, processor: Any, device: torch.device) -> None:
        self.name = name
        self._network, self._processor, self._device = network, processor, device

    def images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        found = []
        for image in images:
            prepared = self._processor.image_processor(images=to_pillow(image), return_tensors="pt")
            output = self._network.vision_model(pixel_values=prepared["pixel_values"].to(self._device))
            found.append(self._network.visual_projection(output.pooler_output))
        return normalize(torch.cat(found).cpu().double(), dim=1)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        prepared = self._processor.tokenizer(
            list(texts), padding=True, truncation=True, max_length=LONGEST_PROMPT, return_tensors="pt"
        ).to(self._device)
        output = self._network.text_model(input_ids=prepared["input_ids"], attention_mask=prepared["attention_mask"])
        return normalize(self._network.text_projection(output.pooler_output).cpu().double(), dim=1)


@contextmanager
def open_clip_folder(path: str) -> Iterator[FolderClip]:
    """A CLIP from a local folder, for the time of a `with`.

    Raises:
        IdentityEditError: when files are missing or the folder holds another kind of network.
    """
    otherwise = ", and CLIP scores need a CLIP with both encoders; choose one such as CLIP ViT-L/14"
    with opened_folder(path, NEEDED, ("clip",), otherwise, "CLIPModel", "CLIPProcessor") as opened:
        yield FolderClip(os.path.basename(os.path.normpath(path)), *opened)


class SocketClip:
    """ComfyUI's CLIP, whose text encoder must give projected embeddings, and the CLIP_VISION trained with it.

    Those are the text encoders of SDXL (with CLIP ViT-bigG's image encoder) and of SD 2.x (with CLIP ViT-H's). That of
    SD 1.x has no text projection in its checkpoints.
    """

    def __init__(self, clip: Any, clip_vision: Any) -> None:
        self.name = "CLIP and CLIP_VISION inputs"
        encoder = _pooling_encoder(clip.cond_stage_model)
        if not getattr(encoder, "return_projected_pooled", False):
            raise IdentityEditError(
                "The text encoder of clip has no text projection, without which prompts cannot be compared with "
                "images; choose a CLIP folder in the place of the inputs, or connect the CLIP of an SDXL checkpoint."
            )
        self._clip, self._clip_vision = clip, clip_vision

    def images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        found = []
        for image in images:
            embedding = self._clip_vision.encode_image(image[None, ..., :3], crop=True)["image_embeds"]
            if embedding is None or embedding.ndim != 2:
                raise IdentityEditError(
                    "The model of clip_vision gives no image embedding; connect the CLIP image encoder that was "
                    "trained with clip."
                )
            found.append(embedding.cpu().double())
        return normalize(torch.cat(found), dim=1)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        found = []
        for text in texts:
            plain = text.replace("(", "\\(").replace(")", "\\)")  # brackets are words here, and no weights
            _, pooled = self._clip.encode_from_tokens(self._clip.tokenize(plain), return_pooled=True)
            found.append(pooled[:1].cpu().double())
        return normalize(torch.cat(found), dim=1)


def _pooling_encoder(model: Any) -> Any:
    """The encoder whose pooled output ComfyUI gives: the G of SDXL, or the only one."""
    return getattr(model, "clip_g", None) or getattr(model, str(getattr(model, "clip", "")), None)


def check_sizes(images: torch.Tensor, texts: torch.Tensor, name: str) -> None:
    """Raise `IdentityEditError` where embeddings of images and of prompts cannot be compared."""
    if images.shape[1] != texts.shape[1]:
        raise IdentityEditError(
            f"{name}: the image encoder gives {images.shape[1]} numbers and the text encoder {texts.shape[1]}; use "
            f"the two that were trained together (CLIP ViT-bigG for SDXL, ViT-H for SD 2.x)."
        )
