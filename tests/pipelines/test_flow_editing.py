"""FlowEdit, Uni-Edit, direct inversion and RF-Inversion's sampler through ComfyUI's sampling, against plain float64
loops."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import comfy.samplers
import pytest
import tiny_flow_models
import tiny_models
import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.flow_editing.direct_inversion import direct_inversion_sampler
from identity_edit_pack.pipelines.flow_editing.flow_edit import flow_edit_sampler
from identity_edit_pack.pipelines.flow_editing.uni_edit import uni_edit_sampler
from identity_edit_pack.pipelines.inversion import inversion, methods, rf_inversion
from identity_edit_pack.pipelines.inversion.edit_friendly import independent_noise
from identity_edit_pack.pipelines.inversion.inverted_noise import InvertedNoise
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from tiny_models import relative_error

from .test_gradients import TeaCache
from .test_inversion_methods import NEGATIVE, SOURCE, TARGET, image, velocity_of

STEPS = 8
EVERY = {**tiny_flow_models.FAMILIES, "qwen_image": tiny_flow_models.qwen_image, "sd1": tiny_models.sd1}


@pytest.fixture(scope="module", params=EVERY)
def model(request: pytest.FixtureRequest) -> Any:
    return EVERY[request.param](output_gain=0.2)


def run(
    model: Any,
    sampler: engine.EditSampler,
    sigmas: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    source: Any = SOURCE,
    target: Any = TARGET,
    scales: tuple[float, float] = (1.0, 1.0),
    mask: torch.Tensor | None = None,
    seed: int = 3,
    guider: Any = None,
) -> torch.Tensor:
    """As SamplerCustomAdvanced runs it."""
    guider = guider or engine.EditGuider(model, source, target, NEGATIVE, *scales)
    z_0 = image(model)
    noise = torch.zeros_like(z_0) if noise is None else noise
    return guider.sample(noise, z_0, sampler, sigmas, denoise_mask=mask, disable_pbar=True, seed=seed)


def schedule(model: Any) -> torch.Tensor:
    return engine.require(model).schedule(STEPS, end_at_zero=True).sigmas


def start_of(model: Any) -> torch.Tensor:
    return engine.to_model_scale(model, image(model)).double()


def to_socket(model: Any, z: torch.Tensor) -> torch.Tensor:
    return engine.to_socket_scale(model, z)


def test_flow_edit_is_its_algorithm(model: Any) -> None:
    sigmas, path, z_0 = schedule(model), engine.require(model).noise_path, start_of(model)
    ours = run(model, flow_edit_sampler(skip=0.25, last_steps=0.25, averages=2), sigmas)
    v_src, v_tar = velocity_of(model, SOURCE), velocity_of(model, TARGET)
    noise = independent_noise(2 * STEPS, z_0, 3).double()
    levels, z = sigmas.double(), z_0
    for i in range(2, 6):
        s, t = levels[i : i + 2]
        delta = torch.zeros_like(z)
        for eps in noise[2 * i : 2 * i + 2]:
            at_source = path.alpha(s) * z_0 + s * eps
            at_target = z + at_source - z_0
            delta += (v_tar(at_target, s) - v_src(at_source, s)) / 2
        z = z + (t - s) * delta
    x = z + path.alpha(levels[6]) * z_0 + levels[6] * noise[12] - z_0
    for s, t in pairwise(levels[6:]):
        x = x + (t - s) * v_tar(x, s)
    assert relative_error(ours, to_socket(model, x)) < 1e-4
    assert relative_error(ours, image(model)) > 1e-3


def test_flow_edit_with_the_source_prompt_returns_the_image(model: Any) -> None:
    same = run(model, flow_edit_sampler(), schedule(model), target=SOURCE, scales=(3.0, 3.0))
    assert relative_error(same, image(model)) < 1e-5


def test_uni_edit_is_its_algorithm(model: Any) -> None:
    sigmas, path = schedule(model), engine.require(model).noise_path
    ours = run(model, uni_edit_sampler(alpha=0.5, omega=2.0), sigmas)
    v_src, v_tar = velocity_of(model, SOURCE), velocity_of(model, TARGET)
    levels = sigmas.double()[4:]
    x = start_of(model) * path.image_scale(levels[-1])
    v = v_src(x, levels[-1])
    for s, t in pairwise(levels.flip(0)):
        v = v_src(x + (t - s) * v, t)
        x = x + (t - s) * v
    for s, t in pairwise(levels):
        one, other = v_src(x, s), v_tar(x, s)
        mask = (other - one).abs().mean(dim=1, keepdim=True)
        mask = (mask - mask.min()) / (mask.max() - mask.min())
        x = x + (t - s) * (mask * other + (1 - mask) * one + 2.0 * (1 + mask) * (other - one))
    assert relative_error(ours, to_socket(model, x / path.image_scale(levels[-1]))) < 1e-4


def test_no_gradients_are_kept_outside_of_a_server() -> None:
    """As by the stock samplers: a script may call a guider without `torch.no_grad`."""
    model = tiny_flow_models.flux(output_gain=0.2)
    model.model.diffusion_model.requires_grad_(True)
    pivot = inversion.invert_image(model, image(model), SOURCE, steps=STEPS, end_at_zero=True)
    for sampler in (flow_edit_sampler(0.0), uni_edit_sampler(), direct_inversion_sampler(model, pivot)):
        assert not run(model, sampler, schedule(model)).requires_grad
    for method in methods.OWN_SAMPLERS:
        sampler = comfy.samplers.KSAMPLER(methods.sampler_of(method, engine.FLOW))
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(TARGET, NEGATIVE)
        noise = torch.randn(image(model).shape, generator=torch.Generator().manual_seed(1))
        assert not guider.sample(noise, image(model), sampler, schedule(model), disable_pbar=True).requires_grad


def test_direct_inversion_returns_the_image_for_the_source_prompt_at_any_scale(model: Any) -> None:
    made = inversion.invert_image(model, image(model), SOURCE, steps=STEPS, end_at_zero=True)
    sampler = direct_inversion_sampler(model, made)
    same = run(model, sampler, made.sigmas, target=SOURCE, scales=(4.0, 4.0))
    assert relative_error(same, image(model)) < 1e-5
    edited = run(model, sampler, made.sigmas, scales=(1.0, 4.0))
    assert relative_error(edited, image(model)) > 1e-2
    # Later levels of the inversion may be skipped, others not.
    run(model, sampler, made.sigmas[3:])
    with pytest.raises(IdentityEditError, match="noise level"):
        run(model, sampler, made.sigmas * 0.9)


def test_direct_inversion_adds_the_drift_of_the_source(model: Any) -> None:
    made = inversion.invert_image(model, image(model), SOURCE, steps=STEPS, end_at_zero=True)
    ours = run(model, direct_inversion_sampler(model, made), made.sigmas)
    v_src, v_tar = velocity_of(model, SOURCE), velocity_of(model, TARGET)
    pivot, levels = made.trajectory.double(), made.sigmas.double()
    x = pivot[0]
    for i, (s, t) in enumerate(pairwise(levels)):
        x = x + (t - s) * v_tar(x, s) + pivot[i + 1] - (pivot[i] + (t - s) * v_src(pivot[i], s))
    assert relative_error(ours, to_socket(model, x / made.noise_path.image_scale(levels[-1]))) < 1e-4


def test_direct_inversion_of_one_image_edits_every_latent() -> None:
    model = tiny_flow_models.sd3(output_gain=0.2)
    made = inversion.invert_image(model, image(model), SOURCE, steps=3)
    guider = engine.EditGuider(model, SOURCE, TARGET, None, 1.0, 1.0)
    one, two = (
        guider.sample(
            torch.zeros_like(latent), latent, direct_inversion_sampler(model, made), made.sigmas, disable_pbar=True
        )
        for latent in (image(model), image(model, 2))
    )
    assert two.shape == image(model, 2).shape
    assert relative_error(two, one.expand_as(two)) < 1e-5


def test_rf_inversions_sampler_is_drawn_to_the_image(model: Any) -> None:
    sigmas = schedule(model)
    made = inversion.invert_image(model, image(model), SOURCE, steps=STEPS, end_at_zero=True)
    noise = InvertedNoise(model, made).generate_noise({"samples": image(model)})
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(TARGET, NEGATIVE)
    guider.set_cfg(1.0)
    ours = run(model, rf_inversion.rf_inversion_sampler(0.8, 0.25, 0.75), sigmas, noise=noise, guider=guider)
    v, z_0, x = velocity_of(model, TARGET), start_of(model), made.trajectory[0].double()
    for i, (s, t) in enumerate(pairwise(sigmas.double())):
        velocity = v(x, s)
        if 2 <= i < 6:
            velocity = 0.2 * velocity + 0.8 * (x - z_0) / s
        x = x + (t - s) * velocity
    assert relative_error(ours, to_socket(model, x)) < 1e-4
    stuck = run(model, rf_inversion.rf_inversion_sampler(1.0, 0.0, 1.0), sigmas, noise=noise, guider=guider)
    assert relative_error(stuck, image(model)) < 1e-5


@pytest.mark.parametrize("name", ["flow edit", "uni-edit", "direct inversion", "rf-inversion"])
def test_the_image_stays_as_it_was_outside_of_the_mask(model: Any, name: str) -> None:
    made = inversion.invert_image(
        model, image(model), SOURCE, steps=STEPS, end_at_zero=True, method=methods.FIXED_POINT
    )
    sampler = {
        "flow edit": lambda: flow_edit_sampler(),
        "uni-edit": lambda: uni_edit_sampler(),
        "direct inversion": lambda: direct_inversion_sampler(model, made),
        "rf-inversion": lambda: rf_inversion.rf_inversion_sampler(),
    }[name]()
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1.0
    noise = InvertedNoise(model, made).generate_noise({"samples": image(model)})
    edited = run(model, sampler, made.sigmas, noise=noise, mask=mask)
    assert relative_error(edited[..., 4:], image(model)[..., 4:]) < 1e-4
    assert relative_error(edited[..., :4], image(model)[..., :4]) > 1e-3


@pytest.mark.parametrize("make", [flow_edit_sampler, uni_edit_sampler, rf_inversion.rf_inversion_sampler])
def test_differential_diffusion_sets_the_mask_of_each_step(make: Any) -> None:
    """Weak parts of a mask change only in the last steps: a hundredth in none of 8, three quarters in some."""
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    model = tiny_flow_models.sd3(output_gain=0.2)
    differential = DifferentialDiffusion.execute(model, 1.0).args[0]
    mask = torch.full((1, 1, 8, 8), 0.01)
    mask[..., :4] = 0.75
    noise = torch.randn(image(model).shape, generator=torch.Generator().manual_seed(0))
    plain, edited = (run(each, make(), schedule(model), noise=noise, mask=mask) for each in (model, differential))
    assert relative_error(edited[..., 4:], image(model)[..., 4:]) < 1e-5
    assert relative_error(plain[..., 4:], image(model)[..., 4:]) > 1e-5
    assert relative_error(edited[..., :4], image(model)[..., :4]) > 1e-3


def test_a_guider_without_a_source_prompt_is_named() -> None:
    model = tiny_flow_models.sd3()
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(TARGET, NEGATIVE)
    with pytest.raises(IdentityEditError, match="connect Source and Target Guider"):
        run(model, flow_edit_sampler(), schedule(model), guider=guider)


def test_other_samplers_see_the_target_prompt() -> None:
    model = tiny_flow_models.sd3()
    plain = comfy.samplers.CFGGuider(model)
    plain.set_conds(TARGET, NEGATIVE)
    plain.set_cfg(3.0)
    ours = engine.EditGuider(model, SOURCE, TARGET, NEGATIVE, 1.0, 3.0)
    noise = torch.randn(image(model).shape, generator=torch.Generator().manual_seed(0))
    one, other = (
        guider.sample(
            noise, image(model), comfy.samplers.sampler_object("euler"), schedule(model), disable_pbar=True, seed=0
        )
        for guider in (plain, ours)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("node", ["EasyCacheNode", "LazyCacheNode"])
@pytest.mark.parametrize("make", [uni_edit_sampler, lambda: flow_edit_sampler(last_steps=0.3)])
def test_caches_of_steps_do_not_mix_source_and_target(node: str, make: Any, caplog: pytest.LogCaptureFixture) -> None:
    from comfy_extras import nodes_easycache

    model = tiny_flow_models.flux(output_gain=0.05)
    cached = getattr(nodes_easycache, node).execute(model, 0.8, 0.0, 1.0, False).args[0]
    plain = run(model, make(), schedule(model))
    assert "cache" not in caplog.text
    assert torch.equal(run(cached, make(), schedule(model)), plain)
    assert "cache is disabled in this run" in caplog.text


@pytest.mark.parametrize("make", [tiny_models.sd1, tiny_flow_models.sd3])
def test_a_cache_around_the_model_does_not_mix_source_and_target(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = make(output_gain=0.2)
    cached = TeaCache().apply_teacache(model)
    plain, with_cache = (run(each, flow_edit_sampler(), schedule(model)) for each in (model, cached))
    assert torch.equal(plain, with_cache) and "TeaCache.apply_teacache is disabled in this run" in caplog.text


@pytest.mark.parametrize("make", [flow_edit_sampler, uni_edit_sampler, rf_inversion.rf_inversion_sampler])
def test_schedules_without_a_step_or_in_another_order(make: Any) -> None:
    """Split Sigmas at the last step, Flip Sigmas, and a scheduler of another kind of model."""
    model = tiny_flow_models.sd3(output_gain=0.2)
    sigmas = schedule(model)
    assert relative_error(run(model, make(), sigmas[-1:]), image(model)) < 1e-6
    for wrong in (sigmas.flip(0), torch.tensor([14.6, 1.0, 0.0])):
        with pytest.raises(IdentityEditError, match="sigmas must descend from at most 1"):
            run(model, make(), wrong)


def test_uni_edit_inverts_an_image_without_noise() -> None:
    model = tiny_flow_models.sd3(output_gain=0.2)
    with pytest.raises(IdentityEditError, match="sigmas end at .*, where an image would still be noisy"):
        run(model, uni_edit_sampler(), schedule(model)[:4])
