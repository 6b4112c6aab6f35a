"""What `score_edits.py` does with cases and methods: makes images and keeps them, scores them, and writes a table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from identity_edit_pack.pipelines.scores import pixels as image_scores
from identity_edit_pack.pipelines.scores.definitions import INSIDE, OUTSIDE
from identity_edit_pack.pipelines.scores.edit_scores import Networks, Score, score_edit
from identity_edit_pack.pipelines.scores.frechet import FEWEST, frechet_distance, kernel_distance
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from PIL import Image

from .cases import EditCase, load_square, save_image
from .datasets import IMAGES, file_name

SOURCE, TARGET = "source", "true edit"
"""Rows that need no method: the image unchanged, and the answer where the dataset knows it."""
TO_TRUE_EDIT = "to the true edit"

Images = Callable[[EditCase], "torch.Tensor | None"]
"""Reads the image of a case that is scored, [1, size, size, 3], or None where there is none."""


# -- images ---------------------------------------------------------------------------------------------------------


class KeptImages:
    """Made images in a folder, one PNG for each method and case, so that a run that was stopped goes on."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Open the folder, or make it.

        Args:
            settings: what the images depend on but for method and case.

        Raises:
            IdentityEditError: when the folder holds images of other settings.
        """
        self.folder = folder
        said = folder / "settings.json"
        text = json.dumps(settings, indent=1, sort_keys=True)
        if said.exists() and said.read_text(encoding="utf-8") != text:
            raise IdentityEditError(
                f"The folder {folder} keeps images of other settings (settings.json); choose another --keep, or the "
                f"settings of before."
            )
        folder.mkdir(parents=True, exist_ok=True)
        said.write_text(text, encoding="utf-8")

    def path(self, method: str, case: EditCase) -> Path:
        return self.folder / file_name(method) / f"{case.name}.png"

    def add(self, method: str, case: EditCase, image: torch.Tensor) -> None:
        """Keep an image [size, size, 3]."""
        if not bool(torch.isfinite(image).all()):
            raise IdentityEditError(
                f"The method {method} gave NaN for {case.name}; leave it out, or run it with another precision."
            )
        save_image(image, self.path(method, case))

    def load(self, method: str, case: EditCase, size: int) -> torch.Tensor | None:
        """[1, size, size, 3] as the PNG holds it, or None where it was not made."""
        path = self.path(method, case)
        return load_square(path, size) if path.exists() else None


class EditedFolder:
    """Images that exist already, each found by the name of its case, however deep it lies in the folder.

    An image that is several times as wide as high is a strip whose last image is the edited one, as the code of
    PIE-Bench writes and reads them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
        self.paths = {path.stem: path for path in reversed(found)}
        if not self.paths:
            raise IdentityEditError(f"{folder} contains no images; choose the folder of edited images.")

    def load(self, case: EditCase, size: int) -> torch.Tensor | None:
        """[1, size, size, 3], or None where the folder has no image of this case."""
        path = self.paths.get(case.name)
        if path is None:
            return None
        with Image.open(path) as opened:
            width, height = opened.size
            is_strip = width > height and width % height == 0
            last = opened.convert("RGB").crop((width - height, 0, width, height)) if is_strip else None
        if last is None:
            return load_square(path, size)
        pixels = np.array(last.resize((size, size), Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels).float()[None] / 255


# -- scores -----------------------------------------------------------------------------------------------------------


@dataclass
class MethodScores:
    """The scores of one method: a value for each case, by the score's name."""

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    definitions: dict[str, Score] = field(default_factory=dict)
    features: list[torch.Tensor] = field(default_factory=list)

    def add(self, case: EditCase, scores: Sequence[Score]) -> None:
        self.values[case.name] = {score.name: float(score.values[0]) for score in scores}
        self.definitions |= {score.name: score for score in scores}

    def mean(self, name: str) -> float:
        """Over the cases for which the score is defined; NaN where it is for none."""
        found = [values[name] for values in self.values.values() if not math.isnan(values.get(name, math.nan))]
        return math.fsum(found) / len(found) if found else math.nan


def score_case(
    edited: torch.Tensor, case: EditCase, networks: Networks, *, size: int, rule: str, compare_source: bool
) -> list[Score]:
    """All scores of one edited image [1, size, size, 3].

    Args:
        compare_source: False where the dataset asks for new images of a subject (DreamBooth): references alone count.
    """
    scores = score_edit(
        edited,
        case.load_image(size) if compare_source else None,
        mask=case.load_mask(size) if compare_source else None,
        source_prompt=case.source_prompt,
        target_prompt=case.target_prompt,
        references=case.load_references(size),
        networks=networks,
        rule=rule,
    )
    target = case.load_target(size)
    if target is not None:
        error = image_scores.mean_squared_error(edited, target)
        known = {"PSNR": image_scores.psnr_of_error(error), "SSIM": image_scores.ssim(edited, target)}
        for score in [score for score in scores if score.name in known]:
            definition = f"{score.name} of the edited image and the true edit, which the dataset knows."
            name = f"{score.name} {TO_TRUE_EDIT}"
            scores.append(Score(name, known[score.name], True, definition, score.source))
    return scores


def set_scores(method: MethodScores, others: Sequence[torch.Tensor]) -> dict[str, float]:
    """FID and KID of a method's images to others, by their Inception features; none of too few images."""
    if min(len(method.features), len(others)) < FEWEST:
        return {}
    first, second = torch.cat(method.features), torch.cat(list(others))
    return {"FID": frechet_distance(first, second), "KID": kernel_distance(first, second)}


# -- the table --------------------------------------------------------------------------------------------------------


def column_names(methods: dict[str, MethodScores]) -> list[str]:
    """Every score that some method has, in the order in which they are defined."""
    longest = max(methods.values(), key=lambda method: len(method.definitions))
    others = (name for method in methods.values() for name in method.definitions)
    return list(dict.fromkeys([*longest.definitions, *others]))


def heading(name: str, higher_is_better: bool | None) -> str:
    """A score's name with the direction that is better."""
    return name + {True: " ↑", False: " ↓", None: ""}[higher_is_better]


def figure(name: str, value: float) -> str:
    """A mean as the table has it."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞"
    if name.startswith(("PSNR", "FID", "aesthetic")):
        return f"{value:.2f}"
    if name.startswith(("MSE", "structure", "KID")):
        return f"{value:.5f}"
    return f"{value:.4f}"


def table(methods: dict[str, MethodScores], sets: dict[str, dict[str, float]]) -> list[str]:
    """One row a method, one column a score, in Markdown, and below it what each score is; those of parts of an image
    are the same on the part."""
    definitions = {name: score for method in methods.values() for name, score in method.definitions.items()}
    names = column_names(methods)
    of_sets = list(dict.fromkeys(name for found in sets.values() for name in found))
    headings = [heading(name, definitions[name].higher_is_better) for name in names]
    headings += [heading(name, False) for name in of_sets]
    lines = [f"| method | cases | {' | '.join(headings)} |", "|---" * (len(headings) + 2) + "|"]
    for method, scores in methods.items():
        cells = [figure(name, scores.mean(name)) for name in names]
        cells += [figure(name, sets.get(method, {}).get(name, math.nan)) for name in of_sets]
        lines.append(f"| {method} | {len(scores.values)} | {' | '.join(cells)} |")
    lines += ["", "Means over the cases; ↑ higher is better, ↓ lower is better.", ""]
    whole = [name for name in names if not name.endswith((INSIDE, OUTSIDE))]
    return lines + [f"- {name}: {definitions[name].definition} [{definitions[name].source}]" for name in whole]


def as_json(value: Any) -> Any:
    """The same with null for NaN and "infinite" for infinity, which JSON has not."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "infinite"
    return value


def figures_of(methods: dict[str, MethodScores], sets: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Means and the values of every case, by method."""
    return {
        method: as_json(
            {
                "cases": len(scores.values),
                "means": {name: scores.mean(name) for name in scores.definitions} | sets.get(method, {}),
                "values": scores.values,
            }
        )
        for method, scores in methods.items()
    }


def means_by_group(methods: dict[str, MethodScores], cases: Sequence[EditCase]) -> Iterator[tuple[str, int, str, dict]]:
    """(group, its cases, method, means) of every kind of edit, where the dataset has several."""
    groups = list(dict.fromkeys(case.group for case in cases))
    for group in groups if len(groups) > 1 else []:
        names = {case.name for case in cases if case.group == group}
        for method, scores in methods.items():
            part = MethodScores({name: value for name, value in scores.values.items() if name in names})
            yield group, len(part.values), method, {name: part.mean(name) for name in scores.definitions}


def sheet(rows: dict[str, Images], cases: Sequence[EditCase], side: int) -> list[torch.Tensor]:
    """The rows of a sheet: for each method its images [n, side, side, 3] of these cases, black where it has none."""
    made = []
    for images in rows.values():
        small = []
        for case in cases:
            image = images(case)
            image = torch.zeros(1, side, side, 3) if image is None else image
            small.append(torch.nn.functional.interpolate(image.movedim(-1, 1), (side, side), mode="area"))
        made.append(torch.cat(small).movedim(1, -1))
    return made
