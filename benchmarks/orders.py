"""Which orders of a paper's table appear here: scores of every case, paired bootstrap intervals, verdicts.

A paper says that one row of its table is better than another. The difference of the two rows' scores on the same cases
gets an interval, and the verdict follows from it: see `order`.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from .harness import Options, markdown, read_results, source_commit

CONFIDENCE = 0.95
RESAMPLES = 9999
FEWEST = 6
"""Independent differences other than 0 below which every order is open: five of one sign come by chance in 2 of 32
experiments, and a bootstrap of equal values has no width."""
SEEN, NOT_SEEN, OPEN = "seen", "not seen", "open"
LOWER_IS_BETTER = ("feature_distance", "frechet_distance")
MARGINS = {"clip": 0.002, "feature": 0.005, "frechet": 0.0}
"""By the first word of a score, the gain that counts as none; 0.1 dB, and 0.01 of shares and all other scores."""
ONCE = f"{OPEN}: measured once, without an interval"
NOT_MEASURED = f"{OPEN}: not measured yet"

Rows = dict[str, list[dict[str, Any]]]
"""By row of a table, the scores of every case; every row has the same cases in the same order."""


def shared_options(seeds: int, name: str) -> Options:
    """Options of every table of a paper's claims."""
    return {
        "seeds": (seeds, f"each draws other subjects and other noise, from --seed on ({seeds})"),
        "name": (name, f"of the files of results ({name})"),
    }


# -- scores of every case -------------------------------------------------------------------------------------------


class Cases:
    """The scores of every case so far. A run that was stopped goes on: see `left`.

    Attributes:
        units: in which the table is measured, such as ("0 brown cat", ...).
        left: those that an earlier run with the same settings at the same commit did not measure; all units when
            there is none, or when it measured everything.
    """

    def __init__(self, arguments: argparse.Namespace, units: Sequence[str], *, resume: bool = True) -> None:
        self.name, self.units = arguments.name, list(units)
        self.settings = {
            name: as_setting(value)
            for name, value in vars(arguments).items()
            if name not in ("name", "processes", "threads", "keep")
        }
        before = read_results(self.name) if resume else {}
        # A result that was written changes the working tree, which the commit says with a "+".
        commit, now = str(before.get("commit", "")).rstrip("+"), source_commit().rstrip("+")
        goes_on = before.get("units_left", 0) > 0 and before.get("settings") == self.settings and commit == now
        self.values: dict[str, dict[str, list[float | None]]] = before["values"] if goes_on else {}
        self.groups: list[int] = before["groups"] if goes_on else []
        self.minutes = before["minutes"] if goes_on else 0.0
        self.left = self.units[-before["units_left"] :] if goes_on else self.units

    def add(self, rows: Rows, *, independent: bool = False) -> None:
        """The next unit's cases; `independent` where they share no training."""
        known, group = len(self.groups), max(self.groups, default=-1) + 1
        for row, cases in rows.items():
            columns = self.values.setdefault(row, {})
            for score in dict.fromkeys([*columns, *(name for case in cases for name in case)]):
                column = columns.setdefault(score, [None] * known)
                column += [as_number(case.get(score)) for case in cases]
        count = len(next(iter(rows.values())))
        self.groups += [group + index * independent for index in range(count)]
        self.left = self.left[1:]

    def figures(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "settings": self.settings,
            "minutes_before": self.minutes,
            "units": len(self.units),
            "units_left": len(self.left),
            "cases": len(self.groups),
            "rows": {row: column_means(columns) for row, columns in self.values.items()},
            "groups": self.groups,
            "values": self.values,
        }


def as_setting(value: Any) -> str:
    """As text; of a file its name, whose folder is no setting."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_setting, value))}]"
    return value.name if isinstance(value, Path) else str(value)


def as_number(value: Any) -> float | None:
    """Six decimals; None where a score is undefined, for JSON has no NaN."""
    return None if value is None or math.isnan(value) else round(float(value), 6)


def column_means(columns: dict[str, list[float | None]]) -> dict[str, float]:
    """Over the cases that have the score."""
    present = {score: [value for value in column if value is not None] for score, column in columns.items()}
    return {score: math.fsum(values) / len(values) for score, values in present.items() if values}


# -- orders -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """How much better one row is than another.

    Attributes:
        difference: mean over groups, positive in the paper's direction.
        low, high: its interval; NaN for fewer than two groups.
        groups: how many independent differences there are.
        differing: how many of them are not 0.
        verdict: SEEN, NOT_SEEN or OPEN.
    """

    difference: float
    low: float
    high: float
    groups: int
    differing: int
    verdict: str


def order(
    better: Sequence[float | None],
    worse: Sequence[float | None],
    groups: Sequence[int] | None = None,
    *,
    higher_is_better: bool = True,
    margin: float = 0.0,
) -> Order:
    """Whether the first row is better than the second on the same cases.

    SEEN where the 95 % interval of the mean difference lies above 0; NOT_SEEN where it lies below 0 or below `margin`;
    OPEN else, and where fewer than `FEWEST` groups differ.

    The interval is the percentile bootstrap of paired cases. Its level is widened for small samples as by Hesterberg
    (2015, "What Teachers Should Know About the Bootstrap"): without it, six groups cover 87 %.

    Args:
        better, worse: [n] a score of each case; None where it is undefined, which leaves the case out.
        groups: [n] the group of each case. Cases of one group share a training and are not independent, so the groups'
            means are resampled. None for independent cases.
        margin: a gain that counts as none.

    Raises:
        ValueError: when the rows have different lengths or no case in common.
    """
    cases = range(len(better)) if groups is None else groups
    by_group: dict[int, list[tuple[float, float]]] = {}
    for first, second, group in zip(better, worse, cases, strict=True):
        if first is not None and second is not None:
            by_group.setdefault(group, []).append((first, second))
    if not by_group:
        raise ValueError("the two rows have no case in common")
    sign = 1.0 if higher_is_better else -1.0
    first, second = sign * np.array([np.mean(pairs, axis=0) for pairs in by_group.values()], dtype=np.float64).T
    difference, count = float(np.mean(first - second)), len(first)
    differing = int(np.count_nonzero(first != second))
    if count < 2:
        return Order(difference, math.nan, math.nan, count, differing, OPEN)
    spread = math.sqrt(count / (count - 1)) * scipy.stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    interval = scipy.stats.bootstrap(
        (first, second), lambda a, b, axis: np.mean(a - b, axis=axis), paired=True, vectorized=True,
        n_resamples=RESAMPLES, method="percentile", confidence_level=1 - 2 * scipy.stats.norm.cdf(-spread),
        random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    low, high = float(interval.low), float(interval.high)
    verdict = OPEN
    if differing >= FEWEST:
        verdict = SEEN if low > 0.0 else NOT_SEEN if high < 0.0 or high < margin else OPEN
    return Order(difference, low, high, count, differing, verdict)


@dataclass(frozen=True)
class Claim:
    """An order of a paper.

    Attributes:
        source: where the paper has it, such as "table 2, CLIP-I".
        better, worse: rows of the table here.
        score: the score by which they are compared here.
        published: the paper's values of both; "" where it shows images or says it in words.
    """

    source: str
    better: str
    worse: str
    score: str
    published: str = ""


@dataclass(frozen=True)
class Published:
    """A table of a paper.

    Attributes:
        name: "Table 2".
        scores: by the heading of the paper's column, the score that stands for it here.
        values: by row, the paper's value of each column; None where it has none. Rows that the table here has bear
            its names, all others the paper's.
        orders: pairs of rows that the paper compares.
        maintained: scores that the paper says do not change between them, which have no order.
    """

    name: str
    scores: dict[str, str]
    values: dict[str, tuple[float | None, ...]]
    orders: tuple[tuple[str, str], ...] = ()
    maintained: tuple[str, ...] = ()

    def claims(self) -> list[Claim]:
        """A claim for each pair and score, in the direction of the paper's values; none where its columns of one score
        disagree."""
        found = []
        for (first, second), score in itertools.product(self.orders, dict.fromkeys(self.scores.values())):
            if score in self.maintained:
                continue
            columns = [index for index, name in enumerate(self.scores.values()) if name == score]
            titles = [title for title, name in self.scores.items() if name == score]
            pairs = [(self.values[first][index], self.values[second][index]) for index in columns]
            known = [(a, b) for a, b in pairs if a is not None and b is not None]
            is_lower = score in LOWER_IS_BETTER
            signs = {(a > b) - (a < b) if not is_lower else (a < b) - (a > b) for a, b in known}
            if len(signs) != 1 or signs == {0}:
                continue
            better, worse = (first, second) if signs == {1} else (second, first)
            sides = ([pair[row != first] for pair in known] for row in (better, worse))
            text = " against ".join(" / ".join(f"{value:g}" for value in side) for side in sides)
            found.append(Claim(f"{self.name.lower()}, {' / '.join(titles)}", better, worse, score, text))
        return found


def margin_of(score: str) -> float:
    return 0.1 if score.endswith("_db") else MARGINS.get(score.split("_")[0], 0.01)


def cells_of(claim: Claim, figures: dict[str, Any]) -> tuple[str, str, str]:
    """The two rows' means, the difference with its interval, and the verdict.

    Args:
        figures: of `Cases`, or "rows" with means alone, as tables before this had them.
    """
    means = [figures["rows"].get(row, {}).get(claim.score) for row in (claim.better, claim.worse)]
    if None in means:
        return "-", "-", NOT_MEASURED
    here = " against ".join(f"{mean:.3f}" for mean in means)
    sign = -1 if claim.score in LOWER_IS_BETTER else 1
    columns = [figures.get("values", {}).get(row, {}).get(claim.score) for row in (claim.better, claim.worse)]
    if None in columns:
        return here, f"{sign * (means[0] - means[1]):+.3f}", ONCE
    found = order(
        columns[0], columns[1], figures["groups"], higher_is_better=sign > 0, margin=margin_of(claim.score)
    )  # fmt: skip
    interval = f"{found.difference:+.3f}"
    if found.groups > 1:
        interval += f" [{found.low:+.3f}, {found.high:+.3f}]"
    few = f"{OPEN}: {found.differing} of {found.groups} groups differ"
    return here, interval, few if found.differing < FEWEST else found.verdict


def orders_table(claims: Iterable[Claim], figures: dict[str, Any]) -> list[str]:
    """One row for each order of the paper."""
    headings = "paper", "order", "published", "score here", "here", "difference, 95 % interval", "verdict"
    rows = []
    for claim in claims:
        here, interval, verdict = cells_of(claim, figures)
        words = f"{claim.better} better than {claim.worse}"
        rows.append((claim.source, words, claim.published, claim.score.replace("_", " "), here, interval, verdict))
    return markdown(headings, rows)


def orders_section(
    tables: Iterable[Published], claims: Iterable[Claim], figures: dict[str, Any], authors: str
) -> list[str]:
    """The orders of a paper's tables, then those that it shows or says, with a heading and what the verdicts mean."""
    groups = len(set(figures["groups"]))
    return [
        "",
        f"## The orders of {authors}",
        "",
        f"Differences are positive in the paper's direction. Paired bootstrap over {groups} independent groups of "
        f"{figures['cases']} cases: *seen* where the interval lies above 0, *not seen* where it lies below 0 or below "
        "a gain that counts as none, *open* else.",
        "",
        *orders_table([*(claim for table in tables for claim in table.claims()), *claims], figures),
    ]
