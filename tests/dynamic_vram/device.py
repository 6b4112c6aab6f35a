"""A second device in host memory: device.cpp compiled, loaded and known to torch as "hostgpu:0".

It is there for the rest of the process, so only a process of its own loads it (worker.py).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from environment import VENV

SOURCE = Path(__file__).with_name("device.cpp")
CACHE = VENV / "dynamic_vram"
NAME = "hostgpu"


def reason_for_none() -> str | None:
    """Why the device cannot be had here, or None."""
    if sys.platform != "linux":
        return "the device in host memory is compiled on Linux only"
    if shutil.which("g++") is None:
        return "there is no g++ to compile the device in host memory with"
    return None


def library() -> Path:
    """The compiled device for this source and this torch; compiled when it is not there, in about a minute."""
    state = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()
    path = CACHE / f"device_{state[:16]}.so"
    if path.is_file():
        return path
    from torch.utils.cpp_extension import include_paths, library_paths

    CACHE.mkdir(parents=True, exist_ok=True)
    # Beside the place and renamed: two test runs may compile it at the same time.
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        made = Path(folder) / path.name
        # Not optimized: it hands everything on, and compiles in half the time.
        command = ["g++", "-std=c++20", "-O0", "-fPIC", "-shared", str(SOURCE), "-o", str(made)]
        command += [f"-isystem{include}" for include in include_paths()]
        command += [f"-L{folder}" for folder in library_paths()]
        done = subprocess.run([*command, "-lc10", "-ltorch_cpu", "-ltorch"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"g++ could not compile {SOURCE.name}:\n{done.stderr[-3000:]}")
        os.replace(made, path)
    return path


class _Module:
    """torch.hostgpu, what torch asks a device's Python side."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        pass


def load() -> torch.device:
    """Load the device into this process."""
    torch.utils.rename_privateuse1_backend(NAME)
    torch.ops.load_library(str(library()))
    torch._register_device_module(NAME, _Module())
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    return torch.device(NAME, 0)
