"""What an edit by an MCDM costs: `python -m benchmarks mcdm_guidance`.

One 20-step edit with UniPC for each way of guidance, on the demo checkpoint inflated to eight input channels (its
weights change no cost): InstructPix2Pix's three terms by ComfyUI's own DualCFGGuider, and MCDM Guider's with the
paper's scales and with scales of which none cancels, each without and with a mask; and MCDM Edit Mask. Counted are
model calls and calls; the seconds are medians over runs that alternate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from identity_edit_pack.demo_world.clip_vision import load_clip_vision
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine.edit_model import as_edit_model
from identity_edit_pack.pipelines.engine.vision import vision_tag
from identity_edit_pack.pipelines.mcdm import model as mcdm
from identity_edit_pack.pipelines.mcdm.edit_mask import edit_mask
from identity_edit_pack.pipelines.mcdm.guidance import GuidanceScales, mcdm_guider
from tqdm import tqdm

from . import memory
from .harness import CHECKPOINT, THREADS, Options, load_checkpoint, markdown

STEPS = 20
BASELINE = "InstructPix2Pix, 3 terms (DualCFGGuider)"


class Counter:
    """Counts evaluations and calls of a model's clone, as a model function wrapper."""

    def __init__(self) -> None:
        self.evaluations = self.calls = 0

    def __deepcopy__(self, _: Any) -> Counter:
        return self

    def __call__(self, apply_model: Callable[..., torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
        self.evaluations += len(arguments["cond_or_uncond"])
        self.calls += 1
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])


OPTIONS: Options = {**CHECKPOINT, "runs": (5, "of each, alternating (5)"), **THREADS}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    base, clip, vae = load_checkpoint(arguments.checkpoint)
    model, vision = as_edit_model(base), load_clip_vision()
    latent_shape = (4, 16, 16)
    embedding = mcdm.new_embedding(model, vision, latent_shape, torch.Generator().manual_seed(0), mcdm.IMAGE_TOKENS)
    made = mcdm.MCDM(embedding, vision_tag(vision), engine.model_tag(model), latent_shape, {})
    counter = Counter()
    counted: Any = model.clone()
    counted.set_model_unet_function_wrapper(counter)
    image = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = mcdm.see_images(made, model, vision, vae, image)
        texts = [
            clip.encode_from_tokens_scheduled(clip.tokenize(text))
            for text in ("a portrait of a smiling person", "", "a portrait of a person")
        ]
    positive, negative, source = (mcdm.with_images(text, seen) for text in texts)
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:96, 32:96] = 1.0
    zeros = torch.zeros(1, *latent_shape)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)

    def sample(guider: Any) -> None:
        sampler = comfy.samplers.sampler_object("uni_pc")
        guider.sample(comfy.sample.prepare_noise(zeros, 0), zeros, sampler, sigmas, disable_pbar=True, seed=0)

    def guided(*scales_and_mask: Any) -> None:
        sample(mcdm_guider(counted, positive, negative, *scales_and_mask))

    def instruct_pix2pix() -> None:
        # As ComfyUI's own workflow has it: text and image, image alone, nothing; no image tokens.
        guider = Guider_DualCFG(counted)
        imaged = [[[entry[0][0], {**entry[0][1], mcdm.SPATIAL_OPTION: seen.latent}]] for entry in (texts[0], texts[1])]
        guider.set_conds(imaged[0], imaged[1], texts[1])
        guider.set_cfg(5.0, 3.0)
        sample(guider)

    ways: dict[str, Callable[[], Any]] = {BASELINE: instruct_pix2pix}
    for title, masked in (("MCDM", ()), ("MCDM with mask", (source, mask))):
        for scales in (GuidanceScales(), GuidanceScales(3.0, 2.0, 5.0)):
            name = f"{title}, scales {scales.image:g}, {scales.spatial:g}, {scales.text:g}"
            ways[name] = partial(guided, scales, *masked)
    ways["MCDM Edit Mask, 10 seeds"] = lambda: edit_mask(counted, positive, source, seen.latent)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    counts: dict[str, tuple[int, int]] = {}
    with torch.inference_mode():
        for run in tqdm(range(arguments.runs + 1), unit="run"):
            for name, way in ways.items():
                counter.evaluations = counter.calls = 0
                begin = time.perf_counter()
                way()
                memory.synchronize()
                if run:  # the first one warms up
                    seconds[name].append(time.perf_counter() - begin)
                counts[name] = counter.evaluations, counter.calls
    return {
        "threads": arguments.threads,
        "evaluations": {name: count[0] for name, count in counts.items()},
        "calls": {name: count[1] for name, count in counts.items()},
        "seconds": seconds,
    }


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    medians = {name: statistics.median(values) for name, values in figures["seconds"].items()}
    counts = [figures["evaluations"], figures["calls"]]
    return [
        "Cost of an edit by an MCDM",
        f"the demo checkpoint with eight input channels, 128x128, {STEPS} steps of UniPC, {arguments.threads} threads, "
        f"medians of {arguments.runs} runs.",
        *markdown(
            ("guidance", "model calls", "calls", "seconds", "relative"),
            (
                (name, *(count[name] for count in counts), f"{median:.2f}", f"{median / medians[BASELINE]:.2f}")
                for name, median in medians.items()
            ),
        ),
        "",
        "With the paper's scales the term of the image embedding alone cancels and is not evaluated. A mask costs one "
        "evaluation more a step, since the prompts differ in the last term only.",
    ]
