"""Gradients in a real ComfyUI, where prompts run in inference mode: by every attention function, with and without
checkpointing, on a model that carries the patches of other nodes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np

from .test_timestep_aware_edit import (
    Prompt,
    inversion_prompt,
    node,
    shown,
    text_optimization,
    with_image,
    with_null_text,
    with_sampler_node,
)

if TYPE_CHECKING:
    from identity_edit_pack.tests.conftest import RunningServer


def optimizing_prompt(checkpointing: bool) -> Prompt:
    """Both optimizations on a model that a stock node (FreeU) has patched."""
    prompt = with_null_text(inversion_prompt(), inner_steps=2)
    prompt["freeu"] = node("FreeU_V2", model=["model", 0], b1=1.1, b2=1.2, s1=0.9, s2=0.4)
    prompt["optimized"] = text_optimization(
        model=["freeu", 0], steps=3, learning_rate=0.05, checkpointing=checkpointing
    )
    prompt["null_text"]["inputs"] |= {"model": ["freeu", 0], "checkpointing": checkpointing}
    prompt["inversion"]["inputs"]["model"] = ["freeu", 0]
    with_sampler_node(prompt, ["null_text", 2])
    prompt["edited"]["inputs"] |= {"model": ["freeu", 0], "optimized": ["optimized", 0], "eta": 0.3}
    return with_image(prompt, "null_text", output=3)


def test_optimization_by_every_attention_function(server: RunningServer, server_by_attention: RunningServer) -> None:
    usual, with_checkpointing = (optimizing_prompt(checkpointing) for checkpointing in (False, True))
    edited, reconstruction = shown(server, usual, "edited"), shown(server, usual, "null_text")
    for another, prompt in (
        (server, with_checkpointing), (server_by_attention, usual), (server_by_attention, with_checkpointing)
    ):  # fmt: skip
        assert np.abs(shown(another, prompt, "edited") - edited).max() <= 3
        assert np.abs(shown(another, prompt, "null_text") - reconstruction).max() <= 3
    without = copy.deepcopy(usual)
    without["null_text"]["inputs"]["method"] = "negative-prompt inversion (fast)"
    assert np.abs(shown(server, without, "edited") - edited).max() > 3, "the optimization has no effect"
