"""The best of several edits: identity kept, prompt followed, rest kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..faces.detection import FaceDetector
from ..faces.similarity import FaceRecognizer
from ..scores.clip import SocketClip, check_sizes, text_similarity
from ..scores.pixels import ssim
from .identity import FaceKept, compare_faces, lowest


@dataclass(frozen=True)
class EditScores:
    """Scores of one edit; NaN for those that were not asked for.

    Attributes:
        identity: ArcFace similarity of the face that drifted most, 0 if it is gone.
        prompt: CLIP similarity to the prompt.
        rest: SSIM to the original outside of the mask.
        faces: every face of the original.
        faces_before: the same in the edit before the rest was kept; empty if it was not given.
        total: weighted mean of the scores, each from 0 for the worst edit to 1 for the best.
    """

    identity: float
    prompt: float
    rest: float
    faces: tuple[FaceKept, ...]
    faces_before: tuple[FaceKept, ...] = ()
    total: float = 0.0


def score_edits(
    original: torch.Tensor,
    edits: torch.Tensor,
    masks: torch.Tensor | None,
    *,
    prompt: str = "",
    clip: SocketClip | None = None,
    faces: tuple[FaceDetector, FaceRecognizer] | None = None,
    before: torch.Tensor | None = None,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
) -> list[EditScores]:
    """Score edits of one original.

    Args:
        original: [H, W, 3], 0 to 1.
        edits: [B, H, W, 3], registered.
        masks: [B, H, W], 0 to 1, where each edit may differ; None compares whole images.
        prompt, clip: the edited image in words; both or neither.
        faces: detector and recognizer, or None.
        before: [B, h, w, 3], each edit before the rest was kept, whose faces are compared too; it enters no score.
        weights: of identity, prompt and rest.
    """
    raw = []
    for number, edit in enumerate(edits):
        kept = [] if faces is None else compare_faces(original, edit, *faces)
        identity = lowest(kept)
        outside = None if masks is None else (masks[number : number + 1] == 0).float()
        follows = math.nan if clip is None else _follows(edit, prompt, clip)
        rest = float(ssim(edit[None], original[None], outside))
        earlier = [] if faces is None or before is None else compare_faces(original, before[number], *faces)
        raw.append((math.nan if identity is None else identity, follows, rest, tuple(kept), tuple(earlier)))
    spread = [_spread(list(values)) for values in list(zip(*raw, strict=True))[:3]]
    total = [
        sum(weight * spread[column][number] for column, weight in enumerate(weights)) / max(sum(weights), 1e-6)
        for number in range(len(raw))
    ]
    return [EditScores(*each, total=value) for each, value in zip(raw, total, strict=True)]


def _follows(edit: torch.Tensor, prompt: str, clip: SocketClip) -> float:
    image, text = clip.images([edit]), clip.texts([prompt])
    check_sizes(image, text, clip.name)
    return float(text_similarity(image, text))


def _spread(values: list[float]) -> list[float]:
    """Values from 0 at the lowest to 1 at the highest; 0 where they are equal or not known."""
    known = [value for value in values if not math.isnan(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    return [(value - low) / (high - low) if high > low and not math.isnan(value) else 0.0 for value in values]
