"""How good the demo world is: `python -m benchmarks demo_world`.

Scores, by the committed attribute classifier, clean renders (how far it can be trusted), the autoencoder's
reconstructions of them (the ceiling of everything the demo checkpoint makes) and images sampled for captions drawn at
random, with DDIM and the best of a few guidance scales. The checkpoint is loaded and sampled by ComfyUI's own code.
Writes benchmarks/results/demo_world.json, demo_world.md and two sheets of images; with `--checkpoint` of the flow
checkpoint, which is sampled with Euler's method, demo_world_flow.json and so on; with `--world harder`,
demo_world_harder.json, which also has the share of compositions that training has never shown.
"""

from __future__ import annotations

import argparse
from typing import Any

import comfy.model_sampling
import comfy.sample
import numpy as np
import torch
from identity_edit_pack.demo_world.attributes import CAPTION_TEMPLATES, Attributes, caption
from identity_edit_pack.demo_world.classifier import AttributeClassifier, classify
from identity_edit_pack.demo_world.harder import never_trained
from identity_edit_pack.demo_world.images import HEADS, labels_of
from identity_edit_pack.demo_world.renderer import render
from skimage.metrics import peak_signal_noise_ratio
from tqdm import tqdm

from .demo_worlds import WORLD, world_of
from .edits import embed, save_sheet
from .harness import CHECKPOINT, RESULTS, SEED, Options, markdown

GUIDANCE_SCALES = (2.0, 3.5, 5.0, 7.5)
# What the demo world's use needs, as shares of right answers.
GOALS = {
    "place": 0.95,
    "pose": 0.95,
    "species": 0.90,
    "color": 0.90,
    "costume": 0.90,
    "facing": 0.80,
    "pattern": 0.80,
    "expression": 0.80,
}
FLOW_GOALS, FLOW_MEAN_GOAL = dict.fromkeys(HEADS, 0.97), 0.99
RENDER_GOAL = 0.97
PSNR_GOAL = 26.0


Sample = tuple[Attributes, int]
"""What an image shows, and the seed of its rendering or its noise."""


def shares(classifier: AttributeClassifier, images: torch.Tensor, pairs: list[Sample]) -> dict[str, float]:
    """Share of right answers for every attribute, over the images that show it."""
    answers = classify(classifier, images)
    labels = torch.tensor([labels_of(attributes, classifier.choices) for attributes, _ in pairs])
    result = {}
    for index, name in enumerate(classifier.choices):
        shown = labels[:, index] >= 0
        result[name] = float((answers[name].cpu() == labels[:, index])[shown].float().mean())
    return result


@torch.no_grad()
def sample(
    checkpoint: tuple[Any, Any, Any], pairs: list[Sample], guidance_scale: float, steps: int, batch: int
) -> torch.Tensor:
    """One image [128, 128, 3] in [0, 1] for the caption of each pair; its noise is drawn from its own seed."""
    model, clip, vae = checkpoint
    sampler = ("euler", "simple") if is_flow(model) else ("ddim", "ddim_uniform")
    made = []
    for start in tqdm(range(0, len(pairs), batch), desc=f"guidance {guidance_scale}", unit="batch"):
        chosen = pairs[start : start + batch]
        generators = [torch.Generator().manual_seed(seed) for _, seed in chosen]
        noise = torch.stack([torch.randn(4, 16, 16, generator=generator) for generator in generators])
        positive = embed(clip, [caption(attributes, seed % CAPTION_TEMPLATES) for attributes, seed in chosen])
        latents = comfy.sample.sample(
            model, noise, steps, guidance_scale, *sampler, positive, embed(clip, [""]),
            torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip
        made.append(vae.decode(latents).cpu())
    return torch.cat(made)


def is_flow(model: Any) -> bool:
    return isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)


OPTIONS: Options = {
    "captions": (500, "captions to sample (500)"),
    "tuning": (100, "captions on which the guidance scale is chosen"),
    "steps": (50, "sampling steps (50)"),
    "batch": (20, "images sampled at once (20)"),
    **WORLD,
    **SEED,
    **CHECKPOINT,
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    world = world_of(arguments)
    checkpoint, classifier = world.checkpoint(arguments.checkpoint), world.classifier()
    vae, is_harder = checkpoint[2], arguments.world == "harder"
    pairs = world.evaluation_set(arguments.captions, arguments.seed)
    renders = torch.stack([torch.from_numpy(np.array(render(*pair)[0])) for pair in pairs]).float() / 255
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(chunk)).cpu() for chunk in renders.split(arguments.batch)])
    quality = np.mean(
        [peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1) for a, b in zip(renders, decoded, strict=True)]
    )
    tuning = world.evaluation_set(arguments.tuning, arguments.seed + 1)
    tried = {}
    for scale in GUIDANCE_SCALES:
        found = shares(classifier, sample(checkpoint, tuning, scale, arguments.steps, arguments.batch), tuning)
        tried[scale] = float(np.mean([found[name] for name in GOALS]))
    best = max(tried, key=lambda scale: tried[scale])
    samples = sample(checkpoint, pairs, best, arguments.steps, arguments.batch)
    rows = [renders[:12], decoded[:12], renders[12:24], decoded[12:24]]
    name = "demo_world" + ("_flow" if is_flow(checkpoint[0]) else "_harder" if is_harder else "")
    save_sheet(RESULTS / f"{name}_reconstructions.jpg", rows)
    save_sheet(RESULTS / f"{name}_samples.jpg", [samples[start : start + 12] for start in range(0, 48, 12)])
    images = {"renders": renders, "reconstructions": decoded, "samples": samples}
    scored = {name: shares(classifier, each, pairs) for name, each in images.items()}
    if is_harder:
        new = [index for index, (attributes, _) in enumerate(pairs) if never_trained(attributes)]
        scored["samples never trained"] = shares(classifier, samples[new], [pairs[index] for index in new])
    return {
        "name": name,
        "flow": is_flow(checkpoint[0]),
        "seed": arguments.seed,
        "captions": arguments.captions,
        "steps": arguments.steps,
        "guidance_scale": best,
        "mean_share_by_guidance_scale": tried,
        "autoencoder_psnr_db": float(quality),
        "shares": scored,
    }


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    columns, rows = figures["shares"], []
    goals, sampler = (FLOW_GOALS, "Euler") if figures["flow"] else (GOALS, "DDIM")
    is_harder = arguments.world == "harder"
    for name in columns["samples"]:
        goal = None if is_harder else goals.get(name)
        reached = "" if goal is None else "yes" if columns["samples"][name] >= goal else "no"
        shown = (f"{column[name]:.3f}" for column in columns.values())
        rows.append((name.replace("_", " "), *shown, "" if goal is None else f"{goal:.2f}", reached))
    _, *titles = columns
    of_columns = f"renders (goal {RENDER_GOAL:.2f})", *titles, "goal for samples", "reached"
    if is_harder:
        rows, of_columns = [row[:-2] for row in rows], of_columns[:-2]
    return [
        f"The {world_of(arguments).title}, scored by its attribute classifier",
        f"{arguments.captions} captions drawn at random (seed {arguments.seed}), {sampler} {arguments.steps} steps, "
        f"guidance scale {figures['guidance_scale']} (the best of {', '.join(map(str, GUIDANCE_SCALES))} on "
        f"{arguments.tuning} other captions).",
        f"Autoencoder: {figures['autoencoder_psnr_db']:.2f} dB on the renders (goal {PSNR_GOAL} dB).",
        f"Mean of the samples: {np.mean(list(columns['samples'].values())):.3f}"
        + (f" (goal {FLOW_MEAN_GOAL})." if figures["flow"] else "."),
        "",
        *markdown(("attribute", *of_columns), rows),
    ]
