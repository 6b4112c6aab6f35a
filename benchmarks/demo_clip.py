"""What the demo world's CLIP knows: `python -m benchmarks demo_clip`.

For images of held-out identities, as the renderer draws them and as the demo checkpoint's autoencoder gives them
back:

- for each attribute, how often the right caption is the nearest among its variants with another value of it;
- how often the right caption is the nearest among as many captions of other images;
- CLIP-T of the right caption, and of one with one attribute wrong;
- CLIP-D of true edits with their own pair of captions, and with the pair of another edit.

"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from identity_edit_pack.demo_world.attributes import ATTRIBUTES_OF, CAPTION_TEMPLATES, Attributes, caption
from identity_edit_pack.demo_world.clip import image_embeddings, load_clip, text_embeddings
from identity_edit_pack.demo_world.images import evaluation_set, to_tensor
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.demo_world.train_clip import attribute_choices
from identity_edit_pack.pipelines.scores.clip import direction_similarity
from tqdm import tqdm

from .harness import CHECKPOINT, SEED, Options, load_checkpoint, markdown

Sample = tuple[Attributes, int]


def with_one_change(sample: Sample, generator: random.Random) -> Sample:
    """The same image with another value of one visible attribute."""
    attributes, seed = sample
    name = generator.choice(sorted(attributes.visible))
    others = [value for value in ATTRIBUTES_OF[attributes.framing][name] if value != getattr(attributes, name)]
    return attributes.replace(**{name: generator.choice(others)}), seed


def text_of(sample: Sample) -> str:
    return caption(sample[0], sample[1] % CAPTION_TEMPLATES)


OPTIONS: Options = {"images": (300, "of held-out identities (300)"), **SEED, **CHECKPOINT}


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load_clip()
    vae = load_checkpoint(arguments.checkpoint, output_clip=False)[2]
    samples = evaluation_set(arguments.images, seed=arguments.seed + 50, held_out=True)
    generator = random.Random(arguments.seed)
    edits = [with_one_change(sample, generator) for sample in samples]

    def embeddings(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([image_embeddings(model, chunk) for chunk in images.split(50)])

    renders = torch.stack([to_tensor(render(*sample)[0]) for sample in tqdm(samples, unit="image")])
    chunks = (renders / 2 + 0.5).movedim(1, -1).split(20)
    decoded = torch.cat([vae.decode(vae.encode(chunk)).cpu() for chunk in tqdm(chunks, unit="batch")])
    embedded = {"renders": embeddings(renders), "reconstructions": embeddings(decoded.movedim(-1, 1) * 2 - 1)}
    edited = embeddings(torch.stack([to_tensor(render(*sample)[0]) for sample in edits]))
    texts, wrong = (text_embeddings(model, tokenizer, list(map(text_of, part))) for part in (samples, edits))
    choices = {name: attribute_choices(found, samples, (model, tokenizer)) for name, found in embedded.items()}
    every = torch.arange(len(samples))
    right, other = ((embedded["renders"] * part).sum(1) for part in (texts, wrong))
    own = direction_similarity(edited, embedded["renders"], wrong, texts)
    shifted = direction_similarity(edited, embedded["renders"], wrong.roll(1, 0), texts.roll(1, 0))
    return {
        "seed": arguments.seed,
        "images": len(samples),
        "attributes": {name: {key: share for key, (share, _) in found.items()} for name, found in choices.items()},
        "by_chance": {name: chance for name, (_, chance) in choices["renders"].items()},
        "caption_among_all": {
            name: float(((found @ texts.T).argmax(1) == every).float().mean()) for name, found in embedded.items()
        },
        "clip_t": {"right": float(right.mean()), "one_wrong": float(other.mean())},
        "right_above_wrong": float((right > other).float().mean()),
        "clip_d": {"own": float(own.mean()), "of_another_edit": float(shifted.mean())},
    }


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    count, clip_t, clip_d = figures["images"], figures["clip_t"], figures["clip_d"]
    shares = [*figures["attributes"].values(), figures["by_chance"]]
    rows = [(name.replace("_", " "), *(f"{each[name]:.3f}" for each in shares)) for name in shares[0]]
    among = (*figures["caption_among_all"].values(), 1 / count)
    return [
        "The demo world's CLIP",
        f"{count} images of held-out identities (seed {arguments.seed}). Share of images whose right caption is nearer "
        "than all that differ from it in one attribute:",
        *markdown(
            ("attribute", "renders", "reconstructions", "by chance"),
            [*rows, (f"the caption among {count}", *(f"{share:.3f}" for share in among))],
        ),
        "",
        f"CLIP-T of the right caption {clip_t['right']:.3f}, of one with one attribute wrong "
        f"{clip_t['one_wrong']:.3f}; the right one is higher for {figures['right_above_wrong']:.3f} of the images.",
        f"CLIP-D of a true edit {clip_d['own']:.3f} with its own captions, {clip_d['of_another_edit']:.3f} with "
        "another edit's.",
    ]
