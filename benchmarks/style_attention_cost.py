"""What style cross-attention costs while sampling: `python -m benchmarks style_attention_cost`.

Guided model calls (both sides, one image) of a Stable Diffusion UNet of full width with random weights, as a
stock sampler makes them: plain, with one person's style attention, with the parallel kind, and with two people who
have style attentions and masks of their own, in turn in one process. Given are medians of the seconds of an
evaluation, their ratio to plain sampling's in the same round, and the highest memory use of a process that does one of
them alone. On a GPU in float16, on the CPU in float32.
Writes benchmarks/results/style_attention_cost_WIDTH_DEVICE.json and .md for each width.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from identity_edit_pack.attention.style_cross_attention import PARALLEL, SEQUENTIAL, layer_sizes, text_layers
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.pidiff.style_attention import (
    ROW_GROUPS,
    StyleAttention,
    StyleNetwork,
    apply_style_attention,
    parse_row_groups,
)
from identity_edit_pack.pipelines.pidiff.w_plus import WPlus

from . import attention_capture as cost

PLAIN, ONE, PARALLEL_ONE, TWO = VARIANTS = (
    "plain sampling",
    "style cross-attention",
    "parallel attention",
    "two people with masks",
)
GOALS = {"cpu": 1.05, "cuda": 1.03}
"""Seconds of an evaluation with one person's style cross-attention, relative to plain."""
ROWS, WIDTH = 18, 512
"""Of e4e's styles."""


def style_attention(model: Any, kind: str, seed: int) -> StyleAttention:
    """A style attention as a training begins it: projections copied from the text's, a random mapping network."""
    layers = text_layers(model.get_model_object("diffusion_model"))
    with torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(seed)
        groups = parse_row_groups(ROW_GROUPS, ROWS)
        network = StyleNetwork(groups, WIDTH, engine.require(model).text_width, layer_sizes(layers))
        for key, layer in layers.items():
            for part in ("to_q", "to_k", "to_v"):
                getattr(network.attention[key], part).weight.copy_(getattr(layer.block.attn2, part).weight)
    network.requires_grad_(False)
    return StyleAttention(network, kind, ROWS, WIDTH, engine.require(model).text_width, "random")


def styles(seed: int) -> WPlus:
    generator = torch.Generator().manual_seed(seed)
    return WPlus(torch.randn(1, ROWS, WIDTH, generator=generator), torch.zeros(ROWS, WIDTH), "random")


def prepared(model: Any, width: str, variant: str, trained: dict[tuple[str, int], StyleAttention]) -> Any:
    """The model of a variant; style attentions are made once."""

    def of(kind: str, seed: int) -> StyleAttention:
        if (kind, seed) not in trained:
            trained[kind, seed] = style_attention(model, kind, seed)
        return trained[kind, seed]

    if variant == PLAIN:
        return model
    if variant != TWO:
        return apply_style_attention(model, of(PARALLEL if variant == PARALLEL_ONE else SEQUENTIAL, 1), styles(1))
    left = torch.zeros(1, 64, 64)
    left[:, :, :32] = 1.0
    first = apply_style_attention(model, of(SEQUENTIAL, 1), styles(1), mask=left)
    return apply_style_attention(first, of(SEQUENTIAL, 2), styles(2), mask=1.0 - left)


OPTIONS = cost.cost_options(VARIANTS, ["sd15"])


def alone(arguments: argparse.Namespace) -> dict[str, Any]:
    return cost.sampled_alone(partial(prepared, trained={}), arguments)


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for width in arguments.width:
        trained: dict[tuple[str, int], StyleAttention] = {}
        prepare = partial(prepared, trained=trained)
        figures = cost.compare("style_attention_cost", width, VARIANTS, prepare, arguments)
        weights = trained[SEQUENTIAL, 1].network.attention.parameters() if trained else ()
        yield figures | {"million_weights": sum(parameter.numel() for parameter in weights) / 1e6}


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    most = GOALS.get(cost.device_type(), GOALS["cpu"])
    about = f"{figures['million_weights']:.1f} million weights in one style cross-attention, "
    goal = (
        f"The goal, at most {most:g} of plain sampling's time with one person, is "
        f"{cost.reached(figures['relative'][ONE] <= most)}."
    )
    return cost.cost_table(figures, arguments, "Style cross-attention", about, goal)
