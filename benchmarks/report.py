"""What every benchmark does with its figures: one JSON file, one Markdown file, and the latter on the screen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def write_results(name: str, figures: dict[str, Any], lines: list[str]) -> None:
    """Write results/NAME.json and results/NAME.md, each whole or not at all, and print the lines."""
    RESULTS.mkdir(exist_ok=True)
    for suffix, text in ((".json", json.dumps(figures, indent=2)), (".md", "\n".join(lines))):
        temporary = RESULTS / f"{name}{suffix}.tmp"
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, RESULTS / f"{name}{suffix}")
    print("\n".join(lines))
