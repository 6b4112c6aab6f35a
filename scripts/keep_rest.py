"""Keep the Rest for folders: originals and their edits by name, without a server.

    python scripts/keep_rest.py --originals photos --edits edited --output kept

An edit belongs to the original of the same name; of several edits of photo.png, the names begin with it: photo.png,
photo_2.png, photo-hat.webp. Results are PNG files of the edits' names, with a table of all figures in report.csv.
To be run by the Python that ComfyUI runs in.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import torch
from user_comfyui import ScriptError, name_pack


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--originals", type=Path, required=True, help="folder of the images before the edit")
    parser.add_argument("--edits", type=Path, required=True, help="folder of the edited images")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--balance", type=float, default=0.0, help="-2 keeps more of the original, 2 more of the edit")
    parser.add_argument("--comparisons", action="store_true", help="also write comparison sheets")
    return parser.parse_args()


def original_of(edit: Path, originals: dict[str, Path]) -> Path | None:
    """The original with the longest name that the edit's name begins with."""
    names = [name for name in originals if edit.stem == name or edit.stem.startswith((f"{name}_", f"{name}-"))]
    return originals[max(names, key=len)] if names else None


def main() -> None:
    arguments = parse_arguments()
    name_pack()
    from identity_edit_pack.pipelines.keep_rest import keep, pictures
    from identity_edit_pack.pipelines.keep_rest.registration import register
    from identity_edit_pack.pipelines.keep_rest.transform import moved_back
    from identity_edit_pack.pipelines.shared.images import image_formats, read_image
    from PIL import Image
    from tqdm import tqdm

    for folder in (arguments.originals, arguments.edits):
        if not folder.is_dir():
            raise ScriptError(f"{folder} is not a folder; name one with images.")
    known = image_formats()
    originals = {path.stem: path for path in arguments.originals.iterdir() if path.suffix.lower() in known}
    edits = [path for path in sorted(arguments.edits.iterdir()) if path.suffix.lower() in known]
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for path in tqdm(edits, unit="edit"):
        source = original_of(path, originals)
        if source is None:
            rows.append({"edit": path.name, "note": "no original of this name"})
            continue
        original, edited = (read_image(each, each.name)[0] for each in (source, path))
        found = register(original, edited)
        row = {"edit": path.name, "original": source.name, "transform": str(found.transform), "note": found.fault or ""}
        rows.append(row)
        if found.fault:
            save(Image.open(path), arguments.output / f"{path.stem}.png")
            continue
        registered, _ = moved_back(found.transform, original, edited)
        kept = keep.keep_rest(original, registered, balance=arguments.balance)
        row |= {name: f"{getattr(kept, name):.4f}" for name in ("changed", "cast", "psnr", "ssim", "noise")}
        row["note"] = kept.warning or ""
        save(picture(kept.image), arguments.output / f"{path.stem}.png")
        if arguments.comparisons:
            sheet = pictures.sheet(original, registered, kept.image, kept.mask)
            save(picture(sheet), arguments.output / f"{path.stem}_comparison.png")
    columns = ["edit", "original", "transform", "changed", "cast", "psnr", "ssim", "noise", "note"]
    with open(arguments.output / "report.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(edits)} edits; the table is {arguments.output / 'report.csv'}.")


def picture(image: torch.Tensor) -> Any:
    """A Pillow image of an image [H, W, 3 or 4], 0 to 1, with its alpha."""
    from PIL import Image

    return Image.fromarray((image.clamp(0.0, 1.0) * 255.0).round().byte().numpy())


def save(image: Any, path: Path) -> None:
    """Write the whole PNG file or nothing."""
    from identity_edit_pack.pipelines.shared.files import atomic_write

    with atomic_write(str(path)) as temporary:
        image.save(temporary, format="PNG")


if __name__ == "__main__":
    try:
        main()
    except ScriptError as error:
        sys.exit(f"error: {error}")
