"""Training an identity prior against a plain loop: `python -m benchmarks identity_prior_training`.

Both train the same attention weights of the demo checkpoint on the same batches with the same draws: the pack's
`train_identity_prior`, and a loop as diffusers' DreamBooth script has it, which calls the same UNet and text encoder
modules directly, with `requires_grad` on the same weights, and torch's AdamW. That both do the same work is checked:
their losses must agree. The runs alternate, each two of them a pair; given are medians over the pairs, of the median
step of each run and of the two's ratio (what else a machine does changes slower than pairs do), and the highest memory
of a process that does one run of one of them alone. Writes benchmarks/results/identity_prior_training.json and .md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Callable
from typing import Any

import comfy.sd
import numpy as np
import torch
from identity_edit_pack.demo_world import family
from identity_edit_pack.demo_world.attributes import Attributes, caption, random_attributes
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.lipe import identity_prior
from identity_edit_pack.pipelines.lipe.train_identity_prior import PriorSettings, train_identity_prior
from identity_edit_pack.pipelines.training import images as training_images
from identity_edit_pack.pipelines.training.images import TrainingImages
from identity_edit_pack.pipelines.training.loop import generator_of

from . import memory
from .harness import made_by, write_results
from .training_runs import (
    WARM_UP,
    Networks,
    Speeds,
    add_training_arguments,
    difference_of_losses,
    draw_subject,
    in_turn,
    peak_memory,
)

PACK, PLAIN = "Train Identity Prior", "plain loop"
GOAL = 1.0
"""Steps a second of the pack relative to the plain loop's."""
SETTINGS = PriorSettings(token="sks", class_word="cat", learning_rate=1e-4, precision="float32", file_dtype="float32")

Sets = tuple[TrainingImages, TrainingImages]
Outcome = tuple[list[float], list[float]]
"""Seconds and loss of every step."""


def draw_sets(vae: Any, seed: int) -> Sets:
    """Four images of one held-out cat, sixteen of other cats."""
    generator = random.Random(seed)
    of_subject, called = draw_subject(generator, SETTINGS.class_word, SETTINGS.token)
    others = [random_attributes(generator, "figure").replace(species=SETTINGS.class_word) for _ in range(16)]

    def encode(images: list[Attributes], captions: list[str]) -> TrainingImages:
        drawn = [torch.from_numpy(np.array(render(one, seed + i)[0])) for i, one in enumerate(images)]
        return training_images.encode_images(vae, [image.float() / 255 for image in drawn], captions)

    return encode(of_subject, called), encode(others, [caption(one) for one in others])


def by_pack(model: Any, clip: Any, sets: Sets, settings: PriorSettings) -> Outcome:
    ends: list[float] = []

    def progress(*_: Any) -> None:
        memory.synchronize()
        ends.append(time.perf_counter())

    with torch.inference_mode():  # as in ComfyUI
        _, run = train_identity_prior(model, clip, *sets, settings, progress=progress)
    return np.diff(ends).tolist(), run.losses


def by_plain_loop(model: Any, clip: Any, sets: Sets, settings: PriorSettings) -> Outcome:
    """The loop of diffusers' train_dreambooth.py with the networks called directly."""
    networks = Networks.of(model, clip)
    device = networks.device
    keys = identity_prior.attention_keys(model, clip)
    states = (dict(model.model.named_parameters()), dict(clip.cond_stage_model.named_parameters()))
    weights = [state[key] for state, part in zip(states, keys, strict=True) for key in part]
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    hooks = networks.copying_before_norms()
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    losses, ends = [], []
    for step in range(settings.steps):
        latents, captions, timesteps, noises = [], [], [], []
        for what, images in zip(("identity", "regularization"), sets, strict=True):
            chosen = training_images.batch_indices(images, SETTINGS.batch_size, step, settings.seed, what)
            latents += [engine.to_model_scale(model, images.latents[number]) for number in chosen]
            captions += [images.captions[number] for number in chosen]
            generator = generator_of(settings.seed, step, f"noise of {what}")
            timesteps.append(torch.randint(networks.alphas_cumprod.shape[0], (len(chosen),), generator=generator))
            noises.append(torch.randn((len(chosen), *latents[-1].shape), generator=generator))
        z_0, t, noise = torch.stack(latents).to(device), torch.cat(timesteps).to(device), torch.cat(noises).to(device)
        z = networks.noised(z_0, noise, t)
        tokens = [[token for token, _ in clip.tokenize(text)["l"][0]] for text in captions]
        context = networks.text_encoder(torch.tensor(tokens, device=device))[0]
        predicted = networks.unet(z, t.float(), context=context, transformer_options={})
        of_identity, of_class = predicted.chunk(2)
        noise_of_identity, noise_of_class = noise.chunk(2)
        mse = torch.nn.functional.mse_loss
        loss = mse(of_identity, noise_of_identity) + SETTINGS.regularization_weight * mse(of_class, noise_of_class)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        memory.synchronize()
        ends.append(time.perf_counter())
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for weight, value in zip(weights, before, strict=True):
            weight.requires_grad_(False).copy_(value)
    return np.diff(ends).tolist(), losses


METHODS: dict[str, Callable[[Any, Any, Sets, PriorSettings], Outcome]] = {PLAIN: by_plain_loop, PACK: by_pack}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser, METHODS, steps=8)


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)

    family.register()
    options = {"dtype": torch.float32}
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(arguments.checkpoint), model_options=options)
    with torch.no_grad():
        sets = draw_sets(vae, arguments.seed)
    names = [arguments.only] if arguments.only else list(METHODS)
    settings = dataclasses.replace(SETTINGS, steps=arguments.steps + WARM_UP + 1, seed=arguments.seed)
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {}
    for name in in_turn(names, arguments):
        times, losses[name] = METHODS[name](model, clip, sets, settings)
        seconds[name].append(times[WARM_UP:])
    if arguments.only:
        print(json.dumps({"peak_memory_mib": memory.highest_of_this_process()}))
        return

    difference = difference_of_losses(losses, [PACK], PLAIN)
    speeds = Speeds.of(seconds, PLAIN)
    rates, ratios, relative = speeds.rates, speeds.ratios[PACK], speeds.relative[PACK]
    memories = {name: peak_memory("identity_prior_training", name, arguments) for name in names}
    trained = sum(
        state[key].numel()
        for state, part in zip(
            (model.model.state_dict(), clip.cond_stage_model.state_dict()),
            identity_prior.attention_keys(model, clip),
            strict=True,
        )
        for key in part
    )
    lines = [
        "# Training an identity prior: speed and memory",
        "",
        f"{made_by()}: medians of {arguments.runs} pairs of runs of {arguments.steps} steps, "
        f"{trained / 1e6:.2f} million weights, one image of each set a step, {arguments.threads} threads, float32. "
        f"The losses of both loops agree to {difference:.1e}. The ratio of a pair is from {min(ratios):.2f} to "
        f"{max(ratios):.2f}.",
        "",
        "| loop | steps a second | relative | peak memory (MiB) |",
        "|---|---|---|---|",
        f"| {PLAIN} | {rates[PLAIN]:.2f} | 1.00 | {memories[PLAIN]} |",
        f"| {PACK} | {rates[PACK]:.2f} | {relative:.2f} | {memories[PACK]} |",
        "",
        f"The goal, at least {GOAL:.1f} of the plain loop's steps a second, is "
        + ("reached." if relative >= GOAL else "not reached."),
    ]
    everything = {
        "threads": arguments.threads,
        "trained_weights": trained,
        "largest_relative_difference_of_losses": difference,
        "seconds_by_step": seconds,
        "steps_a_second": rates,
        "ratios": ratios,
        "relative": relative,
        "peak_memory_mib": memories,
    }
    write_results("identity_prior_training", everything, lines)
