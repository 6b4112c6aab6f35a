"""Puts results of shipped workflows side by side for the README: `.venv/bin/python scripts/results_image.py`.

Its argument is the folder where `scripts/demo.py` saved these workflows (default: demo_output).
Writes images/results.jpg.
"""

from __future__ import annotations

import sys
from pathlib import Path

from environment import ROOT
from PIL import Image, ImageDraw, ImageFont

ROWS: list[list[tuple[str, list[str]]]] = [
    [
        ("a standing cat, jumping", ["lipe_edit/40_source.png", "lipe_edit/41_edited.png"]),
        ("a calm face, laughing", ["mcdm_edit/15_save_source.png", "mcdm_edit/16_save_edit.png"]),
    ],
    [
        (
            "a learned cat, in a new scene",
            ["hifi_generate/34_aligned_reference.png", "hifi_generate/35_second_pass_image.png"],
        ),
        ("two people in one image", ["pidiff_two_people/23_save_image.png"]),
    ],
]
"""By row, a caption and the images above it."""
SIDE, GAP, CAPTION = 224, 12, 34


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "demo_output"
    font = ImageFont.load_default(size=17)
    page = Image.new("RGB", (4 * SIDE + 3 * GAP, len(ROWS) * (SIDE + CAPTION)), "white")
    draw = ImageDraw.Draw(page)
    for row, groups in enumerate(ROWS):
        left, top = 0, row * (SIDE + CAPTION)
        for caption, names in groups:
            draw.text((left, top + SIDE + 6), caption, fill="black", font=font)
            for name in names:
                image = Image.open(folder / name).convert("RGB")
                width = SIDE * image.width // image.height
                page.paste(image.resize((width, SIDE), Image.Resampling.LANCZOS), (left, top))
                left += width + GAP
    page.save(ROOT / "images" / "results.jpg", quality=92)


if __name__ == "__main__":
    main()
