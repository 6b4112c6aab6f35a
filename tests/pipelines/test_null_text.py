"""Null-text optimization against a reference loop on diffusers' UNet with the same weights."""

from __future__ import annotations

import math
from typing import Any

import comfy.model_management
import pytest
import reference_null_text
import tiny_models
import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine.families.noise import DIFFUSION
from identity_edit_pack.pipelines.engine.families.schedule import ddim_timesteps
from identity_edit_pack.pipelines.inversion import inversion, null_text
from identity_edit_pack.pipelines.inversion.unconditional_embedding import change_of_length
from identity_edit_pack.pipelines.shared.errors import IdentityEditError

SD_SCALE = 0.18215
POSITIVE = tiny_models.conditioning(1)
NEGATIVE = tiny_models.near(POSITIVE, 0.1, seed=2)


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


def reference(patcher, latent: torch.Tensor, steps: int) -> tuple[reference_null_text.ReferenceNullText, list]:
    twin = tiny_models.diffusers_twin(patcher).requires_grad_(False)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    scale = reference_null_text.DdimScale(torch.cumprod(1 - betas, 0).float(), ddim_timesteps(steps).tolist())

    def predict_noise(z: torch.Tensor, timestep: int, embedding: torch.Tensor) -> torch.Tensor:
        return twin(z, timestep, embedding).sample

    trajectory = reference_null_text.invert(predict_noise, scale, latent * SD_SCALE, POSITIVE[0][0])
    return reference_null_text.null_text(predict_noise, scale, trajectory, POSITIVE[0][0], NEGATIVE[0][0]), trajectory


# The output gains make some steps stop early and others not, at each step count.
@pytest.mark.parametrize(("steps", "output_gain"), [(10, 0.012), (30, 0.025)])
def test_it_reproduces_the_reference(steps: int, output_gain: float):
    """Trajectory, embeddings, losses and inner-step counts, in the inference mode in which ComfyUI runs a prompt."""
    latent = tiny_models.latent(3, height=8, width=6)
    with torch.inference_mode():
        patcher = tiny_models.sd1(output_gain=output_gain)
        pivot = inversion.invert_image(patcher, latent, POSITIVE, steps=steps)
        ours = null_text.null_text_optimization(patcher, pivot, POSITIVE, NEGATIVE)
    expected, trajectory = reference(tiny_models.sd1(output_gain=output_gain), latent, steps)

    for i in range(steps + 1):
        z = pivot.trajectory[i] / DIFFUSION.scale(pivot.sigmas[i])
        assert relative_error(z, trajectory[steps - i]) < 1e-4
    counts = ours.inner_steps[:, 0].tolist()
    assert counts == expected.inner_steps
    assert len(set(counts)) > 1  # else this test would not see a wrong stopping rule
    for i in range(steps):
        assert relative_error(ours.embeddings.embeddings[i], expected.embeddings[i]) < 2e-3, i
        torch.testing.assert_close(ours.losses[i][:, 0], torch.tensor(expected.losses[i]), rtol=2e-2, atol=1e-9)
    assert relative_error(ours.reconstruction * SD_SCALE, expected.z_0) < 1e-4
    assert ours.evaluations == expected.evaluations - steps  # the conditional noise is not computed twice


def test_a_batch_is_its_latents_one_by_one():
    """Each latent stops by itself: a batch of a quick and a slow one equals two runs."""
    patcher, steps = tiny_models.sd1(output_gain=0.006), 8
    latent = torch.cat([tiny_models.latent(3), 0.3 * tiny_models.latent(4)])
    negative = torch.cat([tiny_models.near(POSITIVE, distance, 2)[0][0] for distance in (0.2, 0.02)])
    pivot = inversion.invert_image(patcher, latent, POSITIVE, steps=steps)
    both = null_text.null_text_optimization(patcher, pivot, POSITIVE, [[negative, {}]])
    for b in range(2):
        own = inversion.invert_image(patcher, latent[b : b + 1], POSITIVE, steps=steps)
        alone = null_text.null_text_optimization(patcher, own, POSITIVE, [[negative[b : b + 1], {}]])
        assert both.inner_steps[:, b].tolist() == alone.inner_steps[:, 0].tolist()
        assert both.converged[:, b].tolist() == alone.converged[:, 0].tolist()
        assert relative_error(both.embeddings.embeddings[:, b], alone.embeddings.embeddings[:, 0]) < 1e-4
    assert both.inner_steps[:, 0].tolist() != both.inner_steps[:, 1].tolist()


@pytest.mark.parametrize("family", ["sd1", "sd2_v", "sdxl"])
def test_it_brings_every_family_back_to_the_image(family: str):
    patcher = tiny_models.FAMILIES[family](output_gain=0.05)
    latent = tiny_models.latent(3, batch=2)
    pivot = inversion.invert_image(patcher, latent, POSITIVE, steps=5)
    before = null_text.null_text_optimization(patcher, pivot, POSITIVE, NEGATIVE, inner_steps=0)
    after = null_text.null_text_optimization(patcher, pivot, POSITIVE, NEGATIVE, inner_steps=10)
    assert bool((after.final_losses[-1] < 0.7 * before.final_losses[-1]).all())
    assert (before.evaluations, after.evaluations) == (10, 5 * 12)
    # The per-step embeddings give the same image through ComfyUI's own guidance.
    again = inversion.sample_inversion(patcher, pivot.with_embeddings(after.embeddings), POSITIVE, NEGATIVE, 7.5)
    assert relative_error(again, after.reconstruction) < 1e-4


def test_the_adaptive_method_comes_nearer_with_no_more_evaluations():
    patcher = tiny_models.sd1(output_gain=0.05)
    latent = tiny_models.latent(3, batch=2)
    pivot = inversion.invert_image(patcher, latent, POSITIVE, steps=5)
    paper, adaptive = (
        null_text.null_text_optimization(patcher, pivot, POSITIVE, NEGATIVE, inner_steps=10, method=method)
        for method in null_text.METHODS
    )
    assert adaptive.evaluations <= paper.evaluations
    assert bool((adaptive.final_losses[-1] < paper.final_losses[-1]).all())
    again = inversion.sample_inversion(patcher, pivot.with_embeddings(adaptive.embeddings), POSITIVE, NEGATIVE, 7.5)
    assert relative_error(again, adaptive.reconstruction) < 1e-4


def test_the_adaptive_method_does_nothing_where_nothing_is_to_be_done():
    """Below the threshold from the start: one conditional and one unconditional evaluation a step, phi as it was."""
    patcher, steps = tiny_models.sd1(), 4
    pivot = inversion.invert_image(patcher, tiny_models.latent(3), POSITIVE, steps=steps)
    idle = null_text.null_text_optimization(
        patcher, pivot, POSITIVE, NEGATIVE, early_stop=1e9, method=null_text.ADAPTIVE
    )
    assert idle.evaluations == 2 * steps and int(idle.inner_steps.sum()) == 0 and bool(idle.converged.all())
    assert all(torch.equal(row, NEGATIVE[0][0]) for row in idle.embeddings.embeddings)


def test_the_length_of_adaptive_updates_is_that_of_a_line_search():
    """With a linear network the length must be the one that reaches the minimum along the update."""
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    start = torch.zeros(1, 6)
    residual = lambda phi: (phi @ matrix - 1.0).reshape(1, 6, 1, 1)  # noqa: E731
    gradient = (2 / 6 * matrix @ (start @ matrix - 1.0).T).T  # of the mean square, at the start
    along = (gradient @ matrix).flatten()
    best = float(((start @ matrix - 1.0).flatten() @ along) / (along @ along))
    for own, expected in ((best / 2, 2.0), (best * 2, 0.5), (best / 100, 4.0)):  # the last one is beyond the limit
        found = change_of_length(residual(start), residual(start - own * gradient))
        assert math.isclose(float(found), expected, rel_tol=1e-3)
    assert float(change_of_length(residual(start), residual(start))) == 1.0


def test_half_precision_reaches_the_same_embeddings():
    """The variable, its gradient and the loss stay in float32; only the network computes in bfloat16."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        patcher = tiny_models.sd1(dtype=dtype, output_gain=0.05)
        pivot = inversion.invert_image(patcher, tiny_models.latent(3), POSITIVE, steps=4)
        results.append(null_text.null_text_optimization(patcher, pivot, POSITIVE, NEGATIVE, inner_steps=3))
    full, half = results
    assert half.embeddings.embeddings.dtype == torch.float32
    moved = full.embeddings.embeddings - NEGATIVE[0][0]
    assert relative_error(half.embeddings.embeddings - NEGATIVE[0][0], moved) < 0.5
    assert float(half.final_losses[-1]) < 2 * float(full.final_losses[-1])


def test_negative_prompt_inversion_is_independent_of_the_guidance_scale():
    patcher = tiny_models.sd1()
    pivot = inversion.invert_image(patcher, tiny_models.latent(3), POSITIVE, steps=6)
    table = null_text.negative_prompt_inversion(pivot, POSITIVE)
    plain = inversion.sample_inversion(patcher, pivot, POSITIVE)
    guided = inversion.sample_inversion(patcher, pivot.with_embeddings(table), POSITIVE, NEGATIVE, guidance_scale=7.5)
    assert relative_error(guided, plain) < 1e-4


def test_more_than_a_hundred_steps_keep_a_positive_learning_rate():
    assert all(0 < null_text.learning_rate_at(i, 1e-2) <= 1e-2 for i in range(1000))
    assert math.isclose(null_text.learning_rate_at(50, 1e-2), 5e-3)


def test_it_says_where_it_did_not_converge():
    patcher = tiny_models.sd1()
    pivot = inversion.invert_image(patcher, tiny_models.latent(3), POSITIVE, steps=3)
    bad = null_text.null_text_optimization(patcher, pivot, POSITIVE, NEGATIVE, inner_steps=1)
    assert bad.warning is not None and "3 of 3 steps" in bad.warning
    good = null_text.null_text_optimization(patcher, pivot, POSITIVE, NEGATIVE, inner_steps=1, early_stop=1e9)
    assert good.warning is None and bool(good.converged.all())


def test_progress_counts_every_inner_step_and_ends_at_the_total():
    seen: list[tuple[int, int]] = []
    patcher = tiny_models.sd1()
    pivot = inversion.invert_image(patcher, tiny_models.latent(3), POSITIVE, steps=2)
    null_text.null_text_optimization(
        patcher, pivot, POSITIVE, NEGATIVE, inner_steps=3,
        callback=lambda step, denoised, x, total: seen.append((step, total)),
    )  # fmt: skip
    assert seen == [(i, 8) for i in range(8)]


def test_an_interrupt_stops_within_one_evaluation_and_leaves_the_model_as_it_was():
    with torch.inference_mode():
        patcher = tiny_models.sd1()
        pivot = inversion.invert_image(patcher, tiny_models.latent(3), POSITIVE, steps=4)
        parameters = {name: id(value) for name, value in patcher.model.named_parameters()}
        forwards = sum("forward" in vars(module) for module in patcher.model.modules())
        steps: list[int] = []

        def cancel(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
            steps.append(step)
            if step == 2:
                comfy.model_management.interrupt_current_processing()

        with pytest.raises(comfy.model_management.InterruptProcessingException):
            null_text.null_text_optimization(patcher, pivot, POSITIVE, NEGATIVE, checkpointing=True, callback=cancel)
        assert steps == [0, 1, 2]
        assert {name: id(value) for name, value in patcher.model.named_parameters()} == parameters
        assert sum("forward" in vars(module) for module in patcher.model.modules()) == forwards


def test_live_tensors_do_not_grow_with_the_inner_steps():
    import gc

    patcher = tiny_models.sd1()
    pivot = inversion.invert_image(patcher, tiny_models.latent(3), POSITIVE, steps=1)
    counts: list[int] = []

    def count(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
        gc.collect()
        large = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor) and value.numel() > 200]
        counts.append(len(large))

    gc.freeze()  # only what is new from here on is counted, and looked through
    try:
        null_text.null_text_optimization(patcher, pivot, POSITIVE, NEGATIVE, inner_steps=12, callback=count)
    finally:
        gc.unfreeze()
    assert max(counts[2:]) <= counts[1] + 2 and min(counts) > 0


def test_bad_inputs_are_refused_in_one_sentence():
    patcher = tiny_models.sd1()
    pivot = inversion.invert_image(patcher, tiny_models.latent(3), POSITIVE, steps=2)
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(guidance_scale=1.0), "above 1"),
        (dict(inner_steps=-1), "inner_steps is -1"),
        (dict(method="quick"), "choose one of paper, adaptive"),
        (dict(negative=[*NEGATIVE, *POSITIVE]), "2 entries"),
        (dict(negative=tiny_models.conditioning(1, batch=3)), "3 entries for a batch of 1"),
        (dict(negative=[[NEGATIVE[0][0] * math.nan, {}]]), "NaN"),
        (dict(model=tiny_models.sd1(seed=5)), "another model"),
        (dict(negative=[[NEGATIVE[0][0], {"start_percent": 0.9, "end_percent": 1.0}]]), "timestep range"),
    ]
    given: dict[str, Any] = dict(model=patcher, inversion=pivot, positive=POSITIVE, negative=NEGATIVE)
    for change, words in cases:
        with pytest.raises(IdentityEditError, match=words) as caught:
            null_text.null_text_optimization(**{**given, **change})
        assert str(caught.value).count(". ") == 0
    assert engine.latent_channels(patcher) == 4
