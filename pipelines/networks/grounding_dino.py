"""Object detection by name: Grounding DINO (Liu et al. 2023), from a folder in transformers format."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..shared.errors import IdentityEditError
from ..shared.images import to_pillow
from .model_folders import opened_folder

FOLDER = "grounding-dino"
NEEDED = (
    "a folder in transformers format with config.json, model.safetensors, preprocessor_config.json and the tokenizer's "
    "files"
)
BOX_THRESHOLD = TEXT_THRESHOLD = 0.25
"""Defaults of transformers."""


def detect(
    path: str,
    images: Sequence[torch.Tensor],
    name: str,
    box_threshold: float = BOX_THRESHOLD,
    text_threshold: float = TEXT_THRESHOLD,
) -> list[list[tuple[float, tuple[float, ...]]]]:
    """Detect a subject by its name with Grounding DINO.

    Args:
        path: a folder; see `NEEDED`.
        images: [height, width, 3], 0 to 1.
        name: the subject's name, such as "dog".
        box_threshold, text_threshold: confidence thresholds, 0 to 1.

    Returns:
        for each image (score, (left, top, right, bottom) in pixels), sorted by decreasing score.

    Raises:
        IdentityEditError: when files are missing, the folder contains another network, or the name is empty.
    """
    words = " ".join(name.lower().replace(".", " ").split())
    if not words:
        raise IdentityEditError("subject is empty; write what to look for, such as 'dog'.")
    otherwise = ", not 'grounding-dino'; choose a Grounding DINO in transformers format"
    classes = "GroundingDinoForObjectDetection", "AutoProcessor"
    detections = []
    with opened_folder(path, NEEDED, ("grounding-dino",), otherwise, *classes) as (network, processor, device):
        for image in images:
            # Grounding DINO expects lower-case names that end with a period.
            inputs = processor(images=to_pillow(image), text=f"{words}.", return_tensors="pt").to(device)
            # Positional, because the third argument's name differs between versions.
            result = processor.post_process_grounded_object_detection(
                network(**inputs), inputs["input_ids"], box_threshold, text_threshold, [tuple(image.shape[:2])]
            )[0]
            boxes = zip(result["scores"].tolist(), (tuple(box) for box in result["boxes"].tolist()), strict=True)
            detections.append(sorted(boxes, reverse=True))
    return detections
