"""What the benchmarks of trainings share: images, runs in turn, the plain loops' networks, tables of times."""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from identity_edit_pack.demo_world.attributes import Attributes, caption, random_attributes
from identity_edit_pack.pipelines import engine
from tqdm import tqdm

from . import memory
from .harness import DEMO_CHECKPOINT

POSES = ("standing", "sitting", "lying", "standing")
PLACES = ("grass", "room", "snow", "night")
WARM_UP = 2
"""Steps of every run that are not counted."""


def add_training_arguments(parser: argparse.ArgumentParser, methods: Collection[str], steps: int) -> None:
    """The options of a benchmark with so many steps a run."""
    parser.add_argument("--checkpoint", type=Path, default=DEMO_CHECKPOINT)
    parser.add_argument("--runs", type=int, default=9, help="runs of each loop, alternating (default 9)")
    parser.add_argument("--steps", type=int, default=steps, help=f"training steps of a run (default {steps})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0, help="draws the images and all batches (default 0)")
    parser.add_argument("--only", choices=methods, help="do one run by one loop and print its memory use")


def draw_subject(generator: random.Random, class_word: str, token: str) -> tuple[list[Attributes], list[str]]:
    """Four images of one held-out subject of a class, and their captions with its token."""
    subject = random_attributes(generator, "figure", held_out=True)
    while subject.species != class_word:
        subject = random_attributes(generator, "figure", held_out=True)
    name = caption(subject).split(f" {class_word}")[0]
    shown = [subject.replace(pose=pose, place=place) for pose, place in zip(POSES, PLACES, strict=True)]
    return shown, [caption(one).replace(name, f"a {token}") for one in shown]


def in_turn(names: Sequence[str], arguments: argparse.Namespace) -> Iterator[str]:
    """The loops round by round, each round beginning with another one; a single run of one that is measured alone."""
    is_alone = bool(arguments.only)
    for run in tqdm(range(1 if is_alone else arguments.runs), unit="round", disable=is_alone):
        first = run % len(names)
        yield from [*names[first:], *names[:first]]


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

    def copying_before_norms(self) -> list[Any]:
        """Hooks without which the text encoder has no backward pass: ComfyUI's adds in place to what its normalizations
        keep for it."""
        norms = [module for module in self.text_encoder.modules() if isinstance(module, torch.nn.LayerNorm)]
        return [norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),)) for norm in norms]


def difference_of_losses(losses: Mapping[str, list[float]], names: Sequence[str], reference: str) -> float:
    """The largest relative difference from the reference's losses, by which is seen that the loops do the same work."""
    pairs = [pair for name in names for pair in zip(losses[name], losses[reference], strict=True)]
    difference = max(abs(ours - theirs) / theirs for ours, theirs in pairs)
    if difference > 0.02:
        raise SystemExit(f"The loops do not do the same work: their losses differ by up to {difference:.1%}.")
    return difference


@dataclass(frozen=True)
class Speeds:
    """Attributes, by loop:
    rates: steps a second, the median of its runs'.
    ratios: its rate relative to the reference's, round by round.
    relative: the ratios' median.
    """

    rates: dict[str, float]
    ratios: dict[str, list[float]]
    relative: dict[str, float]

    @classmethod
    def of(cls, seconds: Mapping[str, list[list[float]]], reference: str) -> Speeds:
        """From the seconds of each step of each run."""
        rates = {name: [1.0 / statistics.median(run) for run in runs] for name, runs in seconds.items()}
        ratios = {
            name: [ours / theirs for ours, theirs in zip(values, rates[reference], strict=True)]
            for name, values in rates.items()
        }
        medians = [{name: statistics.median(values) for name, values in part.items()} for part in (rates, ratios)]
        return cls(medians[0], ratios, medians[1])


def peak_memory(script: str, name: str, arguments: argparse.Namespace) -> int:
    """Highest memory of a process of its own that does one run, in MiB; see `memory.highest_of_this_process`."""
    return int(memory.in_a_process(script, name, arguments)["peak_memory_mib"])
