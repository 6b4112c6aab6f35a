"""Draws the images that the registry shows of the pack: `.venv/bin/python scripts/registry_images.py`.

images/icon.png, 384x384, one portrait; images/banner.png, 1344x576 (21:9), a cat, a dog and a person, each of them the
same in every column.
"""

from __future__ import annotations

from typing import Any

from PIL import Image
from user_comfyui import PACK, name_pack

ICON: dict[str, Any] = dict(framing="portrait", hair_color="red", hair_style="long", eye_color="green", place="beach")
FIGURES: list[dict[str, Any]] = [dict(species="cat", color="orange"), dict(species="dog", color="brown")]
EDITS: list[dict[str, Any]] = [
    *(dict(pose="standing"), dict(pose="jumping"), dict(pose="sitting"), dict(expression="smiling")),
    *(dict(costume="santa hat"), dict(place="beach"), dict(facing="left")),
]
EXPRESSIONS: list[dict[str, Any]] = [
    *(dict(), dict(expression="smiling"), dict(expression="angry"), dict(expression="crying")),
    *(dict(costume="santa hat"), dict(costume="crown"), dict(facing="left")),
]
CELL = 192


def drawn(size: int, **attributes: Any) -> Image.Image:
    from identity_edit_pack.demo_world.attributes import Attributes
    from identity_edit_pack.demo_world.renderer import render

    image, _ = render(Attributes(**attributes), seed=5)
    return Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)


def main() -> None:
    name_pack()
    folder = PACK / "images"
    folder.mkdir(exist_ok=True)
    drawn(384, expression="smiling", **ICON).save(folder / "icon.png", optimize=True)
    rows = [[figure | edit for edit in EDITS] for figure in FIGURES] + [[ICON | change for change in EXPRESSIONS]]
    banner = Image.new("RGB", (CELL * len(EDITS), CELL * len(rows)))
    for row, images in enumerate(rows):
        for column, attributes in enumerate(images):
            banner.paste(drawn(CELL, **attributes), (column * CELL, row * CELL))
    banner.save(folder / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
