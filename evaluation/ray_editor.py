"""An editor in a process of its own, on this machine or another. Only the standard library is imported at first: in a
process that has just begun the pack has no name yet."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


class RayEditor:
    """An `Editor` for `ray_workers`."""

    def __init__(self, arguments: argparse.Namespace, size: int, pack: str | None) -> None:
        sys.path.insert(0, pack or str(Path.cwd()))
        importlib.import_module("benchmarks.harness").prepare()
        self.editing = importlib.import_module("identity_edit_pack.evaluation.editing")
        self.editor = self.editing.Editor(arguments, size)
        self.folder = tempfile.TemporaryDirectory(prefix="identity-edit-edits-")

    def process_id(self) -> int:
        return os.getpid()

    def make(self, sent: tuple[Any, dict[Path, bytes]]) -> Any:
        """The image of a task that comes with its files."""
        return self.editor.edit(self.editing.from_files(*sent, Path(self.folder.name)))

    def stop(self) -> None:
        self.folder.cleanup()
