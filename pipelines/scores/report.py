"""Reports of scores: a table with definitions, and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from .definitions import INSIDE, OUTSIDE, PIE_BENCH_PARTS, PLAIN_PARTS
from .edit_scores import PIE_BENCH, Score

_DIRECTIONS = {True: "higher", False: "lower", None: "-"}
_DIGITS = {"PSNR": 2, "FID": 2, "aesthetic score": 2}
_SMALL = ("MSE", "structure distance", "KID")


def score_table(scores: Sequence[Score], rule: str) -> str:
    """A table of name, mean, lowest and highest value and the better direction, followed by the definitions.

    Args:
        scores: of `edit_scores.score_edit`.
        rule: by which they were taken, one of `edit_scores.RULES`.
    """
    rows = [("score", "mean", "lowest", "highest", "better")]
    for score in scores:
        values = [value for value in score.values.tolist() if not math.isnan(value)]
        figures = (score.mean, min(values), max(values)) if values else (math.nan,) * 3
        shown = [_figure(score.name, value) for value in figures]
        if len(score.values) == 1:
            shown[1:] = ["", ""]
        rows.append((score.name, shown[0], shown[1], shown[2], _DIRECTIONS[score.higher_is_better]))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for row in rows:
        name = row[0].ljust(widths[0])
        figures_text = "  ".join(text.rjust(width) for text, width in zip(row[1:4], widths[1:4], strict=True))
        lines.append(f"{name}  {figures_text}  {row[4]}".rstrip())
    wholes = [score for score in scores if not _is_part(score.name)]
    definitions = [f"{score.name}: {score.definition} [{score.source}]" for score in wholes]
    if len(wholes) < len(scores):
        how = PIE_BENCH_PARTS if rule == PIE_BENCH else PLAIN_PARTS
        definitions.append(f"{INSIDE}, {OUTSIDE}: the same of a part given by the mask: {how}.")
    return "\n".join([*lines, "", *definitions])


def scores_as_json(scores: Sequence[Score], rule: str) -> str:
    """All values by name, with their definitions. null stands for an undefined value, and "infinite" for the PSNR of
    equal images, as JSON has neither."""
    content = {
        "rule": rule,
        "scores": {
            score.name: {
                "mean": _number(score.mean),
                "values": [_number(value) for value in score.values.tolist()],
                "higher_is_better": score.higher_is_better,
                "definition": score.definition,
                "source": score.source,
            }
            for score in scores
        },
    }
    return json.dumps(content, allow_nan=False, ensure_ascii=False, indent=1)


def _is_part(name: str) -> bool:
    """Whether the whole image's definition and the rule define the score; CLIP-T has a rule of its own."""
    return name.endswith((f" {INSIDE}", f" {OUTSIDE}")) and not name.startswith("CLIP")


def _figure(name: str, value: float) -> str:
    if math.isnan(value):
        return "none"
    if math.isinf(value):
        return "infinite"
    base = name.removesuffix(f" {INSIDE}").removesuffix(f" {OUTSIDE}")
    return f"{value:.3g}" if base in _SMALL else f"{value:.{_DIGITS.get(base, 4)}f}"


def _number(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return "infinite" if math.isinf(value) else value
