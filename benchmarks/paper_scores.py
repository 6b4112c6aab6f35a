"""The papers' own scores by the demo world's encoders, which no editing method sees.

Its CLIP gives CLIP-I, CLIP-T and CLIP-D. The attribute classifier stands for networks whose weights no package carries:
the cosine similarity of its features for DINO's, the distance of its feature maps for LPIPS.

A prompt that names a subject by its class, as in the papers, leaves out the color that captions of the demo world have.
So CLIP-T of the renderer's images, not 1, is what a perfect image reaches.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from identity_edit_pack.demo_world.classifier import AttributeClassifier, load_classifier
from identity_edit_pack.demo_world.clip import image_embeddings, load_clip, text_embeddings
from identity_edit_pack.pipelines.scores.clip import direction_similarity, text_similarity
from identity_edit_pack.pipelines.scores.features import cosines

clip = lru_cache(load_clip)
classifier = lru_cache(load_classifier)


@torch.no_grad()
def clip_images(images: torch.Tensor) -> torch.Tensor:
    """[B, D] float64 of length 1 of images [B, 128, 128, 3] in [0, 1]."""
    batches = images.clamp(0, 1).movedim(-1, 1).split(32)
    return torch.cat([image_embeddings(clip()[0], batch * 2 - 1) for batch in batches]).double()


@torch.no_grad()
def clip_texts(texts: list[str]) -> torch.Tensor:
    """[B, D] float64 of length 1."""
    return text_embeddings(*clip(), texts).double()


@torch.no_grad()
def feature_maps(network: AttributeClassifier, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The classifier's feature maps at four depths [B, C, h, w], and the features [B, 256] that its answers use."""
    x = images.permute(0, 3, 1, 2) * 2 - 1
    maps = []
    for layer in network.features:
        x = layer(x)
        if isinstance(layer, torch.nn.ReLU):
            maps.append(x)
    return maps, network.squeeze(x)


def feature_distances(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """[B] in the manner of LPIPS (Zhang et al. 2018, eq. 1) without its learned weights of channels: unit length at
    each place, mean square over places, summed over four depths."""
    found = []
    for some, true in zip(images.split(32), others.split(32), strict=True):
        total = torch.zeros(len(some))
        for layers in zip(feature_maps(classifier(), some)[0], feature_maps(classifier(), true)[0], strict=True):
            first, second = (torch.nn.functional.normalize(each, dim=1) for each in layers)
            total += (first - second).square().sum(1).mean((1, 2))
        found.append(total)
    return torch.cat(found)


def raw_features(images: torch.Tensor) -> torch.Tensor:
    """[B, 256], the classifier's."""
    return torch.cat([feature_maps(classifier(), some)[1] for some in images.split(32)])


def as_rows(columns: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    lists = {name: column.tolist() for name, column in columns.items()}
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def scores_of_edits(
    images: torch.Tensor, sources: torch.Tensor, prompts: list[str], source_prompts: list[str]
) -> list[dict[str, Any]]:
    """For each edited image: how alike it and its source are, how well it fits the target prompt, and whether the
    change between the images is that between the prompts (NaN for equal images)."""
    edited, source, target = clip_images(images), clip_images(sources), clip_texts(prompts)
    return as_rows(
        {
            "feature_similarity": cosines(raw_features(images), raw_features(sources)).diagonal(),
            "feature_distance": feature_distances(images, sources),
            "clip_i": cosines(edited, source).diagonal(),
            "clip_t": text_similarity(edited, target),
            "clip_d": direction_similarity(edited, source, target, clip_texts(source_prompts)),
        }
    )


def scores_of_subjects(images: torch.Tensor, references: torch.Tensor, prompts: list[str]) -> list[dict[str, Any]]:
    """For each image that was drawn of a subject: how alike it is to the references, on average over them (Ruiz et al.
    2023) and for feature maps to the nearest (Gu et al. 2025), and how well it fits its prompt."""
    drawn = clip_images(images)
    distances = [feature_distances(images, one.expand_as(images)) for one in references]
    return as_rows(
        {
            "feature_similarity": cosines(raw_features(images), raw_features(references)).mean(dim=1),
            "feature_distance": torch.stack(distances).amin(dim=0),
            "clip_i": cosines(drawn, clip_images(references)).mean(dim=1),
            "clip_t": text_similarity(drawn, clip_texts(prompts)),
        }
    )
