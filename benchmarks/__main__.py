"""`python -m benchmarks NAME [options]` runs benchmarks/NAME.py; without a name it lists them."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def benchmarks() -> dict[str, str]:
    """The benchmarks by name, those with a command of their own, and what they say they do."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if path.stem != "__main__" and 'if __name__ == "__main__":' in source:
            found[path.stem] = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
    return found


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    known = benchmarks()
    if name not in known:
        lines = "\n".join(f"  {each}: {does}" for each, does in known.items())
        sys.exit(f"usage: python -m benchmarks NAME [options]\n{lines}")
    path = FOLDER / f"{name}.py"
    sys.argv = [str(path), *sys.argv[2:]]
    sys.path.insert(0, str(FOLDER))
    runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    main()
