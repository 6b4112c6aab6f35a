"""Training a style attention against a plain loop: `python -m benchmarks style_attention_training`.

Both train the mapping network and the style cross-attention of the demo checkpoint on the same images with the same
draws: the pack's `train_style_attention`, and a plain loop as the training scripts of IP-Adapter and the w-plus-adapter
have it, which calls the same UNet and text encoder modules directly, with the style cross-attention as equations 3 and
4 of Gu et al. 2025 write it (torch's scaled dot product attention, then the text's own output projection) in a forward
hook behind every text cross-attention, and torch's AdamW. The loop encodes the captions in every step, as those scripts
do. That both do the same work is checked: their losses must agree, and both must evaluate the network as often. The
runs alternate; given are medians over the rounds of the median step of each run and of its ratio to the plain loop's in
the same round, and the highest memory of a process that does one run of one of them alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from functools import partial
from typing import Any

import numpy as np
import torch
from identity_edit_pack.attention.style_cross_attention import layer_sizes, text_layers
from identity_edit_pack.demo_world.attributes import random_attributes
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.pidiff.style_attention import ROW_GROUPS, StyleNetwork, parse_row_groups
from identity_edit_pack.pipelines.pidiff.train import StyleSettings, train_style_attention
from identity_edit_pack.pipelines.pidiff.w_plus import WPlus
from identity_edit_pack.pipelines.training import images as training_images
from identity_edit_pack.pipelines.training.images import TrainingImages
from identity_edit_pack.pipelines.training.loop import generator_of

from . import training_runs as runs
from .harness import load_checkpoint

PACK = "Train Style Attention"
IMAGES, ROWS, WIDTH = 6, 18, 512
"""As many images as in Gu et al. 2025, and the form of e4e's styles; what is in them does not change the cost."""
SETTINGS = StyleSettings(pseudo_word="sks", precision="float32", sample_steps=1)
DRAWS = "style attention"
"""The name under which the pack draws its batches."""


def draw_images(vae: Any, seed: int) -> tuple[TrainingImages, WPlus]:
    """Six portraits of one person, and random styles for them."""
    generator = random.Random(seed)
    person = random_attributes(generator, "portrait")
    images = [torch.from_numpy(np.array(render(person, seed + number)[0])).float() / 255 for number in range(IMAGES)]
    styles = torch.randn(IMAGES, ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))
    encoded = training_images.encode_images(vae, images, [""] * IMAGES)
    return encoded, WPlus(styles, torch.zeros(ROWS, WIDTH), "random")


def train_by_pack(
    model: Any, clip: Any, images: TrainingImages, w_plus: WPlus, training: StyleSettings
) -> runs.Outcome:
    train = partial(train_style_attention, model, clip, images, w_plus, training)
    return runs.by_pack(model.model.diffusion_model, train)


def train_by_plain_loop(
    model: Any, clip: Any, images: TrainingImages, w_plus: WPlus, training: StyleSettings
) -> runs.Outcome:
    networks = runs.Networks.of(model, clip)
    device = networks.device
    layers = text_layers(networks.unet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        groups = parse_row_groups(ROW_GROUPS, ROWS)
        own = StyleNetwork(groups, WIDTH, engine.require(model).text_width, layer_sizes(layers)).to(device)
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

    def loss_of(step: int) -> torch.Tensor:
        nonlocal tokens
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
        style_noise = torch.randn(rows[chosen].shape, generator=generator).to(device)
        styles = rows[chosen] + SETTINGS.style_noise * style_noise
        dropped = torch.rand(len(chosen), generator=generator).to(device) < SETTINGS.style_drop
        tokens = own.mapping(torch.where(dropped[:, None, None], average, styles), average)
        predicted = networks.predicted(networks.noised(z_0, noise, t), t, context)
        return torch.nn.functional.mse_loss(predicted, noise)

    optimizer = torch.optim.AdamW(own.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    outcome = runs.by_loop(networks.unet, optimizer, training.steps, loss_of)
    for hook in hooks:
        hook.remove()
    return outcome


METHODS: runs.Methods = {"plain loop": train_by_plain_loop, PACK: train_by_pack}
OPTIONS = runs.training_options(METHODS, steps=10)


def prepared(arguments: argparse.Namespace) -> tuple[Any, ...]:
    options = {"dtype": torch.float32}
    model, clip, vae = load_checkpoint(arguments.checkpoint, model_options=options, te_model_options=options)
    with torch.no_grad():
        images, w_plus = draw_images(vae, arguments.seed)
    training = dataclasses.replace(SETTINGS, steps=arguments.steps + runs.WARM_UP + 2, seed=arguments.seed)
    return model, clip, images, w_plus, training


def alone(arguments: argparse.Namespace) -> dict[str, Any]:
    return runs.run_alone(METHODS, prepared(arguments), arguments)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    return runs.compare("style_attention_training", METHODS, [PACK], prepared(arguments), arguments)


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    about = f"{SETTINGS.batch_size} of {IMAGES} images a step"
    return runs.training_table(figures, arguments, "a style attention", about, [PACK])
