"""What reading and exchanging joint attention costs: `python -m benchmarks joint_attention_cost`.

Guided sampling runs of a transformer of Flux.1's width with random weights and few blocks: plain, with the identity
prompt recorded as Identity Attention does, with Mutual Self-Attention and with Prompt-to-Prompt, in turn in one
process. The additional model calls are the techniques' own, so the seconds are also given for a model call. Memory is
the highest above what was in use before a run.
Writes benchmarks/results/joint_attention_cost_DEVICE.json and .md.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import Any

import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import torch
from identity_edit_pack.attention.joint_capture import capture_joint_attention
from identity_edit_pack.pipelines.attention_control.mutual_self_attention import mutual_self_attention
from identity_edit_pack.pipelines.attention_control.prompt_to_prompt import ControlSettings, prompt_to_prompt
from identity_edit_pack.pipelines.inversion.inversion import Inversion, invert_image
from tqdm import tqdm

from . import memory
from .harness import THREADS, Options, markdown

PLAIN, RECORDED, MUTUAL, CONTROLLED = (
    "plain sampling", "Identity Attention", "Mutual Self-Attention", "Prompt-to-Prompt",
)  # fmt: skip
VARIANTS = (PLAIN, RECORDED, MUTUAL, CONTROLLED)
TIME_GOAL, MEMORY_GOAL = 1.10, 300
"""Seconds relative to plain sampling (of a model call for the exchanges, which double their number), MiB above it."""

OPTIONS: Options = {
    "width": (3072, "of the transformer (Flux.1's)"),
    "double": (4, "double blocks (of Flux.1's 19)"),
    "single": (8, "single blocks (of Flux.1's 38)"),
    "size": (1024, "images' width and height"),
    "steps": (20, "of a run"),
    "runs": (3, "rounds"),
    "dtype": ("", "of the weights: float32 or bfloat16 (float32 on a processor, else bfloat16)"),
    **THREADS,
}


def load(arguments: argparse.Namespace) -> Any:
    """A MODEL with Flux.1's layout and random weights, without guidance embedding."""
    device = comfy.model_management.get_torch_device()
    network = {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096,
        "hidden_size": arguments.width, "mlp_ratio": 4.0, "num_heads": arguments.width // 128,
        "depth": arguments.double, "depth_single_blocks": arguments.single, "axes_dim": [16, 56, 56], "theta": 10000,
        "patch_size": 2, "qkv_bias": True, "guidance_embed": False,
    }  # fmt: skip
    if any(field.name == "txt_ids_dims" for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)):
        network["txt_ids_dims"] = []  # newer than 0.3.75
    config = comfy.supported_models.Flux(network)
    dtype = arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    config.set_inference_dtype(getattr(torch, dtype), None)
    model = comfy.model_base.Flux(config, device=device)
    model.diffusion_model.to(device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(1.0 if name.endswith(("weight", "scale")) else 0.0)
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=device, offload_device=torch.device("cpu"))


def conditioning(seed: int) -> list[Any]:
    """256 tokens, as of Flux.1."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, 768, generator=generator)
    return [[torch.randn(1, 256, 4096, generator=generator), {"pooled_output": pooled}]]


class Clip:
    """Encodes any two prompts as random embeddings."""

    def tokenize(self, text: str, return_word_ids: bool = False) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list[Any]:
        return conditioning(len(tokens))


def prepared(model: Any, pivot: Inversion, variant: str) -> Any:
    """The model of a variant."""
    if variant == RECORDED:
        return capture_joint_attention(model, conditioning(3), (1, 2), (9,))[0]
    if variant == MUTUAL:
        return mutual_self_attention(model, pivot, conditioning(1), start_step=0.0)
    if variant == CONTROLLED:
        settings = ControlSettings(self_replace_steps=1.0)
        return prompt_to_prompt(model, Clip(), "a cat", "a black dog", settings=settings)[0]  # type: ignore[arg-type]
    return model


def sample(model: Any, pivot: Inversion, size: int) -> dict[str, float]:
    """Seconds, model calls (one conditioning each) and MiB of one guided run."""
    calls = 0

    def count(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += x.shape[0]
        return executor(x, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key("apply_model", "count", count)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(1), conditioning(2))
    guider.set_cfg(3.5)
    noise = torch.randn(1, 16, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), memory.PeakMemory() as peak:
        memory.synchronize()
        begin = time.perf_counter()
        euler = comfy.samplers.sampler_object("euler")
        guider.sample(noise, torch.zeros_like(noise), euler, pivot.sigmas, disable_pbar=True, seed=0)
        memory.synchronize()
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "calls": calls, "mib": peak.mib}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    model = load(arguments)
    side = arguments.size // 8
    with torch.inference_mode():
        pivot = invert_image(model, torch.zeros(1, 16, side, side), conditioning(1), steps=arguments.steps)
    models = {variant: prepared(model, pivot, variant) for variant in VARIANTS}
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for run in tqdm(range(arguments.runs + 1), unit="round"):
        for variant in VARIANTS:
            figures = sample(models[variant], pivot, arguments.size)
            if run:  # the first round warms up
                found[variant].append(figures)
    device = comfy.model_management.get_torch_device()
    return {
        "name": f"joint_attention_cost_{device.type}",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {arguments.threads} threads",
        "size": arguments.size,
        "blocks": [arguments.double, arguments.single],
        "dtype": str(model.model_dtype()).removeprefix("torch."),
        "runs": found,
        "medians": {
            variant: {name: statistics.median(each[name] for each in runs) for name in runs[0]}
            for variant, runs in found.items()
        },
    }


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    medians, plain = figures["medians"], figures["medians"][PLAIN]
    rows = []
    for variant, found in medians.items():
        of_call = found["seconds"] / found["calls"] / (plain["seconds"] / plain["calls"])
        rows.append((
            variant, f"{found['seconds']:.4g}", f"{found['seconds'] / plain['seconds']:.3f}", f"{found['calls']:g}",
            f"{of_call:.3f}", f"{found['mib']:.0f}", f"{found['mib'] - plain['mib']:+.0f}",
        ))  # fmt: skip
    titles = ("", "seconds a run", "relative", "model calls", "seconds a call, relative", "MiB", "more than plain")
    return [
        f"Joint attention: time and memory at {figures['size']}x{figures['size']}",
        f"medians of {len(figures['runs'][PLAIN])} guided runs of {arguments.steps} steps, {figures['device']}, "
        f"width {arguments.width}, {figures['blocks'][0]} double and {figures['blocks'][1]} single blocks, random "
        f"weights in {figures['dtype']}.",
        *markdown(titles, rows),
        "",
        f"Goals: at most {TIME_GOAL:g} of plain sampling's seconds (of a call, for the exchanges), and {MEMORY_GOAL} "
        f"MiB more.",
    ]
