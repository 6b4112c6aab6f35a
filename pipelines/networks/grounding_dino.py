"""Boxes of a subject by its name: Grounding DINO (Liu et al. 2023), from a folder in the form of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..shared.errors import IdentityEditError
from ..shared.images import to_pillow
from .model_folders import check_preprocessor, from_transformers, loaded, read_config

FOLDER = "grounding-dino"
NEEDED = (
    "a folder in the form of transformers with config.json, model.safetensors, preprocessor_config.json and the "
    "tokenizer's files"
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
    """Where Grounding DINO finds a subject by its name.

    Args:
        path: a folder; see `NEEDED`.
        images: [height, width, 3], 0 to 1.
        name: what to look for, such as "dog".
        box_threshold, text_threshold: how sure the network must be, 0 to 1.

    Returns:
        for each image (score, (left, top, right, bottom) in pixels), the most certain first.

    Raises:
        IdentityEditError: when files are missing, the folder holds another network, or there is no name.
    """
    words = " ".join(name.lower().replace(".", " ").split())
    if not words:
        raise IdentityEditError("subject is empty; write what to look for, such as 'dog'.")
    config = read_config(path, NEEDED)
    if config.get("model_type") != "grounding-dino":
        raise IdentityEditError(
            f"The model in {path} is '{config.get('model_type')}', not 'grounding-dino'; choose a Grounding DINO of "
            f"transformers."
        )
    check_preprocessor(path)

    def load() -> tuple[Any, Any]:
        import transformers

        return from_transformers(path, transformers.GroundingDinoForObjectDetection, transformers.AutoProcessor)

    found = []
    with loaded(path, load) as (network, processor, device):
        for image in images:
            # Names are lower case and end with a full stop: so Grounding DINO has learned them.
            inputs = processor(images=to_pillow(image), text=f"{words}.", return_tensors="pt").to(device)
            # By position: the third argument has had two names.
            result = processor.post_process_grounded_object_detection(
                network(**inputs), inputs["input_ids"], box_threshold, text_threshold, [tuple(image.shape[:2])]
            )[0]
            boxes = zip(result["scores"].tolist(), (tuple(box) for box in result["boxes"].tolist()), strict=True)
            found.append(sorted(boxes, reverse=True))
    return found
