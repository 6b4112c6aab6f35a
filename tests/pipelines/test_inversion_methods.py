"""Methods of deterministic inversion against plain float64 loops, on networks of every flow family and a UNet, and how
they reach ComfyUI's samplers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import tiny_flow_models
import tiny_models
import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.inversion import inversion, methods, rf_inversion
from identity_edit_pack.pipelines.inversion.inverted_noise import InvertedNoise
from identity_edit_pack.pipelines.shared import files
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.text.step_embeddings import apply_step_embeddings, constant_embedding
from tiny_models import relative_error

SOURCE, TARGET, NEGATIVE = (tiny_models.conditioning(seed) for seed in (1, 2, 3))
EVERY = {**tiny_flow_models.ALL, "sd1": tiny_models.sd1}


@pytest.fixture(scope="module", params=EVERY)
def model(request: pytest.FixtureRequest) -> Any:
    """Random networks bend their paths far more than trained ones; a small output makes steps short enough."""
    return EVERY[request.param](output_gain=0.05)


def image(model: Any, batch: int = 1) -> torch.Tensor:
    if engine.require(model).noise_path is engine.FLOW:
        return tiny_flow_models.latent_for(model, 4, batch)
    return tiny_models.latent(4, batch=batch)


def velocity_of(model: Any, prompt: Any) -> Any:
    """(x, sigma) -> v in float64, from ComfyUI's own estimate of z_0."""
    results: list[torch.Tensor] = []

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        sigma, noise = sigma.clamp(min=1e-3), torch.zeros(x.shape)

        def evaluate(wrap: Any, x_: Any, sigmas: Any, extra_args: Any = None, **_: Any) -> torch.Tensor:
            results.append(wrap(x.float(), sigma.float().expand(x.shape[0]), **extra_args))
            return x_

        sampler = comfy.samplers.KSAMPLER(evaluate)
        levels = torch.tensor([0.5, 0.25])
        comfy.sample.sample_custom(model, noise, 1.0, sampler, levels, prompt, prompt, noise, disable_pbar=True, seed=0)
        return (x - results.pop().double()) / sigma

    return velocity


def literal(method: str, v: Any, x: torch.Tensor, levels: list[torch.Tensor], ratio: Any) -> list[torch.Tensor]:
    """The published formulas; `ratio` brings a latent of one level to the network's scale of another."""
    path, before = [x], None
    for s, t in pairwise(levels):
        h = t - s
        if method == methods.DDIM:
            x = x + h * v(x * ratio(s, t), t)
        elif method == methods.FIXED_POINT:
            y = x * ratio(s, t)
            for _ in range(3):
                y = x + h * v(y, t)
            x = y
        elif method == methods.UNI_INV:
            before = v(x + h * (v(x, s) if before is None else before), t)
            x = x + h * before
        elif method == methods.MIDPOINT:
            slope = v(x, s)
            # RF-Solver's form: a second-order Taylor step with the derivative of the velocity.
            derivative = (v(x + h / 2 * slope, s + h / 2) - slope) / (h / 2)
            x = x + h * slope + h * h / 2 * derivative
        else:
            before = v(x + h / 2 * (v(x, s) if before is None else before), s + h / 2)
            x = x + h * before
        path.append(x)
    return path


@pytest.mark.parametrize("method", methods.METHODS)
def test_each_method_is_its_formula(method: str) -> None:
    for model in (tiny_flow_models.sd3(output_gain=0.2), tiny_models.sd1(output_gain=0.2)):
        path, z_0 = engine.require(model).noise_path, image(model)
        made = inversion.invert_image(model, z_0, SOURCE, steps=6, method=method, iterations=3)
        levels = [level.double() for level in made.sigmas.flip(0)]
        start = engine.to_model_scale(model, z_0).double() * path.image_scale(levels[0])
        ratio = lambda s, t, path=path: path.network_scale(t) / path.network_scale(s)  # noqa: E731
        expected = literal(method, velocity_of(model, SOURCE), start, levels, ratio)
        for ours, theirs in zip(made.trajectory.flip(0), expected, strict=True):
            assert relative_error(ours, theirs) < 2e-5


def test_stock_euler_returns_the_image_of_a_fixed_point_inversion(model: Any) -> None:
    """Through the NOISE, with any image as LATENT; at guidance scale 1 with the source prompt."""
    z_0, steps = image(model, 2), 8
    made = inversion.invert_image(
        model, z_0, SOURCE, steps=steps, end_at_zero=True, method=methods.FIXED_POINT, iterations=12
    )
    for latent in (z_0, torch.zeros_like(z_0)):
        noise = InvertedNoise(model, made).generate_noise({"samples": latent})
        back = comfy.sample.sample_custom(
            model, noise, 1.0, comfy.samplers.sampler_object("euler"), made.sigmas, SOURCE, NEGATIVE, latent,
            disable_pbar=True, seed=0,
        )  # fmt: skip
        error = relative_error(back, z_0)
        assert error < 2e-4
    ddim = inversion.invert_image(model, z_0, SOURCE, steps=steps, end_at_zero=True)
    assert relative_error(inversion.sample_inversion(model, ddim, SOURCE), z_0) > 5 * error


def test_one_inversion_serves_every_latent_of_a_batch(model: Any) -> None:
    z_0 = image(model)
    made = inversion.invert_image(model, z_0, SOURCE, steps=4, end_at_zero=True, method=methods.FIXED_POINT)
    both = torch.cat([z_0, torch.zeros_like(z_0)])
    one, other = (InvertedNoise(model, made).generate_noise({"samples": each}) for each in (z_0, both[1:]))
    assert torch.equal(InvertedNoise(model, made).generate_noise({"samples": both}), torch.cat([one, other]))


def test_the_last_update_says_how_near_the_fixed_point_is() -> None:
    model = tiny_flow_models.sd3(output_gain=0.5)
    z_0, found = image(model), {}
    for iterations in (1, 2, 3, 12):
        found[iterations] = inversion.invert_image(
            model, z_0, SOURCE, steps=1, end_at_zero=True, method=methods.FIXED_POINT, iterations=iterations
        )
    changed = found[3].trajectory[0] - found[2].trajectory[0]
    assert found[3].last_update == pytest.approx(float(changed.norm() / found[3].trajectory[0].norm()), rel=1e-4)
    assert found[1].last_update > found[3].last_update > found[12].last_update
    assert inversion.invert_image(model, z_0, SOURCE, steps=1).last_update == 0.0


@pytest.mark.parametrize(("family", "shift"), [("sd3", 1.0), ("sd3", 3.0), ("flux", 1.15)])
def test_the_models_own_shift_is_followed(family: str, shift: float) -> None:
    model = tiny_flow_models.ALL[family](output_gain=0.05)
    sampling = type(model.get_model_object("model_sampling"))(model.model.model_config)
    sampling.set_parameters(shift=shift)
    model = model.clone()
    model.add_object_patch("model_sampling", sampling)
    z_0 = image(model)
    for steps in (20, 28, 50):
        made = inversion.invert_image(model, z_0, SOURCE, steps=steps, method=methods.FIXED_POINT)
        assert torch.equal(made.sigmas[:-1], comfy.samplers.calculate_sigmas(sampling, "simple", steps)[:-1])
        assert relative_error(inversion.sample_inversion(model, made, SOURCE), z_0) < 1e-4


@pytest.mark.parametrize("method", methods.OWN_SAMPLERS)
def test_methods_with_their_own_sampler_are_sampled_back_by_it(model: Any, method: str) -> None:
    z_0 = image(model)
    errors = []
    for steps in (8, 16):
        made = inversion.invert_image(model, z_0, SOURCE, steps=steps, method=method)
        noise = InvertedNoise(model, made).generate_noise({"samples": z_0})
        sampler = comfy.samplers.KSAMPLER(methods.sampler_of(method, made.noise_path))
        stock = comfy.sample.sample_custom(
            model, noise, 1.0, sampler, made.sigmas, SOURCE, NEGATIVE, z_0, disable_pbar=True, seed=0
        )
        back = inversion.sample_inversion(model, made, SOURCE)
        scale = made.noise_path.image_scale(made.sigmas[-1]) if made.noise_path is not engine.FLOW else 1.0
        assert relative_error(stock / scale, back) < 1e-4
        errors.append(relative_error(back, z_0))
    assert errors[1] < errors[0] < 0.02


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("uni-inv", 2), ("midpoint", 3), ("fireflow", 3)])
def test_errors_of_a_round_trip_fall_with_the_methods_order(method: str, order: int) -> None:
    """On a smooth velocity: halved steps divide the error by 2 ** order."""

    def estimate(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return x - s * (torch.sin(2 * x + 3 * s) + 0.5 * x)

    x_0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = []
    for steps in (40, 80):
        up = torch.linspace(1e-3, 1.0, steps + 1, dtype=torch.float64)
        back = method if method in methods.OWN_SAMPLERS else None
        *_, (x_1, _) = methods.steps_of(method, engine.FLOW, x_0, up, estimate)
        x = x_1
        if back is not None:
            *_, (x, _) = methods.steps_of(back, engine.FLOW, x_1, up.flip(0), estimate)
        else:
            for s, t in pairwise(up.flip(0)):
                x = engine.FLOW.step(x, estimate(x, s), s, t)
        errors.append(relative_error(x, x_0))
    assert 0.75 * 2**order < errors[0] / errors[1] < 1.35 * 2**order


def test_noise_of_later_steps_starts_at_the_inversions_latent(model: Any) -> None:
    z_0 = image(model)
    made = inversion.invert_image(model, z_0, SOURCE, steps=8)
    sampling = model.get_model_object("model_sampling")
    for skip in (0, 3):
        noise = InvertedNoise(model, made, skip).generate_noise({"samples": z_0})
        start = sampling.noise_scaling(made.sigmas[skip], noise, engine.to_model_scale(model, z_0), False)
        assert relative_error(start, made.trajectory[skip]) < 1e-5
    with pytest.raises(IdentityEditError, match="connect the latent of the inverted image"):
        InvertedNoise(model, made).generate_noise({"samples": z_0[..., :4]})


def test_a_given_schedule_is_followed(model: Any) -> None:
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "beta", 9)
    z_0 = image(model)
    made = inversion.invert_image(model, z_0, SOURCE, method=methods.FIXED_POINT, iterations=12, sigmas=sigmas)
    assert torch.equal(made.sigmas, sigmas) and made.steps == len(sigmas) - 1
    assert relative_error(inversion.sample_inversion(model, made, SOURCE), z_0) < 1e-3
    for wrong in (sigmas.flip(0), sigmas * 1.5):
        with pytest.raises(IdentityEditError, match="sigmas must descend from at most"):
            inversion.invert_image(model, z_0, SOURCE, sigmas=wrong)
    with pytest.raises(IdentityEditError, match="where an image would still be noisy; let them end at 0"):
        inversion.invert_image(model, z_0, SOURCE, sigmas=sigmas[:4])  # the high_sigmas of Split Sigmas


def test_another_text_is_exchanged_with_all_that_goes_with_it(model: Any) -> None:
    """A table of a longer prompt gives what that prompt gives, bit for bit: counted, padded and never repeated."""
    z_0 = image(model)
    longer = tiny_models.conditioning(6, tokens=2 * tiny_models.TOKENS + 3)
    made = inversion.invert_image(model, z_0, SOURCE, steps=4)
    pooled = longer[0][1]["pooled_output"]
    tabled = apply_step_embeddings(model, constant_embedding(made.sigmas, longer[0][0], pooled), "positive")
    ours = inversion.sample_inversion(tabled, made, SOURCE, NEGATIVE, 3.0)
    expected = inversion.sample_inversion(model, made, longer, NEGATIVE, 3.0)
    assert torch.equal(ours, expected)
    assert relative_error(ours, inversion.sample_inversion(model, made, SOURCE, NEGATIVE, 3.0)) > 1e-3


def test_rf_inversion_is_its_formula_and_ends_in_noise_at_full_strength() -> None:
    model = tiny_flow_models.flux(output_gain=0.2)
    z_0 = image(model)
    made = rf_inversion.rf_inversion(model, z_0, SOURCE, steps=6, gamma=0.5, seed=9)
    end = rf_inversion.rf_inversion(model, z_0, SOURCE, steps=6, gamma=1.0, seed=9).trajectory[0].double()
    assert abs(float(end.std()) - 1.0) < 0.05 and abs(float(end.mean())) < 0.1
    v = velocity_of(model, SOURCE)
    levels = [level.double() for level in made.sigmas.flip(0)]
    y = engine.to_model_scale(model, z_0).double() * (1 - levels[0])
    for s, t in pairwise(levels):
        y = y + (t - s) * (0.5 * v(y, s) + 0.5 * (end - y) / (1 - s))
    assert relative_error(made.trajectory[0], y) < 1e-4
    with pytest.raises(IdentityEditError, match="is not a flow model"):
        rf_inversion.rf_inversion(tiny_models.sd1(), tiny_models.latent(2), SOURCE, steps=4)


def test_files_of_every_kind_are_read_and_older_ones_too(model: Any, tmp_path: Any) -> None:
    made = inversion.invert_image(model, image(model), SOURCE, steps=3, method=methods.UNI_INV)
    path = str(tmp_path / "new.safetensors")
    inversion.save_inversion(made, path)
    loaded = inversion.load_inversion(path)
    assert torch.equal(loaded.trajectory, made.trajectory) and loaded.method == methods.UNI_INV
    inversion.check_inversion(loaded, model)
    tensors, description = files.read_tensors(path, "inversion")
    older = str(tmp_path / "older.safetensors")
    files.write_tensors(older, {**tensors, "timesteps": torch.arange(3)}, {**description, "format": 2})
    assert torch.equal(inversion.load_inversion(older).trajectory, made.trajectory)


def test_only_one_frame_is_edited() -> None:
    model = tiny_flow_models.qwen_image()
    with pytest.raises(IdentityEditError, match="is a video of 2 latent frames"):
        inversion.invert_image(model, image(model).repeat(1, 1, 2, 1, 1), SOURCE, steps=2)
    flat = image(model)[:, :, 0]
    made = inversion.invert_image(model, flat, SOURCE, steps=2)
    assert made.trajectory.ndim == 6
    noise = InvertedNoise(model, made).generate_noise({"samples": flat})
    assert noise.shape == image(model).shape
    for latent in (flat, image(model)):
        inversion.check_inversion(made, model, latent_shape=tuple(latent.shape))
