"""What is recorded equals a plain float64 softmax, and recording changes no bit of what is sampled."""

from __future__ import annotations

import copy
import gc
import logging
import weakref

import comfy.ldm.modules.attention as engine_attention
import comfy.samplers
import pytest
import torch
from identity_edit_pack.attention import capture, identity_mask, sites, unet
from identity_edit_pack.attention.capture import capture_attention
from identity_edit_pack.attention.maps import MeanMap
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.text.step_embeddings import StepEmbeddings, apply_step_embeddings
from identity_edit_pack.tests import tiny_models
from identity_edit_pack.tests.attention.sampling import (
    COLUMNS,
    IDENTITY,
    NEGATIVE,
    POSITIVE,
    SIGMAS,
    Reference,
    sample,
)

BACKENDS = ["attention_basic", "attention_sub_quad", "attention_split", "attention_pytorch"]
EMBEDDING = IDENTITY[0][0]


def record(model, choice: str = sites.ALL, embedding: torch.Tensor = EMBEDDING, **options):
    return capture.capture_attention(model, embedding, COLUMNS, choice, **options)


def mean(found: MeanMap) -> torch.Tensor:
    return found.total / found.weight


@pytest.mark.parametrize("family", list(tiny_models.FAMILIES))
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (2, 7, 12)])
def test_means_equal_a_plain_softmax_in_float64(family: str, batch: int, height: int, width: int) -> None:
    model, latent = tiny_models.FAMILIES[family](), tiny_models.latent(4, batch, height, width)
    reference = Reference(model, EMBEDDING, COLUMNS)
    expected = reference.run(latent)
    recording, attention = record(model)
    assert torch.equal(sample(recording, latent), expected), "recording changed the image"
    assert attention.evaluations == 3
    assert set(attention.cross) == set(reference.cross)
    for grid, found in attention.cross.items():
        assert torch.allclose(mean(found).double(), reference.mean_cross(grid), atol=1e-5, rtol=0), grid
        assert float(found.weight.min()) == len(reference.cross[grid])
    finest = max(attention.cross)
    assert attention.self_grid == finest
    assert torch.allclose(attention.self_attention().double(), reference.mean_own(finest), atol=1e-5, rtol=0)


def test_the_mean_is_of_sharp_maps_too() -> None:
    """Random weights make flat maps, on which much could be wrong unseen: sharpen them."""
    model, latent = tiny_models.sd1(), tiny_models.latent(4)
    with torch.no_grad():
        for layer in unet.attention_layers(model.model.diffusion_model):
            for attention in (layer.block.attn1, layer.block.attn2):
                attention.to_q.weight.mul_(8)
    reference = Reference(model, EMBEDDING, COLUMNS)
    reference.run(latent)
    recording, attention = record(model)
    sample(recording, latent)
    assert float(reference.mean_own((8, 8)).amax()) > 5 / 64, "not sharper than an even map of 64 cells"
    assert torch.allclose(mean(attention.cross[8, 8]).double(), reference.mean_cross((8, 8)), atol=1e-5, rtol=0)
    assert torch.allclose(attention.self_attention().double(), reference.mean_own((8, 8)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", list(tiny_models.FAMILIES))
def test_the_latent_keeps_every_bit_with_every_backend(monkeypatch, backend: str, family: str) -> None:
    function = getattr(engine_attention, backend)
    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(engine_attention, name, function)
    model, latent = tiny_models.FAMILIES[family](), tiny_models.latent(4, batch=2, width=10)
    recording, attention = record(model)
    assert torch.equal(sample(recording, latent), sample(model, latent))
    assert attention.evaluations == 3 and attention.cross


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_recorded_in_float32(dtype: torch.dtype) -> None:
    model, latent = tiny_models.sd1(dtype=dtype), tiny_models.latent(4)
    recording, attention = record(model)
    assert torch.equal(sample(recording, latent), sample(model, latent))
    assert attention.cross[8, 8].total.dtype == torch.float32
    assert torch.allclose(attention.self_attention().sum(-1), torch.ones(1, 64), atol=1e-5)


def test_pieces_give_the_same_maps(monkeypatch) -> None:
    model, latent = tiny_models.sd1(), tiny_models.latent(4, batch=2)
    whole, whole_attention = record(model)
    sample(whole, latent)
    from identity_edit_pack.attention import maps

    monkeypatch.setitem(maps._ELEMENTS, "cpu", 700)
    pieces, attention = record(model)
    sample(pieces, latent)
    assert torch.allclose(attention.self_attention(), whole_attention.self_attention(), atol=1e-6)
    for grid in attention.cross:
        assert torch.allclose(attention.cross[grid].total, whole_attention.cross[grid].total, atol=1e-5)


def test_rows_are_found_in_any_order_and_in_separate_calls() -> None:
    """Prompts of different lengths that ComfyUI cannot tile go through the network one after the other."""
    model, latent = tiny_models.sd1(), tiny_models.latent(4, batch=2)
    expected = Reference(model, EMBEDDING, COLUMNS)
    expected.run(latent, cfg=1.0)
    seen = []

    class Reversed(comfy.samplers.CFGGuider):
        """Evaluates [negative, positive], as Dual CFG Guider does."""

        def predict_noise(self, x, timestep, model_options=None, seed=None):
            sides = [self.conds["negative"], self.conds["positive"]]
            return comfy.samplers.calc_cond_batch(self.inner_model, sides, x, timestep, model_options)[1]

    recording, attention = record(model)
    guider = Reversed(recording)
    guider.set_conds(POSITIVE, NEGATIVE)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(7))
    sigmas = torch.tensor([9.0, 4.0, 1.0, 0.0])
    guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=7)
    assert torch.allclose(mean(attention.cross[8, 8]).double(), expected.mean_cross((8, 8)), atol=1e-5, rtol=0)

    def note(apply_model, arguments):
        seen.append(arguments["cond_or_uncond"])
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    separate = model.clone()
    separate.set_model_unet_function_wrapper(note)
    recording, attention = record(separate)
    other = tiny_models.conditioning(2, tokens=5 * tiny_models.TOKENS + 1)
    reference = Reference(model, EMBEDDING, COLUMNS)
    result = reference.run(latent, negative=other)
    assert torch.equal(sample(recording, latent, negative=other), result)
    assert [0] in seen and [1] in seen
    assert torch.allclose(mean(attention.cross[8, 8]).double(), reference.mean_cross((8, 8)), atol=1e-5, rtol=0)


def test_a_sampler_with_two_evaluations_a_step_counts_them() -> None:
    recording, attention = record(tiny_models.sd1())
    sample(recording, tiny_models.latent(4), sampler="heun")
    assert attention.evaluations == 5  # the last step of three ends at sigma 0 and takes one


def test_what_guidance_evaluates_besides_is_not_read() -> None:
    """Perturbed-attention guidance asks for the positive side once more in each step."""
    model, latent = tiny_models.sd1(), tiny_models.latent(4)

    def again(arguments):
        comfy.samplers.calc_cond_batch(
            arguments["model"], [arguments["cond"]], 5 * arguments["input"], arguments["sigma"],
            arguments["model_options"],
        )  # fmt: skip
        return arguments["denoised"]

    plain, plain_attention = record(model)
    sample(plain, latent)
    perturbed = model.clone()
    perturbed.set_model_sampler_post_cfg_function(again)
    recording, attention = record(perturbed)
    sample(recording, latent)
    assert attention.evaluations == 3
    assert torch.equal(attention.cross[8, 8].total, plain_attention.cross[8, 8].total)


def test_beside_another_packs_replace_on_the_same_block() -> None:
    """Like IPAdapter: an attn2 replace that owns the block. Both do their work, and neither notices the other."""
    model, latent = tiny_models.sd1(), tiny_models.latent(4)
    keys = [layer.key for layer in unet.attention_layers(model.model.diffusion_model)]
    calls = []

    def adapter(q, k, v, extra):
        calls.append(extra["block"])
        return engine_attention.attention_basic(q, k, v, extra["n_heads"]) * 1.5

    adapted = model.clone()
    for name, number, index in keys:
        adapted.set_model_attn2_replace(adapter, name, number, index)
    expected = sample(adapted, latent)
    count = len(calls)
    assert count == 3 * len(keys) and not torch.equal(expected, sample(model, latent))
    first, attention = record(adapted)
    assert torch.equal(sample(first, latent), expected)
    assert len(calls) == 2 * count
    # And when the other pack comes later.
    second, other_attention = record(model)
    for name, number, index in keys:
        second.set_model_attn2_replace(adapter, name, number, index)
    assert torch.equal(sample(second, latent), expected)
    for grid in attention.cross:
        assert torch.equal(attention.cross[grid].total, other_attention.cross[grid].total)


def test_two_recordings_share_a_model() -> None:
    model, latent = tiny_models.sd1(), tiny_models.latent(4)
    other_embedding = tiny_models.conditioning(9)[0][0]
    first, attention = record(model)
    both, other = record(first, embedding=other_embedding)
    assert torch.equal(sample(both, latent), sample(model, latent))
    alone, expected = record(model, embedding=other_embedding)
    sample(alone, latent)
    assert torch.equal(other.cross[8, 8].total, expected.cross[8, 8].total)
    assert not torch.equal(attention.cross[8, 8].total, other.cross[8, 8].total)


def test_every_latent_can_have_its_own_identity() -> None:
    model, latent = tiny_models.sd1(), tiny_models.latent(4, batch=2)
    two = torch.cat([EMBEDDING, tiny_models.conditioning(9)[0][0]])
    recording, attention = record(model, embedding=two)
    sample(recording, latent)
    for index in range(2):
        alone, expected = record(model, embedding=two[index : index + 1])
        sample(alone, latent)
        assert torch.allclose(attention.cross[8, 8].total[index], expected.cross[8, 8].total[index], atol=1e-6)
    three, _ = record(model, embedding=EMBEDDING.expand(3, -1, -1))
    with pytest.raises(ValueError, match="3 embeddings for a batch of 2"):
        sample(three, latent)


def test_areas_are_placed_and_weighed() -> None:
    """Two halves side by side: each half's cells get the mean of their own conditioning alone."""
    model, latent = tiny_models.sd1(), tiny_models.latent(4, height=8, width=16)
    left = [[POSITIVE[0][0], {**POSITIVE[0][1], "area": (8, 8, 0, 0), "strength": 0.5}]]
    right = [[NEGATIVE[0][0], {**NEGATIVE[0][1], "area": (8, 8, 0, 8)}]]
    recording, attention = record(model, "1")
    expected = sample(model, latent, positive=left + right)
    assert torch.equal(sample(recording, latent, positive=left + right), expected)
    found = attention.cross[8, 16]
    count = float(found.weight[0, 0, 15])
    assert torch.equal(found.weight[0, :, :8], torch.full((8, 8), 0.5 * count))
    assert torch.equal(found.weight[0, :, 8:], torch.full((8, 8), count))
    own = attention.self_attention()[0].view(8, 16, 8, 16)
    assert float(own[:, :8, :, 8:].abs().max()) == 0 and float(own[:, 8:, :, :8].abs().max()) == 0
    assert torch.allclose(own.sum(dim=(2, 3)), torch.ones(8, 16), atol=1e-5)


def test_what_no_conditioning_covers_has_no_cross_attention_and_attends_to_itself() -> None:
    model, latent = tiny_models.sd1(), tiny_models.latent(4)
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    recording, attention = record(model, "1")
    positive = [[POSITIVE[0][0], {**POSITIVE[0][1], "mask": mask}]]
    sample(recording, latent, positive=positive)
    assert float(attention.cross[8, 8].weight[:, 4:].max()) == 0
    assert float(attention.cross[8, 8].total[:, 4:].abs().max()) == 0
    assert torch.equal(attention.self_attention()[0, 32:], torch.eye(64)[32:])


def test_each_run_starts_anew_and_keeps_nothing_of_the_model() -> None:
    model, latent = tiny_models.sd1(), tiny_models.latent(4)
    recording, attention = record(model)
    sample(recording, latent)
    first = attention.cross[8, 8].total.clone()
    sample(recording.clone(), latent)
    assert attention.evaluations == 3 and torch.equal(attention.cross[8, 8].total, first)
    assert copy.deepcopy(attention) is attention
    network = weakref.ref(model.model.diffusion_model)
    del model, recording
    gc.collect()
    assert network() is None, "the handle keeps the model"


def test_an_interrupted_run_leaves_nothing_behind() -> None:
    model, latent = tiny_models.sd1(), tiny_models.latent(4)
    recording, attention = record(model)

    def stop(apply_model, arguments):
        raise KeyboardInterrupt

    interrupted = recording.clone()
    interrupted.set_model_unet_function_wrapper(stop)
    with pytest.raises(KeyboardInterrupt):
        sample(interrupted, latent)
    assert attention.evaluations == 0 and not attention.cross
    sample(recording, latent)
    assert attention.evaluations == 3


def test_merged_cells_are_left_out_with_a_warning(caplog) -> None:
    """Token merging shortens the self-attention's input before our patch sees it."""
    model, latent = tiny_models.sd1(), tiny_models.latent(4)
    merging = model.clone()
    merging.set_model_attn1_patch(lambda n, context, value, extra: (n[:, ::2].repeat_interleave(2, 1)[:, :-2], n, n))
    merging.set_model_attn1_output_patch(lambda n, extra: torch.nn.functional.pad(n, (0, 0, 0, 2)))
    recording, attention = record(merging)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sample(recording, latent), sample(merging, latent))
    assert "could not be recorded" in caplog.text
    assert attention.cross
    with pytest.raises(ValueError, match="No self-attention"):
        attention.self_attention()


def test_every_patch_fires(caplog) -> None:
    for family in tiny_models.FAMILIES.values():
        recording, _ = record(family())
        with caplog.at_level(logging.WARNING):
            sample(recording, tiny_models.latent(4, height=9, width=14))
    assert "could not be recorded" not in caplog.text


def test_wrong_tokens_and_layers_are_refused_at_once() -> None:
    model = tiny_models.sd1()
    with pytest.raises(ValueError, match="identity tokens"):
        capture.capture_attention(model, EMBEDDING, ())
    with pytest.raises(ValueError, match="identity tokens"):
        capture.capture_attention(model, EMBEDDING, (tiny_models.TOKENS,))
    with pytest.raises(ValueError, match="choose from 1, 2"):
        record(model, "8")


@pytest.mark.parametrize("step_wise", [False, True])
def test_maps_of_every_token_at_every_step(step_wise: bool) -> None:
    """Of the sampled prompt, counted from both ends; with per-step embeddings, each step's own."""
    latent, model = tiny_models.latent(4, batch=2), tiny_models.sd1()
    rows = torch.stack([tiny_models.conditioning(seed)[0][0] for seed in ((11, 12, 13) if step_wise else (1, 1, 1))])
    if step_wise:
        model = apply_step_embeddings(model, StepEmbeddings(sigmas=SIGMAS, embeddings=rows), "positive")
    columns = (3, -1)
    recording, attention = capture_attention(model, None, columns, "2", by_step=True)
    assert torch.equal(sample(recording, latent), sample(model, latent))
    assert sorted(attention.steps) == [0, 1, 2] and attention.step_count == 3
    whole = torch.zeros(2, 4, 4, dtype=torch.float64)
    for step, row in enumerate(rows):
        expected = []
        for column in columns:
            reference = Reference(model, row, (column,))
            reference.run(latent)
            maps = torch.stack(reference.cross[4, 4]).unflatten(0, (3, -1))  # steps, layers
            expected.append(maps[step].mean(0))
        whole += torch.stack(expected).sum(0) / 3
        found = identity_mask.rough_mask(attention.steps[step]).unflatten(0, (2, 2))
        torch.testing.assert_close(found.double(), torch.stack(expected, dim=1), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(identity_mask.rough_mask(attention).double(), whole, rtol=1e-4, atol=1e-7)


def test_tokens_outside_of_the_prompt_are_refused() -> None:
    for column in (tiny_models.TOKENS, -tiny_models.TOKENS - 1):
        recording, _ = capture_attention(tiny_models.sd1(), None, (column,), "2")
        with pytest.raises(IdentityEditError, match="8 tokens of the prompt"):
            sample(recording, tiny_models.latent(4))


def test_a_call_between_two_steps_belongs_to_the_earlier() -> None:
    recording, attention = capture_attention(tiny_models.sd1(), None, (1,), "2", by_step=True)
    sample(recording, tiny_models.latent(4), sampler="dpm_2")  # its second call lies between the noise levels
    assert sorted(attention.steps) == [0, 1, 2] and attention.evaluations == 5
    weights = [float(attention.steps[step].cross[4, 4].weight.max()) for step in range(3)]
    assert weights[0] == weights[1] == 2 * weights[2]
