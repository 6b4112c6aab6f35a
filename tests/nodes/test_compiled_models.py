"""Models behind the stock Torch Compile Model: the pack's patches meet a network that torch.compile has traced.

The tracing is what a patch can break or be lost in; what a backend makes of the traced graphs is PyTorch's. So the
backend here counts the graphs and runs them as they are, which takes seconds where a C++ compiler takes minutes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from identity_edit_pack.tests.nodes.good_inputs import World, good, world_in
from identity_edit_pack.tests.nodes.test_bad_inputs import run, tensors_in

pytestmark = pytest.mark.slow

NODES = ("PromptToPrompt", "ApplyStyleCrossAttention", "NullTextOptimization")
"""One that exchanges attention, one that adds layers, one that needs gradients."""


class CompiledWorld(World):
    """Its model is compiled, as Torch Compile Model does it; `graphs` counts what was traced."""

    def __init__(self) -> None:
        self.graphs = 0

    @functools.cached_property
    def model(self) -> Any:
        model = super().model.clone()
        set_torch_compile_wrapper(model=model, backend=self.backend)
        return model

    def backend(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("name", NODES)
def test_a_compiled_model_gives_what_it_gives_otherwise(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    world_in(tmp_path, monkeypatch)
    plain, compiled = World(), CompiledWorld()
    expected = list(tensors_in(run(name, good(plain, name), plain)))
    found = list(tensors_in(run(name, good(compiled, name), compiled)))
    assert compiled.graphs > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
