"""The demo world's CLIP is read by transformers' own classes, and tells a caption from one with an attribute wrong."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from identity_edit_pack.demo_world import clip, train_clip
from identity_edit_pack.demo_world.attributes import CAPTION_TEMPLATES, Attributes, caption, random_attributes
from identity_edit_pack.demo_world.images import evaluation_set, to_tensor
from identity_edit_pack.demo_world.renderer import render
from PIL import Image
from torch.nn import functional


@pytest.fixture(scope="module")
def loaded():
    return clip.load_clip()


def test_the_folder_is_small_and_has_no_pickle() -> None:
    files = list(clip.CLIP_FOLDER.iterdir())
    assert sum(path.stat().st_size for path in files) < 6_000_000
    assert {path.suffix for path in files} == {".json", ".txt", ".safetensors"}


@torch.no_grad()
def test_transformers_computes_the_same(loaded) -> None:
    """Its own processor and forward pass, from the folder alone."""
    from transformers import CLIPModel, CLIPProcessor

    model, tokenizer = loaded
    image, _ = render(Attributes(), 7)
    texts = ["an orange cat standing on the grass", "a blue dog lying down at night wearing a crown facing left"]
    processor = CLIPProcessor.from_pretrained(clip.CLIP_FOLDER)
    inputs = processor(text=texts, images=Image.fromarray(np.array(image)), return_tensors="pt", padding=True)
    output = CLIPModel.from_pretrained(clip.CLIP_FOLDER, dtype=torch.float32).eval()(**inputs)
    ours = clip.image_embeddings(model, to_tensor(image)[None]), clip.text_embeddings(model, tokenizer, texts)
    for embeddings, expected in zip(ours, (output.image_embeds, output.text_embeds), strict=True):
        torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=0)


def test_every_word_of_the_captions_is_one_token(loaded) -> None:
    _, tokenizer = loaded
    generator = random.Random(1)
    for number in range(100):
        text = caption(random_attributes(generator, held_out=None), number % CAPTION_TEMPLATES)
        assert tokenizer.tokenize(text) == [word + "</w>" for word in text.replace(",", " ,").split()]


@pytest.mark.parametrize("text", ["a sks cat", "ohwx 42%", "çà et là", "猫"])
def test_unknown_words_are_spelled(loaded, text) -> None:
    _, tokenizer = loaded
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in tokens[1:-1]  # it is the mark of the end, where the encoder would stop
    assert tokenizer.decode(tokens[1:-1]).replace(" ", "") == text.replace(" ", "")
    assert clip.make_tokenizer()(text)["input_ids"] == tokens


@torch.no_grad()
def test_held_out_images_are_nearer_to_their_caption_than_to_a_wrong_one(loaded) -> None:
    model, tokenizer = loaded
    generator = random.Random(0)
    samples = evaluation_set(60, seed=77, held_out=True)
    images = torch.stack([to_tensor(render(attributes, seed)[0]) for attributes, seed in samples])
    wrong = [train_clip.with_one_change(attributes, generator) for attributes, _ in samples]
    embedded = clip.image_embeddings(model, images)
    right, other = (
        (embedded * clip.text_embeddings(model, tokenizer, [caption(attributes) for attributes in part])).sum(1)
        for part in ([attributes for attributes, _ in samples], wrong)
    )
    assert float((right > other).float().mean()) >= 0.85


def unit(count, seed):
    return functional.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_loss_without_wrong_captions_is_that_of_clip() -> None:
    from transformers.models.clip.modeling_clip import clip_loss

    embedded, texts, scale = unit(5, 0), unit(5, 1), torch.tensor(9.0)
    found = train_clip.contrastive_loss(embedded, texts, list("abcde"), [], scale)
    torch.testing.assert_close(found, clip_loss(scale * texts @ embedded.T))


def test_the_loss_by_its_formula_in_float64() -> None:
    """Wrong captions compete for images; one that reads like the right caption does not, here the last."""
    images, texts, scale = unit(3, 2).double(), unit(5, 3).double(), torch.tensor(7.0, dtype=torch.float64)
    found = train_clip.contrastive_loss(images, texts, ["a", "b", "c"], ["d", "b"], scale)
    similarity = (scale * images @ texts.T).exp()
    competing = torch.ones(3, 5).double()
    competing[1, 4] = 0
    by_image = torch.stack([similarity[i, i] / (similarity[i] * competing[i]).sum() for i in range(3)])
    by_caption = torch.stack([similarity[i, i] / similarity[:, i].sum() for i in range(3)])
    torch.testing.assert_close(found, -(by_image.log().mean() + by_caption.log().mean()) / 2)


def test_training_shows_no_held_out_identity() -> None:
    generator = random.Random(3)
    for _ in range(300):
        before = random_attributes(generator)
        after = train_clip.with_one_change(before, generator)
        differing = [name for name in Attributes.__dataclass_fields__ if getattr(before, name) != getattr(after, name)]
        assert len(differing) == 1 and differing[0] in before.visible and not after.held_out


def test_a_wording_leaves_parts_out() -> None:
    attributes = Attributes(costume="crown", pose="lying", place="night", facing="left")
    for template in range(CAPTION_TEMPLATES):
        assert train_clip.Wording(template).say(attributes) == caption(attributes, template)
        short = train_clip.Wording(template, train_clip.LEFT_OUT).say(attributes)
        assert short == "an orange cat"


def test_an_interrupted_save_leaves_the_folder_as_it_was(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "config.json").write_text("before")
    tokenizer = clip.make_tokenizer()
    model = clip.make_clip(tokenizer)

    def fail(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        clip.save_clip(model, tokenizer, folder)
    assert (folder / "config.json").read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["clip"]
