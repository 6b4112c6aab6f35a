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
process that does one run of one of them alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from functools import partial
from typing import Any

import numpy as np
import torch
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.hifi_tuner.subject_embedding import OUTPUT, WORD
from identity_edit_pack.pipelines.hifi_tuner.train_subject_embedding import SubjectSettings, train_subject_embedding
from identity_edit_pack.pipelines.subjects.word_vectors import mark_subject
from identity_edit_pack.pipelines.training import images as training_images
from identity_edit_pack.pipelines.training.images import TrainingImages
from identity_edit_pack.pipelines.training.loop import generator_of

from . import training_runs as runs
from .harness import load_checkpoint

PLAIN = "plain loop"
PACK_WORD, PACK_OUTPUT = "Train Subject Embedding, word", "Train Subject Embedding, output"
CLASS_WORD, TOKEN = "cat", "sks"
TOKENS = SubjectSettings.tokens
DRAWS = "shared vectors"
"""The name under which the pack draws the batches of its first phase."""


def draw_images(vae: Any, seed: int) -> TrainingImages:
    """Four images of one held-out cat with their masks."""
    shown, captions = runs.draw_subject(random.Random(seed), CLASS_WORD, TOKEN)
    images, masks = [], []
    for number, one in enumerate(shown):
        image, mask = render(one, seed + number)
        images.append(torch.from_numpy(np.array(image)).float() / 255)
        masks.append(torch.from_numpy(mask != 0).float())
    return training_images.encode_images(vae, images, captions, masks)


def train_by_pack(kind: str, model: Any, clip: Any, images: TrainingImages, training: SubjectSettings) -> runs.Outcome:
    settings = dataclasses.replace(training, kind=kind)
    return runs.by_pack(model.model.diffusion_model, partial(train_subject_embedding, model, clip, images, settings))


def train_by_loop(
    whole_table: bool, model: Any, clip: Any, images: TrainingImages, training: SubjectSettings
) -> runs.Outcome:
    """The loop of diffusers' textual_inversion.py with the networks called directly."""
    networks = runs.Networks.of(model, clip)
    device = networks.device
    embedding = networks.text_encoder.get_input_embeddings()
    hooks = networks.copying_before_norms()
    table = embedding.weight
    before = table.detach().clone()
    # The last words of the vocabulary before begin and end, which no caption uses, are the placeholder tokens.
    new = list(range(table.shape[0] - 2 - TOKENS, table.shape[0] - 2))
    others = torch.ones(table.shape[0], dtype=torch.bool, device=device)
    others[new] = False
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
    else:
        variable = before[new].clone().copy_(before[word]).requires_grad_(True)
        hooks.append(
            embedding.register_forward_hook(
                lambda _, inputs, output: output.index_put(_places(inputs[0], new), variable)
            )
        )

    def loss_of(step: int) -> torch.Tensor:
        (chosen,) = training_images.batch_indices(images, 1, step, training.seed, DRAWS)
        generator = generator_of(training.seed, step, DRAWS)
        z_0 = engine.to_model_scale(model, images.latents[chosen])[None].to(device)
        t = torch.randint(networks.alphas_cumprod.shape[0], (1,), generator=generator).to(device)
        noise = torch.randn(z_0.shape, generator=generator).to(device)
        context = networks.text_encoder(ids[images.captions[chosen]])[0]
        predicted = networks.predicted(networks.noised(z_0, noise, t), t, context)
        mask = images.masks[chosen]
        weights = torch.ones_like(z_0[:, :1]) if mask is None else mask[None, None].to(device)
        return (weights * (predicted - noise) ** 2).sum() / (z_0.shape[1] * weights.sum())

    def put_back() -> None:
        if whole_table:
            with torch.no_grad():
                table[others] = before[others]

    optimizer = torch.optim.Adam([variable], lr=training.learning_rate)
    outcome = runs.by_loop(networks.unet, optimizer, training.steps, loss_of, after=put_back)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        table.requires_grad_(False).copy_(before)
    return outcome


def _places(tokens: torch.Tensor, new: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each placeholder token, in their order."""
    columns = [int((tokens[0] == token).nonzero()[0]) for token in new]
    return torch.zeros(len(new), dtype=torch.long, device=tokens.device), torch.tensor(columns, device=tokens.device)


METHODS: runs.Methods = {
    "diffusers' loop": partial(train_by_loop, True),
    PLAIN: partial(train_by_loop, False),
    PACK_WORD: partial(train_by_pack, WORD),
    PACK_OUTPUT: partial(train_by_pack, OUTPUT),
}
OPTIONS = runs.training_options(METHODS, steps=10)


def prepared(arguments: argparse.Namespace) -> tuple[Any, ...]:
    options = {"dtype": torch.float32}
    model, clip, vae = load_checkpoint(arguments.checkpoint, model_options=options, te_model_options=options)
    with torch.no_grad():
        images = draw_images(vae, arguments.seed)
    training = SubjectSettings(
        class_word=CLASS_WORD, token=TOKEN, steps=arguments.steps + runs.WARM_UP + 2, regularization_weight=0.0,
        updates_per_step=0, precision="float32", seed=arguments.seed, sample_steps=1,
    )  # fmt: skip
    return model, clip, images, training


def alone(arguments: argparse.Namespace) -> dict[str, Any]:
    return runs.run_alone(METHODS, prepared(arguments), arguments)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    return runs.compare("subject_embedding_training", METHODS, [PLAIN, PACK_WORD], prepared(arguments), arguments)


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    about = f"{TOKENS} vectors, one image a step"
    return runs.training_table(figures, arguments, "a subject's embeddings", about, [PACK_WORD, PACK_OUTPUT])
