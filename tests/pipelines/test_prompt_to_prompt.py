"""Words and tokens against the reference implementation's aligner, and prompt-to-prompt on real samplers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import numpy as np
import pytest
import tiny_text_encoders
import torch
from identity_edit_pack.pipelines.attention_control import prompt_to_prompt as p2p
from identity_edit_pack.pipelines.inversion import edit_friendly, inversion
from identity_edit_pack.pipelines.lipe.identity_prompt import encode_identity_prompt
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.text import prompt_tokens as words
from identity_edit_pack.pipelines.text.step_embeddings import apply_step_embeddings, constant_embedding
from identity_edit_pack.tests import tiny_models
from safetensors.torch import save_file

CAT, DOG = "a photo of a cat in the snow", "a photo of a dog in the snow"
HEIGHT, WIDTH = 8, 12


def encoder(family: str = "sd1") -> Any:
    clip = tiny_text_encoders.clip(family)
    if family == "sdxl":  # as comfy.sdxl_clip.SDXLTokenizer has it
        clip.tokenizer.untokenize = clip.tokenizer.parts["g"].untokenize
    return clip


@pytest.fixture(scope="module")
def clip() -> Any:
    return encoder()


def sample(model: Any, positive: Any, negative: Any, sampler: str = "euler", batch: int = 1) -> torch.Tensor:
    latent = torch.zeros(batch, 4, HEIGHT, WIDTH)
    noise = comfy.sample.prepare_noise(latent, 5)
    with torch.no_grad():
        return comfy.sample.sample(
            model, noise, 5, 4.0, sampler, "normal", positive, negative, latent, disable_pbar=True, seed=5
        )


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


class ReferenceAligner:
    """The mappers of google/prompt-to-prompt (seq_aligner.py) in plain loops, on CLIP's tokenizer of transformers."""

    def __init__(self, clip: Any) -> None:
        self.tokenizer = clip.tokenizer.clip_l.tokenizer

    def word_positions(self, text: str, place: int) -> list[int]:
        position, found = 1, []
        for index, word in enumerate(text.split(" ")):
            count = len(self.tokenizer.encode(word)) - 2
            if index == place:
                found = list(range(position, position + count))
            position += count
        return found

    def replacement(self, x: str, y: str) -> np.ndarray:
        differing = [i for i, (a, b) in enumerate(zip(x.split(" "), y.split(" "), strict=True)) if a != b]
        sources = [self.word_positions(x, i) for i in differing]
        targets = [self.word_positions(y, i) for i in differing]
        mapper = np.zeros((77, 77))
        i = j = current = 0
        while i < 77 and j < 77:
            if current < len(sources) and sources[current][0] == i:
                of_source, of_target = sources[current], targets[current]
                if len(of_source) == len(of_target):
                    mapper[of_source, of_target] = 1
                else:
                    for position in of_target:
                        mapper[of_source, position] = 1 / len(of_target)
                current += 1
                i += len(of_source)
                j += len(of_target)
            elif current < len(sources):
                mapper[i, j] = 1
                i, j = i + 1, j + 1
            else:
                mapper[j, j] = 1
                i, j = i + 1, j + 1
        return mapper

    def aligned(self, x: str, y: str) -> dict[int, int]:
        """Target position to source position of the tokens that the global alignment matches."""
        first, second = self.tokenizer.encode(x), self.tokenizer.encode(y)
        score = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
        step = np.zeros_like(score)
        step[0, 1:], step[1:, 0], step[0, 0] = 1, 2, 4
        for i in range(1, len(first) + 1):
            for j in range(1, len(second) + 1):
                match = score[i - 1, j - 1] + (1 if first[i - 1] == second[j - 1] else -1)
                score[i, j] = max(score[i, j - 1], score[i - 1, j], match)
                step[i, j] = 1 if score[i, j] == score[i, j - 1] else 2 if score[i, j] == score[i - 1, j] else 3
        i, j, found = len(first), len(second), {}
        while i > 0 or j > 0:
            if step[i, j] == 3:
                i, j = i - 1, j - 1
                found[j] = i
            elif step[i, j] == 1:
                j -= 1
            else:
                i -= 1
        return found


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (CAT, CAT),
        (CAT, DOG),
        ("a painting of a squirrel eating a burger", "a painting of a lion eating a lasagna"),
        ("a painting of a squirrel eating a burger", "a drawing of a hippopotamus eating a pizza"),
        ("a photo of a hippopotamus", "a photo of a cat"),
        ("a cat", "a parasaurolophus"),
    ],
)
def test_replace_maps_as_the_reference_does(clip: Any, source: str, target: str) -> None:
    first, second = words.prompt_tokens(clip, source), words.prompt_tokens(clip, target)
    ours = words.token_mapper(first, second, words.paired_words(first, second)).numpy()
    reference = ReferenceAligner(clip).replacement(source, target)
    if len(first.content) == len(second.content):
        assert np.array_equal(ours, reference)
        return
    # Behind the last exchanged word the reference goes on by position; until there both agree.
    last = [i for i, pair in enumerate(zip(source.split(), target.split(), strict=True)) if pair[0] != pair[1]][-1]
    behind = second.words[last][-1] + 1
    assert np.allclose(ours[:, :behind], reference[:, :behind])
    # Ours: every source token hands on all of its weight, words to words, end to end, padding to padding.
    assert np.allclose(ours.sum(axis=1), 1.0)
    assert ours[first.chunks[0].end, second.chunks[0].end] == 1.0
    assert ours[76, 76] == 1.0 and ours[0, 0] == 1.0


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("a photo of a house on a mountain", "a photo of a house on a mountain at winter"),
        ("soup", "pea soup with mushrooms"),
        (CAT, "a watercolor painting of a cat sitting in the snow at night"),
        ("a photo of a fluffy parasaurolophus in a red hat", "a photo of a parasaurolophus"),
        (CAT, DOG),
    ],
)
def test_refine_aligns_as_the_reference_does(clip: Any, source: str, target: str) -> None:
    first, second = words.prompt_tokens(clip, source), words.prompt_tokens(clip, target)
    mapper = words.token_mapper(first, second, words.aligned_tokens(first, second))
    ours = {int(j): int(mapper[:, j].argmax()) for j in second.positions if bool(mapper[:, j].any())}
    ours |= {0: 0, second.chunks[0].end: first.chunks[0].end}
    assert ours == ReferenceAligner(clip).aligned(source, target)
    assert set(mapper.unique().tolist()) <= {0.0, 1.0} or len(first.content) != len(second.content)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_words_emphasis_and_long_prompts(family: str) -> None:
    clip = encoder(family)
    plain, emphasized = (words.prompt_tokens(clip, text) for text in ("a cat, red", "a (cat:1.3), (red)"))
    assert plain.words == emphasized.words == ((1,), (2,), (3,), (4,))
    assert plain.chunks == (words.Chunk(0, 5, tuple(range(6, 77))),)
    assert words.positions_of(clip, emphasized, "cat", "The prompt") == (2,)
    assert words.positions_of(clip, words.prompt_tokens(clip, "a cat and a cat"), "a cat", "The prompt") == (1, 2, 4, 5)
    long = words.prompt_tokens(clip, "a cat " + "and a dog " * 30)
    assert long.count == 154 and len(long.chunks) == 2 and long.chunks[1].begin == 77
    mapper = words.token_mapper(long, long, words.paired_words(long, long))
    assert torch.equal(mapper, torch.eye(154))
    short = words.prompt_tokens(clip, "a cat")
    assert words.token_mapper(long, short, words.aligned_tokens(long, short)).shape == (154, 77)


@pytest.mark.parametrize("family", ["sd1", "sd2_v", "sdxl"])
@pytest.mark.parametrize("edit", [p2p.REPLACE, p2p.REFINE])
def test_identical_prompts_give_the_source_bit_for_bit(family: str, edit: str) -> None:
    model, clip = tiny_models.FAMILIES[family](), encoder(family)
    negative = p2p.encode(clip, "")
    plain = sample(model, p2p.encode(clip, CAT), negative, batch=2)
    controlled, positive = p2p.prompt_to_prompt(model, clip, CAT, CAT, edit, {"cat": 1.0}, "cat snow")
    source, target = sample(controlled, positive, negative, batch=2).chunk(2)
    assert torch.equal(source, plain) and torch.equal(target, plain)


@pytest.mark.parametrize("sampler", ["euler", "ddim", "heun", "dpmpp_2m", "uni_pc"])
def test_the_source_of_an_edit_is_the_plain_image(clip: Any, sampler: str) -> None:
    model, negative = tiny_models.sd1(), p2p.encode(clip, "")
    plain = sample(model, p2p.encode(clip, CAT), negative, sampler)
    uncontrolled = sample(model, p2p.encode(clip, DOG), negative, sampler)
    results = []
    blend = {"blend_words": "cat dog", "settings": p2p.ControlSettings(blend_threshold=0.95)}
    for changes in ({}, {"reweight": {"snow": 3.0}}, blend, {"edit": p2p.REFINE}):
        controlled, positive = p2p.prompt_to_prompt(model, clip, CAT, DOG, **changes)
        source, target = sample(controlled, positive, negative, sampler).chunk(2)
        assert torch.equal(source, plain) and not torch.equal(target, plain)
        results.append(target)
    assert len({result.numpy().tobytes() for result in results}) == 4
    off = p2p.ControlSettings(0.0, 0.0)
    controlled, positive = p2p.prompt_to_prompt(model, clip, CAT, DOG, settings=off)
    assert torch.equal(sample(controlled, positive, negative, sampler).chunk(2)[1], uncontrolled)


def test_the_latents_of_a_batch_are_edited_one_by_one(clip: Any) -> None:
    model, negative = tiny_models.sd1(), p2p.encode(clip, "")
    controlled, positive = p2p.prompt_to_prompt(model, clip, CAT, DOG)
    together = sample(controlled, positive, negative, batch=2)
    alone = sample(controlled, positive, negative)  # the first of a batch has the noise of one alone
    assert relative_error(together[[0, 2]], alone) < 1e-5


def inverted(model: Any, clip: Any, batch: int = 1) -> inversion.Inversion:
    return inversion.invert_image(model, tiny_models.latent(4, batch, HEIGHT, WIDTH), p2p.encode(clip, CAT), steps=6)


def sampled(model: Any, pivot: inversion.Inversion, positive: Any, negative: Any, cfg: float = 4.0) -> torch.Tensor:
    start = pivot.start_latent(model)
    with torch.no_grad():
        return comfy.sample.sample_custom(
            model, torch.zeros_like(start), cfg, comfy.samplers.sampler_object("euler"), pivot.sigmas,
            positive, negative, start, disable_pbar=True, seed=0,
        )  # fmt: skip


def test_a_source_that_was_inverted(clip: Any) -> None:
    """The target alone is returned, and a step under control costs three evaluations instead of two."""
    model = tiny_models.sd1(output_gain=0.1)
    negative = p2p.encode(clip, "")
    pivot = inverted(model, clip, batch=2)
    same, positive = p2p.prompt_to_prompt(
        model, clip, CAT, CAT, settings=p2p.ControlSettings(1.0, 1.0), inversion=pivot
    )
    result = sampled(same, pivot, positive, negative, cfg=1.0)
    assert result.shape == (2, 4, HEIGHT, WIDTH)
    plain = sampled(model, pivot, positive, negative, cfg=1.0)
    assert relative_error(result, plain) < 0.05  # DDIM's own path is near the inversion's, and not on it
    edited, positive = p2p.prompt_to_prompt(model, clip, CAT, DOG, inversion=pivot)
    free = sampled(model, pivot, positive, negative)
    assert relative_error(sampled(edited, pivot, positive, negative), free) > 1e-4
    counts: list[int] = []
    counted = edited.clone()
    counted.set_model_unet_function_wrapper(
        lambda apply, given: (
            counts.append(len(given["cond_or_uncond"])) or apply(given["input"], given["timestep"], **given["c"])
        )
    )
    sampled(counted, pivot, positive, negative)
    assert sum(counts) == 5 * 3 + 2  # round(0.8 * 6) = 5 steps under control


def test_an_exact_inversion_with_the_same_prompt_gives_the_image_back(clip: Any) -> None:
    """To rounding: the source is evaluated without its negative side, in a batch of another size."""
    model, positive, negative = tiny_models.sd1(), p2p.encode(clip, CAT), p2p.encode(clip, "")
    latent = tiny_models.latent(4, 1, HEIGHT, WIDTH)
    pivot = edit_friendly.edit_friendly_ddpm_inversion(model, latent, positive, negative, steps=6)
    settings = p2p.ControlSettings(1.0, 1.0)
    same, target = p2p.prompt_to_prompt(model, clip, CAT, CAT, settings=settings, blend_words="cat", inversion=pivot)
    plain, controlled = (inversion.sample_inversion(m, pivot, target, negative, 3.5, skip=0) for m in (model, same))
    assert relative_error(controlled, plain) < 1e-4 and relative_error(controlled, latent) < 1e-4
    other, target = p2p.prompt_to_prompt(model, clip, CAT, DOG, settings=settings, inversion=pivot)
    edited = inversion.sample_inversion(other, pivot, target, negative, 3.5, skip=0)
    assert relative_error(edited, latent) > 1e-2


def test_the_inversions_null_text_embeddings_are_the_negative_side(clip: Any) -> None:
    model = tiny_models.sd1(output_gain=0.1)
    pivot = inverted(model, clip)
    table = constant_embedding(pivot.sigmas, tiny_models.conditioning(8)[0][0].repeat(1, 10, 1)[:, :77])
    with_table = pivot.with_embeddings(table)
    controlled, positive = p2p.prompt_to_prompt(model, clip, CAT, DOG, inversion=with_table)
    by_hand, _ = p2p.prompt_to_prompt(apply_step_embeddings(model, table), clip, CAT, DOG, inversion=pivot)
    empty = p2p.encode(clip, "")
    ours = sampled(controlled, pivot, positive, empty)
    assert torch.equal(ours, sampled(by_hand, pivot, positive, empty))
    assert not torch.equal(
        ours, sampled(p2p.prompt_to_prompt(model, clip, CAT, DOG, inversion=pivot)[0], pivot, positive, empty)
    )


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_step_table_gives_the_same_before_and_after(clip: Any, side: str) -> None:
    """The source keeps its own prompt, whichever of two nodes the model went through first."""
    model = tiny_models.sd1(output_gain=0.1)
    pivot = inverted(model, clip)
    table = constant_embedding(pivot.sigmas, tiny_models.conditioning(8)[0][0].repeat(1, 10, 1)[:, :77])
    before, positive = p2p.prompt_to_prompt(apply_step_embeddings(model, table, side), clip, CAT, DOG, inversion=pivot)
    after = apply_step_embeddings(p2p.prompt_to_prompt(model, clip, CAT, DOG, inversion=pivot)[0], table, side)
    empty = p2p.encode(clip, "")
    assert torch.equal(*(sampled(one, pivot, positive, empty) for one in (before, after)))


def test_outside_of_the_blend_the_inverted_image_remains(clip: Any) -> None:
    """A threshold that nothing exceeds: the estimate is the image's everywhere, whatever the prompt says."""
    model, negative = tiny_models.sd1(output_gain=0.1), p2p.encode(clip, "")
    pivot = inverted(model, clip)
    end = pivot.end_latent(model)
    errors = []
    for threshold, words_ in ((1.0, "cat dog"), (0.3, "")):
        settings = p2p.ControlSettings(0.5, 0.0, blend_threshold=threshold, blend_start=0.0)
        model_, positive = p2p.prompt_to_prompt(
            model, clip, CAT, DOG, settings=settings, blend_words=words_, inversion=pivot
        )
        errors.append(relative_error(sampled(model_, pivot, positive, negative), end))
    assert errors[0] < 0.02 < errors[1]


def test_bad_inputs_are_refused(clip: Any) -> None:
    model = tiny_models.sd1()
    pivot = inverted(model, clip, batch=2)
    refused = [
        (dict(edit="swap"), "choose one of replace, refine"),
        (dict(reweight={"rabbit": 2.0}), "target prompt .* does not contain the word 'rabbit'"),
        (dict(blend_words="cat rabbit"), "Neither the source prompt nor the target prompt contains the word 'rabbit'"),
        (dict(target_prompt="a photo of a dog"), "replace needs equal numbers; use refine"),
    ]
    for changes, message in refused:
        given = {"source_prompt": CAT, "target_prompt": DOG, **changes}
        with pytest.raises(IdentityEditError, match=message):
            p2p.prompt_to_prompt(model, clip, **given)
    with pytest.raises(IdentityEditError, match="another model"):
        p2p.prompt_to_prompt(tiny_models.sd1(seed=5), clip, CAT, DOG, inversion=pivot)
    with pytest.raises(IdentityEditError, match="CLIP of the same checkpoint"):
        p2p.prompt_to_prompt(tiny_models.sd1(context_dim=16), clip, CAT, DOG)
    with pytest.raises(IdentityEditError, match="cross_replace_steps is 2"):
        p2p.ControlSettings(cross_replace_steps=2.0)
    with pytest.raises(IdentityEditError, match="self_attention_grid is '3'"):
        p2p.ControlSettings(self_attention_grid="3")
    controlled, positive = p2p.prompt_to_prompt(model, clip, CAT, DOG, inversion=pivot)
    with pytest.raises(IdentityEditError, match="2 entries for a batch of 3"):
        three = pivot.start_latent(model)[:1].repeat(3, 1, 1, 1)
        comfy.sample.sample_custom(
            controlled, torch.zeros_like(three), 4.0, comfy.samplers.sampler_object("euler"), pivot.sigmas,
            positive, positive, three, disable_pbar=True, seed=0,
        )  # fmt: skip
    with pytest.raises(IdentityEditError, match="inversion's sigmas"):
        sample(controlled, positive, positive, batch=2)
    pairs, positive = p2p.prompt_to_prompt(model, clip, CAT, DOG)
    with pytest.raises(IdentityEditError, match="connect the inversion to Prompt-to-Prompt"):
        inversion.sample_inversion(pairs, pivot, positive, positive, 4.0)


def test_reweight_is_read_from_text() -> None:
    assert p2p.parse_reweight("fluffy: 2, red hat:0.5\nsnow : -1") == {"fluffy": 2.0, "red hat": 0.5, "snow": -1.0}
    for text in (
        "fluffy: 2 red hat:.5 snow :-1e0",
        "fluffy:2,\nred hat: 0.5, , snow: -1.",
        "fluffy\uff1a2\uff0cred hat:.5;snow:-1",
    ):
        assert p2p.parse_reweight(text) == {"fluffy": 2.0, "red hat": 0.5, "snow": -1.0}, text
    assert p2p.parse_reweight("embedding:my_cat: 2 4k:3") == {"embedding:my_cat": 2.0, "4k": 3.0}
    assert p2p.parse_reweight(" , ") == {}
    for text in ("fluffy", "fluffy: much", ": 2", "fluffy: 2 hat", "fluffy: 2 hat: x", "fluffy: nan"):
        with pytest.raises(IdentityEditError, match="each word with its factor"):
            p2p.parse_reweight(text)


def test_fields_of_words_are_separated_by_commas_of_any_language(clip: Any) -> None:
    """As tests/pipelines/test_parsing.py shows in full."""
    text = "cat\uff0csnow"
    prompt = "a cat, in the snow, at night"
    expected = {
        i for word in ("cat", "snow") for i in words.positions_of(clip, words.prompt_tokens(clip, prompt), word, "")
    }
    assert set(encode_identity_prompt(clip, prompt, text).tokens) == expected
    results = []
    for blend in (text, "cat snow"):
        model, positive = p2p.prompt_to_prompt(tiny_models.sd1(), clip, CAT, DOG, blend_words=blend)
        results.append(sample(model, positive, positive))
    assert torch.equal(*results)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("vectors", [1, 2, 7])
def test_an_embedding_is_one_word_however_many_vectors_it_has(vectors: int, family: str, tmp_path: Path) -> None:
    clip = encoder(family)
    width = tiny_models.CONTEXT if family == "sd1" else tiny_models.POOLED
    tensor = torch.randn(vectors, width)
    tensors = {"emb_params": tensor} if family == "sd1" else {"clip_l": tensor, "clip_g": tensor.clone()}
    save_file(tensors, tmp_path / "thing.safetensors")
    for key, part in [("l", clip.tokenizer.clip_l)] if family == "sd1" else clip.tokenizer.parts.items():
        part.embedding_directory, part.embedding_key = str(tmp_path), f"clip_{key}"
    source = words.prompt_tokens(clip, "a cat on the grass")
    for text, counts in (
        ("a embedding:thing on the grass", [1, vectors, 1, 1, 1]),
        ("a (embedding:thing:1.2) on the grass", [1, vectors, 1, 1, 1]),
        ("a embedding:thing embedding:thing cat, on", [1, vectors, vectors, 1, 1, 1]),
    ):
        target = words.prompt_tokens(clip, text)
        assert [len(positions) for positions in target.words] == counts
    target = words.prompt_tokens(clip, "a embedding:thing on the grass")
    mapper = words.token_mapper(source, target, words.paired_words(source, target))
    for i, position in enumerate(range(2, 2 + vectors)):  # each of its vectors gets its share of the cat's attention
        assert float(mapper[2, position]) == pytest.approx(1.0 / vectors), i
    for i in range(3):  # "on the grass" stays with itself
        assert float(mapper[3 + i, 2 + vectors + i]) == 1.0
    p2p.prompt_to_prompt(tiny_models.FAMILIES[family](), clip, source.text, target.text)
