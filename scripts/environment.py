"""Making `.venv`, once, and continuing in it. Standard library only.

`.venv/installed.json` records a hash of the requirement lists: while it fits, nothing is installed again. Other
versions of ComfyUI have environments of their own below `.venv/engines`, on top of `.venv`'s packages.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from user_comfyui import ScriptError

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
ENGINES = VENV / "engines"

MINIMUM_PYTHON = (3, 10)
TORCH = "torch==2.13.0"
TORCHVISION = "torchvision==0.28.0"
LISTS = (ROOT / "scripts" / "requirements.txt", ROOT / "requirements.txt")
STAMP = VENV / "installed.json"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def enter() -> None:
    """Return when this process runs in a complete `.venv`; otherwise make it and start this command again in it.

    In an environment of another ComfyUI (`make_environment`), which is complete from the start, it returns at once.
    """
    if sys.version_info < MINIMUM_PYTHON:
        raise ScriptError(f"Python {sys.version.split()[0]} is too old: python3 3.10 or newer is needed.")
    if ENGINES.resolve() in Path(sys.prefix).resolve().parents:
        return
    wanted = _fingerprint()
    if _read_stamp().get("fingerprint") != wanted or not PYTHON.exists():
        _install(wanted)
    if Path(sys.prefix).resolve() == VENV.resolve():
        return
    command = [str(PYTHON), *sys.argv]
    if os.name == "nt":  # there, exec would hand the terminal back before the new process has finished
        sys.exit(subprocess.run(command).returncode)
    sys.stdout.flush()
    os.execv(command[0], command)


def torchvision_operators_load() -> bool:
    """Whether torchvision's compiled operators fit the installed torch, as found when `.venv` was made."""
    return bool(_read_stamp().get("torchvision_operators", True))


def _read_stamp() -> dict:
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def _engine_requirements() -> list[str]:
    """What a ComfyUI named by COMFYUI_PATH asks for beyond torch, which stays the one of `.venv`."""
    path = os.environ.get("COMFYUI_PATH")
    return requirements_beyond_torch(Path(path).expanduser()) if path else []


def requirements_beyond_torch(engine: Path) -> list[str]:
    """The lines of a ComfyUI's requirements.txt but for torch, torchvision and torchaudio; none without the file."""
    try:
        lines = (engine / "requirements.txt").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    lines = [line.split("#")[0].strip() for line in lines]
    return [line for line in lines if line and not line.startswith(("torch", "-")) or line.startswith("torchsde")]


def make_environment(engine: Path, version: str) -> Path:
    """The Python of an environment with what another ComfyUI needs: its own packages first, then those of `.venv`.

    Call it from `.venv`, with whose torch the ComfyUI runs. Nothing is installed into `.venv` and nothing is written
    into the ComfyUI; an environment that is there already is used again.

    Args:
        engine: the ComfyUI's folder.
        version: its version, which names the environment.
    """
    place = ENGINES / version
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = place / "installed.json"
    wanted = requirements_beyond_torch(engine)
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return python
    print(f"Making an environment for ComfyUI {version} ...", flush=True)
    venv.create(place, with_pip=True, clear=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    # pip sees the packages below as installed, so that it adds only what is missing or of another version.
    (packages / "packages_below.pth").write_text(sysconfig.get_path("purelib") + "\n")
    constraints = place / "constraints.txt"
    constraints.write_text(f"{TORCH}\n{TORCHVISION}\ntransformers<5\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for arguments in (["--constraint", str(constraints), *wanted], ["--no-deps", "torchaudio"]):
        if subprocess.run([*pip, *arguments]).returncode:
            raise ScriptError(f"pip could not install what ComfyUI {version} needs: its own message is above.")
    if subprocess.run([str(python), "-c", "import torchaudio"], capture_output=True).returncode:
        # Made for another torch. ComfyUI imports it at its start; without the compiled part the Python part loads.
        for library in (packages / "torchaudio" / "lib").glob("_torchaudio*"):
            library.unlink()
    stamp.write_text(json.dumps(wanted))
    return python


def _fingerprint() -> str:
    parts = [TORCH, TORCHVISION, *_engine_requirements(), *(path.read_text() for path in LISTS)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _pip(*arguments: str) -> None:
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.run(command).returncode:
        raise ScriptError(f"pip could not install {' '.join(arguments)}: its own message is above.")


def _install(fingerprint: str) -> None:
    STAMP.unlink(missing_ok=True)
    if not _python_runs():
        print("Making .venv ...", flush=True)
        shutil.rmtree(VENV, ignore_errors=True)
        if subprocess.run([sys.executable, "-m", "venv", str(VENV)]).returncode:
            raise ScriptError("Python made no .venv: install its venv module (Debian: apt install python3-venv).")
    print("Installing torch and the other packages into .venv (several minutes, once) ...", flush=True)
    _pip(TORCH)
    # Without its dependencies: it would ask for the CUDA build of torch that it was made with.
    _pip("--no-deps", TORCHVISION)
    constraints = VENV / "constraints.txt"
    constraints.write_text(f"{TORCH}\n{TORCHVISION}\n")
    lists = [argument for path in LISTS for argument in ("-r", str(path))]
    _pip("--constraint", str(constraints), *lists)
    engine_requirements = _engine_requirements()
    if engine_requirements:
        _pip("--constraint", str(constraints), *engine_requirements)
    probe = subprocess.run([str(PYTHON), "-c", "import torch, torchvision"], capture_output=True)
    stamp = {"fingerprint": fingerprint, "torchvision_operators": probe.returncode == 0}
    temporary = STAMP.with_suffix(".tmp")
    temporary.write_text(json.dumps(stamp))
    os.replace(temporary, STAMP)


def _python_runs() -> bool:
    """Whether `.venv` holds a working Python of the version that made the call, with pip."""
    if not PYTHON.exists():
        return False
    check = f"import pip, sys; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])})"
    return subprocess.run([str(PYTHON), "-c", check], capture_output=True).returncode == 0
