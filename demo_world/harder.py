"""The harder demo world, in which prompts can fail: what its captions say, and what its training never shows.

Animals and people of the demo world, half of them small, 40 % with an object beside them. Some words are rare in its
captions, and some compositions are never trained (`never_trained`). A low-rank adaptation of the demo checkpoint knows
this world, and an attribute classifier of its own sees it; both are for the benchmarks alone.
"""

from __future__ import annotations

import random
from pathlib import Path

from .attributes import FIGURE_ATTRIBUTES, HARDER_ATTRIBUTES, OBJECTS, RARE_COSTUMES, RARE_PLACES, Attributes
from .images import EVALUATION_SEED

FOLDER = Path(__file__).parent / "scoring"
LORA_PATH = FOLDER / "harder-world-lora.safetensors"
CLASSIFIER_PATH = FOLDER / "harder-world-classifier.safetensors"

RARE_SHARE = 0.06
"""Of the images have a rare costume, and as many a rare place."""
SMALL_SHARE, OBJECT_SHARE = 0.5, 0.4
UNSEEN_OBJECTS = ("blue ball", "yellow balloon", "red box")
"""Their colors and shapes are trained, in other combinations."""


def never_trained(attributes: Attributes) -> bool:
    """Whether the composition is kept out of training: unseen objects, and small subjects with rare costumes, in rare
    places or jumping."""
    a = attributes
    rare = a.costume in RARE_COSTUMES or a.place in RARE_PLACES or a.pose == "jumping"
    return a.beside in UNSEEN_OBJECTS or (a.size == "small" and rare)


def draw_any(generator: random.Random) -> Attributes:
    """Every value with the same probability, for the classifier."""
    return Attributes(**{name: generator.choice(choices) for name, choices in HARDER_ATTRIBUTES.items()})


def draw_training(generator: random.Random) -> Attributes:
    """Rare words are rare, and held-out identities and compositions are left out."""
    while True:
        values = {name: generator.choice(choices) for name, choices in FIGURE_ATTRIBUTES.items()}
        for name, choices in (("costume", RARE_COSTUMES), ("place", RARE_PLACES)):
            if generator.random() < RARE_SHARE:
                values[name] = generator.choice(choices)
        values["size"] = "small" if generator.random() < SMALL_SHARE else "usual"
        values["beside"] = generator.choice(OBJECTS[1:]) if generator.random() < OBJECT_SHARE else "none"
        attributes = Attributes(**values)
        if not attributes.held_out and not never_trained(attributes):
            return attributes


def evaluation_set(count: int, seed: int = 0) -> list[tuple[Attributes, int]]:
    """``count`` (attributes, render seed) pairs that no training run renders; every value is as frequent as another."""
    generator = random.Random(f"harder evaluation {seed}")
    return [(draw_any(generator), EVALUATION_SEED + seed * 1_000_000 + index) for index in range(count)]
