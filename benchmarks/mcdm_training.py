"""Training an MCDM against a plain loop: `python -m benchmarks mcdm_training`.

Both train all weights of the demo checkpoint's UNet, inflated to eight input channels, and the image embedding on the
same pairs with the same draws: the pack's `train_mcdm`, and a loop as diffusers' train_instruct_pix2pix.py has it,
which calls the same modules directly, with torch's AdamW and diffusers' EMAModel. Both begin from images that are
encoded already; the loop encodes the prompts in every step, as that script does. That both do the same work is checked:
their losses must agree. The runs alternate; given are medians over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import random
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
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

from . import training_runs as runs
from .harness import load_checkpoint

PACK = "Train MCDM"
SETTINGS = MCDMSettings(precision="float32", checkpointing=False, sample_steps=1)

Parts = tuple[Any, Any, Any, Any]


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


def train_by_pack(parts: Parts, pairs: list[PairFiles], settings: MCDMSettings, folder: str) -> runs.Outcome:
    train = partial(train_mcdm.train_mcdm, *parts, pairs, settings, folder)
    return runs.by_pack(parts[0].model.diffusion_model, train)


def train_by_plain_loop(parts: Parts, pairs: list[PairFiles], settings: MCDMSettings, folder: str) -> runs.Outcome:
    """The loop of diffusers' train_instruct_pix2pix.py with the networks called directly."""
    base, clip, vae, clip_vision = parts
    model = as_edit_model(base)
    encoded = encoded_pairs.encode_pairs(pairs, vae, clip_vision, folder)
    networks = runs.Networks.of(model, clip)
    device = networks.device
    start = generator_of(settings.seed, 0, "image embedding")
    embedding = mcdm.new_embedding(model, clip_vision, encoded.latent_shape, start, SETTINGS.image_tokens).to(device)
    weights = [*networks.unet.parameters(), *embedding.parameters()]
    for weight in weights:
        weight.requires_grad_(True)
    average = EMAModel(weights, decay=settings.ema_decay)

    def loss_of(step: int) -> torch.Tensor:
        batch = train_mcdm.draw_mcdm_batch(encoded, settings, networks.alphas_cumprod.shape[0], step)
        texts, latents = [], []
        for number, same, bits in zip(batch.chosen, batch.reconstructs.tolist(), batch.dropped.tolist(), strict=True):
            prompts = encoded.source_prompts if same else encoded.target_prompts
            texts.append("" if bits & TEXT_BIT else prompts[number])
            latents.append(encoded.latents("source" if same else "target", [number]))
        tokens = [[token for token, _ in clip.tokenize(text)["l"][0]] for text in texts]
        with torch.no_grad():
            text = networks.text_encoder(torch.tensor(tokens, device=device))[0]
        source = encoded.latents("source", batch.chosen)
        image = embedding(encoded.tokens(batch.chosen).to(device), engine.to_model_scale(model, source).to(device))
        without_image = torch.tensor([bool(bits & IMAGE_BIT) for bits in batch.dropped.tolist()], device=device)
        context = torch.cat([text, torch.where(without_image[:, None, None], text, image)], dim=1)
        kept = torch.tensor([0.0 if bits & SPATIAL_BIT else 1.0 for bits in batch.dropped.tolist()])
        spatial = (source * kept[:, None, None, None]).to(device)
        z_0 = engine.to_model_scale(model, torch.cat(latents)).to(device)
        noise, t = batch.noise.to(device), batch.t.to(device)
        z = torch.cat([networks.noised(z_0, noise, t), spatial], dim=1)
        return torch.nn.functional.mse_loss(networks.predicted(z, t, context).float(), noise)

    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return runs.by_loop(
        networks.unet, optimizer, settings.steps, loss_of, settings.gradient_clip, lambda: average.step(weights)
    )


METHODS: runs.Methods = {"plain loop": train_by_plain_loop, PACK: train_by_pack}
OPTIONS = runs.training_options(METHODS, steps=8)


@contextlib.contextmanager
def prepared(arguments: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
    model, clip, vae = load_checkpoint(arguments.checkpoint, model_options={"dtype": torch.float32})
    parts = (model, clip, vae, load_clip_vision())
    settings = dataclasses.replace(SETTINGS, steps=arguments.steps + runs.WARM_UP + 2, seed=arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        pairs = draw_pairs(Path(folder), 32, arguments.seed)
        encoded_pairs.encode_pairs(pairs, vae, parts[3], folder)
        yield parts, pairs, settings, folder


def alone(arguments: argparse.Namespace) -> dict[str, Any]:
    with prepared(arguments) as work:
        return runs.run_alone(METHODS, work, arguments)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    with prepared(arguments) as work:
        trained = sum(parameter.numel() for parameter in work[0][0].model.diffusion_model.parameters())
        return runs.compare("mcdm_training", METHODS, [PACK], work, arguments) | {"trained_weights": trained}


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    about = f"{figures['trained_weights'] / 1e6:.1f} million weights, {SETTINGS.batch_size} pairs a step"
    return runs.training_table(figures, arguments, "an MCDM", about, [PACK])
