"""The demo world's encoder of W+: each group of rows says its own attributes and little else, of unseen people."""

from __future__ import annotations

import pytest
import torch
from identity_edit_pack.demo_world.attributes import PORTRAIT_ATTRIBUTES
from identity_edit_pack.demo_world.images import evaluation_set
from identity_edit_pack.demo_world.train_w_plus import GROUPS, W_PLUS_PATH, LinearProbe, encode
from identity_edit_pack.pipelines.pidiff.style_attention import ROW_GROUPS, parse_row_groups
from identity_edit_pack.pipelines.pidiff.w_plus_encoder import SmallWPlusEncoder, load_w_plus_encoder

pytestmark = pytest.mark.slow

NOISE = 0.5
"""What is smaller than this, half of the rows' deviation, counts as nothing."""
OWN = 0.97
ABOVE_CHANCE = 0.15
"""Margins for samples this small; `python -m demo_world w_plus --probe` gives the figures of more."""


@pytest.fixture(scope="module")
def accuracies() -> dict[float, dict[str, list[float]]]:
    """By noise, what a probe reads in each group: with that of Train Style Attention's default, and with NOISE."""
    probe = LinearProbe(fitted=300, tested=150)
    return {noise: probe.accuracy(noise) for noise in (0.05, NOISE)}


def test_the_committed_file_is_a_small_encoder_of_18_rows() -> None:
    encoder = load_w_plus_encoder(str(W_PLUS_PATH))
    assert isinstance(encoder.network, SmallWPlusEncoder)
    assert encoder.average.shape[0] == 18 and encoder.average.shape[1] <= 32
    assert W_PLUS_PATH.stat().st_size < 10_000_000


def test_the_groups_are_those_of_the_paper() -> None:
    lasts = torch.tensor([rows for rows, _ in GROUPS]).cumsum(0).tolist()
    assert lasts == [last for _, last in parse_row_groups(ROW_GROUPS, 18)]


def test_load_w_plus_encoder_lists_it(node_classes) -> None:
    encoder = node_classes["IdentityEditLoadWPlusEncoder"].execute(W_PLUS_PATH.name).result[0]
    assert encoder.name.startswith("identity-edit-demo (")


def test_the_mean_style_is_that_of_training_people() -> None:
    rows = encode(evaluation_set(100, seed=51, held_out=False, framing="portrait"))
    average = load_w_plus_encoder(str(W_PLUS_PATH)).average
    error_of_the_mean = rows.std() / 100**0.5
    assert float((rows.mean(0) - average).square().mean().sqrt()) < 1.5 * error_of_the_mean


@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_a_group_says_its_own_attributes(group: int, accuracies: dict[float, dict[str, list[float]]]) -> None:
    for name in GROUPS[group][1]:
        assert accuracies[0.05][name][group] >= OWN, name


@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_a_group_says_little_about_others(group: int, accuracies: dict[float, dict[str, list[float]]]) -> None:
    accuracy = accuracies[NOISE]
    for name, choices in PORTRAIT_ATTRIBUTES.items():
        # Of three moods: a probe leaves crying people out.
        chance = 1 / (3 if name == "expression" else len(choices))
        if name not in GROUPS[group][1]:
            assert accuracy[name][group] <= chance + ABOVE_CHANCE, name
