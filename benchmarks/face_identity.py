"""Are faces in real photos found, aligned and recognized? `python -m benchmarks face_identity --models FOLDER
--photos FOLDER`.

Nothing is fetched and no photo is kept. --models holds a face detector (--detector, a YuNet or one of insightface), an
ArcFace (--recognizer) and perhaps a salient-object network (--background). --photos holds photos; a photo's name up to
its first digit says who is in it (anna1.jpg and anna2.jpg are one person), unless it shows several people, who are all
taken for others. tests/real_faces.py says which files the figures here are from.

1. Faces found in every photo, the size of their crop and how far they are turned aside.
2. Identity similarity of all pairs of faces: the same person against others, of those the ones that are seen from the
   side apart; the warning of Align Face says which these are.
3. Of photos of one face: similarity to itself after FFHQ alignment to 256 pixels, and after scaling the photo down
   until its crop has fewer and fewer pixels.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from identity_edit_pack.pipelines.faces import background
from identity_edit_pack.pipelines.faces import detection as faces
from identity_edit_pack.pipelines.faces import similarity as identity
from identity_edit_pack.pipelines.faces.alignment import PROFILE, align_ffhq, turned_aside
from PIL import Image

from .harness import Options, markdown

SIDES = (256, 192, 128, 96, 80, 64, 56, 48, 40, 32, 24)


def read(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).float() / 255.0


def scaled(photo: torch.Tensor, factor: float) -> torch.Tensor:
    size = (max(1, round(photo.shape[1] * factor)), max(1, round(photo.shape[0] * factor)))
    small = Image.fromarray((photo * 255).round().byte().numpy()).resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small)).float() / 255.0


def find(detector: Any, photos: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Every face with its photo, person and facts."""
    found = []
    for name, photo in photos.items():
        start = time.perf_counter()
        those = faces.detect_faces(detector, photo)
        seconds = time.perf_counter() - start
        match = re.match(r"[^\d.]+", name)
        person = match.group() if match else name
        for number, face in enumerate(faces.choose_faces(those, faces.ALL, 1, name), start=1):
            found.append(
                {
                    "photo": name,
                    "person": person if len(those) == 1 else f"{name} {number}",
                    "face": face,
                    "image": photo,
                    "side": face.side,
                    "turned": turned_aside(face.points),
                    "seconds": seconds,
                }
            )
    return found


def pairs(found: list[dict[str, Any]], scores: torch.Tensor) -> dict[str, list[float]]:
    """Scores by kind of pair."""
    kinds: dict[str, list[float]] = {"same person": [], "others": [], "others, one from the side": []}
    for i, first in enumerate(found):
        for j, second in enumerate(found[:i]):
            if first["person"] == second["person"]:
                kind = "same person"
            elif max(abs(first["turned"]), abs(second["turned"])) > PROFILE:
                kind = "others, one from the side"
            else:
                kind = "others"
            kinds[kind].append(float(scores[i, j]))
    return kinds


def by_size(detector: Any, recognizer: Any, single: list[dict[str, Any]]) -> dict[int, list[float | None]]:
    """Similarity of faces to themselves when their crop has fewer pixels; None where none was found."""
    rows: dict[int, list[float | None]] = {}
    for side in SIDES:
        rows[side] = []
        for entry in single:
            small = scaled(entry["image"], side / entry["side"])
            those = faces.detect_faces(detector, small)
            if not those:
                rows[side].append(None)
                continue
            both = identity.embed_faces(recognizer, [(entry["image"], entry["face"]), (small, those[0])])
            rows[side].append(float(both[0] @ both[1]))
    return rows


OPTIONS: Options = {
    "models": (None, "folder of the networks", {"type": Path, "required": True}),
    "photos": (None, "folder of photos", {"type": Path, "required": True}),
    "detector": ("face_detection_yunet_2023mar.onnx", "a file of --models"),
    "recognizer": ("fr_feature.onnx", "a file of --models"),
    "background": ("u2netp.onnx", "a file of --models"),
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    detector = faces.open_detector(str(arguments.models / arguments.detector))
    recognizer = identity.FaceRecognizer(str(arguments.models / arguments.recognizer))
    paths = sorted(path for path in arguments.photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    found = find(detector, {path.name: read(path) for path in paths})
    embedded = identity.embed_faces(recognizer, [(entry["image"], entry["face"]) for entry in found])
    single = [entry for entry in found if sum(other["photo"] == entry["photo"] for other in found) == 1]
    start = time.perf_counter()
    aligned = [align_ffhq(entry["image"], entry["face"].points, 256).image for entry in single]
    seconds = (time.perf_counter() - start) / len(single)
    kept = []
    for entry, image in zip(single, aligned, strict=True):
        (again,) = faces.detect_faces(detector, image)[:1]
        both = identity.embed_faces(recognizer, [(entry["image"], entry["face"]), (image, again)])
        kept.append(float(both[0] @ both[1]))
    network = arguments.models / arguments.background
    share = None
    if network.is_file():
        share = background.subject_masks(str(network), torch.stack(aligned)).mean(dim=(1, 2)).tolist()
    return {
        "detector": arguments.detector,
        "recognizer": arguments.recognizer,
        "photos": len(paths),
        "faces": [{key: value for key, value in entry.items() if key not in ("face", "image")} for entry in found],
        "single": [entry["photo"] for entry in single],
        "pairs": pairs(found, identity.similarities(embedded, embedded)),
        "aligned_to_itself": kept,
        "seconds_to_align": seconds,
        "share_of_the_person": share,
        "by_size": by_size(detector, recognizer, single),
    }


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    found, kept, share = figures["faces"], figures["aligned_to_itself"], figures["share_of_the_person"]
    rows = []
    for name in dict.fromkeys(entry["photo"] for entry in found):
        own = [entry for entry in found if entry["photo"] == name]
        sides, turns = (
            ", ".join(f"{entry[key]:{form}}" for entry in own) for key, form in (("side", ".0f"), ("turned", "+.2f"))
        )
        rows.append((name, len(own), sides, turns, f"{own[0]['seconds']:.2f}"))
    kinds = [
        (kind, len(values), *(f"{each:.2f}" for each in (min(values), sum(values) / len(values), max(values))))
        for kind, values in figures["pairs"].items()
        if values
    ]
    lines = [
        "Faces in real photos",
        f"{len(found)} faces in {figures['photos']} photos; detector {arguments.detector}, recognizer "
        f"{arguments.recognizer}, on the CPU.",
        *markdown(("photo", "faces", "side of the crop, pixels", "turned aside", "seconds to find"), rows),
        "",
        "## Identity similarity",
        "",
        *markdown(("pairs", "number", "lowest", "mean", "highest"), kinds),
        "",
        f"The same person is above {identity.SAME_PERSON}, others below {identity.OTHER_PERSON}, unless a face is seen "
        f"from the side (turned aside by more than {PROFILE}), of which Align Face and Identity Similarity warn.",
        "",
        f"A face aligned to 256 pixels and found again: {min(kept):.2f} to {max(kept):.2f} to the photo; "
        f"{figures['seconds_to_align']:.2f} seconds a face.",
    ]
    if share is not None:
        keeps = f"{min(share):.0%} to {max(share):.0%} as the person."
        lines.append(f"Of the aligned faces {arguments.background} keeps {keeps}")
    by_side = [
        (side, *("not found" if value is None else f"{value:.2f}" for value in row))
        for side, row in figures["by_size"].items()
    ]
    return [
        *lines,
        "",
        "## How small a face may be",
        "",
        "Similarity to the photo itself when the photo is scaled down.",
        "",
        *markdown(("side of the crop, pixels", *figures["single"]), by_side),
    ]
