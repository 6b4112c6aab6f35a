"""Lets these tests import the models and the reference loops that they share."""

import sys
from pathlib import Path

import pytest
import torch

_ROOT = Path(__file__).resolve().parents[2]
for _folder in ("tests", "benchmarks"):
    if str(_ROOT / _folder) not in sys.path:
        sys.path.append(str(_ROOT / _folder))


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models are faster with one thread, many times so on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
