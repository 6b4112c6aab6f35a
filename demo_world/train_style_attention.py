"""Training of the demo world's style attention with the pack's own training, on many people instead of one.

Gu et al. 2025 train on six images of one person and use W+ codes of other images for other people (section 2.2.2),
which relies on the many people that e4e and Stable Diffusion have seen. Here the images show many training people with
captions that describe everything but the identity, so that only the style tokens determine the person, and unseen
people can be drawn from one image.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch

from ..pipelines.pidiff import train as pidiff
from ..pipelines.pidiff.style_attention_files import save_style_attention
from ..pipelines.pidiff.w_plus_encoder import encode_w_plus, load_w_plus_encoder
from ..pipelines.training.images import encode_images
from ..pipelines.training.loop import BFLOAT16
from . import family
from .attributes import CAPTION_TEMPLATES, Attributes, caption, description, random_attributes
from .images import EVALUATION_SEED, rendered
from .train_w_plus import W_PLUS_PATH

CHECKPOINT_PATH = Path(__file__).parent / "weights" / "identity-edit-demo.safetensors"
STYLE_PATH = Path(__file__).parent / "style_attention" / "identity-edit-demo-style.safetensors"
TEXT_DROP, STYLE_DROP = 0.3, 0.1
"""0.5 each in Gu et al. 2025, for one person. With many people, images with both W+ code and caption teach most; at
0.5 only a quarter has both, and dark skin had green spots even after 3500 steps."""
SILENT = 0.5
"""Share of captions without expression and direction, so that the W+ code determines them if the prompt does not."""
STYLE_NOISE = 0.2
"""Relative to the standard deviation of the rows; information about other groups in a row is smaller (see
LinearProbe)."""


def caption_calling(attributes: Attributes, name: str = "person", template: int = 0, *, silent: bool = False) -> str:
    """A portrait's caption with a name instead of the person's description: "a portrait of a smiling person in a room
    facing left". With ``silent``, it omits expression and direction."""
    who, facing = description(attributes), f" facing {attributes.facing}"
    if silent:
        attributes = attributes.replace(expression="neutral")  # which captions do not name
    text = caption(attributes, template).replace(who, name)
    return text.replace(facing, "") if silent else text


def draw_people(count: int) -> list[tuple[Attributes, int, str]]:
    """Attributes, render seed and caption of portraits of training identities."""
    drawn = []
    for index in range(count):
        generator = random.Random(f"portrait of a style attention {index}")
        attributes = random_attributes(generator, "portrait")
        seed = generator.randrange(EVALUATION_SEED)
        template = generator.randrange(CAPTION_TEMPLATES)
        silent = generator.random() < SILENT
        drawn.append((attributes, seed, caption_calling(attributes, template=template, silent=silent)))
    return drawn


def train_style_attention(
    folder: Path, steps: int, batch_size: int, learning_rate: float, count: int, precision: str, kind: str
) -> None:
    """Train on ``count`` portraits and write the file that Load Style Attention lists.

    An interrupted run resumes from a checkpoint in ``folder``.
    """
    import comfy.sd
    from tqdm import tqdm

    family.register()
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT_PATH))
    people = draw_people(count)
    images = rendered((attributes, seed) for attributes, seed, _ in people)
    with torch.no_grad():
        styles = encode_w_plus(load_w_plus_encoder(str(W_PLUS_PATH)), images)
        shown = [image.permute(1, 2, 0) * 0.5 + 0.5 for image in images]
        # bfloat16 as in `encode`: on a CPU the autoencoder is the slowest part.
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == BFLOAT16):
            encoded = encode_images(vae, shown, [text for _, _, text in people])
    settings = pidiff.StyleSettings(
        pseudo_word="",
        templates=(),
        kind=kind,
        text_drop=TEXT_DROP,
        style_drop=STYLE_DROP,
        style_noise=STYLE_NOISE,
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        precision=precision,
        checkpoint_every=25,
        sample_steps=1,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=steps, mininterval=5, unit="step") as bar:
        losses: list[float] = []

        def progress(step: int, _: int, loss: float, __: torch.Tensor | None) -> None:
            losses.append(loss)
            recent = losses[-100:]
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
            bar.update(step - bar.n)

        style, _ = pidiff.train_style_attention(
            model,
            clip,
            encoded,
            styles,
            settings,
            checkpoint=lambda run: str(folder / f"style_attention_{run}.safetensors"),
            progress=progress,
        )
    save_style_attention(style, str(STYLE_PATH))
