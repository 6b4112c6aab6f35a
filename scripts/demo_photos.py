"""Photos of the demo world for the workflows that begin with the user's own: `python3 scripts/demo_photos.py [FOLDER]`.

Draws them into ComfyUI's input folder, by default that of `demo.py --serve`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import environment

SIDE, MARGIN = 320, 48
"""Height of a photo, and what it is wider at each side, in pixels: neither square nor the checkpoint's size."""

CAT = dict(species="cat", color="green", pattern="striped")
CATS = (
    dict(pose="standing", facing="left", place="grass"),
    dict(pose="sitting", facing="left", expression="smiling", place="room"),
    dict(pose="lying", facing="right", place="snow"),
    dict(pose="jumping", facing="right", expression="angry", place="night"),
)
WOMAN = dict(
    framing="portrait", species="person", hair_color="red", hair_style="long", eye_color="brown", skin="tan",
    face_shape="round",
)  # fmt: skip
PORTRAITS = (
    dict(facing="left", place="grass"),
    dict(facing="right", expression="smiling", place="room"),
    dict(facing="left", expression="smiling", place="snow"),
    dict(facing="right", place="beach"),
    dict(facing="left", expression="angry", place="night"),
    dict(facing="right", place="snow"),
)


def draw_photos(folder: Path) -> None:
    """Write the photos, with caption files, into `folder`, an input folder."""
    import random

    import numpy as np
    from PIL import Image

    sys.path.insert(0, str(environment.ROOT))
    world = import_module("demo_world.attributes")
    draw_pose, render = import_module("demo_world.pose").draw_pose, import_module("demo_world.renderer").render
    Attributes, who = world.Attributes, world.description(world.Attributes(**WOMAN))

    def save(pixels: Any, path: Path, text: str | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        square = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        wide = np.pad(np.asarray(square), ((0, 0), (MARGIN, MARGIN), (0, 0)), mode="reflect")
        Image.fromarray(wide).save(path, quality=95)
        if text is not None:
            path.with_suffix(".txt").write_text(text, encoding="utf-8")

    def photo(path: Path, attributes: Any, seed: int, words: str = "", subject: str = "") -> None:
        text = world.caption(attributes).replace(words, subject)
        save(render(attributes, seed)[0], path, text if subject else None)

    for number, attributes in enumerate(CATS, start=1):
        photo(
            folder / f"my_subject/{number}.jpg",
            Attributes(**CAT, **attributes),
            20 + number,
            "striped green cat",
            "cat",
        )
    test = Attributes(**CAT, pose="standing", facing="right", place="beach")
    photo(folder / "my_subject/test/test.png", test, 31, "striped green cat", "cat")
    for number, attributes in enumerate(PORTRAITS, start=1):
        path = folder / f"my_person/{number}.jpg"
        photo(path, Attributes(**WOMAN, **attributes), 30 + number, who, "person")
    photo(folder / "photo.png", Attributes(place="grass", facing="right"), 5)
    # The photo as an image editor returns it: a crown, other colors, zoomed, shifted and softened.
    photo(folder / "edited.png", Attributes(place="grass", facing="right", costume="crown"), 5)
    drawn = Image.open(folder / "edited.png")
    width, height = drawn.size
    moved = drawn.resize((width, height), Image.Resampling.BICUBIC, box=(6, 4, width - 3, height - 6))
    cast = np.asarray(moved) * (0.95, 1.0, 0.92) + 5.0
    Image.fromarray(cast.clip(0, 255).astype(np.uint8)).save(folder / "edited.png")
    photo(folder / "portrait.png", Attributes(**WOMAN, facing="right", place="beach"), 3)
    generator = random.Random("demo photos")
    for number in range(1, 9):
        person = world.random_attributes(generator, "portrait").replace(expression="neutral", costume="none")
        photo(folder / f"my_portraits/{number}.jpg", person, number, world.description(person), "person")
        save(draw_pose(person, number), folder / f"my_poses/{number}.png")


def main() -> None:
    environment.enter()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else environment.VENV / "comfyui-base" / "input"
    draw_photos(folder)
    print(folder)


if __name__ == "__main__":
    try:
        main()
    except environment.ScriptError as error:
        sys.exit(f"error: {error}")
