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
from identity_edit_pack.tests import tiny_models
from identity_edit_pack.tests.nodes.good_inputs import World, good, world_in
from identity_edit_pack.tests.nodes.test_bad_inputs import run, tensors_in

pytestmark = pytest.mark.slow

NODES = ("PromptToPrompt", "ApplyStyleCrossAttention", "NullTextOptimization")
"""One that exchanges attention, one that adds layers, one that needs gradients."""


RECOMPILATIONS = 2
"""PyTorch gives up after eight, and then runs a network as it is."""


class SmallWorld(World):
    """Its model has one resolution, as tracing takes as long as a network has layers."""

    @functools.cached_property
    def model(self) -> Any:
        one_level = {"channel_mult": [1], "num_res_blocks": [1], "transformer_depth": [1]}
        return tiny_models.sd1(output_gain=0.1, **one_level, transformer_depth_output=[1, 1])


@pytest.mark.parametrize("name", NODES)
def test_a_compiled_model_gives_what_it_gives_otherwise(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    world_in(tmp_path, monkeypatch)
    world = SmallWorld()
    inputs = good(world, name)
    expected = list(tensors_in(run(name, inputs, world)))
    compiled = inputs["model"].clone()
    set_torch_compile_wrapper(model=compiled, backend=backend)  # as Torch Compile Model does it
    with torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS):
        found = list(tensors_in(run(name, {**inputs, "model": compiled}, world)))
    assert graphs
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
