"""The two worlds in which subjects are learned and edited: the demo world, and one where prompts can fail."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from identity_edit_pack.demo_world import harder
from identity_edit_pack.demo_world.attributes import (
    FIGURE_ATTRIBUTES,
    HARDER_ATTRIBUTES,
    RARE_COSTUMES,
    Attributes,
    random_attributes,
)
from identity_edit_pack.demo_world.classifier import AttributeClassifier, load_classifier
from identity_edit_pack.demo_world.images import evaluation_set

from .harness import Options, load_checkpoint

WORLD: Options = {
    "world": (
        "demo",
        "of the subjects: demo, or harder with rarer words, smaller subjects and objects beside them (demo)",
        {"choices": ("demo", "harder")},
    )
}
PROMPTS: tuple[dict[str, str], ...] = (
    {"place": "snow", "costume": "santa hat"},
    {"place": "beach", "pose": "sitting"},
    {"place": "room", "expression": "smiling"},
    {"place": "night", "pose": "jumping"},
    {"place": "grass", "pose": "lying"},
    {"place": "room", "costume": "crown", "pose": "sitting"},
    {"place": "snow", "costume": "scarf", "pose": "jumping"},
    {"place": "grass", "expression": "angry"},
    {"place": "beach", "expression": "crying", "pose": "lying"},
    {"place": "night", "costume": "crown"},
    {"place": "grass"},
    {"place": "snow"},
    {"place": "beach"},
    {"place": "room"},
    {"place": "night"},
    {"place": "grass", "costume": "santa hat", "expression": "smiling"},
    {"place": "beach", "costume": "scarf"},
    {"place": "room", "pose": "jumping"},
    {"place": "night", "pose": "sitting", "costume": "scarf"},
    {"place": "snow", "pose": "lying", "expression": "angry"},
    {"place": "beach", "costume": "crown", "pose": "jumping"},
    {"place": "room", "costume": "santa hat", "pose": "lying"},
    {"place": "night", "expression": "smiling", "pose": "lying"},
    {"place": "grass", "costume": "scarf", "expression": "crying"},
    {"place": "snow", "pose": "sitting", "expression": "smiling"},
)
"""What each prompt asks; where it is silent the subject stands, neutral, without a costume. The first ten hold every
place, pose, costume and expression."""


def draw_figure(generator: random.Random) -> Attributes:
    return random_attributes(generator, "figure", held_out=None)


def draw_trained_figure(generator: random.Random) -> Attributes:
    return random_attributes(generator, "figure")


def draw_harder_prompts(count: int) -> tuple[dict[str, str], ...]:
    """Prompts that name everything at once, rare words as often as others; nearly half of them were never trained."""
    generator = random.Random("harder prompts")
    names = ("place", "pose", "costume", "expression", "size", "beside")
    drawn = [harder.draw_any(generator) for _ in range(count)]
    return tuple({name: getattr(each, name) for name in names} for each in drawn)


@dataclass(frozen=True)
class World:
    """What images, prompts and edits show.

    Attributes:
        title: its name in a table's title.
        draw: any figure, identity and all.
        draw_trained: a figure as the checkpoint's training shows them.
        prompts: what prompts ask of a subject.
        asked: the attributes that prompts ask for.
        edits: attributes that an edit changes, by turns.
        choices: by attribute, the values to which an edit changes it.
        evaluation_set: images for a count and a seed that no training renders, as attributes and render seeds.
    """

    title: str
    draw: Callable[[random.Random], Attributes]
    draw_trained: Callable[[random.Random], Attributes]
    prompts: tuple[dict[str, str], ...]
    asked: tuple[str, ...]
    edits: tuple[tuple[str, ...], ...]
    choices: dict[str, tuple[str, ...]]
    evaluation_set: Callable[[int, int], list[tuple[Attributes, int]]]

    def checkpoint(self, path: Any) -> tuple[Any, Any, Any]:
        """MODEL, CLIP and VAE."""
        return load_checkpoint(path)

    def classifier(self) -> AttributeClassifier:
        return load_classifier()


class HarderWorld(World):
    def checkpoint(self, path: Any) -> tuple[Any, Any, Any]:
        import comfy.sd
        import comfy.utils

        model, clip, vae = load_checkpoint(path)
        lora = comfy.utils.load_torch_file(str(harder.LORA_PATH), safe_load=True)
        return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0], clip, vae

    def classifier(self) -> AttributeClassifier:
        return load_classifier(harder.CLASSIFIER_PATH, HARDER_ATTRIBUTES)


ASKED = ("place", "pose", "costume", "expression", "facing")
WORLDS = {
    "demo": World(
        "demo world", draw_figure, draw_trained_figure, PROMPTS, ASKED, (("pose",), ("expression",), ("facing",)),
        FIGURE_ATTRIBUTES, evaluation_set,
    ),
    "harder": HarderWorld(
        "harder demo world", harder.draw_any, harder.draw_training, draw_harder_prompts(len(PROMPTS)),
        (*ASKED, "beside"), tuple((name, "costume") for name in ("pose", "expression", "facing")),
        {**HARDER_ATTRIBUTES, "costume": RARE_COSTUMES}, harder.evaluation_set,
    ),
}  # fmt: skip


def world_of(arguments: Any) -> World:
    return WORLDS[getattr(arguments, "world", "demo")]
