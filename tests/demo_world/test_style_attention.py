"""The demo world's style attention draws people that nobody trained on by their W+ codes, as the classifier sees."""

from __future__ import annotations

import comfy.sample
import comfy.sd
import pytest
import torch
from identity_edit_pack.demo_world import family
from identity_edit_pack.demo_world.attributes import IDENTITY_OF
from identity_edit_pack.demo_world.classifier import classify, load_classifier
from identity_edit_pack.demo_world.images import HEADS, evaluation_set, to_tensor
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.demo_world.train_style_attention import CHECKPOINT_PATH, STYLE_PATH, caption_calling
from identity_edit_pack.demo_world.train_w_plus import W_PLUS_PATH
from identity_edit_pack.pipelines.pidiff.style_attention import apply_style_attention, check_model, check_styles
from identity_edit_pack.pipelines.pidiff.style_attention_files import load_style_attention
from identity_edit_pack.pipelines.pidiff.w_plus_encoder import encode_w_plus, load_w_plus_encoder

pytestmark = pytest.mark.slow

PEOPLE = 6


@pytest.fixture(scope="module")
def style():
    return load_style_attention(str(STYLE_PATH))


@pytest.fixture(scope="module")
def people():
    """Portraits of held-out identities with open eyes, and what they show."""
    samples = evaluation_set(4 * PEOPLE, seed=71, held_out=True, framing="portrait")
    chosen = [sample for sample in samples if sample[0].expression != "crying"][:PEOPLE]
    images = torch.stack([to_tensor(render(attributes, seed)[0]) for attributes, seed in chosen])
    return [attributes for attributes, _ in chosen], encode_w_plus(load_w_plus_encoder(str(W_PLUS_PATH)), images)


def test_the_files_are_small() -> None:
    assert STYLE_PATH.stat().st_size + W_PLUS_PATH.stat().st_size <= 40_000_000


def test_load_style_attention_lists_it(node_classes) -> None:
    name = f"{STYLE_PATH.name} [style_attention]"
    assert node_classes["IdentityEditLoadStyleAttention"].validate_inputs(name) is True


def test_it_fits_the_checkpoint_and_draws_unseen_people(style, people) -> None:
    family.register()
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT_PATH))
    shown, styles = people
    assert check_model(style, model) is None, "trained with the committed checkpoint"
    assert check_styles(style, styles) is None, "and with the committed encoder"

    def encoded(texts: list[str]) -> list:
        return [[torch.cat([clip.encode_from_tokens(clip.tokenize(text)) for text in texts]), {}]]

    def share_right(strength: float, count: int) -> float:
        """Of the identity's attributes, as the classifier sees them; of the first `count` people, in one batch."""
        own = type(styles)(styles.rows[:count], styles.average, styles.encoder)
        drawing = apply_style_attention(model, style, own, strength=strength)
        noise = torch.cat(
            [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(number)) for number in range(count)]
        )
        captions = [caption_calling(attributes) for attributes in shown[:count]]
        latent = comfy.sample.sample(
            drawing, noise, 12, 3.0, "ddim", "ddim_uniform", encoded(captions), encoded([""]), torch.zeros_like(noise),
            disable_pbar=True, seed=0,
        )  # fmt: skip
        answers = classify(load_classifier(), vae.decode(latent).cpu().clamp(0, 1))
        right = [
            HEADS[name][int(answers[name][number])] == getattr(shown[number], name)
            for number in range(count)
            for name in IDENTITY_OF["portrait"]
        ]
        return sum(right) / len(right)

    with torch.no_grad():
        assert share_right(1.0, PEOPLE) >= 0.85
        assert share_right(0.0, PEOPLE // 2) <= 0.5, "without it nothing says who to draw"
