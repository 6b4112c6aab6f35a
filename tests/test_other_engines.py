"""The test suite on another ComfyUI: `scripts/test.py --engine FOLDER`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import environment
import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_scripts_stay_in_the_environment_of_another_comfyui(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that a test starts there installs nothing into .venv and does not go on in it."""

    def fails(*_: object) -> None:
        raise AssertionError("it left the environment")

    monkeypatch.setattr(environment, "_install", fails)
    monkeypatch.setattr(environment.os, "execv", fails)
    monkeypatch.setattr(environment, "_fingerprint", lambda: "what another ComfyUI needs")
    monkeypatch.setattr(sys, "prefix", str(environment.ENGINES / "0.0.0"))
    environment.enter()
    monkeypatch.setattr(sys, "prefix", str(environment.VENV.parent))
    with pytest.raises(AssertionError, match="left"):
        environment.enter()


def test_a_folder_without_a_comfyui_is_named(tmp_path: Path) -> None:
    code = "import environment, runpy; environment.enter = lambda: None; runpy.run_path('test.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, "--engine", str(tmp_path), "-k", "inversion"],
        cwd=ROOT / "scripts",
        capture_output=True,
        text=True,
    )
    expected = f"error: --engine is '{tmp_path}', which holds no ComfyUI: it has no main.py and comfy/."
    assert done.returncode == 1 and done.stderr.strip() == expected
