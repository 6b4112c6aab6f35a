"""Training a style attention against a plain loop: `python -m benchmarks style_attention_training`.

Both train the mapping network and the style cross-attention of the demo checkpoint on the same images with the same
draws: the pack's `train_style_attention`, and a plain loop as the training scripts of IP-Adapter and the w-plus-adapter
have it, which calls the same UNet and text encoder modules directly, with the style cross-attention as equations 3 and
4 of Gu et al. 2025 write it (torch's scaled dot product attention, then the text's own output projection) in a forward
hook behind every text cross-attention, and torch's AdamW. The loop encodes the captions in every step, as those scripts
do. That both do the same work is checked: their losses must agree, and both must evaluate the network as often. The
runs alternate; given are medians over the rounds of the median step of each run and of its ratio to the plain loop's in
the same round, and the highest memory of a process that does one run of one of them alone. Writes
benchmarks/results/style_attention_training.json and .md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.sd
import numpy as np
import torch
from identity_edit_pack.attention.style_cross_attention import layer_sizes, text_layers
from identity_edit_pack.demo_world import family
from identity_edit_pack.demo_world.attributes import random_attributes
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.pidiff.style_attention import ROW_GROUPS, StyleNetwork, parse_row_groups
from identity_edit_pack.pipelines.pidiff.train import StyleSettings, train_style_attention
from identity_edit_pack.pipelines.pidiff.w_plus import WPlus
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
    in_turn,
    peak_memory,
)

PACK, PLAIN = "Train Style Attention", "plain loop"
GOAL = 1.0
"""Steps a second of the pack relative to the plain loop."""
IMAGES, ROWS, WIDTH = 6, 18, 512
"""As many images as in Gu et al. 2025, and the form of e4e's styles; what is in them does not change the cost."""
SETTINGS = StyleSettings(pseudo_word="sks", precision="float32", sample_steps=1)
DRAWS = "style attention"
"""The name under which the pack draws its batches."""

Outcome = tuple[list[float], list[float], int]
"""Seconds and loss of every step, and model calls."""


def draw_images(vae: Any, seed: int) -> tuple[TrainingImages, WPlus]:
    """Six portraits of one person, and random styles for them."""
    generator = random.Random(seed)
    person = random_attributes(generator, "portrait")
    images = [torch.from_numpy(np.array(render(person, seed + number)[0])).float() / 255 for number in range(IMAGES)]
    styles = torch.randn(IMAGES, ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))
    encoded = training_images.encode_images(vae, images, [""] * IMAGES)
    return encoded, WPlus(styles, torch.zeros(ROWS, WIDTH), "random")


class Evaluations:
    """`with Evaluations(model) as counted: work()`; `counted.number` forward passes of the UNet."""

    def __init__(self, model: Any) -> None:
        self.number = 0
        self._unet = model.model.diffusion_model

    def _count(self, *_: Any) -> None:
        self.number += 1

    def __enter__(self) -> Evaluations:
        self._handle = self._unet.register_forward_pre_hook(self._count)
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()


def by_pack(model: Any, clip: Any, images: TrainingImages, w_plus: WPlus, training: StyleSettings) -> Outcome:
    ends: list[float] = []
    evaluations: list[int] = []

    def progress(*_: Any) -> None:
        memory.synchronize()
        ends.append(time.perf_counter())
        evaluations.append(counted.number)

    with torch.inference_mode(), Evaluations(model) as counted:  # as in ComfyUI
        _, run = train_style_attention(model, clip, images, w_plus, training, progress=progress)
    # The sample at the end is made before the last step is reported, and is no part of the training.
    return np.diff(ends).tolist()[:-1], run.losses, evaluations[-2] + 1


def by_plain_loop(model: Any, clip: Any, images: TrainingImages, w_plus: WPlus, training: StyleSettings) -> Outcome:
    networks = Networks.of(model, clip)
    device = networks.device
    layers = text_layers(networks.unet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        groups = parse_row_groups(ROW_GROUPS, ROWS)
        own = StyleNetwork(groups, WIDTH, engine.context_channels(model), layer_sizes(layers)).to(device)
    tokens: torch.Tensor | None = None

    def add_style(attention: Any, key: Any, module: Any, inputs: Any, text: torch.Tensor) -> torch.Tensor:
        """Out + SCA as equations 3 and 4 write them."""
        q, k, v = attention.to_q(text), attention.to_k(tokens), attention.to_v(tokens)
        heads = [part.unflatten(-1, (module.heads, -1)).transpose(1, 2) for part in (q, k, v)]
        attended = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return text + torch.nn.functional.linear(attended, module.to_out[0].weight)

    hooks = []
    for key, layer in layers.items():
        for part in ("to_q", "to_k", "to_v"):
            with torch.no_grad():
                getattr(own.attention[key], part).weight.copy_(getattr(layer.block.attn2, part).weight)
        hooks.append(layer.block.attn2.register_forward_hook(partial(add_style, own.attention[key], key)))
    rows, average = w_plus.rows.to(device), w_plus.average.to(device)
    ids = {
        text: [token for token, _ in clip.tokenize(text)["l"][0]]
        for text in ("", *(SETTINGS.caption(template) for template in SETTINGS.templates))
    }
    optimizer = torch.optim.AdamW(own.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    losses, ends = [], []
    with Evaluations(model) as counted:
        for step in range(training.steps):
            chosen = training_images.batch_indices(images, SETTINGS.batch_size, step, training.seed, DRAWS)
            generator = generator_of(training.seed, step, DRAWS)
            z_0 = torch.stack([engine.to_model_scale(model, images.latents[number]) for number in chosen]).to(device)
            t = torch.randint(networks.alphas_cumprod.shape[0], (len(chosen),), generator=generator).to(device)
            noise = torch.randn(z_0.shape, generator=generator).to(device)
            drawn = torch.randint(len(SETTINGS.templates), (len(chosen),), generator=generator).tolist()
            without = (torch.rand(len(chosen), generator=generator) < SETTINGS.text_drop).tolist()
            captions = [
                "" if dropped else SETTINGS.caption(SETTINGS.templates[number])
                for number, dropped in zip(drawn, without, strict=True)
            ]
            with torch.no_grad():
                context = networks.text_encoder(torch.tensor([ids[text] for text in captions], device=device))[0]
            styles = rows[chosen] + SETTINGS.style_noise * torch.randn(rows[chosen].shape, generator=generator).to(
                device
            )
            dropped = torch.rand(len(chosen), generator=generator).to(device) < SETTINGS.style_drop
            tokens = own.mapping(torch.where(dropped[:, None, None], average, styles), average)
            z = networks.noised(z_0, noise, t)
            predicted = networks.unet(z, t.float(), context=context, transformer_options={})
            loss = torch.nn.functional.mse_loss(predicted, noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            memory.synchronize()
            ends.append(time.perf_counter())
    for hook in hooks:
        hook.remove()
    return np.diff(ends).tolist()[:-1], losses, counted.number


METHODS: dict[str, Callable[[Any, Any, TrainingImages, WPlus, StyleSettings], Outcome]] = {
    PLAIN: by_plain_loop,
    PACK: by_pack,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser, METHODS, steps=10)


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)

    family.register()
    options = {"dtype": torch.float32}
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
        str(arguments.checkpoint), model_options=options, te_model_options=options
    )
    with torch.no_grad():
        images, w_plus = draw_images(vae, arguments.seed)
    names = [arguments.only] if arguments.only else list(METHODS)
    training = dataclasses.replace(SETTINGS, steps=arguments.steps + WARM_UP + 2, seed=arguments.seed)
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {}
    evaluations: dict[str, int] = {}
    for name in in_turn(names, arguments):
        times, losses[name], evaluations[name] = METHODS[name](model, clip, images, w_plus, training)
        seconds[name].append(times[WARM_UP:])
    if arguments.only:
        print(json.dumps({"peak_memory_mib": memory.highest_of_this_process()}))
        return

    difference = difference_of_losses(losses, [PACK], PLAIN)
    if len(set(evaluations.values())) != 1:
        raise SystemExit(f"The loops evaluate the network differently often: {evaluations}.")
    speeds = Speeds.of(seconds, PLAIN)
    rates, ratios, relative = speeds.rates, speeds.ratios, speeds.relative
    memories = {name: peak_memory("style_attention_training", name, arguments) for name in names}
    lines = [
        "# Training a style attention: speed and memory",
        "",
        f"{made_by()}: medians of {arguments.runs} rounds of runs of {arguments.steps} steps, "
        f"{SETTINGS.batch_size} of {IMAGES} images a step, {arguments.threads} threads, float32. The losses of "
        f"both loops agree to {difference:.1e}; each evaluates the network {evaluations[PLAIN]} times in "
        f"{training.steps} steps.",
        "",
        "| loop | steps a second | relative | from | to | peak memory (MiB) |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {rates[name]:.2f} | {relative[name]:.2f} | {min(ratios[name]):.2f} | "
            f"{max(ratios[name]):.2f} | {memories[name]} |"
            for name in names
        ),
        "",
        f"The goal, at least {GOAL:.1f} of the plain loop's steps a second, is "
        + ("reached." if relative[PACK] >= GOAL else "not reached."),
    ]
    everything = {
        "threads": arguments.threads,
        "largest_relative_difference_of_losses": difference,
        "network_evaluations": evaluations,
        "seconds_by_step": seconds,
        "steps_a_second": rates,
        "ratios": ratios,
        "relative": relative,
        "peak_memory_mib": memories,
    }
    write_results("style_attention_training", everything, lines)
