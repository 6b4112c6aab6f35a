"""Training a subject against textual inversion: `python -m benchmarks subject_embedding_training`.

All train on the same images of the demo checkpoint with the same draws:

- "diffusers' loop" is that of diffusers' textual_inversion.py: the whole table of word vectors requires a gradient, and
  after each step of the optimizer all rows but the new ones are put back;
- "plain loop" trains the new vectors alone, calling the same UNet and text encoder modules directly;
- the pack's Train Subject Embedding, kind "word", which is the same work as both;
- the same with kind "output", which needs no gradient through the text encoder.

That the first three do the same work is checked: their losses must agree, and all four must evaluate the network as
often. The runs alternate; given are medians over the rounds, of the median step of each run and of its ratio to
diffusers' loop in the same round (what else a machine does changes slower than rounds do), and the highest memory of a
process that does one run of one of them alone. Writes benchmarks/results/subject_embedding_training.json and .md.
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
from identity_edit_pack.demo_world import family
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.hifi_tuner.subject_embedding import OUTPUT, WORD
from identity_edit_pack.pipelines.hifi_tuner.train_subject_embedding import SubjectSettings, train_subject_embedding
from identity_edit_pack.pipelines.subjects.word_vectors import mark_subject
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

DIFFUSERS, PLAIN = "diffusers' loop", "plain loop"
PACK_WORD, PACK_OUTPUT = "Train Subject Embedding, word", "Train Subject Embedding, output"
GOAL = 1.0
"""Steps a second of the pack relative to diffusers' loop."""
CLASS_WORD, TOKEN = "cat", "sks"
TOKENS = SubjectSettings.tokens
DRAWS = "shared vectors"
"""The name under which the pack draws the batches of its first phase."""

Outcome = tuple[list[float], list[float], int]
"""Seconds and loss of every step, and model calls."""


def draw_images(vae: Any, seed: int) -> TrainingImages:
    """Four images of one held-out cat with their masks."""
    shown, captions = draw_subject(random.Random(seed), CLASS_WORD, TOKEN)
    images, masks = [], []
    for number, one in enumerate(shown):
        image, mask = render(one, seed + number)
        images.append(torch.from_numpy(np.array(image)).float() / 255)
        masks.append(torch.from_numpy(np.array(mask)).float())
    return training_images.encode_images(vae, images, captions, masks)


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


def by_pack(kind: str, model: Any, clip: Any, images: TrainingImages, training: SubjectSettings) -> Outcome:
    ends: list[float] = []
    evaluations: list[int] = []

    def progress(*_: Any) -> None:
        memory.synchronize()
        ends.append(time.perf_counter())
        evaluations.append(counted.number)

    settings = dataclasses.replace(training, kind=kind)
    with torch.inference_mode(), Evaluations(model) as counted:  # as in ComfyUI
        _, run = train_subject_embedding(model, clip, images, settings, progress=progress)
    # The sample at the end is made before the last step is reported, and is no part of the training.
    return np.diff(ends).tolist()[:-1], run.losses, evaluations[-2] + 1


def by_loop(whole_table: bool, model: Any, clip: Any, images: TrainingImages, training: SubjectSettings) -> Outcome:
    """The loop of diffusers' textual_inversion.py with the networks called directly."""
    networks = Networks.of(model, clip)
    device = networks.device
    embedding = networks.text_encoder.get_input_embeddings()
    hooks = networks.copying_before_norms()
    table = embedding.weight
    before = table.detach().clone()
    # The last words of the vocabulary before begin and end, which no caption uses, are the placeholder tokens.
    new = list(range(table.shape[0] - 2 - TOKENS, table.shape[0] - 2))
    word = clip.tokenize(CLASS_WORD)["l"][0][1][0]
    with torch.no_grad():
        table[new] = before[word]
    ids = {}
    for text in images.captions:
        places = iter(new)
        marked = mark_subject(clip, TOKEN, CLASS_WORD, TOKENS, text)["l"][0]
        ids[text] = torch.tensor([[next(places) if token is None else token for token, _ in marked]], device=device)
    if whole_table:
        variable = table.requires_grad_(True)
        others = torch.ones(table.shape[0], dtype=torch.bool, device=device)
        others[new] = False
    else:
        variable = before[new].clone().copy_(before[word]).requires_grad_(True)
        hooks.append(
            embedding.register_forward_hook(
                lambda _, inputs, output: output.index_put(_places(inputs[0], new), variable)
            )
        )
    optimizer = torch.optim.Adam([variable], lr=training.learning_rate)
    losses, ends = [], []
    with Evaluations(model) as counted:
        for step in range(training.steps):
            (chosen,) = training_images.batch_indices(images, 1, step, training.seed, DRAWS)
            generator = generator_of(training.seed, step, DRAWS)
            z_0 = engine.to_model_scale(model, images.latents[chosen])[None].to(device)
            t = torch.randint(networks.alphas_cumprod.shape[0], (1,), generator=generator).to(device)
            noise = torch.randn(z_0.shape, generator=generator).to(device)
            z = networks.noised(z_0, noise, t)
            context = networks.text_encoder(ids[images.captions[chosen]])[0]
            predicted = networks.unet(z, t.float(), context=context, transformer_options={})
            mask = images.masks[chosen]
            weights = torch.ones_like(z_0[:, :1]) if mask is None else mask[None, None].to(device)
            loss = (weights * (predicted - noise) ** 2).sum() / (z_0.shape[1] * weights.sum())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if whole_table:
                with torch.no_grad():
                    table[others] = before[others]
            losses.append(float(loss.detach()))
            memory.synchronize()
            ends.append(time.perf_counter())
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        table.requires_grad_(False).copy_(before)
    return np.diff(ends).tolist()[:-1], losses, counted.number


def _places(tokens: torch.Tensor, new: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each placeholder token, in their order."""
    columns = [int((tokens[0] == token).nonzero()[0]) for token in new]
    return torch.zeros(len(new), dtype=torch.long, device=tokens.device), torch.tensor(columns, device=tokens.device)


METHODS: dict[str, Callable[[Any, Any, TrainingImages, SubjectSettings], Outcome]] = {
    DIFFUSERS: partial(by_loop, True),
    PLAIN: partial(by_loop, False),
    PACK_WORD: partial(by_pack, WORD),
    PACK_OUTPUT: partial(by_pack, OUTPUT),
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
        images = draw_images(vae, arguments.seed)
    names = [arguments.only] if arguments.only else list(METHODS)
    training = SubjectSettings(
        class_word=CLASS_WORD,
        token=TOKEN,
        steps=arguments.steps + WARM_UP + 2,
        regularization_weight=0.0,
        updates_per_step=0,
        precision="float32",
        seed=arguments.seed,
        sample_steps=1,
    )
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {}
    evaluations: dict[str, int] = {}
    for name in in_turn(names, arguments):
        times, losses[name], evaluations[name] = METHODS[name](model, clip, images, training)
        seconds[name].append(times[WARM_UP:])
    if arguments.only:
        print(json.dumps({"peak_memory_mib": memory.highest_of_this_process()}))
        return

    difference = difference_of_losses(losses, [PLAIN, PACK_WORD], DIFFUSERS)
    if len(set(evaluations.values())) != 1:
        raise SystemExit(f"The loops evaluate the network differently often: {evaluations}.")
    speeds = Speeds.of(seconds, DIFFUSERS)
    rates, ratios, relative = speeds.rates, speeds.ratios, speeds.relative
    memories = {name: peak_memory("subject_embedding_training", name, arguments) for name in names}
    lines = [
        "# Training a subject's embeddings: speed and memory",
        "",
        f"{made_by()}: medians of {arguments.runs} rounds of runs of {arguments.steps} steps, "
        f"{TOKENS} vectors, one image a step, {arguments.threads} threads, float32. The losses of the three loops of "
        f"textual inversion agree to {difference:.1e}; each evaluates the network {evaluations[DIFFUSERS]} times in "
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
        f"The goal, at least {GOAL:.1f} of the steps a second of diffusers' loop, is "
        + " and ".join(
            f"{'reached' if relative[name] >= GOAL else 'not reached'} by {name}" for name in (PACK_WORD, PACK_OUTPUT)
        )
        + ".",
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
    write_results("subject_embedding_training", everything, lines)
