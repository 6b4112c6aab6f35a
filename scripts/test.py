"""Runs every check of the repository: `python3 scripts/test.py [--fast] [--engine FOLDER] [options of pytest]`.

ruff, mypy, import-linter, then the whole test suite, on as many processes as there are cores (`-n 0`: in one), with its
slowest ten tests and what was skipped, and why. All run even when an early one fails. `--fast` leaves out the tests
that need a server or a browser, that try bad values by the hundred, or that took more than 0.3 seconds when durations
were recorded.

`--engine FOLDER` runs the test suite alone, on the ComfyUI in that folder, with an environment of its own below
.venv/engines; nothing is written into the folder.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import environment
from engine import cores, engine_in, find_engine, link, version_of
from environment import ENGINES, ROOT, VENV

PACKAGE = "identity_edit_pack"
SUITE = ["-m", "pytest", "--durations=10", "-rfEs", "-n", str(cores())]
FAST = ["-m", "not (engine or page or fuzz or slow or endurance)"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--fast", action="store_true", help="only the tests that take a moment, without a server")
    parser.add_argument("--engine", metavar="FOLDER", help="run the tests on the ComfyUI in this folder")
    arguments, of_pytest = parser.parse_known_args()
    of_pytest = [*(FAST if arguments.fast else []), *of_pytest]
    if arguments.engine:
        os.environ.pop("COMFYUI_PATH", None)  # what it needs would be installed into .venv
        environment.enter()
        return tests_on(arguments.engine, of_pytest)
    environment.enter()
    find_engine()
    return checks_and_tests(of_pytest)


def tests_on(chosen: str, of_pytest: list[str]) -> int:
    """The test suite on another ComfyUI."""
    engine = engine_in(chosen, "--engine")
    version = version_of(engine)
    python = environment.make_environment(engine, version)
    # Beside its environment Python may keep compiled files: the suite starts many servers.
    compiled = ENGINES / version / "compiled"
    variables = {**os.environ, "COMFYUI_PATH": str(engine), "PYTHONPYCACHEPREFIX": str(compiled)}
    print(f"\n== pytest on ComfyUI {version}", flush=True)
    return subprocess.run([str(python), *SUITE, *of_pytest], cwd=ROOT, env=variables).returncode


def checks_and_tests(of_pytest: list[str]) -> int:
    # ComfyUI names the pack after its folder, whatever that is called; the checkers see it under a fixed name.
    folder = VENV / "checked"
    link(ROOT, folder / PACKAGE)
    python = sys.executable
    checks = {
        "ruff": [python, "-m", "ruff", "check", "."],
        "mypy": [python, "-m", "mypy", "-p", PACKAGE],
        "import-linter": [python, "-c", "from importlinter.cli import lint_imports_command as run; run()"],
        "pytest": [python, *SUITE, *of_pytest],
    }
    path = os.pathsep.join(str(part) for part in (folder, ROOT / "scripts", ROOT / "tests"))
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
