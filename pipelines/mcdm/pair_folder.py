"""A folder of pairs, the training data of an MCDM (Chen et al. 2024, section 3.2).

    pairs/                    the dataset
        dataset.json          how it was made; pairs of other settings are refused
        pairs/000000/         one pair: source.png, target.png, and pair.json that describes it
        index.jsonl           one line for each pair, in their order, with paths below the folder
        contact_sheet.jpg     the first pairs, to look at
        rejected/000007.json  a pair that did not pass the check, and why; it is not made again
        damaged/              pairs that could no longer be read, moved out of the way; they are made again

A pair is whole or absent: its folder is written under another name and renamed, and a folder that is there already is
never written over, so that several writers neither lose nor double one. The index is made of the pairs' own
descriptions and can be made again at any time.

`datasets` and the like write whole tables; what is needed here, single pairs that survive a killed process, is a
rename.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..shared.errors import IdentityEditError
from ..shared.files import ABANDONED_AFTER, atomic_write
from ..shared.images import from_pillow, open_image, to_pillow

SOURCE, TARGET, DESCRIPTION = "source.png", "target.png", "pair.json"
DATASET, INDEX, SHEET = "dataset.json", "index.jsonl", "contact_sheet.jpg"
_NAME = re.compile(r"\d{6,}")
_TEMPORARY = ".tmp"
_LONGEST_LABEL = 60
_MAY_DIFFER = ("count",)
"""Settings that change no pair: a dataset can be made longer."""


class PairFolder:
    """One dataset on disk; the folder is created when it is missing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with _writing(self.path):
            (self.path / "pairs").mkdir(parents=True, exist_ok=True)

    def claim(self, settings: dict[str, Any]) -> None:
        """Record the dataset's description, or check that the recorded one is the same.

        Raises:
            IdentityEditError: when the folder holds a dataset of other settings.
        """
        file = self.path / DATASET
        if file.exists():
            found = _read_json(file)
            differing = [
                name
                for name in sorted({*found, *settings} - set(_MAY_DIFFER))
                if found.get(name) != json.loads(json.dumps(settings.get(name)))
            ]
            if differing:
                raise IdentityEditError(
                    f"The folder {self.path} contains pairs generated with another {', '.join(differing)}; choose "
                    f"another folder, or the previous settings."
                )
        self._write(file, json.dumps(settings, indent=1, ensure_ascii=False).encode())

    def finished(self) -> dict[int, dict[str, Any]]:
        """The descriptions of all complete pairs by number; damaged ones are moved to `damaged`.

        Raises:
            IdentityEditError: when the folder cannot be read.
        """
        found = {}
        with _reading(self.path):
            entries = sorted((self.path / "pairs").iterdir())
        for entry in entries:
            if entry.name.endswith(_TEMPORARY):
                with suppress(FileNotFoundError):  # its process has just finished it
                    if time.time() - entry.stat().st_mtime > ABANDONED_AFTER:
                        shutil.rmtree(entry, ignore_errors=True)
            elif _NAME.fullmatch(entry.name):
                try:
                    found[int(entry.name)] = read_pair(entry)
                except IdentityEditError:
                    self._set_aside(entry)
        return found

    def rejected(self) -> dict[int, dict[str, Any]]:
        """The descriptions of pairs that failed the similarity check."""
        files = sorted((self.path / "rejected").glob("*.json"))
        return {int(file.stem): _read_json(file) for file in files if _NAME.fullmatch(file.stem)}

    def add(self, number: int, source: torch.Tensor, target: torch.Tensor, facts: dict[str, Any]) -> bool:
        """Write one pair.

        Args:
            number: the pair's.
            source, target: images [H, W, 3] in [0, 1].
            facts: what JSON can hold; the description of the pair.

        Returns:
            whether it was written; False when the pair is there already.

        Raises:
            IdentityEditError: when it cannot be written; nothing of it is left then.
        """
        files = {SOURCE: png(source), TARGET: png(target)}
        facts = {"number": number, **facts, "files": {name: _facts_of(data) for name, data in files.items()}}
        return self.adopt(number, {**files, DESCRIPTION: json.dumps(facts, indent=1, ensure_ascii=False).encode()})

    def adopt(self, number: int, files: dict[str, bytes]) -> bool:
        """Write one pair from its files' contents by name; see `add`."""
        final = self.path / "pairs" / f"{number:06}"
        if final.exists():
            return False
        temporary = final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}{_TEMPORARY}")
        try:
            with _writing(self.path):
                temporary.mkdir()
                for name, data in files.items():
                    (temporary / name).write_bytes(data)
                read_pair(temporary)
                try:
                    temporary.rename(final)
                except OSError:
                    if not final.exists():
                        raise
                    return False  # another process was faster
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return True

    def reject(self, number: int, facts: dict[str, Any]) -> None:
        """Record that a pair failed the similarity check."""
        file = self.path / "rejected" / f"{number:06}.json"
        self._write(file, json.dumps({"number": number, **facts}, indent=1, ensure_ascii=False).encode())

    def write_index(self) -> int:
        """Write the index of all pairs, completely or not at all, and return their number."""
        lines = []
        for number, facts in sorted(self.finished().items()):
            paths = {"source": f"pairs/{number:06}/{SOURCE}", "target": f"pairs/{number:06}/{TARGET}"}
            lines.append(json.dumps({**paths, **facts}, ensure_ascii=False))
        self._write(self.path / INDEX, "".join(line + "\n" for line in lines).encode("utf-8", "replace"))
        return len(lines)

    def contact_sheet(self, most: int = 24, columns: int = 4, height: int = 128) -> torch.Tensor | None:
        """Draw the first pairs with their edits into one image [1, H, W, 3], write it, and return it.

        None where there is no pair yet.
        """
        pairs = sorted(self.finished().items())[:most]
        if not pairs:
            return None
        sheet = _sheet([(self.path / "pairs" / f"{number:06}", facts) for number, facts in pairs], columns, height)
        buffer = io.BytesIO()
        sheet.save(buffer, "JPEG", quality=90)
        self._write(self.path / SHEET, buffer.getvalue())
        return from_pillow(sheet)[None]

    def _set_aside(self, entry: Path) -> None:
        place = self.path / "damaged" / f"{entry.name}.{uuid.uuid4().hex[:8]}"
        with _writing(self.path):
            place.parent.mkdir(exist_ok=True)
            entry.rename(place)

    def _write(self, file: Path, data: bytes) -> None:
        with _writing(self.path), atomic_write(str(file)) as temporary:
            Path(temporary).write_bytes(data)


def read_pair(folder: Path) -> dict[str, Any]:
    """The description of the pair in a folder, with both images checked against it.

    Raises:
        IdentityEditError: when a file is missing or is not what was written.
    """
    with _reading(folder):
        facts = _read_json(folder / DESCRIPTION)
        files = facts.get("files")
        for name in (SOURCE, TARGET):
            if not isinstance(files, dict) or files.get(name) != _facts_of((folder / name).read_bytes()):
                raise IdentityEditError(f"The image {folder / name} is damaged; delete the pair to generate it again.")
    return facts


def png(image: torch.Tensor) -> bytes:
    """An image [H, W, 3] in [0, 1] as a PNG file."""
    buffer = io.BytesIO()
    to_pillow(image).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def _sheet(pairs: Sequence[tuple[Path, dict[str, Any]]], columns: int, height: int) -> Any:
    from PIL import Image, ImageDraw

    line, gap = 14, 6
    tiles = []
    for folder, facts in pairs:
        halves = [open_image(folder / name, str(folder / name)).convert("RGB") for name in (SOURCE, TARGET)]
        width = max(1, round(height * halves[0].width / halves[0].height))
        tile = Image.new("RGB", (2 * width, height + line), "white")
        for place, half in enumerate(halves):
            tile.paste(half.resize((width, height), Image.Resampling.LANCZOS), (place * width, 0))
        label = " ".join(str(part) for part in (int(folder.name), facts.get("edit", ""), facts.get("split", "")))
        label = label.encode("utf-8", "replace").decode()[:_LONGEST_LABEL]
        ImageDraw.Draw(tile).text((2, height + 1), label, fill="black")
        tiles.append(tile)
    columns = min(columns, len(tiles))
    width = max(tile.width for tile in tiles)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + line + gap) - gap), "white")
    for place, tile in enumerate(tiles):
        row, column = divmod(place, columns)
        sheet.paste(tile, (column * (width + gap), row * (height + line + gap)))
    return sheet


def _facts_of(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _read_json(file: Path) -> dict[str, Any]:
    with _reading(file):
        found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise IdentityEditError(f"The file {file} describes no pairs; delete it.")
    return found


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise IdentityEditError(
            f"The folder {path} cannot be written to ({error.strerror or error}); free disk space or choose another "
            f"folder, and queue again: existing pairs are kept."
        ) from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, IdentityEditError):
            raise
        raise IdentityEditError(f"{path} cannot be read ({error}); delete it to make it again.") from error
