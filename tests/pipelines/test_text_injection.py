"""Timestep-aware text injection: what every network call sees, and that all routes to a sample agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from from_noise import sample_from
from identity_edit_pack.pipelines.engine.families.noise import DIFFUSION
from identity_edit_pack.pipelines.engine.families.schedule import ddim_schedule
from identity_edit_pack.pipelines.inversion import inversion as inversions
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.text.step_embeddings import apply_step_embeddings, constant_embedding
from identity_edit_pack.pipelines.timestep_aware import text_injection
from identity_edit_pack.tests import tiny_models

SOURCE, TARGET, NEGATIVE = (tiny_models.conditioning(seed) for seed in (1, 2, 3))
SD_SCALE = 0.18215


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


def network(denoise: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], patcher: Any = None) -> Any:
    """A tiny model whose network is a formula: denoise(x, sigma [B, 1, 1, 1], embedding [B, T, C]) -> z_0."""
    patcher = (patcher or tiny_models.sd1()).clone()

    def wrapper(_: Any, call: dict[str, Any]) -> torch.Tensor:
        return denoise(call["input"], call["timestep"].reshape(-1, 1, 1, 1), call["c"]["c_crossattn"])

    patcher.set_model_unet_function_wrapper(wrapper)
    return patcher


def a_formula(x: torch.Tensor, sigma: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """Depends on all three, and strongly on the text."""
    return x / (1 + sigma**2) + 0.3 * torch.tanh(embedding[:, :1, :8].sum(dim=2)[:, :, None, None]) * torch.sin(x)


def stock_sample(
    model: Any, positive: Any, negative: Any, cfg: float, sampler: str, sigmas: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """What SamplerCustom does with add_noise off."""
    return comfy.sample.sample_custom(
        model,
        torch.zeros_like(x),
        cfg,
        comfy.samplers.sampler_object(sampler),
        sigmas,
        positive,
        negative,
        x,
        disable_pbar=True,
        seed=0,
    )


def texts_seen(model: Any, positive: Any, sigmas: torch.Tensor, sampler: str = "euler") -> list[tuple[float, str]]:
    """(sigma, which text) of every network call of a stock sampler without guidance, in order."""
    seen = []

    def record(x: torch.Tensor, sigma: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        name = {float(text[0][0].sum()): word for text, word in ((SOURCE, "source"), (TARGET, "target"))}
        assert embedding.shape[0] == x.shape[0] == 1, "two texts were evaluated at once"
        seen.append((float(sigma), name[float(embedding.sum())]))
        return torch.zeros_like(x)

    stock_sample(network(record, model), positive, NEGATIVE, 1.0, sampler, sigmas, torch.ones(1, 4, 2, 2))
    return seen


def expected_source_steps(steps: int, ratio: float) -> int:
    """Round half up, in whole hundredths."""
    return (round(ratio * 100) * steps + 50) // 100


def test_the_source_prompts_steps_are_rounded_in_whole_hundredths() -> None:
    for steps in range(1, 101):
        for hundredths in range(101):
            ratio = hundredths / 100
            assert text_injection.source_steps(steps, ratio) == expected_source_steps(steps, ratio), (steps, ratio)


def texts_of_ranges(ranges: Any, sampling: Any, sigmas: torch.Tensor) -> list[str]:
    """Which text is in its range at every step, by ComfyUI's rule: from the start's noise level to the end's."""
    names = {float(text[0][0].sum()): word for text, word in ((SOURCE, "source"), (TARGET, "target"))}
    limits = [
        (
            float(sampling.percent_to_sigma(options.get("start_percent", 0.0))),
            float(sampling.percent_to_sigma(options.get("end_percent", 1.0))),
            names[float(embedding.sum())],
        )
        for embedding, options in ranges
    ]
    used = [[name for start, end, name in limits if end <= float(sigma) <= start] for sigma in sigmas[:-1]]
    assert all(len(each) == 1 for each in used)
    return [name for (name,) in used]


def test_the_right_step_switches() -> None:
    """Ranges and rows of every number of steps; that ComfyUI follows the ranges is seen on a few."""
    model = tiny_models.sd1()
    sampling = model.get_model_object("model_sampling")
    for steps in range(1, 101):
        sigmas = ddim_schedule(sampling, steps).sigmas
        for ratio in (0.1, 0.29, 0.4):
            count = expected_source_steps(steps, ratio)
            expected = ["source"] * count + ["target"] * (steps - count)
            ranges = text_injection.injected_conditioning(model, sigmas, SOURCE, TARGET, ratio)
            assert texts_of_ranges(ranges, sampling, sigmas) == expected
            table = text_injection.injection_table(sigmas, SOURCE, TARGET, ratio)
            rows = [table.embeddings[table.row(float(sigma))] for sigma in sigmas[:-1]]
            assert all(
                torch.equal(row, {"source": SOURCE, "target": TARGET}[text][0][0])
                for row, text in zip(rows, expected, strict=True)
            )
        if steps in (1, 2, 3, 10, 29, 100):
            assert [text for _, text in texts_seen(model, ranges, sigmas)] == expected


@pytest.mark.parametrize("ratio", [0.0, 0.34, 1.0])
def test_a_table_on_the_model_switches_at_the_right_step(ratio: float) -> None:
    model = tiny_models.sd1()
    sigmas = ddim_schedule(model.get_model_object("model_sampling"), 25).sigmas
    table = text_injection.injection_table(sigmas, SOURCE, TARGET, ratio)
    count = expected_source_steps(25, ratio)
    seen = texts_seen(apply_step_embeddings(model, table, "positive"), TARGET, sigmas)
    assert [text for _, text in seen] == ["source"] * count + ["target"] * (25 - count)
    ranges = text_injection.injected_conditioning(model, sigmas, SOURCE, TARGET, ratio)
    assert texts_seen(model, ranges, sigmas) == seen


def test_ten_percent_of_fifty_are_the_first_five() -> None:
    assert text_injection.source_steps(50, 0.1) == 5  # Jung et al. 2024, appendix E.1
    assert text_injection.source_steps(50, 0.29) == 15  # 14.5, although 50 * 0.29 is a little less in binary


@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_every_scheduler_switches_between_two_steps(zero_snr: bool, scheduler: str) -> None:
    model = tiny_models.sd2_v(zero_snr=zero_snr)
    sampling = model.get_model_object("model_sampling")
    lowest, highest = float(sampling.sigmas[0]), float(sampling.sigmas[-1])
    for steps in range(2, 101):
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
        if not bool((sigmas[:-1] > sigmas[1:]).all()):
            continue  # some schedulers repeat a level when there are too many steps
        first_edit_step = max(1, len(sigmas) // 3)
        below, above = float(sigmas[first_edit_step]), float(sigmas[first_edit_step - 1])
        try:
            percent = text_injection.switch_percent(model, sigmas, first_edit_step)
        except IdentityEditError:
            # Only where the model's own levels leave no room: levels beyond its range, or closer than float32 tells.
            assert min(above, highest) / max(below, lowest) < 1.001
            continue
        assert below < sampling.percent_to_sigma(percent) < above, steps


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 33, 1000])
def test_every_step_of_a_run_can_switch(steps: int) -> None:
    model = tiny_models.sd1()
    sampling = model.get_model_object("model_sampling")
    sigmas = ddim_schedule(sampling, steps).sigmas
    for first_edit_step in range(1, steps, max(1, steps // 40)):
        percent = text_injection.switch_percent(model, sigmas, first_edit_step)
        assert float(sigmas[first_edit_step]) < sampling.percent_to_sigma(percent) < float(sigmas[first_edit_step - 1])


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "dpmpp_sde", "uni_pc", "seeds_3"])
@pytest.mark.parametrize("route", ["ranges", "table"])
def test_samplers_of_higher_order_choose_by_noise_level(sampler: str, route: str) -> None:
    model = tiny_models.sd1()
    sigmas = ddim_schedule(model.get_model_object("model_sampling"), 20).sigmas
    positive = text_injection.injected_conditioning(model, sigmas, SOURCE, TARGET, 0.4)
    if route == "table":
        table = text_injection.injection_table(sigmas, SOURCE, TARGET, 0.4)
        model, positive = apply_step_embeddings(model, table, "positive"), TARGET
    seen = texts_seen(model, positive, sigmas, sampler)
    assert len(seen) >= 20
    for sigma, text in seen:
        assert text == ("source" if sigma > float(sigmas[8]) * 1.0001 else "target"), sigma


def test_entries_keep_their_own_ranges() -> None:
    model = tiny_models.sd1()
    sigmas = ddim_schedule(model.get_model_object("model_sampling"), 10).sigmas
    early = [[SOURCE[0][0], {"start_percent": 0.0, "end_percent": 0.1}], [SOURCE[0][0], {"strength": 0.5}]]
    late = [[TARGET[0][0], {"start_percent": 0.9, "end_percent": 1.0}], [TARGET[0][0], {"end_percent": 0.05}]]
    result = text_injection.injected_conditioning(model, sigmas, early, late, 0.5)
    switch = text_injection.switch_percent(model, sigmas, 5)
    ranges = [(options["start_percent"], options["end_percent"], options.get("strength")) for _, options in result]
    assert ranges == [(0.0, 0.1, None), (0.0, switch, 0.5), (0.9, 1.0, None)]
    assert "start_percent" not in early[1][1], "an input was changed"


def test_prompts_of_different_lengths_give_the_same_in_a_table() -> None:
    model = tiny_models.sd1()
    long = tiny_models.conditioning(5, tokens=3 * tiny_models.TOKENS)
    source = tiny_models.conditioning(6, tokens=2 * tiny_models.TOKENS)
    sigmas = ddim_schedule(model.get_model_object("model_sampling"), 6).sigmas
    x = tiny_models.latent(4)
    ranges = text_injection.injected_conditioning(model, sigmas, source, long, 0.5)
    table = text_injection.injection_table(sigmas, source, long, 0.5)
    assert table.embeddings.shape[2] == 6 * tiny_models.TOKENS
    by_ranges = stock_sample(model, ranges, NEGATIVE, 5.0, "euler", sigmas, x)
    patched = apply_step_embeddings(model, table, "positive")
    by_table = stock_sample(patched, long, NEGATIVE, 5.0, "euler", sigmas, x)
    assert relative_error(by_table, by_ranges) < 1e-5


def make_inversion(model: Any, steps: int, end_at_zero: bool = False, batch: int = 1) -> inversions.Inversion:
    latent = tiny_models.latent(4, batch=batch)
    return inversions.invert_image(model, latent, SOURCE, steps=steps, end_at_zero=end_at_zero)


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [("ddim", steps) for steps in (1, 2, 3, 7, 10, 25, 100)] + [("heun", steps) for steps in (1, 2, 3, 10)],
)
def test_all_routes_give_the_loop_of_the_paper(sampler: str, steps: int) -> None:
    """The all-in-one and the stock sampler with ranges, against eq. 5 in float64."""
    model = network(a_formula)
    inversion = make_inversion(model, steps)
    guidance_scale, ratio = 3.0, 0.4
    count = expected_source_steps(steps, ratio)
    sigmas = inversion.sigmas.double()
    source, target, negative = (text[0][0].double() for text in (SOURCE, TARGET, NEGATIVE))

    def noise(x: torch.Tensor, i: int) -> torch.Tensor:
        text = source if i < count else target
        positive, uncond = a_formula(x, sigmas[i], text), a_formula(x, sigmas[i], negative)
        return (x - (uncond + guidance_scale * (positive - uncond))) / sigmas[i]

    x = inversion.trajectory[0].double()
    for i in range(steps):
        slope = noise(x, i)
        if sampler == "heun":
            # The second evaluation is at the next step's noise level; below the last one there is no row but the last.
            x_next = x + (sigmas[i + 1] - sigmas[i]) * slope
            text = source if i + 1 < count or count == steps else target
            positive = a_formula(x_next, sigmas[i + 1], text)
            uncond = a_formula(x_next, sigmas[i + 1], negative)
            denoised = uncond + guidance_scale * (positive - uncond)
            slope = (slope + (x_next - denoised) / sigmas[i + 1]) / 2
        x = x + (sigmas[i + 1] - sigmas[i]) * slope
    z_0 = (x / math.sqrt(1 + float(sigmas[-1]) ** 2) / SD_SCALE).float()

    result = text_injection.timestep_aware_sampling(
        model, inversion, SOURCE, TARGET, NEGATIVE, ratio=ratio, guidance_scale=guidance_scale, sampler=sampler
    )
    assert relative_error(result.latent, z_0) < 1e-4
    assert result.source_steps == count

    start = inversion.start_latent(model)
    ranges = text_injection.injected_conditioning(model, inversion.sigmas, SOURCE, TARGET, ratio)
    by_ranges = stock_sample(model, ranges, NEGATIVE, guidance_scale, sampler, inversion.sigmas, start)
    # Stock samplers return x at the last sigma, which is not 0.
    assert relative_error(by_ranges / DIFFUSION.scale(inversion.sigmas[-1]), z_0) < 1e-4


@pytest.mark.parametrize(
    ("family", "sampler", "end_at_zero"),
    [
        ("sd1", "ddim", False), ("sd1", "ddim", True), ("sd1", "heun", False), ("sd1", "heun", True),
        ("sd2_v", "heun", False), ("sdxl", "ddim", False),
    ],
)  # fmt: skip
def test_routes_agree_on_a_network(family: str, sampler: str, end_at_zero: bool) -> None:
    model = tiny_models.FAMILIES[family]()
    inversion = make_inversion(model, 5, end_at_zero, batch=2)
    result = text_injection.timestep_aware_sampling(
        model, inversion, SOURCE, TARGET, NEGATIVE, ratio=0.3, guidance_scale=5.0, sampler=sampler
    )
    start, sigmas = inversion.start_latent(model), inversion.sigmas
    ranges = text_injection.injected_conditioning(model, sigmas, SOURCE, TARGET, 0.3)
    by_ranges = stock_sample(model, ranges, NEGATIVE, 5.0, sampler, sigmas, start) / DIFFUSION.scale(sigmas[-1])
    table = text_injection.injection_table(sigmas, SOURCE, TARGET, 0.3)
    patched = apply_step_embeddings(model, table, "positive")
    by_table = stock_sample(patched, TARGET, NEGATIVE, 5.0, sampler, sigmas, start) / DIFFUSION.scale(sigmas[-1])
    assert relative_error(by_ranges, result.latent) < 1e-5
    assert relative_error(by_table, result.latent) < 1e-5
    target_only = stock_sample(model, TARGET, NEGATIVE, 5.0, sampler, sigmas, start) / DIFFUSION.scale(sigmas[-1])
    assert relative_error(target_only, result.latent) > 1e-2, "the injection has no effect"
    evaluations = 2 * 5 if sampler == "ddim" else 4 * 5 - 2 * end_at_zero
    assert result.evaluations == evaluations


def test_the_kind_of_ksampler_that_has_the_same_schedule_agrees() -> None:
    """KSampler (Advanced), ddim, ddim_uniform, 20 steps, without noise, after an inversion that ends at zero."""
    model = tiny_models.sd1()
    inversion = make_inversion(model, 20, end_at_zero=True)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "ddim_uniform", 20)
    assert torch.equal(sigmas, inversion.sigmas)
    ranges = text_injection.injected_conditioning(model, sigmas, SOURCE, TARGET, 0.2)
    start = inversion.start_latent(model)
    sampled = comfy.sample.sample(
        model,
        torch.zeros_like(start),
        20,
        4.0,
        "ddim",
        "ddim_uniform",
        ranges,
        NEGATIVE,
        start,
        disable_noise=True,
        force_full_denoise=True,
        disable_pbar=True,
        seed=0,
    )
    result = text_injection.timestep_aware_sampling(
        model, inversion, SOURCE, TARGET, NEGATIVE, ratio=0.2, guidance_scale=4.0
    )
    assert relative_error(sampled, result.latent) < 1e-5


def test_ratio_one_is_the_reconstruction_and_the_table_is_used() -> None:
    model = tiny_models.sd1()
    inversion = make_inversion(model, 6)
    other = tiny_models.conditioning(9)
    table = text_injection.injection_table(inversion.sigmas, other, NEGATIVE, 0.5)
    with_table = inversion.with_embeddings(table)
    # The same loop from the same LATENT: the same numbers to the bit. A reconstruction starts from the inversion's own
    # trajectory, which the way through the scale of LATENT sockets rounds.
    patched = apply_step_embeddings(model, table, "negative")
    expected = sample_from(patched, inversion, inversion.start_latent(model), SOURCE, NEGATIVE, 3.0)
    reconstruction = inversions.sample_inversion(model, with_table, SOURCE, NEGATIVE, 3.0)
    given = text_injection.timestep_aware_sampling(model, with_table, SOURCE, TARGET, NEGATIVE, 1.0, 3.0)
    carried = text_injection.timestep_aware_sampling(model, with_table, SOURCE, TARGET, None, 1.0, 3.0)
    without = text_injection.timestep_aware_sampling(model, inversion, SOURCE, TARGET, NEGATIVE, 1.0, 3.0)
    assert torch.equal(given.latent, expected)
    assert torch.equal(carried.latent, expected)
    assert relative_error(given.latent, reconstruction) < 1e-5
    assert relative_error(without.latent, expected) > 1e-3


def test_another_guidance_scale_than_the_optimized_one_is_said() -> None:
    model = tiny_models.sd1()
    inversion = make_inversion(model, 3)
    table = constant_embedding(inversion.sigmas, NEGATIVE[0][0])
    for optimized_for, warns in ((None, False), (4.0, False), (7.5, True)):
        pivot = inversion.with_embeddings(replace(table, guidance_scale=optimized_for))
        result = text_injection.timestep_aware_sampling(model, pivot, SOURCE, TARGET, guidance_scale=4.0)
        assert (result.warning is not None) == warns
        assert not warns or ("4 " in str(result.warning) and "7.5" in str(result.warning))


def test_interpolation_is_equation_3() -> None:
    optimized = tiny_models.conditioning(8)
    mixed = text_injection.edit_conditioning(TARGET, optimized, 0.7)
    assert torch.allclose(mixed[0][0], 0.7 * TARGET[0][0] + 0.3 * optimized[0][0])
    assert mixed[0][1]["pooled_output"] is TARGET[0][1]["pooled_output"]
    assert text_injection.edit_conditioning(TARGET, None, 0.7) is TARGET


SIGMAS = torch.tensor([14.0, 5.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: text_injection.injected_conditioning(model, SIGMAS, SOURCE, TARGET, 1.5), "ratio is 1.5"),
        (lambda model: text_injection.injected_conditioning(model, SIGMAS[:1], SOURCE, TARGET), "contain no step"),
        (lambda model: text_injection.injected_conditioning(model, SIGMAS.flip(0), SOURCE, TARGET), "do not descend"),
        (lambda model: text_injection.injected_conditioning(model, SIGMAS, [], TARGET), "source prompt is empty"),
        (lambda model: text_injection.injected_conditioning(model, SIGMAS * 100, SOURCE, TARGET), "No CONDITIONING"),
        (lambda model: text_injection.injection_table(SIGMAS, SOURCE + SOURCE, TARGET), "2 entries"),
        (
            lambda model: text_injection.edit_conditioning(TARGET, tiny_models.conditioning(1, tokens=3), 0.5),
            "differ in tokens",
        ),
        (
            lambda model: text_injection.timestep_aware_sampling(model, make_inversion(model, 2), SOURCE, TARGET),
            "needs a negative conditioning",
        ),
        (
            lambda model: text_injection.timestep_aware_sampling(
                model, make_inversion(tiny_models.sd1(seed=5), 2), SOURCE, TARGET, NEGATIVE
            ),
            "another model",
        ),
        (
            lambda model: text_injection.timestep_aware_sampling(
                model, make_inversion(model, 2), SOURCE, TARGET, NEGATIVE, sampler="euler_ancestral"
            ),
            "choose one of ddim, heun",
        ),
    ],
)
def test_bad_inputs_are_refused_in_one_sentence(call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(IdentityEditError, match=message) as caught:
        call(tiny_models.sd1())
    assert str(caught.value).count(". ") == 0 and str(caught.value).endswith(".")
