"""How much memory a piece of work needs on top of what was there before it, and a process as a whole."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import threading
from types import TracebackType
from typing import Any

import psutil
import torch

from .harness import ROOT, command_of

INTERVAL_SECONDS = 0.002


def synchronize() -> None:
    """Wait until a GPU has done what it was asked to, before a clock is read."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class PeakMemory:
    """`with PeakMemory() as peak: work()`; afterwards `peak.mib` is the highest memory during the work above that
    before it: of the GPU's allocator where there is one, else the process's resident memory, looked at every 2 ms."""

    def __enter__(self) -> PeakMemory:
        self.mib = 0.0
        self._cuda = torch.cuda.is_available()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        self._process = psutil.Process()
        self._before = self._highest = self._process.memory_info().rss
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL_SECONDS):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            highest = torch.cuda.max_memory_allocated()
        else:
            self._done.set()
            self._watcher.join()
            highest = self._highest
        self.mib = (highest - self._before) / 2**20


def highest_of_this_process() -> int:
    """The highest memory of this process since its start, with all that it has loaded, in MiB: of the GPU's allocator
    where there is one, else the process's resident memory."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    if os.name == "nt":
        return round(psutil.Process().memory_info().peak_wset / 2**20)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def in_a_process(name: str, only: str, arguments: argparse.Namespace, *options: str) -> dict[str, Any]:
    """What a benchmark prints as JSON in its last line when it measures one thing alone, in a process of its own.

    Args:
        name: the benchmark's.
        only: what it measures, its option --only.
        arguments: the caller's own; steps, threads, checkpoint, seed and layers are passed on where there are any.
        options: further ones, which come last and so count.
    """
    command = [*command_of(name), "--only", only]
    for option in ("steps", "threads", "checkpoint", "seed", "layers"):
        if hasattr(arguments, option):
            command += [f"--{option}", str(getattr(arguments, option))]
    done = subprocess.run([*command, *options], check=True, capture_output=True, text=True, cwd=ROOT)
    return dict(json.loads(done.stdout.splitlines()[-1]))
