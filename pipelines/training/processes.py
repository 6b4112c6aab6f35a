"""Data-parallel training with Hugging Face accelerate, one process per accelerator.

accelerate starts the processes (`accelerate launch`), on one machine or several, and averages tensors over them. Its
`prepare` is not used, because it wraps a network, but inside ComfyUI it is ComfyUI that calls the network.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch

from ..shared.errors import IdentityEditError


class Processes(Protocol):
    """The processes of a training, one per accelerator.

    Attributes:
        count: number of processes.
        index: index of this one, from 0. The first writes files.
    """

    @property
    def count(self) -> int: ...

    @property
    def index(self) -> int: ...

    def mean(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The mean of each tensor over all processes, the same in every process."""
        ...

    def wait(self) -> None:
        """Wait until all processes have called this."""
        ...


class OneProcess:
    """A single process."""

    count = 1
    index = 0

    def mean(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return tensors

    def wait(self) -> None:
        return None


class AccelerateProcesses:
    """`Processes` of an `accelerate.Accelerator`."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    @property
    def count(self) -> int:
        return int(self._accelerator.num_processes)

    @property
    def index(self) -> int:
        return int(self._accelerator.process_index)

    def mean(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(self._accelerator.reduce(tensors, reduction="mean"))

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


def launched_processes() -> Processes:
    """The processes started by `accelerate launch`, or this one alone.

    Raises:
        IdentityEditError: when several processes were started but accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return OneProcess()
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise IdentityEditError(
            "Several processes were started but accelerate is not installed; run pip install accelerate, or start one "
            "process."
        ) from error
    return AccelerateProcesses(Accelerator())
