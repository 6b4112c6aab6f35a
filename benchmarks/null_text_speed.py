"""Null-text optimization against the reference's loop: `python -m benchmarks null_text_speed`.

Both optimize the same images with the same network, in float32 and with the same number of threads: the pack's
`null_text_optimization`, by each of its methods, and `reference_null_text.py`, which does it the way the reference
implementation does (weights that require gradients, guided evaluations of two at the end of each step). Given are
medians over the runs of time, model calls and PSNR of the reconstructed image, and the highest memory use
above that of the loaded model in a process that does one of them alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from identity_edit_pack.demo_world.attributes import CAPTION_TEMPLATES, caption
from identity_edit_pack.demo_world.images import evaluation_set
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine.families.noise import DIFFUSION
from identity_edit_pack.pipelines.engine.families.schedule import ddim_timesteps
from identity_edit_pack.pipelines.inversion import inversion, null_text
from identity_edit_pack.pipelines.inversion.reconstruction import psnr
from identity_edit_pack.pipelines.shared.conditioning import Conditioning
from tqdm import tqdm

from ..tests import reference_null_text
from . import memory
from .edits import embed
from .harness import CHECKPOINT, SEED, THREADS, Options, load_checkpoint, markdown

REFERENCE = "reference"
GOAL = 0.5
"""Time of the pack's fastest method relative to the reference's."""

Outcome = tuple[torch.Tensor, int, int]
"""z_0 in the scale of LATENT sockets, model calls, updates of the embedding."""


def by_reference(
    model: Any, pivot: inversion.Inversion, positive: Conditioning, negative: Conditioning, guidance_scale: float
) -> Outcome:
    """The reference's loop on the same UNet, called directly, for models without vector conditioning."""
    network = model.model.diffusion_model
    sampling = engine.require(model).sampling
    device = next(network.parameters()).device
    alphas_cumprod = (1.0 / (1.0 + sampling.sigmas.double() ** 2)).float().to(device)
    scale = reference_null_text.DdimScale(alphas_cumprod, ddim_timesteps(pivot.steps).tolist())
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


OPTIONS: Options = {
    **CHECKPOINT,
    "runs": (5, "images, each optimized once by each method (5)"),
    "steps": (50, "DDIM steps (50)"),
    "guidance_scale": (null_text.GUIDANCE_SCALE, "of the optimization"),
    **THREADS,
    **SEED,
    "only": (None, "do one image by one method and print its memory use", {"choices": METHODS}),
}


def images_of(arguments: argparse.Namespace, count: int) -> Iterator[tuple[Any, ...]]:
    """(image, the autoencoder's of it, VAE, what a method is called with) of some images."""
    model, clip, vae = load_checkpoint(arguments.checkpoint, model_options={"dtype": torch.float32})
    for attributes, seed in tqdm(evaluation_set(count, seed=arguments.seed), unit="image"):
        image = torch.from_numpy(np.array(render(attributes, seed)[0])).float().unsqueeze(0) / 255
        with torch.no_grad():
            latent = vae.encode(image)
            decoded = vae.decode(latent).cpu()
        positive, negative = (embed(clip, [text]) for text in (caption(attributes, seed % CAPTION_TEMPLATES), ""))
        pivot = inversion.invert_image(model, latent, positive, steps=arguments.steps)
        yield image, decoded, vae, (model, pivot, positive, negative, arguments.guidance_scale)


def alone(arguments: argparse.Namespace) -> dict[str, Any]:
    """Memory that one image by one method needs on top of the loaded model, in MiB."""
    *_, work = next(images_of(arguments, 1))
    with memory.PeakMemory() as peak:
        METHODS[arguments.only](*work)
    return {"peak_memory_mib": round(peak.mib)}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    keys = ("seconds", "evaluations", "updates", "psnr_db", "psnr_to_autoencoder_db")
    rows: dict[str, dict[str, list[float]]] = {name: {key: [] for key in keys} for name in METHODS}
    ceiling = []
    for image, decoded, vae, work in images_of(arguments, arguments.runs):
        ceiling.append(float(psnr(image, decoded)))
        for name, method in METHODS.items():
            memory.synchronize()
            begin = time.perf_counter()
            z_0, evaluations, updates = method(*work)
            memory.synchronize()
            seconds = time.perf_counter() - begin
            with torch.no_grad():
                made = vae.decode(z_0).cpu()
            found = (seconds, evaluations, updates, float(psnr(image, made)), float(psnr(decoded, made)))
            for key, value in zip(keys, found, strict=True):
                rows[name][key].append(value)
    medians = {name: {key: statistics.median(values) for key, values in row.items()} for name, row in rows.items()}
    for name, median in medians.items():
        median |= memory.in_a_process("null_text_speed", name, arguments)
    return {
        "steps": arguments.steps,
        "threads": arguments.threads,
        "guidance_scale": arguments.guidance_scale,
        "autoencoder_psnr_db": ceiling,
        "runs": rows,
        "medians": medians,
    }


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    medians = figures["medians"]
    reference = medians[REFERENCE]
    reached = [
        name
        for name in null_text.METHODS
        if medians[name]["seconds"] <= GOAL * reference["seconds"] and medians[name]["psnr_db"] >= reference["psnr_db"]
    ]
    counts = "model calls", "updates", "PSNR to the image (dB)", "PSNR to the autoencoder's (dB)"
    return [
        "Null-text optimization: time, evaluations and memory",
        f"medians of {arguments.runs} images, {arguments.steps} steps, guidance scale {arguments.guidance_scale:g}, "
        f"{arguments.threads} threads, float32. The autoencoder alone: "
        f"{statistics.median(figures['autoencoder_psnr_db']):.2f} dB.",
        *markdown(
            ("method", "time (s)", "relative", *counts, "memory above the loaded model (MiB)"),
            (
                (name, f"{median['seconds']:.1f}", f"{median['seconds'] / reference['seconds']:.2f}",
                 f"{median['evaluations']:.0f}", f"{median['updates']:.0f}", f"{median['psnr_db']:.2f}",
                 f"{median['psnr_to_autoencoder_db']:.2f}", median["peak_memory_mib"])
                for name, median in medians.items()
            ),
        ),
        "",
        f"The goal, at most {GOAL:g} of the reference's time at an equal or better PSNR, is "
        + (f"reached by: {', '.join(reached)}." if reached else "not reached."),
    ]  # fmt: skip
