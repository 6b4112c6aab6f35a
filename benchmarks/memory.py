"""How much memory a piece of work needs on top of what was there before it."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil
import torch

INTERVAL_SECONDS = 0.002


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
