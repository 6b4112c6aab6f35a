"""What reading attention costs: `python -m benchmarks attention_capture`.

Guided model calls (both sides, one image) of a Stable Diffusion UNet of full width with random weights, as a
stock sampler makes them: plain, with the identity prompt's cross-attention recorded, and with self-attention recorded
too, in turn in one process. Given are medians of the seconds of an evaluation, their ratio to plain sampling's, and the
highest memory use of a process that does one of them alone (`--runs 0` takes its seconds too). On a GPU in float16, on
the CPU in float32.
Writes benchmarks/results/attention_capture_WIDTH_DEVICE.json and .md for each width. What `style_attention_cost` has
in common with it is here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
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
from .harness import THREADS, Options, markdown
from .real_sizes_checkpoints import UNETS

TOKENS, IDENTITY_TOKENS = 77, (1, 2)
PLAIN, CROSS, BOTH = "plain sampling", "cross-attention recorded", "cross- and self-attention recorded"
VARIANTS = (PLAIN, CROSS, BOTH)
GOALS = {"cpu": 1.15, "cuda": 1.10}
"""Seconds of an evaluation with both recorded, relative to plain."""
MEMORY_GOAL = 300
"""MiB above plain sampling."""

SIZES = {"sd15": 512, "sdxl": 1024}
"""Of the images, by the name of the UNet in `UNETS`."""


def device_type() -> str:
    return str(comfy.model_management.get_torch_device().type)


def load(width: str) -> Any:
    """A MODEL with random weights of a size that keeps signals up."""
    dtype = torch.float32 if device_type() == "cpu" else torch.float16
    unet = dict(UNETS[width])
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
    embedding = torch.randn(1, TOKENS, UNETS[width]["context_dim"], generator=generator)
    return [[embedding, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]


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
    # The first wrapper is the outermost, and those of a variant count too.
    others = model.wrappers.get(WrappersMP.PREDICT_NOISE, {})
    model.wrappers[WrappersMP.PREDICT_NOISE] = {"timer": [timed], **others}
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


def image_size(width: str, arguments: argparse.Namespace) -> int:
    return arguments.size or SIZES[width]


def cost_options(variants: Collection[str], widths: list[str]) -> Options:
    """The options of a benchmark of what sampling costs in some ways."""
    return {
        "width": (widths, f"UNets to measure ({' '.join(widths)})", {"choices": SIZES}),
        "runs": (3, "sampling runs of each kind, in turn; 0 takes the seconds of the processes that are alone (3)"),
        "steps": (2, "guided evaluations a run (2)"),
        "size": (0, "images' width and height (the model's own)"),
        **THREADS,
        "only": (None, "sample in one way and print the memory use", {"choices": variants}),
    }


Prepare = Callable[[Any, str, str], Any]
"""The model of a variant, from the plain model, the width and the variant."""


def sampled_alone(prepare: Prepare, arguments: argparse.Namespace) -> dict[str, Any]:
    """One sampling run in a process of its own: its highest memory in MiB, and the seconds of each evaluation."""
    width = arguments.width[0]
    seconds = evaluations(prepare(load(width), width, arguments.only), width, arguments, arguments.steps)
    return {"peak_memory_mib": memory.highest_of_this_process(), "seconds": seconds}


def compare(
    benchmark: str, width: str, variants: Sequence[str], prepare: Prepare, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Sample in all ways in turn, the first of which is the plain one, and in each alone for its memory."""
    options = ["--width", width, "--size", str(image_size(width, arguments))]
    options += ["--steps", str(arguments.steps + (arguments.runs == 0))]  # one more, which warms up
    # These come first, while this process needs little memory itself.
    alone = {
        variant: memory.in_a_process(benchmark, variant, arguments, *options)
        for variant in tqdm(variants, desc=f"{width} alone")
    }
    seconds = {variant: [found["seconds"][1:]] for variant, found in alone.items()}
    if arguments.runs:
        model = load(width)
        models = {variant: prepare(model, width, variant) for variant in variants}
        seconds = {variant: [] for variant in variants}
        for variant in variants:
            evaluations(models[variant], width, arguments, 1)  # warm-up
        for run in tqdm(range(arguments.runs), desc=width, unit="round"):
            first = run % len(variants)  # another one first in each round: a machine that slows down favors none
            for variant in (*variants[first:], *variants[:first]):
                seconds[variant].append(evaluations(models[variant], width, arguments, arguments.steps))
    of_runs = {variant: [statistics.median(run) for run in each] for variant, each in seconds.items()}
    ratios = {
        variant: [a / b for a, b in zip(each, of_runs[variants[0]], strict=True)] for variant, each in of_runs.items()
    }
    is_gpu = device_type() == "cuda"
    return {
        "name": f"{benchmark}_{width}_{device_type()}",
        "width": width,
        "size": image_size(width, arguments),
        "device": f"{torch.cuda.get_device_name()}, float16"
        if is_gpu
        else f"CPU, {arguments.threads} threads, float32",
        "seconds": seconds,
        "medians": {variant: statistics.median(s for run in each for s in run) for variant, each in seconds.items()},
        "ratios": ratios,
        "relative": {variant: statistics.median(each) for variant, each in ratios.items()},
        "peak_memory_mib": {variant: int(found["peak_memory_mib"]) for variant, found in alone.items()},
    }


def cost_table(figures: dict[str, Any], arguments: argparse.Namespace, title: str, about: str, goal: str) -> list[str]:
    """A row for each way."""
    ratios, peaks = figures["ratios"], figures["peak_memory_mib"]
    plain = next(iter(peaks.values()))
    each = "" if arguments.runs else ", in a process each"
    rows = []
    for name, seconds in figures["medians"].items():
        relative = (figures["relative"][name], min(ratios[name]), max(ratios[name]))
        shown = (f"{ratio:.3f}" for ratio in relative)
        rows.append((name, f"{seconds:.4g}", *shown, peaks[name], f"{peaks[name] - plain:+d}"))
    titles = "seconds an evaluation", "relative", "from", "to", "peak memory (MiB)", "more than plain (MiB)"
    return [
        f"{title}: time and memory, {figures['width']} at {figures['size']}x{figures['size']}",
        f"medians of {max(arguments.runs, 1)} rounds of {arguments.steps} guided evaluations of one image{each}, "
        f"{figures['device']}, {about}random weights.",
        *markdown(("", *titles), rows),
        "",
        goal,
    ]


def reached(is_reached: bool) -> str:
    return "reached" if is_reached else "not reached"


# -- the claim --------------------------------------------------------------------------------------------------------

OPTIONS = cost_options(VARIANTS, list(SIZES)) | {"layers": (AUTOMATIC, "that are recorded", {"choices": LAYER_CHOICES})}


def prepared(model: Any, width: str, variant: str, layers: str = AUTOMATIC) -> Any:
    if variant == PLAIN:
        return model
    return capture_attention(model, conditioning(width, 3)[0][0], IDENTITY_TOKENS, layers, variant == BOTH)[0]


def alone(arguments: argparse.Namespace) -> dict[str, Any]:
    return sampled_alone(partial(prepared, layers=arguments.layers), arguments)


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for width in arguments.width:
        yield compare("attention_capture", width, VARIANTS, partial(prepared, layers=arguments.layers), arguments)


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    most = GOALS.get(device_type(), GOALS["cpu"])
    more = figures["peak_memory_mib"][BOTH] - figures["peak_memory_mib"][PLAIN]
    goal = (
        f"The goals, at most {most:g} of plain sampling's time and {MEMORY_GOAL} MiB more, are "
        f"{reached(figures['relative'][BOTH] <= most)} (time) and {reached(more <= MEMORY_GOAL)} (memory)."
    )
    return cost_table(figures, arguments, "Recording attention", f"layers {arguments.layers}, ", goal)
