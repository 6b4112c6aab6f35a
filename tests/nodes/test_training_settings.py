"""Training Settings: with its defaults it changes no training, and what is set in it arrives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from identity_edit_pack.pipelines.training import loop
from identity_edit_pack.tests.nodes.good_inputs import CLASSES, World, good, with_training_settings, world_in

TRAININGS = [
    name for name, node in CLASSES.items() if "training_settings" in [item.id for item in node.define_schema().inputs]
]
CHOSEN = {
    "learning_rate_schedule": "cosine", "warmup_steps": 1, "optimizer": "SGD", "weight_decay": 0.5, "ema_decay": 0.25,
    "batch_size": 2, "gradient_accumulation": 3, "precision": "float32", "checkpointing": False, "sample_every": 7,
    "sample_prompt": "a sks cat", "checkpoint_every": 5,
}  # fmt: skip


class Stop(Exception):
    """Raised instead of the training's first step."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        yield world_in(tmp_path_factory.mktemp("comfyui"), patch)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[loop.TrainingSettings]:
    """The settings that a training makes; it ends there."""
    made: list[loop.TrainingSettings] = []
    check = loop.TrainingSettings.__post_init__

    def checked(self: loop.TrainingSettings) -> None:
        check(self)
        made.append(self)
        raise Stop

    monkeypatch.setattr(loop.TrainingSettings, "__post_init__", checked)
    return made


def start(name: str, world: World, **changes: Any) -> None:
    with torch.inference_mode(), pytest.raises(Stop):
        CLASSES[name].execute(**{**good(world, name), **changes})


def test_all_trainings_take_them() -> None:
    assert len(TRAININGS) == 6


@pytest.mark.parametrize("name", TRAININGS)
def test_its_defaults_change_no_training(name: str, world: World, settings: list[loop.TrainingSettings]) -> None:
    start(name, world, training_settings=None)
    start(name, world, **with_training_settings({}))
    assert settings[0] == settings[1]
    assert settings[0].learning_rate_schedule == "constant" and settings[0].checkpoint_every > 0


@pytest.mark.parametrize("name", TRAININGS)
def test_what_is_set_arrives(name: str, world: World, settings: list[loop.TrainingSettings]) -> None:
    start(name, world, **with_training_settings({**CHOSEN, "steps": 9}))
    for key, value in CHOSEN.items():
        assert getattr(settings[0], "accumulation" if key == "gradient_accumulation" else key) == value, key


def test_zeros_turn_off_what_a_default_turns_on(world: World, settings: list[loop.TrainingSettings]) -> None:
    off = {"weight_decay": 0.0, "ema_decay": 0.0, "sample_every": 0, "checkpoint_every": 0}
    start("TrainMCDM", world, **with_training_settings(off))
    assert all(getattr(settings[0], name) == 0 for name in off)
