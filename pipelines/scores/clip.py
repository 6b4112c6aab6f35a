"""CLIP-T, CLIP-I and CLIP-D: cosine similarities of CLIP's embeddings of images and prompts.

The embedder is a CLIP folder in transformers format, or ComfyUI's CLIP and CLIP_VISION sockets.
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
    "encoder, such as CLIP ViT-L/14, in transformers format"
)
LONGEST_PROMPT = 77
"""Maximum number of tokens, including the start and end tokens; longer prompts are truncated, as is usual."""


class ClipEmbedder(Protocol):
    """A CLIP with both encoders; `name` is its name in the report."""

    name: str

    def images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Normalized embeddings [n, D] float64 of images [h, w, 3], 0 to 1; each is resized along its shorter side and
        center-cropped, as by CLIP's authors."""
        ...

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Normalized embeddings [n, D] float64."""
        ...


def text_similarity(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """CLIP-T: cosine similarity [n] of normalized embeddings [n, D] of images and prompts (Ruiz et al. 2023, sec. 4.1).

    100 times CLIP-T is PIE-Bench's CLIP similarity, 2.5 times CLIP-T the CLIPScore of Hessel et al. 2021; both clip
    negative values to 0.
    """
    return (images * texts).sum(dim=1)


def direction_similarity(
    edited: torch.Tensor, source: torch.Tensor, target_texts: torch.Tensor, source_texts: torch.Tensor
) -> torch.Tensor:
    """CLIP-D: cosine similarity [n] of the change between images and the change between prompts (Gal et al. 2022;
    Brooks et al. 2023, section 3.1.2).

    Args:
        edited, source, target_texts, source_texts: normalized embeddings [n, D].

    Returns:
        [n] float64, -1 to 1; NaN where the images or the prompts are equal.
    """
    images, texts = edited - source, target_texts - source_texts
    return (images * texts).sum(dim=1) / (images.norm(dim=1) * texts.norm(dim=1))


class FolderClip:
    """A loaded CLIP of transformers."""

    def __init__(self, name: str, network: Any, processor: Any, device: torch.device) -> None:
        self.name = name
        self._network, self._processor, self._device = network, processor, device

    def images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        embeddings = []
        for image in images:
            prepared = self._processor.image_processor(images=to_pillow(image), return_tensors="pt")
            output = self._network.vision_model(pixel_values=prepared["pixel_values"].to(self._device))
            embeddings.append(self._network.visual_projection(output.pooler_output))
        return normalize(torch.cat(embeddings).cpu().double(), dim=1)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        prepared = self._processor.tokenizer(
            list(texts), padding=True, truncation=True, max_length=LONGEST_PROMPT, return_tensors="pt"
        ).to(self._device)
        output = self._network.text_model(input_ids=prepared["input_ids"], attention_mask=prepared["attention_mask"])
        return normalize(self._network.text_projection(output.pooler_output).cpu().double(), dim=1)


@contextmanager
def open_clip_folder(path: str) -> Iterator[FolderClip]:
    """Context manager for a CLIP from a local folder.

    Raises:
        IdentityEditError: when files are missing or the folder contains another kind of network.
    """
    otherwise = ", and CLIP scores need a CLIP with both encoders; choose one such as CLIP ViT-L/14"
    with opened_folder(path, NEEDED, ("clip",), otherwise, "CLIPModel", "CLIPProcessor") as opened:
        yield FolderClip(os.path.basename(os.path.normpath(path)), *opened)


class SocketClip:
    """ComfyUI's CLIP, whose text encoder must have a text projection, and the CLIP_VISION trained with it.

    These are the text encoders of SDXL (with the image encoder of CLIP ViT-bigG) and of SD 2.x (with that of CLIP
    ViT-H). SD 1.x checkpoints contain no text projection.
    """

    def __init__(self, clip: Any, clip_vision: Any) -> None:
        self.name = "CLIP and CLIP_VISION inputs"
        encoder = _pooling_encoder(clip.cond_stage_model)
        if not getattr(encoder, "return_projected_pooled", False):
            raise IdentityEditError(
                "The text encoder of clip has no text projection, without which prompts cannot be compared with "
                "images; choose a CLIP folder instead of the inputs, or connect the CLIP of an SDXL checkpoint."
            )
        self._clip, self._clip_vision = clip, clip_vision

    def images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        embeddings = []
        for image in images:
            embedding = self._clip_vision.encode_image(image[None, ..., :3], crop=True)["image_embeds"]
            if embedding is None or embedding.ndim != 2:
                raise IdentityEditError(
                    "The model of clip_vision gives no image embedding; connect the CLIP image encoder that was "
                    "trained with clip."
                )
            embeddings.append(embedding.cpu().double())
        return normalize(torch.cat(embeddings), dim=1)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        embeddings = []
        for text in texts:
            plain = text.replace("(", "\\(").replace(")", "\\)")  # in scored prompts, parentheses are not weights
            _, pooled = self._clip.encode_from_tokens(self._clip.tokenize(plain), return_pooled=True)
            embeddings.append(pooled[:1].cpu().double())
        return normalize(torch.cat(embeddings), dim=1)


def _pooling_encoder(model: Any) -> Any:
    """The encoder of ComfyUI's pooled output: SDXL's clip_g, or the only one."""
    return getattr(model, "clip_g", None) or getattr(model, str(getattr(model, "clip", "")), None)


def check_sizes(images: torch.Tensor, texts: torch.Tensor, name: str) -> None:
    """Raise `IdentityEditError` where embeddings of images and of prompts cannot be compared."""
    if images.shape[1] != texts.shape[1]:
        raise IdentityEditError(
            f"{name}: the image encoder has {images.shape[1]} channels and the text encoder {texts.shape[1]}; use two "
            f"encoders that were trained together (CLIP ViT-bigG for SDXL, ViT-H for SD 2.x)."
        )
