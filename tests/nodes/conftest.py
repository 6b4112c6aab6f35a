"""Keeps these tests quick."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models are faster with one thread, many times so on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
