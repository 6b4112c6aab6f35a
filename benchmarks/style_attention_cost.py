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
import json
import statistics
import time
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from identity_edit_pack.attention.style_cross_attention import (
    PARALLEL,
    SEQUENTIAL,
    layer_sizes,
    text_layers,
)
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.pidiff.style_attention import (
    ROW_GROUPS,
    StyleAttention,
    StyleNetwork,
    apply_style_attention,
    parse_row_groups,
)
from identity_edit_pack.pipelines.pidiff.w_plus import WPlus
from tqdm import tqdm

from . import memory
from .attention_capture import WIDTHS, conditioning, device_type, image_size, load
from .harness import made_by, write_results

PLAIN, ONE, PARALLEL_ONE, TWO = (
    "plain sampling",
    "style cross-attention",
    "parallel attention",
    "two people with masks",
)
VARIANTS = (PLAIN, ONE, PARALLEL_ONE, TWO)
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
        network = StyleNetwork(groups, WIDTH, engine.context_channels(model), layer_sizes(layers))
        for key, layer in layers.items():
            for part in ("to_q", "to_k", "to_v"):
                getattr(network.attention[key], part).weight.copy_(getattr(layer.block.attn2, part).weight)
    network.requires_grad_(False)
    return StyleAttention(network, kind, ROWS, WIDTH, engine.context_channels(model), "random")


def styles(seed: int) -> WPlus:
    generator = torch.Generator().manual_seed(seed)
    return WPlus(torch.randn(1, ROWS, WIDTH, generator=generator), torch.zeros(ROWS, WIDTH), "random")


def prepared(model: Any, variant: str, trained: dict[tuple[str, int], StyleAttention]) -> Any:
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


def evaluations(model: Any, width: str, arguments: argparse.Namespace, steps: int) -> list[float]:
    """Seconds of each guided evaluation of one sampling run."""
    seconds: list[float] = []

    def timed(executor: Any, *args: Any, **kwargs: Any) -> Any:
        memory.synchronize()
        begin = time.perf_counter()
        result = executor(*args, **kwargs)
        memory.synchronize()
        seconds.append(time.perf_counter() - begin)
        return result

    model = model.clone()
    # The first wrapper is the outermost, and a style's own counts too.
    model.wrappers[WrappersMP.PREDICT_NOISE] = {
        "timer": [timed],
        **model.wrappers.get(WrappersMP.PREDICT_NOISE, {}),
    }
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(width, 1), conditioning(width, 2))
    guider.set_cfg(7.5)
    side = image_size(width, arguments) // 8
    latent = torch.zeros(1, 4, side, side)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    sigmas = torch.linspace(14.0, 1.0, steps + 1)
    with torch.inference_mode():
        guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)
    return seconds


def measure(width: str, arguments: argparse.Namespace) -> None:
    options = ["--width", width, "--size", str(image_size(width, arguments))]
    peaks = {  # first, while this process needs little memory itself
        variant: int(memory.in_a_process("style_attention_cost", variant, arguments, *options)["peak_memory_mib"])
        for variant in tqdm(VARIANTS, desc=f"{width} alone", disable=arguments.no_memory)
        if not arguments.no_memory
    }
    seconds: dict[str, list[list[float]]] = {variant: [] for variant in VARIANTS}
    model = load(width)
    trained: dict[tuple[str, int], StyleAttention] = {}
    models = {variant: prepared(model, variant, trained) for variant in VARIANTS}
    for variant in VARIANTS:
        evaluations(models[variant], width, arguments, 1)  # warm-up
    for run in tqdm(range(arguments.runs), desc=width, unit="round"):
        first = run % len(VARIANTS)  # another one first in each round: a machine that slows down favors none
        for variant in (*VARIANTS[first:], *VARIANTS[:first]):
            seconds[variant].append(evaluations(models[variant], width, arguments, arguments.steps))
    medians = {variant: statistics.median(s for run in runs for s in run) for variant, runs in seconds.items()}
    of_runs = {variant: [statistics.median(run) for run in runs] for variant, runs in seconds.items()}
    ratios = {variant: [a / b for a, b in zip(of_runs[variant], of_runs[PLAIN], strict=True)] for variant in VARIANTS}
    relative = {variant: statistics.median(ratios[variant]) for variant in VARIANTS}
    size, kind = image_size(width, arguments), device_type()
    where = f"CPU, {arguments.threads} threads, float32"
    if kind == "cuda":
        where = f"{torch.cuda.get_device_name()}, float16"
    weights = sum(parameter.numel() for parameter in trained[SEQUENTIAL, 1].network.attention.parameters())
    lines = [
        f"# Style cross-attention: time and memory, {width} at {size}x{size}",
        "",
        f"{made_by()}: medians of {arguments.runs} rounds of {arguments.steps} "
        f"guided evaluations of one image, {where}, random weights; {weights / 1e6:.1f} million weights in one "
        f"style cross-attention.",
        "",
        "| | seconds an evaluation | relative | from | to | peak memory (MiB) |",
        "|---|---|---|---|---|---|",
        *(
            f"| {variant} | {medians[variant]:.4g} | {relative[variant]:.3f} | {min(ratios[variant]):.3f} | "
            f"{max(ratios[variant]):.3f} | {peaks.get(variant, '')} |"
            for variant in VARIANTS
        ),
        "",
        f"The goal, at most {GOALS.get(kind, 1.05):g} of plain sampling's time with one person, is "
        f"{'reached' if relative[ONE] <= GOALS.get(kind, 1.05) else 'not reached'}.",
    ]
    figures = {
        "width": width,
        "size": size,
        "device": where,
        "seconds": seconds,
        "medians": medians,
        "ratios": ratios,
        "relative": relative,
        "peak_memory_mib": peaks,
    }
    write_results(f"style_attention_cost_{width}_{kind}", figures, lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", choices=WIDTHS, nargs="+", default=["sd15"], help="UNets to measure (default sd15)")
    parser.add_argument("--runs", type=int, default=5, help="sampling runs of each kind, in turn (default 5)")
    parser.add_argument("--steps", type=int, default=2, help="guided evaluations a run (default 2)")
    parser.add_argument("--size", type=int, help="images' width and height (default: the model's own)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--only", choices=VARIANTS, help="sample in one way and print the memory use")


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        width = arguments.width[0]
        model = load(width)
        evaluations(prepared(model, arguments.only, {}), width, arguments, arguments.steps)
        print(json.dumps({"peak_memory_mib": memory.highest_of_this_process()}))
        return
    for width in arguments.width:
        measure(width, arguments)
