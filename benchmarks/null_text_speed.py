"""Null-text optimization against the reference's loop: `python -m benchmarks null_text_speed`.

Both optimize the same images with the same network, in float32 and with the same number of threads: the pack's
`null_text_optimization`, by each of its methods, and `reference_null_text.py`, which does it the way the reference
implementation does (weights that require gradients, guided evaluations of two at the end of each step). Given are
medians over the runs of time, model calls and PSNR of the reconstructed image, and the highest memory use
above that of the loaded model in a process that does one of them alone.
Writes benchmarks/results/null_text_speed.json and null_text_speed.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sd
import numpy as np
import torch
from identity_edit_pack.demo_world import family
from identity_edit_pack.demo_world.attributes import CAPTION_TEMPLATES, caption
from identity_edit_pack.demo_world.images import evaluation_set
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine.families.noise import DIFFUSION
from identity_edit_pack.pipelines.inversion import inversion, null_text
from identity_edit_pack.pipelines.inversion.reconstruction import psnr
from identity_edit_pack.pipelines.shared.conditioning import Conditioning
from tqdm import tqdm

from ..tests import reference_null_text
from . import memory
from .harness import DEMO_CHECKPOINT, made_by, write_results

REFERENCE = "reference"
GOAL = 0.5
"""Time of the pack's fastest method relative to the reference's."""

Outcome = tuple[torch.Tensor, int, int]
"""z_0 in the scale of LATENT sockets, model calls, updates of the embedding."""


def load(checkpoint: Path) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE by ComfyUI's own loader, the UNet in float32."""
    family.register()
    options = {"dtype": torch.float32}
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint), model_options=options)
    return model, clip, vae


def by_reference(
    model: Any, pivot: inversion.Inversion, positive: Conditioning, negative: Conditioning, guidance_scale: float
) -> Outcome:
    """The reference's loop on the same UNet, called directly, for models without vector conditioning."""
    network = model.model.diffusion_model
    sampling = engine.require(model).sampling
    device = next(network.parameters()).device
    alphas_cumprod = (1.0 / (1.0 + sampling.sigmas.double() ** 2)).float().to(device)
    scale = reference_null_text.DdimScale(alphas_cumprod, pivot.timesteps.tolist())
    pivots = [(x / DIFFUSION.scale(sigma)).to(device) for x, sigma in zip(pivot.trajectory, pivot.sigmas, strict=True)]
    v_prediction = pivot.model.prediction == "v"

    def predict_noise(z: torch.Tensor, timestep: int, embedding: torch.Tensor) -> torch.Tensor:
        timesteps = torch.full((z.shape[0],), float(timestep), device=device)
        predicted = network(z, timesteps, context=embedding, transformer_options={})
        if v_prediction:
            alpha_bar = scale.alpha_bar(timestep)
            predicted = alpha_bar**0.5 * predicted + (1 - alpha_bar) ** 0.5 * z
        return predicted

    network.requires_grad_(True)
    found = reference_null_text.null_text(
        predict_noise, scale, pivots[::-1], positive[0][0].to(device), negative[0][0].to(device), guidance_scale
    )
    network.requires_grad_(False)
    for parameter in network.parameters():
        parameter.grad = None
    return engine.to_socket_scale(model, found.z_0), found.evaluations, sum(found.inner_steps)


def by_pack(method: str) -> Callable[..., Outcome]:
    def run(
        model: Any, pivot: inversion.Inversion, positive: Conditioning, negative: Conditioning, guidance_scale: float
    ) -> Outcome:
        found = null_text.null_text_optimization(model, pivot, positive, negative, guidance_scale, method=method)
        return found.reconstruction, found.evaluations, int(found.inner_steps.sum())

    return run


METHODS = {REFERENCE: by_reference, **{name: by_pack(name) for name in null_text.METHODS}}


def peak_memory(name: str, arguments: argparse.Namespace) -> int:
    """Memory that one image by one method needs on top of the loaded model, in MiB, in a process of its own."""
    return int(memory.in_a_process("null_text_speed", name, arguments)["peak_memory_mib"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, default=DEMO_CHECKPOINT)
    parser.add_argument("--runs", type=int, default=5, help="images, each optimized once by each method (default 5)")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps (default 50)")
    parser.add_argument("--guidance-scale", type=float, default=null_text.GUIDANCE_SCALE)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0, help="draws the images (default 0)")
    parser.add_argument("--only", choices=METHODS, help="do one image by one method and print its memory use")


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)

    model, clip, vae = load(arguments.checkpoint)
    names = [arguments.only] if arguments.only else list(METHODS)
    rows: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "evaluations": [], "updates": [], "psnr_db": [], "psnr_to_autoencoder_db": []}
        for name in names
    }
    ceiling, memory_used = [], 0.0
    pairs = evaluation_set(1 if arguments.only else arguments.runs, seed=arguments.seed)
    for attributes, seed in tqdm(pairs, unit="image", disable=bool(arguments.only)):
        image = torch.from_numpy(np.array(render(attributes, seed)[0])).float().unsqueeze(0) / 255
        with torch.no_grad():
            latent = vae.encode(image)
            decoded = vae.decode(latent).cpu()
            positive = [[clip.encode_from_tokens(clip.tokenize(caption(attributes, seed % CAPTION_TEMPLATES))), {}]]
            negative = [[clip.encode_from_tokens(clip.tokenize("")), {}]]
        ceiling.append(float(psnr(image, decoded)))
        pivot = inversion.ddim_inversion(model, latent, positive, steps=arguments.steps)
        for name in names:
            memory.synchronize()
            begin = time.perf_counter()
            # Watching the memory would take time of its own: only in a process that is asked for nothing else.
            watch = memory.PeakMemory() if arguments.only else None
            with watch or contextlib.nullcontext():
                z_0, evaluations, updates = METHODS[name](model, pivot, positive, negative, arguments.guidance_scale)
            memory.synchronize()
            memory_used = watch.mib if watch else 0.0
            row = rows[name]
            row["seconds"].append(time.perf_counter() - begin)
            row["evaluations"].append(evaluations)
            row["updates"].append(updates)
            with torch.no_grad():
                made = vae.decode(z_0).cpu()
            row["psnr_db"].append(float(psnr(image, made)))
            row["psnr_to_autoencoder_db"].append(float(psnr(decoded, made)))
    if arguments.only:
        print(json.dumps({"peak_memory_mib": round(memory_used)}))
        return

    medians = {
        name: {key: statistics.median(values) for key, values in row.items()}
        | {"peak_memory_mib": peak_memory(name, arguments)}
        for name, row in rows.items()
    }
    lines = [
        "# Null-text optimization: time, evaluations and memory",
        "",
        f"{made_by()}: medians of {arguments.runs} images, {arguments.steps} steps, guidance "
        f"scale {arguments.guidance_scale:g}, {arguments.threads} threads, float32. The autoencoder alone: "
        f"{statistics.median(ceiling):.2f} dB.",
        "",
        "| method | time (s) | relative | model calls | updates | PSNR to the image (dB) | PSNR to the "
        "autoencoder's (dB) | memory above the loaded model (MiB) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, median in medians.items():
        relative = median["seconds"] / medians[REFERENCE]["seconds"]
        lines.append(
            f"| {name} | {median['seconds']:.1f} | {relative:.2f} | {median['evaluations']:.0f} | "
            f"{median['updates']:.0f} | {median['psnr_db']:.2f} | {median['psnr_to_autoencoder_db']:.2f} | "
            f"{median['peak_memory_mib']} |"
        )
    reached = [
        name
        for name in null_text.METHODS
        if medians[name]["seconds"] <= GOAL * medians[REFERENCE]["seconds"]
        and medians[name]["psnr_db"] >= medians[REFERENCE]["psnr_db"]
    ]
    lines += [
        "",
        f"The goal, at most {GOAL:g} of the reference's time at an equal or better PSNR, is "
        + (f"reached by: {', '.join(reached)}." if reached else "not reached."),
    ]
    everything = {
        "steps": arguments.steps,
        "threads": arguments.threads,
        "guidance_scale": arguments.guidance_scale,
        "autoencoder_psnr_db": ceiling,
        "runs": rows,
        "medians": medians,
    }
    write_results("null_text_speed", everything, lines)
