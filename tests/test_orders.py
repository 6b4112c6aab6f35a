"""Orders of the papers' tables: intervals against known distributions, verdicts, and runs that go on."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from identity_edit_pack.benchmarks import evidence, harness, orders
from identity_edit_pack.benchmarks.orders import NOT_SEEN, OPEN, SEEN, Cases, Claim, Published, order

WORSE = np.linspace(0.0, 1.0, 40)


def test_the_interval_is_that_of_students_t_where_differences_are_normal():
    generator = np.random.default_rng(1)
    for count in (30, 200):
        differences = generator.normal(0.3, 1.0, count)
        worse = generator.normal(5.0, 20.0, count)  # pairing takes what the cases share out of the interval
        found = order(worse + differences, worse)
        low, high = scipy.stats.t.interval(0.95, count - 1, differences.mean(), scipy.stats.sem(differences))
        assert found.difference == pytest.approx(differences.mean(), abs=1e-9)
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low) / 2)


def test_intervals_of_few_groups_hold_the_truth_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(orders, "RESAMPLES", 1999)
    generator = np.random.default_rng(2)
    zeros = np.zeros(6)
    found = [order(generator.normal(1.0, 2.0, 6), zeros) for _ in range(400)]
    holds = np.mean([each.low <= 1.0 <= each.high for each in found])
    assert 0.91 <= holds <= 0.98  # 0.87 with the plain percentiles of six groups


@pytest.mark.parametrize(
    "differences, margin, verdict",
    [
        (np.full(40, 0.1) + 0.01 * WORSE, 0.0, SEEN),
        (-np.full(40, 0.1) - 0.01 * WORSE, 0.0, NOT_SEEN),
        (np.where(np.arange(40) % 2, 0.1, -0.1), 0.0, OPEN),
        (np.where(np.arange(40) % 2, 1e-4, -1e-4), 0.01, NOT_SEEN),
        (np.zeros(40), 0.01, OPEN),  # a score that saturates decides nothing
        (np.r_[np.ones(5), np.zeros(35)], 0.0, OPEN),
    ],
)
def test_verdicts(differences, margin, verdict):
    better = WORSE + differences
    assert order(better, WORSE, margin=margin).verdict == verdict
    assert order(-better, -WORSE, margin=margin, higher_is_better=False).verdict == verdict


def test_cases_that_share_a_training_count_as_one():
    differences = np.repeat([0.9, 0.1, 0.2, -0.1, 0.3, -0.6, 0.4, 0.2], 50)
    worse, groups = np.zeros(400), np.repeat(np.arange(8), 50).tolist()
    assert order(differences, worse).verdict == SEEN
    grouped = order(differences, worse, groups)
    alone = order(differences[::50], worse[::50])
    assert (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high))
    assert grouped.groups == 8 and grouped.verdict == alone.verdict == OPEN


def test_five_subjects_decide_nothing_and_undefined_cases_are_left_out():
    assert order([1.0] * 5, [0.0] * 5).verdict == OPEN
    found = order([None, 2.0, 3.0, 1.0], [1.0, None, 1.0, 0.0])
    assert found.groups == 2 and found.difference == 1.5
    with pytest.raises(ValueError, match="no case"):
        order([None], [1.0])


def test_a_published_table_gives_claims_in_its_own_direction():
    scores = {"CLIP-T": "clip_t", "LPIPS a": "feature_distance", "LPIPS b": "feature_distance", "ID": "identity_kept"}
    table = Published("Table 9", scores, {"x": (0.2, 0.5, 0.4, 1.0), "y": (0.3, 0.6, 0.5, 1.0)}, (("x", "y"),))
    assert table.claims() == [
        Claim("table 9, CLIP-T", "y", "x", "clip_t", "0.3 against 0.2"),
        Claim("table 9, LPIPS a / LPIPS b", "x", "y", "feature_distance", "0.5 / 0.4 against 0.6 / 0.5"),
    ]  # equal values order nothing


def run_of(arguments: argparse.Namespace, stop_after: int) -> list[dict[str, Any]]:
    """A benchmark of four subjects with two cases each, which is stopped after some of them."""
    cases = Cases(arguments, ["a", "b", "c", "d"])
    seen = []
    for unit in cases.left[:stop_after]:
        value = float("abcd".index(unit))
        cases.add({"ours": [{"score": value}, {"score": float("nan")}], "theirs": [{"score": 0.0}, {"score": 1.0}]})
        seen.append(cases.figures())
        harness.write_results(arguments.name, {"minutes": 1.0, **cases.figures()}, [])
    return seen


def test_a_run_that_was_stopped_goes_on_and_a_whole_one_begins_anew(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    arguments = argparse.Namespace(name="table", steps=3, threads=1)
    assert len(run_of(arguments, 2)) == 2
    assert run_of(argparse.Namespace(name="other", steps=3, threads=1), 0) == []
    going_on = run_of(argparse.Namespace(name="table", steps=3, threads=2), 9)
    assert [figures["units_left"] for figures in going_on] == [1, 0] and going_on[-1]["minutes_before"] == 1.0
    whole = json.loads((tmp_path / "table.json").read_text())
    assert whole["values"]["ours"]["score"] == [0.0, None, 1.0, None, 2.0, None, 3.0, None]
    assert whole["groups"] == [0, 0, 1, 1, 2, 2, 3, 3] and whole["rows"] == {
        "ours": {"score": 1.5},
        "theirs": {"score": 0.5},
    }
    assert len(run_of(arguments, 9)) == 4  # nothing was left
    run_of(arguments, 1)
    assert len(run_of(argparse.Namespace(name="table", steps=4, threads=1), 9)) == 4  # other settings


def test_the_page_of_evidence_is_what_the_results_say():
    """After measuring a table again: `python -m benchmarks evidence`."""
    assert evidence.PAGE.read_text(encoding="utf-8") == evidence.page()


def test_every_claim_names_rows_and_scores_that_its_table_has():
    """Rows of the module's constants; the figures of a run are tried by running the benchmark."""
    for paper in evidence.PAPERS:
        for claim in [*(claim for table in paper.module.PUBLISHED for claim in table.claims()), *paper.module.CLAIMS]:
            assert claim.better != claim.worse and re.fullmatch(r"[a-z_]+", claim.score), claim
