"""Several processes that train together, one for each accelerator, started by Hugging Face accelerate.

accelerate finds out which accelerators there are, starts a process for each (`accelerate launch`), on one machine or on
several, and averages tensors over them with the backend that suits the hardware. Its `prepare` is not used: it wraps a
network and its optimizer, and a network inside ComfyUI is called by ComfyUI.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch

from ..shared.errors import IdentityEditError


class Processes(Protocol):
    """The processes that train together, one for each accelerator.

    Attributes:
        count: how many there are.
        index: which one this is, from 0. The first writes files.
    """

    @property
    def count(self) -> int: ...

    @property
    def index(self) -> int: ...

    def mean(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The mean over all processes of each tensor, the same in every process."""
        ...

    def wait(self) -> None:
        """Return when all processes have come here."""
        ...


class OneProcess:
    """This process alone."""

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
    """The processes that `accelerate launch` has started, or this one alone.

    Raises:
        IdentityEditError: when several processes were started and accelerate is not there.
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
