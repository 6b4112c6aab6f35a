"""Captions by real transformers models, of random weights, and by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import comfy.model_management
import numpy as np
import pytest
import torch
from identity_edit_pack.pipelines.networks.language_models import IMAGE_AND_TEXT, TEXT, load_language_model
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.subjects import captioning
from identity_edit_pack.pipelines.subjects.images import SubjectImages, from_batch
from identity_edit_pack.tests import tiny_language_models as tiny
from PIL import Image

QUESTION = "photo of a dog"
TOKENS = 6


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    tiny.save_llava(folder)
    return folder


def images(count: int = 2) -> torch.Tensor:
    shape = (count, 20, 20, 3)
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape) / 255.0).float()


def subject(captions: list[str] | None = None, count: int = 2) -> SubjectImages:
    made = from_batch(images(count), [], "dog", "sks")
    return made if captions is None else replace(made, captions=captions)


def likeliest_words(folder: Path, image: torch.Tensor) -> str:
    """The caption by a plain loop: the prompt written out by hand, one forward pass of the network for each word."""
    from transformers import AutoTokenizer, CLIPImageProcessor, LlavaForConditionalGeneration

    network = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    words = AutoTokenizer.from_pretrained(folder)
    images = CLIPImageProcessor.from_pretrained(folder)
    pixels = images(Image.fromarray((image * 255).round().byte().numpy()), return_tensors="pt")["pixel_values"]
    ids = words("USER: " + "<image>" * 4 + QUESTION + " ASSISTANT:", return_tensors="pt")["input_ids"]
    answer: list[int] = []
    for _ in range(TOKENS):
        with torch.no_grad():
            logits = network(input_ids=ids, pixel_values=pixels).logits[0, -1]
        answer.append(int(logits.argmax()))
        if answer[-1] == words.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([[answer[-1]]])], dim=1)
    return words.decode(answer, skip_special_tokens=True).strip()


@pytest.mark.parametrize("template", [tiny.LLAVA_TEMPLATE, None], ids=["template", "no template"])
def test_llava_says_what_a_plain_loop_says(template: str | None, tmp_path: Path) -> None:
    # Without a template the prompt is LLaVA 1.5's, which for this tokenizer is the same words.
    tiny.save_llava(tmp_path, template=template)
    expected = [likeliest_words(tmp_path, image) for image in images()]
    assert len(set(expected)) == 2, "the two images must lead to different captions"
    with load_language_model(str(tmp_path), IMAGE_AND_TEXT) as model:
        said = [model.ask(QUESTION, image, max_new_tokens=TOKENS, temperature=0.0, seed=0) for image in images()]
    assert said == expected
    captioned, _ = captioning.caption_images(
        subject(), model_path=str(tmp_path), instruction=QUESTION, max_new_tokens=TOKENS
    )
    assert captioned.captions == [captioning.identity_caption(text, "dog", "sks") for text in expected]


def test_an_encoder_decoder_is_asked_too(tmp_path: Path) -> None:
    from transformers import BlipForConditionalGeneration, BlipProcessor

    tiny.save_blip(tmp_path)
    network = BlipForConditionalGeneration.from_pretrained(tmp_path).eval()
    processor = BlipProcessor.from_pretrained(tmp_path)
    image = images()[0]
    pillow = Image.fromarray((image * 255).round().byte().numpy())
    with torch.no_grad():
        ids = network.generate(**processor(pillow, return_tensors="pt"), max_new_tokens=TOKENS, do_sample=False)
    with load_language_model(str(tmp_path), IMAGE_AND_TEXT) as model:
        said = model.ask("", image, max_new_tokens=TOKENS, temperature=0.0, seed=0)
    assert said and said == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


@pytest.mark.parametrize("kind", ["blip", "blip2"])
def test_a_plain_captioner_gets_no_instruction(kind: str, tmp_path: Path) -> None:
    getattr(tiny, f"save_{kind}")(tmp_path)
    with load_language_model(str(tmp_path), IMAGE_AND_TEXT) as model:
        assert not model.follows_instructions
        pillow = Image.fromarray((images()[0] * 255).round().byte().numpy())
        with torch.no_grad():  # transformers' own call for captioning
            ids = model.network.generate(
                **model.processor(pillow, return_tensors="pt"), max_new_tokens=TOKENS, do_sample=False
            )
        expected = model.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
        begun = model.ask("photo of", images()[0], max_new_tokens=TOKENS, temperature=0.0, seed=0)
    options = {"model_path": str(tmp_path), "max_new_tokens": TOKENS}
    captioned, _ = captioning.caption_images(subject(), **options)
    assert expected and captioned.captions[0] == captioning.identity_caption(expected, "dog", "sks")
    own, _ = captioning.caption_images(subject(), **options, instruction="photo of")
    assert own.captions[0] == captioning.identity_caption(begun, "dog", "sks") != captioned.captions[0]


def test_a_chat_model_gets_the_instruction(llava: Path) -> None:
    with load_language_model(str(llava), IMAGE_AND_TEXT) as model:
        assert model.follows_instructions
        options = {"max_new_tokens": TOKENS, "temperature": 0.0, "seed": 0}
        expected = model.ask(captioning.INSTRUCTION, images()[0], **options)
        assert expected != model.ask("", images()[0], **options)
    captioned, _ = captioning.caption_images(subject(), model_path=str(llava), max_new_tokens=TOKENS)
    assert captioned.captions[0] == captioning.identity_caption(expected, "dog", "sks")


def test_the_seed_draws_and_nothing_outside_notices(llava: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with load_language_model(str(llava), IMAGE_AND_TEXT) as model:
        said = [model.ask(QUESTION, images()[0], max_new_tokens=20, temperature=2.0, seed=seed) for seed in (1, 2, 1)]
    assert said[0] == said[2] != said[1]
    assert torch.equal(torch.rand(1), expected)


def test_lines_come_before_files_and_files_before_the_model(llava: Path) -> None:
    test_image = images(3)[2]
    given = replace(
        subject(["", "an old dog, the dog's bed"]), test_image=test_image, test_name="test/9.png", test_caption=""
    )
    seen: list[tuple[int, int]] = []
    options = {"model_path": str(llava), "instruction": QUESTION, "max_new_tokens": TOKENS}
    by_model, _ = captioning.caption_images(given, **options, progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 2), (2, 2)], "the image with a caption is not asked about"
    assert by_model.captions[1] == "an old sks dog, the dog's bed"
    model_says = [captioning.identity_caption(likeliest_words(llava, p), "dog", "sks") for p in images(3)]
    assert [by_model.captions[0], by_model.test_caption] == [model_says[0], model_says[2]]
    all_anew, _ = captioning.caption_images(given, **options, keep_existing=False)
    assert all_anew.captions == model_says[:2]
    typed, notes = captioning.caption_images(given, lines=["a kitten", "", "sks dog asleep"])
    assert typed.captions == ["sks dog, a kitten", "an old sks dog, the dog's bed"]
    assert typed.test_caption == "sks dog asleep" and "image 1 did not contain 'dog'" in notes[0] and len(notes) == 1
    assert given.captions == ["", "an old dog, the dog's bed"], "the input stays as it is"


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a Dog and a dog", "a sks Dog and a dog"),
        ("a sks dog", "a sks dog"),
        ("a puppy", "sks dog, a puppy"),
        ("sks in the grass", "dog, sks in the grass"),
        ("dogs", "sks dog, dogs"),
    ],
)
def test_the_subject_gets_its_name(caption: str, expected: str) -> None:
    assert captioning.identity_caption(caption, "dog", "sks") == expected


def test_missing_and_surplus_captions_are_named() -> None:
    with pytest.raises(IdentityEditError, match="image 2 has no caption; choose a model"):
        captioning.caption_images(subject(["a dog", ""]))
    unnamed = replace(subject(), test_image=images(3)[2], test_name="test/9.png", test_caption="")
    captioned, notes = captioning.caption_images(unnamed, lines=["a dog", "a dog"])
    assert captioned.test_caption == "" and len(notes) == 1 and "test/9.png, the test image, has no caption" in notes[0]
    with pytest.raises(IdentityEditError, match="3 lines for 2 images"):
        captioning.caption_images(subject(), lines=["dog"] * 3)


def test_a_silent_model_is_named(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioning.LanguageModel, "ask", lambda *_, **__: ' "" ')
    with pytest.raises(IdentityEditError, match="returned nothing for image 1"):
        captioning.caption_images(subject(), model_path=str(llava))


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def with_pickle(folder: Path) -> None:
    without_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"never read")


def with_own_code(folder: Path) -> None:
    """A folder whose model is defined by its own code, which must not run."""
    (folder / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForImageTextToText": "own.Model"}}'
    )
    (folder / "own.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\n")


BAD = {
    "no folder": (lambda folder: folder.rename(folder.with_name("away")), "does not exist; create it with"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json; put into it config.json, the"),
    "no weights": (without_weights, "has no weights"),
    "pickled weights": (with_pickle, "has only pickled weights, which could run code"),
    "damaged weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99),
        "cannot be loaded for image-text-to-text",
    ),
    "no processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "has no preprocessor_config.json"),
    "no tokenizer": (without_tokenizer, "cannot be loaded for image-text-to-text"),
    "code of its own": (with_own_code, "cannot be loaded for image-text-to-text"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_model_folder_is_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.save_llava(folder)
    change, message = BAD[name]
    change(folder)
    with pytest.raises(IdentityEditError, match=message), load_language_model(str(folder), IMAGE_AND_TEXT):
        pass
    assert not (folder / "executed").exists()


def test_a_model_of_another_kind_is_named(tmp_path: Path) -> None:
    tiny.save_gpt2(tmp_path)
    with pytest.raises(IdentityEditError, match="choose a model that reads images"):
        captioning.caption_images(subject(), model_path=str(tmp_path))
    with load_language_model(str(tmp_path), TEXT) as model, pytest.raises(IdentityEditError, match="cannot answer"):
        model.ask("dog " * 600, max_new_tokens=1, temperature=0.0, seed=0)  # beyond its 512 positions


def test_an_interrupt_ends_the_answer(llava: Path) -> None:
    comfy.model_management.interrupt_current_processing(True)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            captioning.caption_images(subject(), model_path=str(llava))
    finally:
        comfy.model_management.interrupt_current_processing(False)
