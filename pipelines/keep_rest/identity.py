"""Does everybody in an edit still look like in the original? ArcFace similarity of matched faces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..faces.detection import Face, FaceDetector, detect_faces
from ..faces.similarity import SAME_PERSON, FaceRecognizer, embed_faces, similarities, verdict


@dataclass(frozen=True)
class FaceKept:
    """A face of the original in an edit.

    Attributes:
        number: from 1, from left to right in the original.
        place: center of the face in the original, 0 to 1 of width and height.
        similarity: to the face at the same place in the edit; None if there is none.
    """

    number: int
    place: tuple[float, float]
    similarity: float | None

    def __str__(self) -> str:
        where = f"face {self.number} at {self.place[0]:.0%}, {self.place[1]:.0%}"
        return f"{where}: {self.figure}" + ("" if self.similarity is None else f", {verdict(self.similarity)}")

    @property
    def figure(self) -> str:
        return "gone" if self.similarity is None else f"{self.similarity:.2f}"

    @property
    def drifted(self) -> bool:
        return self.similarity is None or self.similarity < SAME_PERSON


def compare_faces(
    original: torch.Tensor, edited: torch.Tensor, detector: FaceDetector, recognizer: FaceRecognizer
) -> list[FaceKept]:
    """Match the faces of two registered images by place, and compare them.

    Args:
        original, edited: [H, W, 3] and [h, w, 3], 0 to 1, of the same frame.

    Returns:
        every face of the original, from left to right.
    """
    faces, others = (
        sorted(detect_faces(detector, image), key=lambda face: face.box[0]) for image in (original, edited)
    )
    places, other_places = (
        [_place(face, image) for face in found] for found, image in ((faces, original), (others, edited))
    )
    if not faces or not others:
        return [FaceKept(number, place, None) for number, place in enumerate(places, start=1)]
    scores = similarities(
        embed_faces(recognizer, [(original, face) for face in faces]),
        embed_faces(recognizer, [(edited, face) for face in others]),
    )
    kept = []
    for number, (face, place) in enumerate(zip(faces, places, strict=True)):
        reach = face.side / original.shape[1]
        near = _nearest(place, other_places, reach)
        kept.append(FaceKept(number + 1, place, None if near is None else float(scores[number, near])))
    return kept


def lowest(faces: Sequence[FaceKept]) -> float | None:
    """Similarity of the face that drifted most, 0 if one is gone; None without faces."""
    return min((0.0 if face.similarity is None else face.similarity for face in faces), default=None)


def _place(face: Face, image: torch.Tensor) -> tuple[float, float]:
    left, top, right, bottom = face.box
    return (left + right) / 2.0 / image.shape[1], (top + bottom) / 2.0 / image.shape[0]


def _nearest(place: tuple[float, float], others: list[tuple[float, float]], reach: float) -> int | None:
    """The index of the closest place, or None beyond `reach` in parts of the width."""
    distances = [((x - place[0]) ** 2 + (y - place[1]) ** 2) ** 0.5 for x, y in others]
    best = min(range(len(others)), key=lambda index: distances[index])
    return best if distances[best] <= reach else None
