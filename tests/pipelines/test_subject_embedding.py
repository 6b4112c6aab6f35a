"""Subject embeddings: where the vectors go in a prompt, that each step's reach the network, and the files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.sd1_clip
import pytest
import tiny_models
import tiny_text_encoders
import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine.families import schedule
from identity_edit_pack.pipelines.hifi_tuner import subject_embedding, subject_files
from identity_edit_pack.pipelines.hifi_tuner.subject_embedding import (
    OUTPUT,
    WORD,
    SubjectEmbedding,
    apply_subject,
    subject_conditioning,
    subject_table,
)
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from safetensors.torch import load_file, save_file

WIDTHS = {"sd1": {"clip_l": 32}, "sd2_v": {"clip_l": 32}, "sdxl": {"clip_l": 16, "clip_g": 16}}
PROMPT = "a sks cat on the grass"


def make(family: str) -> tuple[Any, Any]:
    return tiny_models.FAMILIES[family](), tiny_text_encoders.clip(family)


def subject(kind: str, family: str = "sd1", steps: int = 0, rows: int = 5, seed: int = 1, **changes: Any):
    generator = torch.Generator().manual_seed(seed)
    widths = {OUTPUT: 32} if kind == OUTPUT else WIDTHS[family]
    shared = {name: torch.randn(rows, width, generator=generator) for name, width in widths.items()}
    each = {
        name: vectors + 0.1 * torch.randn(steps, *vectors.shape, generator=generator)
        for name, vectors in shared.items()
    }
    made = SubjectEmbedding(
        kind=kind,
        vectors=shared,
        step_vectors=each if steps else None,
        timesteps=tuple(schedule.ddim_timesteps(steps).tolist()) if steps else (),
        class_word="cat",
        token="sks",
    )
    return dataclasses.replace(made, **changes)


# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_last_rows_of_the_encoders_output_are_the_subjects(family: str):
    clip, learned = tiny_text_encoders.clip(family), subject(OUTPUT, family)
    (embedding, options), *more = subject_conditioning(clip, learned, PROMPT)
    plain, pooled = clip.encode_from_tokens(clip.tokenize("a cat on the grass"), return_pooled=True)
    assert not more and embedding.shape == (1, 77, 32)
    assert torch.equal(embedding[0, -5:], learned.vectors[OUTPUT])
    assert torch.equal(embedding[0, :-5], plain[0, :-5]), "the prompt without the token"
    assert torch.equal(options["pooled_output"], pooled)
    long, _ = subject_conditioning(clip, learned, "a cat " + "on the grass " * 40)[0]
    assert long.shape[1] == 154 and torch.equal(long[0, -5:], learned.vectors[OUTPUT])
    assert not torch.equal(long[0, 72:77], learned.vectors[OUTPUT]), "only in the last chunk"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a sks cat on the grass", "a cat on the grass"),
        ("A SKS  Cat, smiling", "A Cat, smiling"),
        ("a sks, smiling", "a cat, smiling"),
        ("a cat and asks", "a cat and asks"),
        ("", ""),
    ],
)
def test_the_token_is_taken_out_of_prompts(prompt: str, expected: str):
    assert subject_embedding.without_token(prompt, "sks", "cat") == expected
    assert subject_embedding.without_token(prompt, "", "cat") == prompt


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize(
    ("prompt", "stock"),
    [
        ("a sks cat on the grass", "a embedding:thing on the grass"),
        ("a sks on the grass", "a embedding:thing on the grass"),
        ("a cat, on the grass", "a embedding:thing , on the grass"),
        ("(sks cat:1.3) on the grass", "(embedding:thing:1.3) on the grass"),
        ("a sks cat beside a cat", "a embedding:thing beside a cat"),
    ],
)
def test_word_vectors_are_read_as_comfyuis_own_embeddings_are(family: str, prompt: str, stock: str, tmp_path: Path):
    learned = subject(WORD, family, rows=3)
    subject_files.save_textual_inversion(learned, str(tmp_path / "thing.safetensors"))
    clip = tiny_text_encoders.clip(family)
    ours = subject_conditioning(clip, learned, prompt)
    with_folder = tiny_text_encoders.clip(family)
    parts = with_folder.tokenizer.parts if family == "sdxl" else {"l": with_folder.tokenizer.clip_l}
    for encoder, part in parts.items():
        part.embedding_directory, part.embedding_key = [str(tmp_path)], f"clip_{encoder}"
    theirs = with_folder.encode_from_tokens_scheduled(with_folder.tokenize(stock))
    torch.testing.assert_close(ours[0][0], theirs[0][0])
    if family == "sdxl":
        torch.testing.assert_close(ours[0][1]["pooled_output"], theirs[0][1]["pooled_output"])
    without = clip.encode_from_tokens(clip.tokenize(prompt))
    assert not torch.allclose(ours[0][0], without, rtol=1e-2)


def test_a_prompt_that_does_not_name_the_subject():
    model, clip = make("sd1")
    with pytest.raises(IdentityEditError, match="does not name the subject; write 'sks cat'"):
        subject_conditioning(clip, subject(WORD), "a dog on the grass")
    assert "does not name the subject" in apply_subject(model, clip, subject(OUTPUT), "on the grass")[2]
    assert apply_subject(model, clip, subject(OUTPUT), "a cat")[2] is None
    with pytest.raises(IdentityEditError, match="There is no CLIP"):
        subject_conditioning(None, subject(WORD), PROMPT)


def test_prompts_that_reach_into_the_last_positions_are_warned_of():
    model, clip = make("sd1")
    learned = subject(OUTPUT)
    fits, over = "cat " * 70, "cat " * 71  # begin, 70 words and the end are 72 of 77 positions
    assert apply_subject(model, clip, learned, fits)[2] is None
    warning = apply_subject(model, clip, learned, over)[2]
    assert "71 tokens" in warning and "last 5" in warning and "shorten it to 70" in warning
    assert apply_subject(model, clip, subject(WORD), over)[2] is None, "words move up for other words"
    assert apply_subject(model, clip, learned, "cat " * 80)[2] is None, "the last chunk has room"


def test_other_widths_are_refused():
    model, clip = make("sd1")
    wide = subject(OUTPUT, vectors={OUTPUT: torch.zeros(5, 48)})
    for call in (lambda: apply_subject(model, clip, wide, PROMPT), lambda: subject_conditioning(clip, wide, PROMPT)):
        with pytest.raises(IdentityEditError, match="embeddings of 48 channels but this checkpoint has 32"):
            call()
    with pytest.raises(IdentityEditError, match="needs clip_g of 16"):
        subject_conditioning(
            tiny_text_encoders.clip("sdxl"), subject(WORD, vectors={"clip_l": torch.zeros(2, 16)}), PROMPT
        )


def test_another_checkpoint_is_warned_of():
    model, clip = make("sd1")
    learned = subject(OUTPUT, model=engine.model_tag(tiny_models.sd1()))
    assert apply_subject(model, clip, learned, PROMPT)[2] is None
    assert "another checkpoint (different weights)" in apply_subject(tiny_models.sd1(seed=3), clip, learned, PROMPT)[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "words"}, "choose output or word"),
        ({"vectors": {}}, "cannot have vectors for nothing"),
        ({"vectors": {"clip_l": torch.zeros(5, 32)}}, "cannot have vectors for clip_l"),
        ({"vectors": {OUTPUT: torch.full((5, 32), float("nan"))}}, "contains NaN"),
        ({"vectors": {OUTPUT: torch.zeros(32)}}, "instead of"),
        ({"timesteps": (981, 1)}, "do not match its timesteps"),
        ({"step_vectors": {OUTPUT: torch.zeros(2, 5, 32)}, "timesteps": (1, 981)}, "do not descend"),
        ({"step_vectors": {OUTPUT: torch.zeros(2, 4, 32)}, "timesteps": (981, 1)}, "instead of"),
    ],
)
def test_subjects_that_cannot_be_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(IdentityEditError, match=message):
        dataclasses.replace(subject(OUTPUT), **changes)


# -- steps -------------------------------------------------------------------------------------------------------------


def recorded(model: Any) -> tuple[Any, list[tuple[float, torch.Tensor]]]:
    """A clone that records the noise level and the conditional side's text embedding of every model call, and answers
    each with an empty image, as only what reaches the network is looked at."""
    seen: list[tuple[float, torch.Tensor]] = []

    def wrapper(apply_model, arguments):
        context = arguments["c"]["c_crossattn"]
        for place, side in enumerate(arguments["cond_or_uncond"]):
            if side == 0:
                seen.append((float(arguments["timestep"][place]), context[place].clone()))
        return torch.zeros_like(arguments["input"])

    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return clone, seen


def sample(model: Any, conditioning: Any, negative: Any, how: str, steps: int) -> None:
    latent = torch.zeros(1, 4, 8, 8)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    if how == "KSampler":
        comfy.sample.sample(
            model, noise, steps, 2.0, "ddim", "ddim_uniform", conditioning, negative, latent, disable_pbar=True, seed=0
        )
    else:  # SamplerCustomAdvanced with CFGGuider
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(conditioning, negative)
        guider.set_cfg(2.0)
        sigmas = schedule.ddim_schedule(engine.require(model).sampling, steps, end_at_zero=True).sigmas
        guider.sample(noise, latent, comfy.samplers.sampler_object(how), sigmas, disable_pbar=True, seed=0)


@pytest.mark.parametrize("kind", [OUTPUT, WORD])
@pytest.mark.parametrize("how", ["KSampler", "euler"])
def test_all_fifty_embeddings_reach_the_network_at_their_own_steps(kind: str, how: str):
    model, clip = make("sd1")
    learned = subject(kind, steps=50)
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    watched, seen = recorded(model)
    patched, conditioning, warning = apply_subject(watched, clip, learned, PROMPT)
    assert warning is None
    sample(patched, conditioning, negative, how, 50)
    sigmas = engine.require(model).sampling.sigmas
    assert len(seen) == 50
    for index, (sigma, context) in enumerate(seen):
        assert sigma == pytest.approx(float(sigmas[learned.timesteps[index]]), rel=1e-4)
        if kind == OUTPUT:
            assert torch.equal(context[-5:], learned.step_vectors[OUTPUT][index])
            assert torch.equal(context[:-5], conditioning[0][0][0, :-5])
        else:
            torch.testing.assert_close(context, subject_conditioning(clip, learned.at_step(index), PROMPT)[0][0][0])


@pytest.mark.parametrize("how", ["heun", "dpmpp_sde"])
def test_evaluations_between_the_steps_take_the_nearest(how: str):
    model, clip = make("sd1")
    learned = subject(OUTPUT, steps=50)
    sampling = engine.require(model).sampling
    watched, seen = recorded(model)
    patched, conditioning, _ = apply_subject(watched, clip, learned, PROMPT)
    sample(patched, conditioning, clip.encode_from_tokens_scheduled(clip.tokenize("")), how, 13)
    assert len(seen) > 20
    for sigma, context in seen:
        t = float(sampling.timestep(torch.tensor(sigma)))
        found = int((learned.step_vectors[OUTPUT] - context[-5:]).abs().sum((1, 2)).argmin())
        assert torch.equal(learned.step_vectors[OUTPUT][found], context[-5:])
        distance = abs(learned.timesteps[found] - t)
        assert distance <= min(abs(other - t) for other in learned.timesteps) + 1.0, "nearest, but for rounding"


@pytest.mark.parametrize("steps", [1, 7, 30, 1000])
def test_every_trained_timestep_has_its_own_row(steps: int):
    model, clip = make("sd2_v")
    learned = subject(OUTPUT, steps=steps)
    table = subject_table(model, clip, learned, PROMPT)
    sigmas = engine.require(model).sampling.sigmas
    assert [table.row(float(sigmas[t])) for t in learned.timesteps] == list(range(steps))
    assert table.embeddings.shape == (steps, 1, 77, 32)


def test_pooled_outputs_of_word_vectors_go_with_their_step():
    model, clip = make("sdxl")
    learned = subject(WORD, "sdxl", steps=3)
    table = subject_table(model, clip, learned, PROMPT)
    for index in range(3):
        embedding, options = subject_conditioning(clip, learned.at_step(index), PROMPT)[0]
        torch.testing.assert_close(table.embeddings[index], embedding)
        torch.testing.assert_close(table.pooled[index], options["pooled_output"])
    assert subject_table(model, clip, subject(OUTPUT, "sdxl", steps=3), PROMPT).pooled is None


def test_without_step_vectors_the_model_stays_as_it_is():
    model, clip = make("sd1")
    patched, _, _ = apply_subject(model, clip, subject(OUTPUT), PROMPT)
    assert patched is not model and not patched.get_all_wrappers("predict_noise")
    with pytest.raises(IdentityEditError, match="has no step-wise embeddings"):
        subject_table(model, clip, subject(OUTPUT), PROMPT)


def test_tensors_made_in_inference_mode_can_be_differentiated_afterwards():
    with torch.inference_mode():
        model, clip = make("sd1")
        table = subject_table(model, clip, subject(OUTPUT, steps=2), PROMPT)
    assert not table.embeddings.is_inference()


# -- files -------------------------------------------------------------------------------------------------------------


def same(first: SubjectEmbedding, second: SubjectEmbedding) -> bool:
    steps = first.step_vectors or {}, second.step_vectors or {}
    return (
        all(torch.equal(first.vectors[name], second.vectors[name]) for name in second.vectors)
        and all(torch.equal(steps[0][name], steps[1][name]) for name in steps[1])
        and all(
            getattr(first, name) == getattr(second, name)
            for name in ("kind", "timesteps", "class_word", "token", "model", "training")
        )
    )


@pytest.mark.parametrize("kind", [OUTPUT, WORD])
@pytest.mark.parametrize("steps", [0, 4])
def test_a_saved_subject_is_the_same(kind: str, steps: int, tmp_path: Path):
    learned = subject(kind, "sdxl", steps=steps, model=engine.model_tag(tiny_models.sdxl()), training={"steps": 3})
    path = tmp_path / "new" / "subject.safetensors"
    subject_files.save_subject(learned, str(path))
    assert same(subject_files.load_subject(str(path)), learned)
    assert [file.name for file in path.parent.iterdir()] == ["subject.safetensors"]


@pytest.mark.parametrize(("width", "exact"), [(768, True), (1024, False), (2048, False)])
def test_files_stay_below_a_megabyte(width: int, exact: bool, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    shared = {OUTPUT: torch.randn(5, width, generator=generator)}
    drift = 0.02 * torch.randn(50, 5, width, generator=generator).cumsum(0)
    learned = SubjectEmbedding(
        OUTPUT, shared, {OUTPUT: shared[OUTPUT] + drift}, tuple(range(981, 0, -20)), "cat", "sks",
        engine.model_tag(tiny_models.sd1()), {"steps": 1000},
    )  # fmt: skip
    path = tmp_path / "subject.safetensors"
    subject_files.save_subject(learned, str(path))
    assert path.stat().st_size < 1_000_000
    loaded = subject_files.load_subject(str(path))
    assert torch.equal(loaded.vectors[OUTPUT], shared[OUTPUT])
    error = (loaded.step_vectors[OUTPUT] - learned.step_vectors[OUTPUT]).abs()
    bound = drift.abs().amax(2, keepdim=True) / 254
    assert bool((error <= (0.0 if exact else 1.0) * bound + 1e-6).all())
    _, description = subject_files.read_tensors(str(path), subject_files.KIND)
    relative = float(error.norm() / drift.norm())
    assert description["rounding"] == pytest.approx(relative, rel=0.01) and (relative < 1e-6) == exact


class Code:
    def __reduce__(self) -> Any:
        return print, ("executed",)


VECTORS = torch.arange(64.0).reshape(2, 32)


@pytest.mark.parametrize(
    ("file", "content", "token", "rows"),
    [
        ("a1111.pt", {"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "thing"}, "thing", 2),
        ("a1111.safetensors", {"emb_params": VECTORS}, "a1111", 2),
        ("diffusers.safetensors", {"<cat-toy>": VECTORS[0]}, "<cat-toy>", 1),
        ("diffusers.bin", {"<cat-toy>": VECTORS}, "<cat-toy>", 2),
        ("comfyui.safetensors", {"clip_l": VECTORS}, "comfyui", 2),
    ],
)
def test_textual_inversions_of_other_programs(file: str, content: Any, token: str, rows: int, tmp_path: Path):
    path = tmp_path / file
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    loaded = subject_files.load_subject(str(path))
    assert loaded.kind == WORD and loaded.token == token and loaded.model is None and loaded.class_word == ""
    assert torch.equal(loaded.vectors["clip_l"], VECTORS[:rows])
    clip = tiny_text_encoders.clip("sd1")
    ours = subject_conditioning(clip, loaded, f"a {token} on the grass")[0][0]
    clip.tokenizer.clip_l.embedding_directory = [str(tmp_path)]
    theirs = clip.encode_from_tokens(clip.tokenize(f"a embedding:{file} on the grass"))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("width", "encoder"), [(768, "clip_l"), (1024, "clip_h"), (1280, "clip_g")])
def test_the_width_tells_the_encoder(width: int, encoder: str, tmp_path: Path):
    save_file({"emb_params": torch.ones(2, width)}, tmp_path / "one.safetensors")
    assert list(subject_files.load_subject(str(tmp_path / "one.safetensors")).vectors) == [encoder]


@pytest.mark.parametrize(("family", "size"), [("sd1", None), ("sdxl", 16)])
def test_an_exported_subject_loads_through_comfyuis_loader(family: str, size: int | None, tmp_path: Path):
    learned = subject(WORD, family, steps=3)
    subject_files.save_textual_inversion(learned, str(tmp_path / "cat.safetensors"))
    for encoder, vectors in learned.vectors.items():
        loaded = comfy.sd1_clip.load_embed("cat", str(tmp_path), vectors.shape[-1], encoder)
        assert torch.equal(loaded, vectors)
    assert set(load_file(tmp_path / "cat.safetensors")) == set(learned.vectors)
    assert subject_files.load_subject(str(tmp_path / "cat.safetensors")).vectors.keys() == learned.vectors.keys()


def test_rows_of_the_output_are_no_words(tmp_path: Path):
    with pytest.raises(IdentityEditError, match="train it with kind 'word'"):
        subject_files.save_textual_inversion(subject(OUTPUT), str(tmp_path / "cat.safetensors"))
    assert not list(tmp_path.iterdir())


DAMAGED = ("text.safetensors", "text.pt", "cut.safetensors")
WRONG = {
    "missing.safetensors": "does not exist",
    "code.pt": "contains code",
    "other.safetensors": "is neither",
    "nan.safetensors": "contains NaN",
    "numbers.pt": "is neither",
    "version.safetensors": "another version",
}


@pytest.mark.parametrize("name", [*DAMAGED, *WRONG])
def test_files_that_cannot_be_read_say_so(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "text.pt").write_text("no tensors")
    torch.save({"string_to_param": {"*": Code()}}, tmp_path / "code.pt")
    save_file({"a": VECTORS, "b": VECTORS.clone()}, tmp_path / "other.safetensors")
    save_file({"emb_params": VECTORS * float("nan")}, tmp_path / "nan.safetensors")
    torch.save([1, 2], tmp_path / "numbers.pt")
    subject_files.write_tensors(
        str(tmp_path / "version.safetensors"), {"shared.output": VECTORS}, {"kind": subject_files.KIND}
    )
    subject_files.save_subject(subject(OUTPUT, steps=4), str(tmp_path / "whole.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-100])
    with pytest.raises(IdentityEditError) as raised:
        subject_files.load_subject(str(tmp_path / name))
    assert "executed" not in capsys.readouterr().out
    assert WRONG.get(name, name) in str(raised.value)
