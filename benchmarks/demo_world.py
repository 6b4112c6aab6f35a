"""How good the demo world is: `python -m benchmarks demo_world`.

Scores, by the committed attribute classifier, clean renders (how far it can be trusted), the autoencoder's
reconstructions of them (the ceiling of everything the demo checkpoint makes) and images sampled for captions drawn at
random, with DDIM and the best of a few guidance scales. The checkpoint is loaded and sampled by ComfyUI's own code.
Writes benchmarks/results/demo_world.json, demo_world.md and two sheets of images.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.sd
import numpy as np
import torch
from identity_edit_pack.demo_world import family
from identity_edit_pack.demo_world.attributes import CAPTION_TEMPLATES, Attributes, caption
from identity_edit_pack.demo_world.classifier import AttributeClassifier, classify, load_classifier
from identity_edit_pack.demo_world.images import HEADS, evaluation_set, labels_of
from identity_edit_pack.demo_world.renderer import render
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from tqdm import tqdm

from .harness import DEMO_CHECKPOINT, RESULTS, made_by, write_results

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
RENDER_GOAL = 0.97
PSNR_GOAL = 26.0


Sample = tuple[Attributes, int]
"""What an image shows, and the seed of its rendering or its noise."""


def shares(classifier: AttributeClassifier, images: torch.Tensor, pairs: list[Sample]) -> dict[str, float]:
    """Share of right answers for every attribute, over the images that show it."""
    answers = classify(classifier, images)
    labels = torch.tensor([labels_of(attributes) for attributes, _ in pairs])
    result = {}
    for index, name in enumerate(HEADS):
        shown = labels[:, index] >= 0
        result[name] = float((answers[name].cpu() == labels[:, index])[shown].float().mean())
    return result


@torch.no_grad()
def sample(
    checkpoint: tuple[Any, Any, Any], pairs: list[Sample], guidance_scale: float, steps: int, batch: int
) -> torch.Tensor:
    """One image [128, 128, 3] in [0, 1] for the caption of each pair; its noise is drawn from its own seed."""
    model, clip, vae = checkpoint

    def embed(texts: list[str]) -> list[list[Any]]:
        return [[torch.cat([clip.encode_from_tokens(clip.tokenize(text)) for text in texts]), {}]]

    made = []
    for start in tqdm(range(0, len(pairs), batch), desc=f"guidance {guidance_scale}", unit="batch"):
        chosen = pairs[start : start + batch]
        generators = [torch.Generator().manual_seed(seed) for _, seed in chosen]
        latents = comfy.sample.sample(
            model,
            torch.stack([torch.randn(4, 16, 16, generator=generator) for generator in generators]),
            steps,
            guidance_scale,
            "ddim",
            "ddim_uniform",
            embed([caption(attributes, seed % CAPTION_TEMPLATES) for attributes, seed in chosen]),
            embed([""]),
            torch.zeros(len(chosen), 4, 16, 16),
            disable_pbar=True,
            seed=0,
        )
        made.append(vae.decode(latents).cpu())
    return torch.cat(made)


def save_sheet(name: str, rows: list[torch.Tensor]) -> None:
    """The first images of the run, as they came."""
    sheet = torch.cat([torch.cat(list(row), dim=1) for row in rows])
    Image.fromarray((sheet * 255).round().to(torch.uint8).numpy()).save(RESULTS / name, quality=90)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--captions", type=int, default=500, help="captions to sample (default 500)")
    parser.add_argument("--tuning", type=int, default=100, help="captions on which the guidance scale is chosen")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps (default 50)")
    parser.add_argument("--batch", type=int, default=20, help="images sampled at once (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="draws the captions and the noise (default 0)")
    parser.add_argument("--checkpoint", type=Path, default=DEMO_CHECKPOINT)


def main(arguments: argparse.Namespace) -> None:

    family.register()
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(arguments.checkpoint))
    checkpoint = (model, clip, vae)
    classifier = load_classifier()

    pairs = evaluation_set(arguments.captions, seed=arguments.seed)
    renders = torch.stack([torch.from_numpy(np.array(render(*pair)[0])) for pair in pairs]).float() / 255
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(chunk)).cpu() for chunk in renders.split(arguments.batch)])
    quality = np.mean(
        [peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1) for a, b in zip(renders, decoded, strict=True)]
    )

    tuning = evaluation_set(arguments.tuning, seed=arguments.seed + 1)
    tried = {}
    for scale in GUIDANCE_SCALES:
        found = shares(classifier, sample(checkpoint, tuning, scale, arguments.steps, arguments.batch), tuning)
        tried[scale] = float(np.mean([found[name] for name in GOALS]))
    best = max(tried, key=lambda scale: tried[scale])
    samples = sample(checkpoint, pairs, best, arguments.steps, arguments.batch)

    columns = {
        name: shares(classifier, images, pairs)
        for name, images in (("renders", renders), ("reconstructions", decoded), ("samples", samples))
    }
    lines = [
        "# The demo world, scored by its attribute classifier",
        "",
        f"{made_by()}: {arguments.captions} captions drawn at random (seed {arguments.seed}), DDIM "
        f"{arguments.steps} steps, guidance scale {best} (the best of "
        f"{', '.join(str(scale) for scale in GUIDANCE_SCALES)} on {arguments.tuning} other captions).",
        "",
        f"Autoencoder: {quality:.2f} dB on the renders (goal {PSNR_GOAL} dB).",
        "",
        f"| attribute | renders (goal {RENDER_GOAL:.2f}) | reconstructions | samples | goal for samples | reached |",
        "|---|---|---|---|---|---|",
    ]
    for name in HEADS:
        goal = GOALS.get(name)
        reached = "" if goal is None else "yes" if columns["samples"][name] >= goal else "no"
        cells = " | ".join(f"{column[name]:.3f}" for column in columns.values())
        lines.append(f"| {name.replace('_', ' ')} | {cells} | {'' if goal is None else f'{goal:.2f}'} | {reached} |")
    figures = {
        "seed": arguments.seed,
        "captions": arguments.captions,
        "steps": arguments.steps,
        "guidance_scale": best,
        "mean_share_by_guidance_scale": tried,
        "autoencoder_psnr_db": float(quality),
        "shares": columns,
    }
    write_results("demo_world", figures, lines)
    save_sheet("demo_world_reconstructions.jpg", [renders[:12], decoded[:12], renders[12:24], decoded[12:24]])
    save_sheet("demo_world_samples.jpg", [samples[start : start + 12] for start in range(0, 48, 12)])
