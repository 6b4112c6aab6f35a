"""The demo world's attributes, captions and held-out subjects.

An image is determined by its :class:`Attributes` and an integer seed. The seed sets the layout (position, scale,
horizon, clouds, phase of the stripes) and changes no attribute.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random

SPECIES = ("cat", "dog", "bear", "rabbit", "person")
COLORS = ("white", "black", "brown", "orange", "pink", "blue", "green")
PATTERNS = ("plain", "striped", "spotted")
POSES = ("standing", "sitting", "jumping", "lying")
FACINGS = ("left", "right")
EXPRESSIONS = ("neutral", "smiling", "angry", "crying")
COSTUMES = ("none", "santa hat", "crown", "scarf")
PLACES = ("grass", "snow", "beach", "room", "night")
FRAMINGS = ("figure", "portrait")

HAIR_COLORS = ("black", "brown", "blonde", "red")
HAIR_STYLES = ("short", "long", "curly")
EYE_COLORS = ("brown", "blue", "green")
SKINS = ("light", "tan", "dark")
FACE_SHAPES = ("round", "long", "square")

# The attributes of each framing, in the order of their random draws.
SCENE_ATTRIBUTES = {"facing": FACINGS, "expression": EXPRESSIONS, "costume": COSTUMES, "place": PLACES}
FIGURE_ATTRIBUTES = {"species": SPECIES, "color": COLORS, "pattern": PATTERNS, "pose": POSES, **SCENE_ATTRIBUTES}
PORTRAIT_ATTRIBUTES = {
    "hair_color": HAIR_COLORS,
    "hair_style": HAIR_STYLES,
    "eye_color": EYE_COLORS,
    "skin": SKINS,
    "face_shape": FACE_SHAPES,
    **SCENE_ATTRIBUTES,
}
ATTRIBUTES_OF = {"figure": FIGURE_ATTRIBUTES, "portrait": PORTRAIT_ATTRIBUTES}

# What only figures of the harder world have (see `harder.py`): words that are rare in its captions, a size, and an
# object beside the subject.
RARE_COSTUMES = ("top hat", "bow tie", "party hat")
RARE_PLACES = ("desert",)
SIZES = ("usual", "small")
OBJECTS = ("none", *(f"{color} {shape}" for shape in ("ball", "balloon", "box") for color in ("red", "yellow", "blue")))
HARDER_ATTRIBUTES = {
    **FIGURE_ATTRIBUTES,
    "costume": COSTUMES + RARE_COSTUMES,
    "place": PLACES + RARE_PLACES,
    "size": SIZES,
    "beside": OBJECTS,
}

# Attributes of the identity; an edit may change the others.
IDENTITY_OF = {
    "figure": ("species", "color", "pattern"),
    "portrait": ("hair_color", "hair_style", "eye_color", "skin", "face_shape"),
}
# One identity in this many is held out of training, as an unseen subject for personalization.
HELD_OUT_ONE_IN = 8
PORTRAIT_SHARE = 0.3


@dataclasses.dataclass(frozen=True)
class Attributes:
    """The content of an image. Figures ignore the attributes of portraits only, and vice versa."""

    framing: str = "figure"
    species: str = "cat"
    color: str = "orange"
    pattern: str = "plain"
    pose: str = "standing"
    hair_color: str = "brown"
    hair_style: str = "short"
    eye_color: str = "brown"
    skin: str = "light"
    face_shape: str = "round"
    facing: str = "right"
    expression: str = "neutral"
    costume: str = "none"
    place: str = "grass"
    size: str = "usual"
    beside: str = "none"

    def __post_init__(self) -> None:
        if self.framing not in FRAMINGS:
            raise ValueError(f"framing {self.framing!r} is not one of {', '.join(FRAMINGS)}")
        figure, portrait = HARDER_ATTRIBUTES, PORTRAIT_ATTRIBUTES
        for name, choices in (portrait | figure if self.framing == "figure" else figure | portrait).items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(choices)}")

    @property
    def visible(self) -> dict[str, str]:
        """The visible attributes by name: those of the framing, without the color of closed eyes."""
        shown = {name: getattr(self, name) for name in ATTRIBUTES_OF[self.framing]}
        if self.expression == "crying":
            shown.pop("eye_color", None)
        return shown

    @property
    def identity(self) -> tuple[str, ...]:
        """Values of the attributes in ``IDENTITY_OF``."""
        return tuple(getattr(self, name) for name in IDENTITY_OF[self.framing])

    @property
    def held_out(self) -> bool:
        """Whether this identity is kept out of every training set of the demo world."""
        digest = hashlib.sha256(" ".join((self.framing, *self.identity)).encode()).digest()
        return digest[0] % HELD_OUT_ONE_IN == 0

    def replace(self, **changes: str) -> Attributes:
        """The image with some attributes changed, the ground truth of an edit."""
        return dataclasses.replace(self, **changes)


def random_attributes(
    generator: random.Random, framing: str | None = None, held_out: bool | None = False
) -> Attributes:
    """Draw attributes uniformly.

    Args:
        generator: source of randomness.
        framing: ``"figure"``, ``"portrait"``, or None for a mixture with ``PORTRAIT_SHARE`` portraits.
        held_out: False for training identities, True for held-out identities, None for both.
    """
    while True:
        chosen = framing or ("portrait" if generator.random() < PORTRAIT_SHARE else "figure")
        values = {name: generator.choice(choices) for name, choices in ATTRIBUTES_OF[chosen].items()}
        attributes = Attributes(framing=chosen, **values)
        if held_out is None or attributes.held_out == held_out:
            return attributes


def description(attributes: Attributes) -> str:
    """Description of the person in a portrait: "person with short brown hair, ..."."""
    a = attributes
    hair, face = f"{a.hair_style} {a.hair_color} hair", f"a {a.face_shape} face"
    return f"person with {hair}, {a.eye_color} eyes, {a.skin} skin and {face}"


PLACE_PHRASES = {
    "grass": "on the grass",
    "snow": "in the snow",
    "beach": "on the beach",
    "room": "in a room",
    "night": "at night",
    "desert": "in a desert",
}
POSE_PHRASES = {"standing": "standing", "sitting": "sitting", "jumping": "jumping", "lying": "lying down"}
CAPTION_TEMPLATES = 5


def caption(attributes: Attributes, template: int = 0) -> str:
    """Caption of an image.

    Args:
        attributes: its content.
        template: 0 to ``CAPTION_TEMPLATES - 1``; templates differ in the order of the words only.
    """
    a = attributes
    expression = "" if a.expression == "neutral" else a.expression + " "
    size = "" if a.size == "usual" else a.size + " "
    costume = "" if a.costume == "none" else f"wearing a {a.costume}"
    beside = "" if a.beside == "none" else f"with a {a.beside}"
    costume = " ".join(part for part in (costume, beside) if part)
    place = PLACE_PHRASES[a.place]
    facing = f"facing {a.facing}"
    if a.framing == "portrait":
        subject, action = f"a portrait of a {expression}{description(a)}", ""
    else:
        pattern = "" if a.pattern == "plain" else a.pattern + " "
        if a.species == "person":
            subject = f"a {size}{expression}person in {pattern}{a.color} clothes"
        else:
            subject = f"a {size}{expression}{pattern}{a.color} {a.species}"
        action = POSE_PHRASES[a.pose]
    orders = (
        (subject, costume, action, place, facing),
        (subject, action, place, costume, facing),
        (subject, facing, action, costume, place),
        (place + ",", subject, action, facing, costume),
        (subject, action, facing, place, costume),
    )
    words = " ".join(part for part in orders[template % CAPTION_TEMPLATES] if part)
    return words.replace("a angry", "an angry").replace("a orange", "an orange")
