"""Training an identity prior against a plain loop: `python -m benchmarks identity_prior_training`.

Both train the same attention weights of the demo checkpoint on the same batches with the same draws: the pack's
`train_identity_prior`, and a loop as diffusers' DreamBooth script has it, which calls the same UNet and text encoder
modules directly, with `requires_grad` on the same weights, and torch's AdamW. That both do the same work is checked:
their losses must agree. The runs alternate; given are medians over the rounds, of the median step of each run and of
its ratio to the plain loop's in the same round (what else a machine does changes slower than rounds do), and the
highest memory of a process that does one run of one of them alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from functools import partial
from typing import Any

import numpy as np
import torch
from identity_edit_pack.demo_world.attributes import Attributes, caption, random_attributes
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.lipe import identity_prior
from identity_edit_pack.pipelines.lipe.train_identity_prior import PriorSettings, train_identity_prior
from identity_edit_pack.pipelines.training import images as training_images
from identity_edit_pack.pipelines.training.images import TrainingImages
from identity_edit_pack.pipelines.training.loop import generator_of

from . import training_runs as runs
from .harness import load_checkpoint

PACK = "Train Identity Prior"
SETTINGS = PriorSettings(token="sks", class_word="cat", learning_rate=1e-4, precision="float32", file_dtype="float32")

Sets = tuple[TrainingImages, TrainingImages]


def draw_sets(vae: Any, seed: int) -> Sets:
    """Four images of one held-out cat, sixteen of other cats."""
    generator = random.Random(seed)
    of_subject, called = runs.draw_subject(generator, SETTINGS.class_word, SETTINGS.token)
    others = [random_attributes(generator, "figure").replace(species=SETTINGS.class_word) for _ in range(16)]

    def encode(images: list[Attributes], captions: list[str]) -> TrainingImages:
        drawn = [torch.from_numpy(np.array(render(one, seed + i)[0])) for i, one in enumerate(images)]
        return training_images.encode_images(vae, [image.float() / 255 for image in drawn], captions)

    return encode(of_subject, called), encode(others, [caption(one) for one in others])


def train_by_pack(model: Any, clip: Any, sets: Sets, settings: PriorSettings) -> runs.Outcome:
    return runs.by_pack(model.model.diffusion_model, partial(train_identity_prior, model, clip, *sets, settings))


def train_by_plain_loop(model: Any, clip: Any, sets: Sets, settings: PriorSettings) -> runs.Outcome:
    """The loop of diffusers' train_dreambooth.py with the networks called directly."""
    networks = runs.Networks.of(model, clip)
    device = networks.device
    weights = trained_weights(model, clip)
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    hooks = networks.copying_before_norms()

    def loss_of(step: int) -> torch.Tensor:
        latents, captions, timesteps, noises = [], [], [], []
        # The names of the pack's seeds, the second in the spelling that it began with.
        for what, images in zip(("identity", "regularisation"), sets, strict=True):
            chosen = training_images.batch_indices(images, SETTINGS.batch_size, step, settings.seed, what)
            latents += [engine.to_model_scale(model, images.latents[number]) for number in chosen]
            captions += [images.captions[number] for number in chosen]
            generator = generator_of(settings.seed, step, f"noise of {what}")
            timesteps.append(torch.randint(networks.alphas_cumprod.shape[0], (len(chosen),), generator=generator))
            noises.append(torch.randn((len(chosen), *latents[-1].shape), generator=generator))
        z_0, t, noise = torch.stack(latents).to(device), torch.cat(timesteps).to(device), torch.cat(noises).to(device)
        tokens = [[token for token, _ in clip.tokenize(text)["l"][0]] for text in captions]
        context = networks.text_encoder(torch.tensor(tokens, device=device))[0]
        of_identity, of_class = networks.predicted(networks.noised(z_0, noise, t), t, context).chunk(2)
        noise_of_identity, noise_of_class = noise.chunk(2)
        mse = torch.nn.functional.mse_loss
        return mse(of_identity, noise_of_identity) + SETTINGS.regularization_weight * mse(of_class, noise_of_class)

    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    outcome = runs.by_loop(networks.unet, optimizer, settings.steps, loss_of, settings.gradient_clip)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for weight, value in zip(weights, before, strict=True):
            weight.requires_grad_(False).copy_(value)
    return outcome


def trained_weights(model: Any, clip: Any) -> list[torch.nn.Parameter]:
    states = (dict(model.model.named_parameters()), dict(clip.cond_stage_model.named_parameters()))
    keys = identity_prior.attention_keys(model, clip)
    return [state[key] for state, part in zip(states, keys, strict=True) for key in part]


METHODS: runs.Methods = {"plain loop": train_by_plain_loop, PACK: train_by_pack}
OPTIONS = runs.training_options(METHODS, steps=8)


def prepared(arguments: argparse.Namespace) -> tuple[Any, ...]:
    model, clip, vae = load_checkpoint(arguments.checkpoint, model_options={"dtype": torch.float32})
    with torch.no_grad():
        sets = draw_sets(vae, arguments.seed)
    settings = dataclasses.replace(SETTINGS, steps=arguments.steps + runs.WARM_UP + 2, seed=arguments.seed)
    return model, clip, sets, settings


def alone(arguments: argparse.Namespace) -> dict[str, Any]:
    return runs.run_alone(METHODS, prepared(arguments), arguments)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    work = prepared(arguments)
    trained = sum(weight.numel() for weight in trained_weights(*work[:2]))
    return runs.compare("identity_prior_training", METHODS, [PACK], work, arguments) | {"trained_weights": trained}


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    about = f"{figures['trained_weights'] / 1e6:.2f} million weights, one image of each set a step"
    return runs.training_table(figures, arguments, "an identity prior", about, [PACK])
