"""What reading attention costs: `python -m benchmarks attention_capture`.

Guided model calls (both sides, one image) of a Stable Diffusion UNet of full width with random weights, as a
stock sampler makes them: plain, with the identity prompt's cross-attention recorded, and with self-attention recorded
too, in turn in one process. Given are medians of the seconds of an evaluation, their ratio to plain sampling's, and the
highest memory use of a process that does one of them alone (`--runs 0` takes its seconds too). On a GPU in float16, on
the CPU in float32.
Writes benchmarks/results/attention_capture_WIDTH_DEVICE.json and .md for each width.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import torch
from comfy.patcher_extension import WrappersMP
from identity_edit_pack.attention.capture import capture_attention
from identity_edit_pack.attention.sites import AUTOMATIC, LAYER_CHOICES
from tqdm import tqdm

from . import memory
from .harness import made_by, write_results

TOKENS, IDENTITY_TOKENS = 77, (1, 2)
PLAIN, CROSS, BOTH = "plain sampling", "cross-attention recorded", "cross- and self-attention recorded"
VARIANTS = (PLAIN, CROSS, BOTH)
GOALS = {"cpu": 1.15, "cuda": 1.10}
"""Seconds of an evaluation with both recorded, relative to plain."""
MEMORY_GOAL = 300
"""MiB above plain sampling."""

_COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_temporal_attention": False,
    "use_spatial_transformer": True,
    "legacy": False,
}
SD15 = {
    **_COMMON,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
    "context_dim": 768,
    "adm_in_channels": None,
}
SDXL = {
    **_COMMON,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
}
WIDTHS: dict[str, tuple[dict[str, Any], int]] = {"sd15": (SD15, 512), "sdxl": (SDXL, 1024)}
"""UNet and the size of its images."""


def device_type() -> str:
    return str(comfy.model_management.get_torch_device().type)


def load(width: str) -> Any:
    """A MODEL with random weights of a size that keeps signals up."""
    dtype = torch.float32 if device_type() == "cpu" else torch.float16
    unet = dict(WIDTHS[width][0])
    if width == "sdxl":
        config: Any = comfy.supported_models.SDXL(unet)
        config.unet_config["num_head_channels"] = 64
    else:
        config = comfy.supported_models.SD15(unet)
    config.set_inference_dtype(dtype, None)
    device = comfy.model_management.get_torch_device()
    model: Any
    if width == "sdxl":
        model = comfy.model_base.SDXL(config, device=device)
    else:
        model = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.EPS, device=device)
    model.diffusion_model.to(device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=device, offload_device=torch.device("cpu"))


def conditioning(width: str, seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(1, TOKENS, WIDTHS[width][0]["context_dim"], generator=generator)
    return [[embedding, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]


def evaluations(model: Any, width: str, variant: str, arguments: argparse.Namespace) -> list[float]:
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
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "timer", timed)  # the first is the outermost
    if variant != PLAIN:
        identity = conditioning(width, 3)[0][0]
        model, _ = capture_attention(model, identity, IDENTITY_TOKENS, arguments.layers, variant == BOTH)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(width, 1), conditioning(width, 2))
    guider.set_cfg(7.5)
    side = image_size(width, arguments) // 8
    latent = torch.zeros(1, 4, side, side)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    sigmas = torch.linspace(14.0, 1.0, arguments.steps + 1)
    with torch.inference_mode():
        guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)
    return seconds


def image_size(width: str, arguments: argparse.Namespace) -> int:
    return arguments.size or WIDTHS[width][1]


def alone(width: str, variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One sampling run in a process of its own: its highest memory in MiB, and the seconds of each evaluation."""
    options = ["--width", width, "--size", str(image_size(width, arguments)), "--layers", arguments.layers]
    options += ["--steps", str(arguments.steps + (arguments.runs == 0))]  # one more, which warms up
    return memory.in_a_process("attention_capture", variant, arguments, *options)


def measure(width: str, arguments: argparse.Namespace) -> None:
    # These come first, while this process needs little memory itself.
    processes = {variant: alone(width, variant, arguments) for variant in tqdm(VARIANTS, desc=f"{width} alone")}
    peaks = {variant: int(found["peak_memory_mib"]) for variant, found in processes.items()}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    if arguments.runs == 0:
        seconds = {variant: found["seconds"][1:] for variant, found in processes.items()}  # the first warms up
    else:
        model = load(width)
        for variant in VARIANTS:
            evaluations(model, width, variant, argparse.Namespace(**{**vars(arguments), "steps": 1}))  # warm-up
        for run in tqdm(range(arguments.runs), desc=width, unit="run"):
            # Each in another order, so that a machine that slows down or speeds up favors none.
            for variant in VARIANTS if run % 2 == 0 else VARIANTS[::-1]:
                seconds[variant] += evaluations(model, width, variant, arguments)
    medians = {variant: statistics.median(values) for variant, values in seconds.items()}
    size, kind = image_size(width, arguments), device_type()
    where = (
        f"{torch.cuda.get_device_name()}, float16" if kind == "cuda" else f"CPU, {arguments.threads} threads, float32"
    )
    each = " in a process each" if arguments.runs == 0 else ""
    lines = [
        f"# Recording attention: time and memory, {width} at {size}x{size}",
        "",
        f"{made_by()}: medians of {len(seconds[PLAIN])} guided "
        f"evaluations of one image{each}, {where}, layers {arguments.layers}, random weights.",
        "",
        "| | seconds an evaluation | relative | peak memory (MiB) | more than plain (MiB) |",
        "|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        lines.append(
            f"| {variant} | {medians[variant]:.4g} | {medians[variant] / medians[PLAIN]:.3f} | {peaks[variant]} | "
            f"{peaks[variant] - peaks[PLAIN]:+d} |"
        )
    ratio, more = medians[BOTH] / medians[PLAIN], peaks[BOTH] - peaks[PLAIN]
    lines += [
        "",
        f"The goals, at most {GOALS.get(kind, 1.15):g} of plain sampling's time and {MEMORY_GOAL} MiB more, are "
        f"{'reached' if ratio <= GOALS.get(kind, 1.15) else 'not reached'} (time) and "
        f"{'reached' if more <= MEMORY_GOAL else 'not reached'} (memory).",
    ]
    figures = {
        "width": width,
        "size": size,
        "device": where,
        "seconds": seconds,
        "medians": medians,
        "peak_memory_mib": peaks,
    }
    write_results(f"attention_capture_{width}_{kind}", figures, lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--width", choices=WIDTHS, nargs="+", default=list(WIDTHS), help="UNets to measure (default all)"
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=3,
        help="sampling runs of each kind, in turn; 0 takes the seconds of the processes that are measured alone "
        "(default 3)",
    )
    parser.add_argument("--steps", type=int, default=2, help="guided evaluations a run (default 2)")
    parser.add_argument("--size", type=int, help="images' width and height (default: the model's own)")
    parser.add_argument("--layers", choices=LAYER_CHOICES, default=AUTOMATIC)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=VARIANTS, help="sample in one way and print the memory use")


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        seconds = evaluations(load(arguments.width[0]), arguments.width[0], arguments.only, arguments)
        print(json.dumps({"peak_memory_mib": memory.highest_of_this_process(), "seconds": seconds}))
        return
    for width in arguments.width:
        measure(width, arguments)
