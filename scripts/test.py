"""Runs every check of the repository: `python3 scripts/test.py [options of pytest]`.

ruff, mypy, import-linter, then the whole test suite with its slowest ten tests. All run even when an early one fails.
"""

from __future__ import annotations

import os
import subprocess
import sys

import environment
from engine import find_engine, link
from environment import ROOT, VENV

PACKAGE = "identity_edit_pack"


def main() -> int:
    environment.enter()
    find_engine()
    # ComfyUI names the pack after its folder, whatever that is called; the checkers see it under a fixed name.
    folder = VENV / "checked"
    link(ROOT, folder / PACKAGE)
    python = sys.executable
    checks = {
        "ruff": [python, "-m", "ruff", "check", "."],
        "mypy": [python, "-m", "mypy", "-p", PACKAGE],
        "import-linter": [python, "-c", "from importlinter.cli import lint_imports_command as run; run()"],
        "pytest": [python, "-m", "pytest", "--durations=10", *sys.argv[1:]],
    }
    path = os.pathsep.join(str(part) for part in (folder, ROOT / "scripts", ROOT / "tests", ROOT / "benchmarks"))
    failed = []
    for name, command in checks.items():
        print(f"\n== {name}", flush=True)
        variables = dict(os.environ)
        if name != "pytest":
            variables |= {"PYTHONPATH": str(folder), "MYPYPATH": path}
        if subprocess.run(command, cwd=ROOT, env=variables).returncode:
            failed.append(name)
    if failed:
        print(f"\nFailed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except environment.ScriptError as error:
        sys.exit(f"error: {error}")
