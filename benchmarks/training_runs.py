"""What the benchmarks of trainings share: images, loops and their networks, runs in turn, and the table."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import numpy as np
import torch
from identity_edit_pack.demo_world.attributes import Attributes, caption, random_attributes
from identity_edit_pack.pipelines import engine
from tqdm import tqdm

from . import memory
from .harness import CHECKPOINT, SEED, THREADS, Options, markdown

POSES = ("standing", "sitting", "lying", "standing")
PLACES = ("grass", "room", "snow", "night")
WARM_UP = 2
"""Steps of every run that are not counted."""
GOAL = 1.0
"""Steps a second relative to the reference's."""
Outcome = tuple[list[float], list[float], int]
"""Seconds and loss of every step, and model calls."""
Methods = dict[str, Callable[..., Outcome]]


def training_options(methods: Collection[str], steps: int) -> Options:
    """The options of a benchmark with so many steps a run."""
    return {
        **CHECKPOINT,
        "runs": (9, "runs of each loop, alternating (9)"),
        "steps": (steps, f"training steps of a run ({steps})"),
        **THREADS,
        **SEED,
        "only": (None, "do one run by one loop and print its memory use", {"choices": methods}),
    }


def draw_subject(generator: random.Random, class_word: str, token: str) -> tuple[list[Attributes], list[str]]:
    """Four images of one held-out subject of a class, and their captions with its token."""
    subject = random_attributes(generator, "figure", held_out=True)
    while subject.species != class_word:
        subject = random_attributes(generator, "figure", held_out=True)
    name = caption(subject).split(f" {class_word}")[0]
    shown = [subject.replace(pose=pose, place=place) for pose, place in zip(POSES, PLACES, strict=True)]
    return shown, [caption(one).replace(name, f"a {token}") for one in shown]


# -- runs -------------------------------------------------------------------------------------------------------------


class Steps:
    """`with Steps(unet) as steps: ...`: the clock at the end of each step (`done`), and forward passes of the UNet, or
    of the copy of it that a training makes."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self._kind, self._number = type(unet), 0
        self.ends: list[float] = []
        self.model_calls: list[int] = []

    def _count(self, module: torch.nn.Module, *_: Any) -> None:
        self._number += type(module) is self._kind

    def __enter__(self) -> Steps:
        self._handle = torch.nn.modules.module.register_module_forward_pre_hook(self._count)
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()

    def done(self, *_: Any) -> None:
        memory.synchronize()
        self.ends.append(time.perf_counter())
        self.model_calls.append(self._number)

    def outcome(self, losses: list[float]) -> Outcome:
        """The pack makes a sample before it reports the last step, whose time is therefore left out."""
        return np.diff(self.ends).tolist()[:-1], losses, self.model_calls[-2] + 1


def by_pack(unet: torch.nn.Module, train: Callable[..., Any]) -> Outcome:
    """A training of the pack, to be called with `progress`."""
    with torch.inference_mode(), Steps(unet) as steps:  # as in ComfyUI
        _, run = train(progress=steps.done)
    return steps.outcome(run.losses)


def by_loop(
    unet: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    count: int,
    loss_of: Callable[[int], torch.Tensor],
    gradient_clip: float | None = None,
    after: Callable[[], None] = lambda: None,
) -> Outcome:
    """A plain loop of so many steps; `after` is called after each of the optimizer."""
    losses = []
    with Steps(unet) as steps:
        for step in range(count):
            loss = loss_of(step)
            loss.backward()
            if gradient_clip is not None:
                torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], gradient_clip)
            optimizer.step()
            after()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            steps.done()
    return steps.outcome(losses)


@dataclass(frozen=True)
class Networks:
    """A checkpoint's networks for a loop that calls them directly.

    Attributes:
        unet, text_encoder: ComfyUI's modules, without gradients of their weights.
        device: where they are.
        alphas_cumprod: [T] float32 of the model's timesteps, on the device.
    """

    unet: Any
    text_encoder: Any
    device: torch.device
    alphas_cumprod: torch.Tensor

    @classmethod
    def of(cls, model: Any, clip: Any) -> Networks:
        comfy.model_management.load_models_gpu([model, clip.patcher], force_full_load=True)
        sampling = engine.require(model).sampling
        unet, text_encoder = model.model.diffusion_model, clip.cond_stage_model.clip_l.transformer
        for module in (unet, text_encoder):
            module.requires_grad_(False)
        alphas_cumprod = (1.0 / (1.0 + sampling.sigmas.double() ** 2)).float().to(model.load_device)
        return cls(unet, text_encoder, model.load_device, alphas_cumprod)

    def noised(self, z_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps."""
        alpha_bar = self.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return alpha_bar.sqrt() * z_0 + (1 - alpha_bar).sqrt() * noise

    def predicted(self, z: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.unet(z, t.float(), context=context, transformer_options={})

    def copying_before_norms(self) -> list[Any]:
        """Hooks without which the text encoder has no backward pass: ComfyUI's adds in place to what its normalizations
        keep for it."""
        norms = [module for module in self.text_encoder.modules() if isinstance(module, torch.nn.LayerNorm)]
        return [norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),)) for norm in norms]


# -- figures ----------------------------------------------------------------------------------------------------------


def run_alone(methods: Methods, work: tuple[Any, ...], arguments: argparse.Namespace) -> dict[str, Any]:
    """One run by one loop, in a process of its own: its highest memory in MiB, see `memory.highest_of_this_process`."""
    methods[arguments.only](*work)
    return {"peak_memory_mib": memory.highest_of_this_process()}


def compare(
    benchmark: str, methods: Methods, same: Sequence[str], work: tuple[Any, ...], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Run all loops in turn, each round beginning with another one, and then each alone for its memory.

    Args:
        benchmark: its name.
        methods: what is called with `work`, by name; the first is the reference.
        same: those that must have the reference's losses.
    """
    names = list(methods)
    reference = names[0]
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    losses, calls = {}, {}
    for run in tqdm(range(arguments.runs), unit="round"):
        first = run % len(names)
        for name in (*names[first:], *names[:first]):
            times, losses[name], calls[name] = methods[name](*work)
            seconds[name].append(times[WARM_UP:])
    pairs = [pair for name in same for pair in zip(losses[name], losses[reference], strict=True)]
    difference = max(abs(ours - theirs) / theirs for ours, theirs in pairs)
    if difference > 0.02 or len(set(calls.values())) != 1:
        raise SystemExit(
            f"The loops do not do the same work: losses differ by up to {difference:.1%}, model calls are {calls}."
        )
    rates = {name: [1.0 / statistics.median(run) for run in runs] for name, runs in seconds.items()}
    ratios = {n: [a / b for a, b in zip(each, rates[reference], strict=True)] for n, each in rates.items()}
    return {
        "threads": arguments.threads,
        "largest_relative_difference_of_losses": difference,
        "network_evaluations": calls,
        "seconds_by_step": seconds,
        "steps_a_second": {name: statistics.median(each) for name, each in rates.items()},
        "ratios": ratios,
        "relative": {name: statistics.median(each) for name, each in ratios.items()},
        "peak_memory_mib": {name: memory.in_a_process(benchmark, name, arguments)["peak_memory_mib"] for name in names},
    }


def training_table(
    figures: dict[str, Any], arguments: argparse.Namespace, title: str, about: str, goals: Sequence[str]
) -> list[str]:
    """A row for each loop, and whether those of `goals` are as fast as the reference."""
    rates, relative, calls = figures["steps_a_second"], figures["relative"], figures["network_evaluations"]
    reference = next(iter(rates))
    reached = [f"{'reached' if relative[name] >= GOAL else 'not reached'} by {name}" for name in goals]
    return [
        f"Training {title}: speed and memory",
        f"medians of {arguments.runs} rounds of runs of {arguments.steps} steps, {about}, {arguments.threads} threads, "
        f"float32. The losses of loops that do the same work agree to "
        f"{figures['largest_relative_difference_of_losses']:.1e}; each evaluates the network {calls[reference]} times "
        f"in {arguments.steps + WARM_UP + 2} steps.",
        *markdown(
            ("loop", "steps a second", "relative", "from", "to", "peak memory (MiB)"),
            (
                (name, *(f"{each:.2f}" for each in (rate, relative[name], min(ratios), max(ratios))), peak)
                for (name, rate), ratios, peak in zip(
                    rates.items(), figures["ratios"].values(), figures["peak_memory_mib"].values(), strict=True
                )
            ),
        ),
        "",
        f"The goal, at least {GOAL:.1f} of the steps a second of {reference}, is {' and '.join(reached)}.",
    ]
