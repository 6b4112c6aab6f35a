"""Reference-guided sampling against algorithm 2 written out on diffusers' UNet, and against stock sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import tiny_models
import torch
from from_noise import sample_from
from identity_edit_pack.pipelines.engine.families.noise import DIFFUSION
from identity_edit_pack.pipelines.engine.families.schedule import ddim_schedule, ddim_timesteps
from identity_edit_pack.pipelines.hifi_tuner import reference_guidance
from identity_edit_pack.pipelines.hifi_tuner.reference_guidance import (
    first_pass_latent,
    guided_steps,
    latent_mask,
    reference_guided_sampling,
)
from identity_edit_pack.pipelines.inversion import inversion
from identity_edit_pack.pipelines.inversion.inversion import Inversion
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.text.step_embeddings import StepEmbeddings, apply_step_embeddings
from reference_null_text import DdimScale, invert

SD_SCALE = 0.18215
POSITIVE = tiny_models.conditioning(1)
NEGATIVE = tiny_models.near(POSITIVE, 0.1, seed=2)
REFERENCE = tiny_models.near(POSITIVE, 0.1, seed=5)
MASK = torch.zeros(1, 64, 64)
MASK[:, 16:48, 8:40] = 1.0  # four by four cells of an 8x8 latent


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


def reference_inversion(model: Any, steps: int, batch: int = 1, end_at_zero: bool = False) -> Inversion:
    return inversion.invert_image(model, tiny_models.latent(3, batch), REFERENCE, steps=steps, end_at_zero=end_at_zero)


def noise_start(model: Any, of: Inversion, batch: int = 1, seed: int = 7) -> torch.Tensor:
    return first_pass_latent(model, torch.zeros(batch, 4, 8, 8), of.sigmas, seed)


def sampled(model: Any, of: Inversion, start: torch.Tensor, positive: Any = POSITIVE) -> torch.Tensor:
    return sample_from(model, of, start, positive, NEGATIVE, 7.5)


def algorithm_2(
    predict_noise: Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor],
    scale: DdimScale,
    z: torch.Tensor,
    trajectory: list[torch.Tensor],
    mask: torch.Tensor,
    cond: list[torch.Tensor],
    phi: torch.Tensor,
    t_s: int,
    t_e: int,
    inner_steps: int,
    w: float = 7.5,
) -> tuple[torch.Tensor, list[torch.Tensor], list[list[float]]]:
    """Wang et al. 2023, algorithm 2, line by line, with nothing reused; trajectory is [z*_0, ..., z*_T]."""

    def step(z: torch.Tensor, t: int, null: torch.Tensor) -> torch.Tensor:  # F of eq. 1
        timestep = scale.timesteps[steps - t]
        noise = w * predict_noise(z, timestep, cond[steps - t]) + (1 - w) * predict_noise(z, timestep, null)
        return scale.move(noise, z, timestep, timestep - scale.interval)

    steps = len(scale.timesteps)
    embeddings, losses = [], []
    for t in range(steps, 0, -1):
        if t == t_s:
            phi_h = phi
            z = torch.where(mask, trajectory[t], z)
        with torch.no_grad():
            z_previous = step(z, t, phi)
        if t_s >= t >= t_e:
            phi_h = phi_h.detach().clone().requires_grad_(True)
            optimizer = torch.optim.Adam([phi_h], lr=1e-2)
            losses.append([])
            for _ in range(inner_steps):
                chosen = mask.expand_as(z)
                loss = (trajectory[t - 1][chosen] - step(z, t, phi_h)[chosen]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
            with torch.no_grad():
                z_previous = torch.where(mask, step(z, t, phi_h), z_previous)
            embeddings.append(phi_h.detach().clone())
        z = z_previous
    return z, embeddings, losses


def positive_table(steps: int, of: Inversion) -> StepEmbeddings:
    """A different embedding at every step, as step-wise learned subjects have it."""
    rows = [tiny_models.near(POSITIVE, 0.1, seed=100 + i)[0][0] for i in range(steps)]
    return StepEmbeddings(sigmas=of.sigmas.clone(), embeddings=torch.stack(rows))


@pytest.mark.parametrize(("steps", "inner_steps", "table"), [(5, 2, False), (8, 4, True)])
def test_it_reproduces_algorithm_2(steps: int, inner_steps: int, table: bool) -> None:
    """Latent, embeddings and losses, in the inference mode in which ComfyUI runs a prompt, in float64 beside it. Eight
    steps have plain ones before and after the guided ones."""
    output_gain = 0.02
    with torch.inference_mode():
        model = tiny_models.sd1(output_gain=output_gain)
        pivot = reference_inversion(model, steps)
        start = noise_start(model, pivot)
        rows = positive_table(steps, pivot)
        patched = apply_step_embeddings(model, rows, "positive") if table else model
        ours = reference_guided_sampling(patched, start, pivot, MASK, POSITIVE, NEGATIVE, inner_steps=inner_steps)

    twin = tiny_models.diffusers_twin(tiny_models.sd1(output_gain=output_gain)).double().requires_grad_(False)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    scale = DdimScale(torch.cumprod(1 - betas, 0), ddim_timesteps(steps).tolist())

    def predict_noise(z: torch.Tensor, timestep: int, embedding: torch.Tensor) -> torch.Tensor:
        return twin(z, timestep, embedding.double()).sample

    trajectory = invert(predict_noise, scale, tiny_models.latent(3).double() * SD_SCALE, REFERENCE[0][0])
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(7)).double()
    z_t = noise * (1 - scale.alpha_bar(scale.timesteps[0])) ** 0.5  # KSampler's start is sigma * noise
    cond = list(rows.embeddings) if table else [POSITIVE[0][0]] * steps
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[:, :, 2:6, 1:5] = True
    t_s, t_e = round(0.8 * steps), round(0.2 * steps)
    z_0, embeddings, losses = algorithm_2(
        predict_noise, scale, z_t, trajectory, mask, cond, NEGATIVE[0][0].double(), t_s, t_e, inner_steps
    )
    assert relative_error(ours.latent * SD_SCALE, z_0) < 1e-3
    assert ours.steps == range(steps - t_s, steps - t_e + 1) and len(embeddings) == len(ours.steps)
    for index, expected in enumerate(embeddings):
        assert relative_error(ours.embeddings[index], expected) < 2e-3, index
        moved = expected - NEGATIVE[0][0]
        assert relative_error(ours.embeddings[index] - NEGATIVE[0][0], moved) < 5e-2, index
        torch.testing.assert_close(ours.losses[index][:, 0].double(), torch.tensor(losses[index]).double(),
                                   rtol=2e-2, atol=1e-9)  # fmt: skip
    plain = sampled(patched, pivot, start)
    assert relative_error(ours.latent, plain) > 1e-2  # else this test would not see the guidance


def test_the_papers_steps_of_fifty() -> None:
    steps = guided_steps(50, reference_guidance.START_PERCENT, reference_guidance.END_PERCENT)
    remaining = [50 - i for i in steps]
    assert remaining == list(range(40, 9, -1))
    assert guided_steps(50, 0.0, 1.0) == range(50)
    assert guided_steps(10, 0.5, 0.5) == range(5, 6)
    assert not guided_steps(50, 1.0, 1.0) and not guided_steps(50, 0.6, 0.4)


@pytest.mark.parametrize(
    ("change", "evaluations"),
    [
        ({}, 2 * 1 + 4 * 13),
        (dict(inner_steps=0), 10),
        (dict(start_percent=1.0), 10),
        (dict(early_stop=1e9), 2 * 1 + 4 * 3),
    ],
)
def test_no_evaluation_is_made_twice(change: dict[str, Any], evaluations: int) -> None:
    """Two a plain step; conditional, phi, J of phi_h and the last of phi_h a guided one."""
    model = tiny_models.sd1(output_gain=0.02)
    pivot = reference_inversion(model, 5)
    reports: list[tuple[int, int]] = []
    found = reference_guided_sampling(
        model, noise_start(model, pivot), pivot, MASK, POSITIVE, NEGATIVE, **change,
        callback=lambda step, denoised, x, total: reports.append((step, total)),
    )  # fmt: skip
    assert found.evaluations == evaluations
    total = reference_guidance.progress_total(5, found.steps, change.get("inner_steps", 10))
    assert all(of == total for _, of in reports) and reports[-1][0] == total - 1
    if "early_stop" in change:
        assert torch.equal(found.embeddings, NEGATIVE[0][0].expand_as(found.embeddings))
        assert all(len(rows) == 0 for rows in found.losses)
    else:
        assert [step for step, _ in reports] == list(range(total))


@pytest.mark.parametrize("family", ["sd1", "sd2_v", "sdxl"])
def test_without_a_guided_step_it_is_plain_ddim_to_the_bit(family: str) -> None:
    model = tiny_models.FAMILIES[family](output_gain=0.05)
    pivot = reference_inversion(model, 3)
    start = noise_start(model, pivot)
    for off in (dict(start_percent=1.0), dict(start_percent=0.7, end_percent=0.3)):
        found = reference_guided_sampling(model, start, pivot, MASK, POSITIVE, NEGATIVE, **off)
        assert torch.equal(found.latent, sampled(model, pivot, start))
        assert found.warning is not None and "No step is guided" in found.warning


@pytest.mark.parametrize(
    ("family", "sampler"), [("sd1", "ddim"), ("sd1", "euler"), ("sd2_v", "euler"), ("sdxl", "euler")]
)
def test_the_first_pass_is_the_stock_samplers(family: str, sampler: str) -> None:
    """KSampler with scheduler ddim_uniform, and SamplerCustom with the inversion's sigmas."""
    model, steps, seed = tiny_models.FAMILIES[family](output_gain=0.05), 4, 11
    empty = torch.zeros(3, 4, 8, 8)
    for end_at_zero in (True, False):
        pivot = reference_inversion(model, steps, end_at_zero=end_at_zero)
        start = first_pass_latent(model, empty, pivot.sigmas, seed)
        ours = reference_guided_sampling(model, start, pivot, MASK, POSITIVE, NEGATIVE, start_percent=1.0)
        noise = comfy.sample.prepare_noise(empty, seed)
        if end_at_zero:
            stock = comfy.sample.sample(
                model, noise, steps, 7.5, sampler, "ddim_uniform", POSITIVE, NEGATIVE, empty, disable_pbar=True,
                seed=seed,
            )  # fmt: skip
        else:
            stock = comfy.sample.sample_custom(
                model, noise, 7.5, comfy.samplers.sampler_object(sampler), pivot.sigmas, POSITIVE, NEGATIVE, empty,
                disable_pbar=True, seed=seed,
            )  # fmt: skip
            stock = stock / DIFFUSION.scale(pivot.sigmas[-1])  # the papers' z at timestep 0
        assert relative_error(ours.latent, stock) < 1e-5


def test_the_start_at_the_highest_noise_level_and_of_a_picked_latent_is_the_stock_one() -> None:
    model = tiny_models.sd2_v(zero_snr=True)
    sampling = model.get_model_object("model_sampling")
    highest = sampling.sigma_max.reshape(1)
    empty = torch.zeros(1, 4, 8, 8)
    noise = comfy.sample.prepare_noise(empty, 3)
    x = first_pass_latent(model, empty, highest, 3) * SD_SCALE
    torch.testing.assert_close(x, noise * torch.sqrt(1 + highest**2))
    picked = first_pass_latent(model, empty, highest, 3, batch_index=[2])
    of_batch = comfy.sample.prepare_noise(torch.zeros(3, 4, 8, 8), 3)
    assert not torch.equal(picked, first_pass_latent(model, empty, highest, 3))
    expected = comfy.sample.prepare_noise(empty, 3, [2]) * torch.sqrt(1 + highest**2)
    torch.testing.assert_close(picked * SD_SCALE, expected)
    assert of_batch.shape[0] == 3


@pytest.mark.parametrize("family", ["sd1", "sd2_v", "sdxl"])
def test_the_subject_comes_nearer_to_the_reference_and_the_rest_stays(family: str) -> None:
    model = tiny_models.FAMILIES[family](output_gain=0.05)
    pivot = reference_inversion(model, 5, batch=2)
    start = noise_start(model, pivot, batch=2)
    found = reference_guided_sampling(model, start, pivot, MASK, POSITIVE, NEGATIVE, end_percent=1.0, inner_steps=6)
    placed = reference_guided_sampling(model, start, pivot, MASK, POSITIVE, NEGATIVE, inner_steps=0)
    inside = found.mask[0].bool()
    reference = pivot.end_latent(model)
    for b in range(2):
        distances = [
            relative_error(latent[b][:, inside], reference[b][:, inside])
            for latent in (found.latent, placed.latent, sampled(model, pivot, start))
        ]
        assert distances[0] < distances[1] < distances[2]
    first = torch.stack([rows[0] for rows in found.losses])
    assert bool((found.final_losses < first).float().mean() > 0.8) and found.warning is None
    assert bool((found.final_losses < found.unguided_losses).float().mean() > 0.8)
    # phi_h starts as phi.
    torch.testing.assert_close(found.unguided_losses[0], first[0], rtol=1e-3, atol=0.0)


def test_a_mask_of_ones_holds_everything() -> None:
    model = tiny_models.sd1(output_gain=0.02)
    pivot = reference_inversion(model, 4)
    start = noise_start(model, pivot)
    found = reference_guided_sampling(
        model, start, pivot, torch.ones(1, 8, 8), POSITIVE, NEGATIVE, start_percent=0.0, end_percent=1.0, inner_steps=15
    )
    assert relative_error(found.latent, pivot.end_latent(model)) < 0.2
    assert relative_error(sampled(model, pivot, start), pivot.end_latent(model)) > 0.8


def test_a_batch_is_its_latents_one_by_one() -> None:
    """Each with its own noise, reference, mask and embedding, and each stops by itself."""
    model = tiny_models.sd1(output_gain=0.02)
    pivot = inversion.invert_image(
        model, torch.cat([tiny_models.latent(3), 0.2 * tiny_models.latent(4)]), REFERENCE, steps=6
    )
    masks = torch.cat([MASK, MASK.flip(2)])
    start = noise_start(model, pivot, batch=2)
    settings: dict[str, Any] = dict(inner_steps=5, early_stop=7.5e-5)
    both = reference_guided_sampling(model, start, pivot, masks, POSITIVE, NEGATIVE, **settings)
    counts = torch.stack([(~rows.isnan()).sum(dim=0) for rows in both.losses])
    assert bool((counts[:, 0] != counts[:, 1]).any())  # else this test would not see a latent stop
    for b in range(2):
        own = replace(pivot, trajectory=pivot.trajectory[:, b : b + 1])
        alone = reference_guided_sampling(
            model, start[b : b + 1], own, masks[b : b + 1], POSITIVE, NEGATIVE, **settings
        )
        assert relative_error(both.latent[b], alone.latent[0]) < 1e-4
        assert relative_error(both.embeddings[:, b], alone.embeddings[:, 0]) < 1e-4
        assert counts[:, b].tolist() == [len(rows) for rows in alone.losses]


def test_one_reference_serves_a_batch() -> None:
    model = tiny_models.sd1(output_gain=0.02)
    pivot = reference_inversion(model, 4)
    start = noise_start(model, pivot, batch=2)
    both = reference_guided_sampling(model, start, pivot, MASK, POSITIVE, NEGATIVE, inner_steps=2)
    second = reference_guided_sampling(model, start[1:], pivot, MASK, POSITIVE, NEGATIVE, inner_steps=2)
    assert relative_error(both.latent[1], second.latent[0]) < 1e-4


def test_a_step_table_on_the_negative_side_is_used_around_the_subject() -> None:
    model = tiny_models.sd1(output_gain=0.02)
    pivot = reference_inversion(model, 4)
    table = replace(positive_table(4, pivot), embeddings=NEGATIVE[0][0] + 0.3 * torch.randn(4, 1, 8, 32))
    patched = apply_step_embeddings(model, table, "negative")
    start = noise_start(model, pivot)
    found = reference_guided_sampling(
        patched, start, pivot, MASK, POSITIVE, NEGATIVE, start_percent=0.75, inner_steps=1
    )
    inside = found.mask.bool()
    expected = sampled(patched, pivot, start)
    # One guided step, the last: around the subject it is the plain one.
    with_reference = reference_guided_sampling(
        patched, start, pivot, MASK, POSITIVE, NEGATIVE, start_percent=0.75, inner_steps=0
    ).latent
    outside = ~inside[0]
    assert relative_error(found.latent[0][:, outside], with_reference[0][:, outside]) < 1e-5
    assert relative_error(found.latent[0][:, outside], expected[0][:, outside]) < 0.2


def test_half_precision_keeps_the_embeddings_in_float32() -> None:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_models.sd1(dtype=dtype, output_gain=0.05)
        pivot = reference_inversion(model, 4)
        results.append(
            reference_guided_sampling(
                model, noise_start(model, pivot), pivot, MASK, POSITIVE, NEGATIVE, inner_steps=3, checkpointing=True
            )
        )
    full, half = results
    assert half.embeddings.dtype == half.latent.dtype == torch.float32
    assert relative_error(half.latent, full.latent) < 0.1


def test_checkpointing_changes_nothing() -> None:
    model = tiny_models.sd1(output_gain=0.05)
    pivot = reference_inversion(model, 4)
    latents = [
        reference_guided_sampling(
            model, noise_start(model, pivot), pivot, MASK, POSITIVE, NEGATIVE, inner_steps=2, checkpointing=on
        ).latent
        for on in (False, True)
    ]
    assert relative_error(latents[1], latents[0]) < 1e-5


def test_it_warns_where_the_loss_does_not_fall() -> None:
    model = tiny_models.sd1(output_gain=0.05)
    pivot = reference_inversion(model, 4)
    start = noise_start(model, pivot)
    found = reference_guided_sampling(model, start, pivot, MASK, POSITIVE, NEGATIVE, inner_steps=2, learning_rate=50.0)
    assert found.warning is not None and "did not reduce the loss" in found.warning
    guided_inversion = inversion.invert_image(
        model, tiny_models.latent(3), REFERENCE, NEGATIVE, steps=4, guidance_scale=2.0
    )
    found = reference_guided_sampling(model, start, guided_inversion, MASK, POSITIVE, NEGATIVE, inner_steps=1)
    assert found.warning is not None and "inverted with guidance scale 2" in found.warning


def test_an_interrupt_stops_within_one_evaluation_and_leaves_the_model_as_it_was() -> None:
    with torch.inference_mode():
        model = tiny_models.sd1()
        pivot = reference_inversion(model, 4)
        parameters = {name: id(value) for name, value in model.model.named_parameters()}
        reports: list[int] = []

        def cancel(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
            reports.append(step)
            if step == 3:
                comfy.model_management.interrupt_current_processing()

        with pytest.raises(comfy.model_management.InterruptProcessingException):
            reference_guided_sampling(
                model, noise_start(model, pivot), pivot, MASK, POSITIVE, NEGATIVE, callback=cancel
            )
        assert reports == [0, 1, 2, 3]
        assert {name: id(value) for name, value in model.model.named_parameters()} == parameters


def test_masks_of_any_size_become_cells() -> None:
    expected = torch.zeros(8, 8)
    expected[2:6, 1:5] = 1
    for mask in (MASK, MASK[0], torch.nn.functional.interpolate(MASK[None], size=(512, 512))[0], expected):
        assert torch.equal(latent_mask(mask, 2, 8, 8), expected.expand(2, -1, -1))
    soft = torch.zeros(1, 16, 16)
    soft[:, 4:6, 4:6], soft[:, 8:10, 8:10] = 0.6, 0.4
    assert latent_mask(soft, 1, 8, 8).nonzero().tolist() == [[0, 2, 2]]
    assert latent_mask(torch.ones(1, 4, 4), 1, 8, 8).all()  # smaller than the latent


def test_bad_inputs_are_refused_in_one_sentence() -> None:
    model = tiny_models.sd1()
    pivot = reference_inversion(model, 2)
    start = noise_start(model, pivot)
    two = reference_inversion(model, 2, batch=2)
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(mask=torch.zeros(1, 64, 64)), "mask is empty"),
        (dict(mask=torch.zeros(1, 64, 64).index_fill(1, torch.tensor([5]), 1.0)), "mask is empty"),
        (dict(mask=torch.ones(1, 3, 64, 64)), "must be a mask"),
        (dict(mask=torch.ones(3, 64, 64)), "3 masks for 1 image"),
        (dict(mask=MASK * math.nan), "NaN"),
        (dict(inversion=two), "2 entries for a batch of 1"),
        (dict(start=torch.zeros(1, 4, 8, 6)), "align the reference"),
        (dict(start=start * math.inf), "NaN or infinite"),
        (dict(model=tiny_models.sd1(seed=5)), "another model"),
        (dict(inversion=replace(pivot, method=inversion.EDIT_FRIENDLY_DDPM)), "from Noise Inversion"),
        (dict(guidance_scale=1.0), "above 1"),
        (dict(inner_steps=-1), "inner_steps is -1"),
        (dict(learning_rate=0.0), "learning_rate is 0"),
        (dict(start_percent=1.2), "start_percent is 1.2"),
        (dict(negative=[*NEGATIVE, *POSITIVE]), "2 entries"),
        (dict(negative=tiny_models.conditioning(1, batch=3)), "3 entries for a batch of 1"),
    ]
    given: dict[str, Any] = dict(
        model=model, start=start, inversion=pivot, mask=MASK, positive=POSITIVE, negative=NEGATIVE
    )
    for change, words in cases:
        with pytest.raises(IdentityEditError, match=words) as caught:
            reference_guided_sampling(**{**given, **change})
        assert str(caught.value).count(". ") == 0
    assert ddim_schedule(model.get_model_object("model_sampling"), 2).steps == pivot.steps
