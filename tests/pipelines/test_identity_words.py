"""Identity words: that they stand where words would, how they are trained, and their file."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from identity_edit_pack.pipelines.mcdm import identity_words as words_of
from identity_edit_pack.pipelines.mcdm.train_identity_words import IdentitySettings, features_of, train_identity_words
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.shared.files import write_tensors
from identity_edit_pack.pipelines.subjects.word_vectors import word_table
from identity_edit_pack.pipelines.training.images import TrainingImages
from identity_edit_pack.pipelines.training.loop import FLOAT32
from identity_edit_pack.tests import tiny_models, tiny_text_encoders

CAPTIONS = ["a person on the grass", "a smiling person", "an angry person in the snow", "a person"]
SETTINGS = IdentitySettings(
    class_word="person", steps=6, learning_rate=1e-2, batch_size=2, precision=FLOAT32, seed=3, checkpoint_every=2
)
FEATURES = torch.randn(4, 5, 48, generator=torch.Generator().manual_seed(2))


def images() -> TrainingImages:
    generator = torch.Generator().manual_seed(1)
    latents = [5.0 * torch.randn(4, 8, 8, generator=generator) for _ in CAPTIONS]
    return TrainingImages(latents, list(CAPTIONS), [None] * len(CAPTIONS), "images")


def train(family="sd1", settings=SETTINGS, features=FEATURES, **options):
    model, clip = tiny_models.FAMILIES[family](output_gain=0.1), tiny_text_encoders.clip(family)
    return train_identity_words(model, clip, images(), features, settings, **options)


@pytest.fixture(scope="module")
def trained():
    return train()


def vectors_of(clip, text):
    """The embeddings of a text's words, read from the text encoders' own tables: [1, words, width] each."""
    found = {}
    for encoder, chunks in clip.tokenize(text, return_word_ids=True).items():
        tokens = [token for token, _, word in chunks[0] if word != 0]
        found[f"clip_{encoder}"] = word_table(clip)[f"clip_{encoder}"].detach()[tokens][None]
    return found


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_words_that_exist_give_the_prompt_that_has_them(family) -> None:
    clip = tiny_text_encoders.clip(family)
    vectors = vectors_of(clip, "old happy")
    for prompt, written in (
        ("a woman, santa costume", "a old happy woman, santa costume"),
        ("the same woman on the left and right", "the same old happy woman on the left and right"),
        ("a (Woman:1.3) and a woman", "a (old happy Woman:1.3) and a woman"),
    ):
        found = words_of.identity_conditioning(clip, vectors, prompt, "woman")
        expected = clip.encode_from_tokens_scheduled(clip.tokenize(written))
        assert torch.allclose(found[0][0], expected[0][0], atol=1e-5), prompt
        if family == "sdxl":
            assert torch.allclose(found[0][1]["pooled_output"], expected[0][1]["pooled_output"], atol=1e-5)
    plain = clip.encode_from_tokens_scheduled(clip.tokenize("a woman, santa costume"))
    assert not torch.allclose(
        words_of.identity_conditioning(clip, vectors, "a woman, santa costume", "woman")[0][0], plain[0][0]
    )


def test_several_images_make_a_batch() -> None:
    clip = tiny_text_encoders.clip("sd1")
    pair = torch.cat([vectors_of(clip, "old happy")["clip_l"], vectors_of(clip, "young angry")["clip_l"]])
    found = words_of.identity_conditioning(clip, {"clip_l": pair}, "a woman", "woman")
    each = [
        clip.encode_from_tokens_scheduled(clip.tokenize(f"a {w} woman"))[0][0] for w in ("old happy", "young angry")
    ]
    assert len(found) == 1 and torch.allclose(found[0][0], torch.cat(each), atol=1e-5)


def test_a_prompt_without_the_class_word_is_refused() -> None:
    clip = tiny_text_encoders.clip("sd1")
    with pytest.raises(IdentityEditError, match="does not contain the class word 'woman'"):
        words_of.identity_conditioning(clip, vectors_of(clip, "old happy"), "a womanly thing", "woman")
    with pytest.raises(IdentityEditError, match="channels"):
        words_of.identity_conditioning(clip, {"clip_l": torch.randn(1, 2, 7)}, "a woman", "woman")


def test_the_encoder_begins_with_the_class_word() -> None:
    clip = tiny_text_encoders.clip("sdxl")
    widths = {name: table.shape[-1] for name, table in word_table(clip).items()}
    encoder = words_of.IdentityEncoder(48, widths, 3)
    person = {name: each[0, 0] for name, each in vectors_of(clip, "person").items()}
    encoder.begin_with(person)
    given = encoder(FEATURES)
    assert {name: tuple(each.shape) for name, each in given.items()} == {n: (4, 3, w) for n, w in widths.items()}
    for name, each in given.items():
        assert torch.allclose(each, person[name].expand_as(each), atol=1e-6)


def test_images_of_different_features_get_different_words(trained) -> None:
    words, run = trained
    assert len(run.losses) == 6 and all(loss > 0 for loss in run.losses)
    vectors = words_of.identity_vectors(words, FEATURES)
    assert vectors["clip_l"].shape == (4, 2, tiny_models.CONTEXT)
    assert float((vectors["clip_l"][0] - vectors["clip_l"][1]).abs().max()) > 1e-4
    # Order of the patches aside from their places: the words depend on every feature.
    changed = FEATURES.clone()
    changed[0, 3] = FEATURES[1, 2]
    again = words_of.identity_vectors(words, changed)
    assert not torch.allclose(again["clip_l"][0], vectors["clip_l"][0], atol=1e-6)
    assert torch.allclose(again["clip_l"][1:], vectors["clip_l"][1:], atol=1e-6)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_training_learns_and_leaves_the_networks_alone(family) -> None:
    model, clip = tiny_models.FAMILIES[family](output_gain=0.1), tiny_text_encoders.clip(family)
    before = [copy.deepcopy(part.state_dict()) for part in (model.model, clip.cond_stage_model)]
    words, _ = train_identity_words(
        model, clip, images(), FEATURES, dataclasses.replace(SETTINGS, regularization_weight=50.0, steps=40)
    )
    for part, state in zip((model.model, clip.cond_stage_model), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in part.state_dict().items())
        assert not any(parameter.grad is not None for parameter in part.parameters())
    # With such a weight of their size the words shrink.
    start = vectors_of(clip, "person")
    for name, each in words_of.identity_vectors(words, FEATURES).items():
        assert float(each.abs().mean()) < 0.9 * float(start[name].abs().mean())


def test_the_loss_is_the_denoising_loss_of_the_captions_with_the_words() -> None:
    """The first step against the definition: eps-MSE with the embedding of 'a person person person', and ELITE's
    regularization."""
    from identity_edit_pack.pipelines.engine import to_model_scale
    from identity_edit_pack.pipelines.training.images import batch_indices
    from identity_edit_pack.pipelines.training.loop import generator_of

    model, clip = tiny_models.sd1(output_gain=0.1), tiny_text_encoders.clip("sd1")
    shown = images()
    settings = dataclasses.replace(SETTINGS, regularization_weight=0.5, steps=1)
    _, run = train_identity_words(model, clip, shown, FEATURES, settings)
    chosen = batch_indices(shown, 2, 0, settings.seed, "identity words")
    sampling = model.get_model_object("model_sampling")
    generator = generator_of(settings.seed, 0, "identity words")
    t, noise = torch.randint(1000, (2,), generator=generator), torch.randn(2, 4, 8, 8, generator=generator)
    losses = []
    for row, number in enumerate(chosen):
        text = CAPTIONS[number].replace("person", "person person person")
        embedding = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]
        sigma = sampling.sigmas[t[row]].double()
        x = to_model_scale(model, shown.latents[number])[None] + sigma.float() * noise[row : row + 1]
        with torch.no_grad():
            eps = model.model.diffusion_model(
                x / (1 + sigma.float() ** 2) ** 0.5, torch.tensor([float(t[row])]), context=embedding
            )
        losses.append((eps.double() - noise[row : row + 1].double()).square().mean())
    size = vectors_of(clip, "person")["clip_l"].double().abs().mean()
    assert abs(run.losses[0] - float(sum(losses) / 2 + 0.5 * size)) < 1e-4 * run.losses[0]


def test_a_stopped_training_goes_on_as_if_it_had_not(trained, tmp_path) -> None:
    class Stopped(Exception):
        pass

    def stop(done, total, loss, sample):
        if done == 3:
            raise Stopped

    def path(run):
        return str(tmp_path / f"{run}.safetensors")

    with pytest.raises(Stopped):
        train(checkpoint=path, progress=stop)
    assert len(list(tmp_path.iterdir())) == 1
    words, run = train(checkpoint=path)
    assert run.resumed_at == 3 and run.losses[:3] == trained[1].losses[:3]
    # Not to the bit: a matrix product may depend on where its operands lie in memory.
    assert run.losses == pytest.approx(trained[1].losses, rel=1e-5)
    expected = trained[0].encoder.state_dict()
    assert all(torch.allclose(value, expected[name], atol=1e-4) for name, value in words.encoder.state_dict().items())


def test_a_file_holds_all_of_it(trained, tmp_path) -> None:
    words = trained[0]
    path = str(tmp_path / "words.safetensors")
    words_of.save_identity_words(words, path)
    read = words_of.load_identity_words(path)
    assert dataclasses.replace(read, encoder=None) == dataclasses.replace(words, encoder=None)
    assert torch.equal(
        words_of.identity_vectors(read, FEATURES)["clip_l"], words_of.identity_vectors(words, FEATURES)["clip_l"]
    )
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "words.safetensors").read_bytes()[:900])
    with pytest.raises(IdentityEditError, match="cannot be read"):
        words_of.load_identity_words(str(tmp_path / "cut.safetensors"))
    write_tensors(str(tmp_path / "other.safetensors"), {"a": torch.zeros(1)}, {"kind": "inversion"})
    with pytest.raises(IdentityEditError, match="contains no identity words"):
        words_of.load_identity_words(str(tmp_path / "other.safetensors"))


def test_another_clip_vision_is_refused(trained) -> None:
    with pytest.raises(IdentityEditError, match="5 features of width 48.*5 of width 32"):
        words_of.identity_vectors(trained[0], torch.randn(1, 5, 32))
    with pytest.raises(IdentityEditError, match="no features of single patches"):
        words_of.image_features(SimpleNamespace(penultimate_hidden_states=None))


def test_wrong_images_are_refused() -> None:
    with pytest.raises(IdentityEditError, match="caption of image 1"):
        train(settings=dataclasses.replace(SETTINGS, class_word="woman"))
    with pytest.raises(IdentityEditError, match="4 images and CLIP vision features for 3"):
        train(features=FEATURES[:3])
    with pytest.raises(IdentityEditError, match="no image has a mask"):
        train(settings=dataclasses.replace(SETTINGS, masked=True))


def test_features_are_the_stock_clip_visions() -> None:
    from identity_edit_pack.demo_world.clip_vision import load_clip_vision

    encoder = load_clip_vision()
    shown = [torch.rand(128, 128, 3), torch.rand(96, 128, 3)]
    features = features_of(encoder, shown)
    assert features.shape == (2, 65, 192)
    assert torch.equal(features[0], encoder.encode_image(shown[0][None], crop=False)["penultimate_hidden_states"][0])
