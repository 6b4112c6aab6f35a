"""Training an MCDM against a plain loop: `python -m benchmarks mcdm_training`.

Both train all weights of the demo checkpoint's UNet, inflated to eight input channels, and the image embedding on the
same pairs with the same draws: the pack's `train_mcdm`, and a loop as diffusers' train_instruct_pix2pix.py has it,
which calls the same modules directly, with torch's AdamW and diffusers' EMAModel. Both begin from images that are
encoded already; the loop encodes the prompts in every step, as that script does. That both do the same work is checked:
their losses must agree. The runs alternate, each two of them a pair; given are medians over the pairs. Writes
benchmarks/results/mcdm_training.json and .md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import numpy as np
import torch
from diffusers.training_utils import EMAModel
from identity_edit_pack.demo_world import family
from identity_edit_pack.demo_world.attributes import caption, random_attributes
from identity_edit_pack.demo_world.clip_vision import load_clip_vision
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine.edit_model import as_edit_model
from identity_edit_pack.pipelines.mcdm import encoded_pairs
from identity_edit_pack.pipelines.mcdm import model as mcdm
from identity_edit_pack.pipelines.mcdm import train as train_mcdm
from identity_edit_pack.pipelines.mcdm.encoded_pairs import PairFiles
from identity_edit_pack.pipelines.mcdm.train import IMAGE_BIT, SPATIAL_BIT, TEXT_BIT, MCDMSettings
from identity_edit_pack.pipelines.training.loop import generator_of
from PIL import Image

from . import memory
from .harness import made_by, write_results
from .training_runs import (
    WARM_UP,
    Speeds,
    add_training_arguments,
    difference_of_losses,
    in_turn,
    peak_memory,
)

PACK, PLAIN = "Train MCDM", "plain loop"
GOAL = 1.0
"""Samples a second of the pack relative to the plain loop's."""
SETTINGS = MCDMSettings(precision="float32", checkpointing=False, sample_steps=1)

Parts = tuple[Any, Any, Any, Any]
Outcome = tuple[list[float], list[float]]
"""Seconds and loss of every step."""


def draw_pairs(folder: Path, count: int, seed: int) -> list[PairFiles]:
    """Portraits with a neutral and a smiling face, drawn by the renderer: what is in them does not change the cost."""
    generator = random.Random(seed)
    pairs = []
    for number in range(count):
        source = random_attributes(generator, "portrait").replace(expression="neutral")
        target = source.replace(expression="smiling")
        files = [folder / f"{number}-{name}.png" for name in ("source", "target")]
        for file, attributes in zip(files, (source, target), strict=True):
            Image.fromarray(np.array(render(attributes, seed + number)[0])).save(file)
        pairs.append(PairFiles(files[0], files[1], caption(source), caption(target)))
    return pairs


def by_pack(parts: Parts, pairs: list[PairFiles], settings: MCDMSettings, folder: Path) -> Outcome:
    ends: list[float] = []

    def progress(*_: Any) -> None:
        memory.synchronize()
        ends.append(time.perf_counter())

    with torch.inference_mode():  # as in ComfyUI
        _, run = train_mcdm.train_mcdm(*parts, pairs, settings, str(folder), progress=progress)
    return np.diff(ends).tolist(), run.losses


def by_plain_loop(parts: Parts, pairs: list[PairFiles], settings: MCDMSettings, folder: Path) -> Outcome:
    """The loop of diffusers' train_instruct_pix2pix.py with the networks called directly."""
    model, clip, vae, clip_vision = parts
    encoded = encoded_pairs.encode_pairs(pairs, vae, clip_vision, str(folder))
    edit_model = as_edit_model(model)
    comfy.model_management.load_models_gpu([edit_model, clip.patcher], force_full_load=True)
    sampling = engine.require(edit_model).sampling
    device = edit_model.load_device
    unet, text_encoder = edit_model.model.diffusion_model, clip.cond_stage_model.clip_l.transformer
    start = generator_of(settings.seed, 0, "image embedding")
    embedding = mcdm.new_embedding(edit_model, clip_vision, encoded.latent_shape, start, SETTINGS.image_tokens).to(
        device
    )
    weights = [*unet.parameters(), *embedding.parameters()]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    average = EMAModel(weights, decay=settings.ema_decay)
    alphas_cumprod = (1.0 / (1.0 + sampling.sigmas.double() ** 2)).float().to(device)
    losses, ends = [], []
    for step in range(settings.steps):
        batch = train_mcdm.draw_mcdm_batch(encoded, settings, int(sampling.sigmas.shape[0]), step)
        texts, latents = [], []
        for number, same, bits in zip(batch.chosen, batch.reconstructs.tolist(), batch.dropped.tolist(), strict=True):
            prompts = encoded.source_prompts if same else encoded.target_prompts
            texts.append("" if bits & TEXT_BIT else prompts[number])
            latents.append(encoded.latents("source" if same else "target", [number]))
        tokens = [[token for token, _ in clip.tokenize(text)["l"][0]] for text in texts]
        with torch.no_grad():
            text = text_encoder(torch.tensor(tokens, device=device))[0]
        source = encoded.latents("source", batch.chosen)
        image = embedding(encoded.tokens(batch.chosen).to(device), engine.to_model_scale(edit_model, source).to(device))
        without_image = torch.tensor([bool(bits & IMAGE_BIT) for bits in batch.dropped.tolist()], device=device)
        context = torch.cat([text, torch.where(without_image[:, None, None], text, image)], dim=1)
        kept = torch.tensor([0.0 if bits & SPATIAL_BIT else 1.0 for bits in batch.dropped.tolist()])
        spatial = (source * kept[:, None, None, None]).to(device)
        z_0 = engine.to_model_scale(edit_model, torch.cat(latents)).to(device)
        noise, t = batch.noise.to(device), batch.t.to(device)
        alpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
        z = alpha_bar.sqrt() * z_0 + (1 - alpha_bar).sqrt() * noise
        predicted = unet(torch.cat([z, spatial], dim=1), t.float(), context=context, transformer_options={})
        loss = torch.nn.functional.mse_loss(predicted.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, settings.gradient_clip)
        optimizer.step()
        average.step(weights)
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        memory.synchronize()
        ends.append(time.perf_counter())
    return np.diff(ends).tolist(), losses


METHODS: dict[str, Callable[[Parts, list[PairFiles], MCDMSettings, Path], Outcome]] = {
    PLAIN: by_plain_loop,
    PACK: by_pack,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser, METHODS, steps=8)


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    family.register()
    options = {"dtype": torch.float32}
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(arguments.checkpoint), model_options=options)
    parts = (model, clip, vae, load_clip_vision())
    names = [arguments.only] if arguments.only else list(METHODS)
    settings = dataclasses.replace(SETTINGS, steps=arguments.steps + WARM_UP + 1, seed=arguments.seed)
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pairs = draw_pairs(folder, 32, arguments.seed)
        encoded_pairs.encode_pairs(pairs, vae, parts[3], str(folder))
        for name in in_turn(names, arguments):
            times, losses[name] = METHODS[name](parts, pairs, settings, folder)
            seconds[name].append(times[WARM_UP:])
    if arguments.only:
        print(json.dumps({"peak_memory_mib": memory.highest_of_this_process()}))
        return

    difference = difference_of_losses(losses, [PACK], PLAIN)
    size = SETTINGS.batch_size
    speeds = Speeds.of(seconds, PLAIN)
    rates = {name: size * rate for name, rate in speeds.rates.items()}
    ratios, relative = speeds.ratios[PACK], speeds.relative[PACK]
    memories = {name: peak_memory("mcdm_training", name, arguments) for name in names}
    trained = sum(parameter.numel() for parameter in model.model.diffusion_model.parameters())
    lines = [
        "# Training an MCDM: speed and memory",
        "",
        f"{made_by()}: medians of {arguments.runs} pairs of runs of {arguments.steps} steps, "
        f"{trained / 1e6:.1f} million weights, {size} pairs a step, {arguments.threads} threads, float32. The losses "
        f"of both loops agree to {difference:.1e}. The ratio of a pair is from {min(ratios):.2f} to {max(ratios):.2f}.",
        "",
        "| loop | samples a second | relative | peak memory (MiB) |",
        "|---|---|---|---|",
        f"| {PLAIN} | {rates[PLAIN]:.2f} | 1.00 | {memories[PLAIN]} |",
        f"| {PACK} | {rates[PACK]:.2f} | {relative:.2f} | {memories[PACK]} |",
        "",
        f"The goal, at least {GOAL:.1f} of the plain loop's samples a second, is "
        + ("reached." if relative >= GOAL else "not reached."),
    ]
    everything = {
        "threads": arguments.threads,
        "trained_weights": trained,
        "largest_relative_difference_of_losses": difference,
        "seconds_by_step": seconds,
        "samples_a_second": rates,
        "ratios": ratios,
        "relative": relative,
        "peak_memory_mib": memories,
    }
    write_results("mcdm_training", everything, lines)
