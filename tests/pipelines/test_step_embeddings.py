"""Per-step embeddings under ComfyUI's stock samplers, against sampling by hand with each evaluation's embedding."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import comfy_extras.nodes_custom_sampler
import pytest
import tiny_models
import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine.families import schedule
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.text import step_embeddings
from identity_edit_pack.pipelines.text.step_embeddings import StepEmbeddings, apply_step_embeddings

POSITIVE, NEGATIVE = tiny_models.conditioning(1), tiny_models.conditioning(2)


def table_of(sigmas: torch.Tensor, seed: int, batch: int = 1, tokens: int = tiny_models.TOKENS) -> StepEmbeddings:
    rows = [tiny_models.conditioning(seed + i, batch, tokens)[0][0] for i in range(sigmas.shape[0] - 1)]
    return StepEmbeddings(sigmas=sigmas, embeddings=torch.stack(rows))


def run_of(patcher: Any, steps: int) -> torch.Tensor:
    return schedule.ddim_schedule(engine.require(patcher).sampling, steps).sigmas


def sample(patcher: Any, sampler: str, sigmas: torch.Tensor, positive=POSITIVE, negative=NEGATIVE, cfg=3.0, batch=1):
    latent = 0.18215**-1 * sigmas[0] * torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    stock = comfy.samplers.sampler_object(sampler)
    return comfy.sample.sample_custom(
        patcher, torch.zeros_like(latent), cfg, stock, sigmas, positive, negative, latent, disable_pbar=True, seed=0
    )


def sample_by_hand(patcher: Any, sigmas: torch.Tensor, evaluate, heun: bool, batch: int = 1) -> torch.Tensor:
    """Euler or Heun (Karras et al. 2022, algorithm 1) with `evaluate(evaluator, x, i)` at noise level sigmas[i]."""

    def loop(evaluator: engine.NetworkEvaluator, x: torch.Tensor) -> torch.Tensor:
        for i in range(len(sigmas) - 1):
            slope = (x - evaluate(evaluator, x, i)) / sigmas[i]
            ahead = x + (sigmas[i + 1] - sigmas[i]) * slope
            if heun and sigmas[i + 1] > 0:
                slope_ahead = (ahead - evaluate(evaluator, ahead, i + 1)) / sigmas[i + 1]
                ahead = x + (sigmas[i + 1] - sigmas[i]) * (slope + slope_ahead) / 2
            x = ahead
        return x

    start = sigmas[0] * torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return engine.to_socket_scale(patcher, engine.run_loop(patcher, POSITIVE, NEGATIVE, start, sigmas, loop))


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim"])
@pytest.mark.parametrize("which", ["negative", "positive"])
def test_stock_samplers_use_the_row_of_the_noise_level(sampler: str, which: str):
    patcher = tiny_models.sd1()
    sigmas = run_of(patcher, 6)
    table = table_of(sigmas, 20)
    ours = sample(apply_step_embeddings(patcher, table, which), sampler, sigmas)

    def evaluate(evaluator: engine.NetworkEvaluator, x: torch.Tensor, i: int) -> torch.Tensor:
        row = table.embeddings[min(i, table.steps - 1)]
        sides = {side: row if side == which else None for side in ("positive", "negative")}
        positive, negative = (evaluator.denoised(x, sigmas[i], side, row) for side, row in sides.items())
        return negative + 3.0 * (positive - negative)

    expected = sample_by_hand(patcher, sigmas, evaluate, heun=sampler == "heun")
    assert tiny_models.relative_error(ours, expected) < 1e-5
    assert not torch.allclose(ours, sample(patcher, sampler, sigmas), rtol=1e-2)


def test_tables_for_both_sides_compose_and_differ_in_length():
    patcher = tiny_models.sd1()
    sigmas = run_of(patcher, 4)
    positive, negative = table_of(sigmas, 20, tokens=16), table_of(sigmas, 40, tokens=8)
    both = apply_step_embeddings(apply_step_embeddings(patcher, positive, "positive"), negative, "negative").clone()

    def evaluate(evaluator: engine.NetworkEvaluator, x: torch.Tensor, i: int) -> torch.Tensor:
        uncond = evaluator.denoised(x, sigmas[i], "negative", negative.embeddings[i])
        return uncond + 3.0 * (evaluator.denoised(x, sigmas[i], "positive", positive.embeddings[i]) - uncond)

    expected = sample_by_hand(patcher, sigmas, evaluate, heun=False)
    assert tiny_models.relative_error(sample(both, "euler", sigmas), expected) < 1e-5


def test_a_constant_table_is_the_plain_conditioning_bit_for_bit():
    patcher = tiny_models.sd1()
    sigmas = run_of(patcher, 5)
    table = step_embeddings.constant_embedding(sigmas, NEGATIVE[0][0])
    assert torch.equal(sample(apply_step_embeddings(patcher, table), "euler", sigmas), sample(patcher, "euler", sigmas))


def test_the_pooled_output_goes_with_the_embedding():
    patcher = tiny_models.sdxl()
    sigmas = run_of(patcher, 3)
    other = tiny_models.conditioning(7)
    table = step_embeddings.constant_embedding(sigmas, other[0][0], other[0][1]["pooled_output"])
    ours = sample(apply_step_embeddings(patcher, table), "euler", sigmas)
    torch.testing.assert_close(ours, sample(patcher, "euler", sigmas, negative=other))
    without = step_embeddings.constant_embedding(sigmas, other[0][0])
    mixed = [[other[0][0], NEGATIVE[0][1]]]
    torch.testing.assert_close(
        sample(apply_step_embeddings(patcher, without), "euler", sigmas),
        sample(patcher, "euler", sigmas, negative=mixed),
    )


def test_each_latent_of_a_batch_has_its_own_row():
    patcher = tiny_models.sd1()
    sigmas = run_of(patcher, 3)
    table = table_of(sigmas, 20, batch=2)
    both = sample(apply_step_embeddings(patcher, table), "euler", sigmas, batch=2)
    single = StepEmbeddings(sigmas=sigmas, embeddings=table.embeddings[:, 1:])
    second = sample(apply_step_embeddings(patcher, single), "euler", sigmas, batch=2)
    assert tiny_models.relative_error(both[1], second[1]) < 1e-5
    assert not torch.allclose(both[0], second[0], rtol=1e-2)
    with pytest.raises(IdentityEditError, match="2 entries for a batch of 3"):
        sample(apply_step_embeddings(patcher, table), "euler", sigmas, batch=3)


def test_a_second_table_for_a_side_replaces_the_first_and_the_model_is_untouched():
    patcher = tiny_models.sd1()
    sigmas = run_of(patcher, 3)
    plain = sample(patcher, "euler", sigmas)
    first, second = table_of(sigmas, 20), table_of(sigmas, 40)
    both = apply_step_embeddings(apply_step_embeddings(patcher, first), second)
    assert len(both.get_all_wrappers("predict_noise")) == 1
    twice = sample(both, "euler", sigmas)
    assert torch.equal(twice, sample(apply_step_embeddings(patcher, second), "euler", sigmas))
    assert torch.equal(sample(patcher, "euler", sigmas), plain)


def test_the_guiders_conditionings_are_put_back_even_after_an_error():
    patcher = tiny_models.sd1().clone()
    seen: list[Any] = []

    def outermost(executor, *args, **kwargs):
        before = executor.class_obj.conds
        try:
            return executor(*args, **kwargs)
        finally:
            seen.append(executor.class_obj.conds is before)

    def fail(_):
        raise RuntimeError("another node fails")

    patcher = engine.with_wrappers(patcher, "outermost", outermost)
    sigmas = run_of(patcher, 2)
    patcher = apply_step_embeddings(patcher, table_of(sigmas, 20))
    sample(patcher, "heun", sigmas)
    patcher.set_model_sampler_post_cfg_function(fail)
    with pytest.raises(RuntimeError, match="another node fails"):
        sample(patcher, "euler", sigmas)
    assert len(seen) == 2 * 2 + 1 and all(seen)


def test_a_guider_without_that_side_is_left_alone():
    patcher = tiny_models.sd1()
    sigmas = run_of(patcher, 2)
    latents = []
    for model in (patcher, apply_step_embeddings(patcher, table_of(sigmas, 20))):
        guider = comfy_extras.nodes_custom_sampler.Guider_Basic(model)
        guider.set_conds(POSITIVE)
        start = torch.ones(1, 4, 8, 8)
        sampler = comfy.samplers.sampler_object("euler")
        latents.append(guider.sample(torch.zeros_like(start), start, sampler, sigmas, disable_pbar=True, seed=0))
    assert torch.equal(*latents)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30, 50, 100, 333, 1000])
def test_the_row_of_a_noise_level(steps: int):
    """Every level of the table is in its own row, whatever its rounding; levels between belong to the row above."""
    sigmas = run_of(tiny_models.sd1(), steps)
    table = StepEmbeddings(sigmas=sigmas, embeddings=torch.zeros(steps, 1, 1, 1))
    for i in range(steps):
        for rounding in (1 - 2e-5, 1.0, 1 + 2e-5):
            assert table.row(float(sigmas[i]) * rounding) == i
        assert table.row(float(sigmas[i] + sigmas[i + 1]) / 2) == i
    assert table.row(1e9) == 0 and table.row(0.0) == steps - 1 == table.row(float(sigmas[-1]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(sigmas=torch.tensor([2.0, 1.0])), "need 3 sigmas"),
        (dict(sigmas=torch.tensor([1.0, 2.0, 0.0])), "must descend"),
        (dict(embeddings=torch.zeros(2, 8, 32)), "embeddings"),
        (dict(embeddings=torch.full((2, 1, 8, 32), torch.nan)), "NaN"),
        (dict(pooled=torch.zeros(2, 3, 16)), "pooled"),
    ],
)
def test_tables_that_make_no_sense_are_refused(change: dict[str, Any], words: str):
    given = dict(sigmas=torch.tensor([2.0, 1.0, 0.0]), embeddings=torch.zeros(2, 1, 8, 32))
    with pytest.raises(IdentityEditError, match=words):
        StepEmbeddings(**{**given, **change})


def test_a_table_of_another_model_is_refused():
    sigmas = torch.tensor([2.0, 1.0])
    table = StepEmbeddings(sigmas=sigmas, embeddings=torch.zeros(1, 1, 8, 768))
    with pytest.raises(IdentityEditError, match="768 channels but the model takes 32"):
        apply_step_embeddings(tiny_models.sd1(), table)
