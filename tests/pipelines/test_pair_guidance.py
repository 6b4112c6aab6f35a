"""The Pair Guider: equation 2 of Chen et al. 2024 on noise in float64, its cost, and what ComfyUI does around it."""

from __future__ import annotations

import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.mcdm.pair_dataset import Poses, with_pose
from identity_edit_pack.pipelines.mcdm.pair_guidance import doubled, halves, pair_estimate, pair_guider
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests import tiny_flow_models, tiny_models

NAMES = ("shared", "source", "target", "negative")


class OneEvaluation(comfy.samplers.Sampler):
    """Asks the guider once, and keeps what it was asked and what it said."""

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def sample(
        self, model, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        self.x = noise * self.sigma
        self.denoised = model(self.x, torch.full((len(noise),), self.sigma), **extra_args)
        return self.denoised


def conditionings(batch=1):
    return {name: tiny_models.conditioning(seed, batch) for seed, name in enumerate(NAMES)}


def evaluate(guider, shape=(2, 4, 6, 20), sigma=3.0, seed=1):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    sampler = OneEvaluation(sigma)
    guider.sample(noise, torch.zeros(shape), sampler, torch.tensor([sigma, 0.0]), disable_pbar=True)
    return sampler.x.detach(), sampler.denoised.detach()


def literal(x, estimates, sigma, scale, weights):
    """Equation 2 on predicted noise, in float64, with M'_a = [1, 0] and M'_b = [0, 1]."""
    x = x.double()
    eps = {name: (x - estimate.double()) / sigma for name, estimate in estimates.items()}
    guided = {name: eps["negative"] + scale * (eps[name] - eps["negative"]) for name in NAMES[:3]}
    h, w = x.shape[-2], x.shape[-1] // 2
    one, zero = torch.ones(h, w, dtype=torch.float64), torch.zeros(h, w, dtype=torch.float64)
    masks = {"shared": torch.ones(h, 2 * w), "source": torch.cat([one, zero], 1), "target": torch.cat([zero, one], 1)}
    noise = sum(weight * masks[name] * guided[name] for name, weight in zip(NAMES[:3], weights, strict=True))
    return x - sigma * noise


@pytest.mark.parametrize("weights", [(0.1, 0.9, 0.9), (0.3, 0.5, 1.2)])
def test_random_predictions_are_combined_by_the_formula(weights) -> None:
    model = tiny_models.sd1()
    seen: dict[int, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(3)

    def random_predictions(apply_model, arguments):
        parts = torch.randn(arguments["input"].shape, generator=generator).chunk(len(arguments["cond_or_uncond"]))
        seen.update(zip(arguments["cond_or_uncond"], parts, strict=True))
        return torch.cat(parts)

    model.set_model_unet_function_wrapper(random_predictions)
    guider = pair_guider(
        model, **conditionings(), guidance_scale=7.5, shared_weight=weights[0], source_weight=weights[1],
        target_weight=weights[2],
    )  # fmt: skip
    x, denoised = evaluate(guider)
    estimates = dict(zip(("shared", "negative", "source", "target"), (seen[i] for i in range(4)), strict=True))
    expected = literal(x, estimates, 3.0, 7.5, weights)
    assert float((denoised.double() - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert denoised.dtype == torch.float32 and guider.evaluations == 4


FAMILIES = {**tiny_models.FAMILIES, **tiny_flow_models.ALL}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_four_evaluations_of_ones_own(family) -> None:
    model = FAMILIES[family]()
    given = conditionings()
    is_flow = family in tiny_flow_models.ALL
    latent = tiny_flow_models.latent_for(model, 2, 2) if is_flow else tiny_models.latent(2, 2)
    sigma, shape = 0.6 if is_flow else 3.0, (*latent.shape[:-2], 6, 20)
    x, denoised = evaluate(pair_guider(model, **given), shape, sigma)
    estimates = {}
    for name, conditioning in given.items():

        def alone(evaluator, latent):
            return evaluator.denoised(x, torch.tensor(sigma))

        estimates[name] = engine.run_loop(
            model, conditioning, None, torch.zeros_like(x), torch.tensor([sigma, 0.0]), alone
        )
    expected = literal(x, estimates, sigma, 7.5, (0.1, 0.9, 0.9))
    assert torch.allclose(denoised.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    # Each half depends on its own prompt and the other's prompt not at all, but through the network.
    other = {**given, "target": tiny_models.conditioning(9)}
    _, changed = evaluate(pair_guider(model, **other), shape, sigma)
    left, right = (changed - denoised).chunk(2, dim=-1)
    assert float(left.abs().max()) < 1e-4 * float(right.abs().max())


def calls_of(model):
    """A clone of the model, and a list to which every call of the network adds its number of conditionings."""
    calls: list[int] = []

    def count(executor, x, *args, **kwargs):
        options = next(value for value in (*args, *kwargs.values()) if isinstance(value, dict) and "uuids" in value)
        calls.append(len(options["cond_or_uncond"]))
        return executor(x, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "test", count)
    return clone, calls


@pytest.mark.parametrize(
    ("settings", "cost"),
    [({}, 4), ({"guidance_scale": 1.0}, 3), ({"shared_weight": 0.0}, 3), ({"target_weight": 0.0}, 3)],
)
def test_a_step_costs_one_call(settings, cost) -> None:
    model, calls = calls_of(tiny_models.sd1())
    guider = pair_guider(model, **conditionings(), **settings)
    evaluate(guider)
    assert calls == [cost] and guider.evaluations == cost


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m_sde", "uni_pc", "heun", "ddim"])
def test_any_stock_sampler_takes_it(name) -> None:
    model, calls = calls_of(tiny_models.sd1(output_gain=0.1))
    guider = pair_guider(model, **conditionings())
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 4)
    noise = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    runs = [
        guider.sample(
            noise, torch.zeros_like(noise), comfy.samplers.sampler_object(name), sigmas, disable_pbar=True, seed=5
        )
        for _ in range(2)
    ]
    assert bool(torch.isfinite(runs[0]).all()) and torch.equal(*runs)
    assert guider.evaluations == sum(calls) and set(calls) == {4}


def test_guidance_patches_of_other_nodes_take_part() -> None:
    model = tiny_models.sd1()
    scales = []

    def halved(arguments):
        scales.append(arguments["cond_scale"])
        return arguments["uncond"] + 0.5 * arguments["cond_scale"] * (arguments["cond"] - arguments["uncond"])

    patched = model.clone()
    patched.set_model_sampler_cfg_function(halved)
    _, denoised = evaluate(pair_guider(patched, **conditionings()))
    _, expected = evaluate(pair_guider(model, **conditionings(), guidance_scale=3.75))
    assert scales == [7.5] * 3
    assert torch.allclose(denoised, expected, atol=1e-4 * float(expected.abs().max()))


def tiny_control_net():
    """A real ControlNet of ComfyUI with random weights."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    left_out = ("out_channels", "transformer_depth_output")
    config = {name: value for name, value in tiny_models._unet_config().items() if name not in left_out}
    network = comfy.cldm.cldm.ControlNet(
        **config, hint_channels=3, num_heads=8, dtype=torch.float32, device="cpu",
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    tiny_models._draw_weights(network, 4)
    cpu = torch.device("cpu")
    return comfy.controlnet.ControlNet(network.eval(), load_device=cpu)


def test_a_pose_by_stock_nodes_holds_on_both_halves() -> None:

    import nodes

    pose = torch.rand(1, 48, 80, 3, generator=torch.Generator().manual_seed(2))
    given = conditionings()
    control_net = tiny_control_net()
    apply = nodes.ControlNetApplyAdvanced().apply_controlnet
    both = torch.cat([pose, pose], dim=2)  # what the stock ImageStitch makes of the same image twice
    stock = dict(given)
    stock["shared"], stock["negative"] = apply(given["shared"], given["negative"], control_net, both, 0.8, 0.0, 1.0)
    stock["source"], stock["target"] = apply(given["source"], given["target"], control_net, both, 0.8, 0.0, 1.0)
    model, calls = calls_of(tiny_models.sd1())
    _, plain = evaluate(pair_guider(model, **given))
    calls.clear()
    _, posed = evaluate(pair_guider(model, **stock))
    assert sorted(calls) == [2, 2], "two ControlNet objects, two calls"
    assert float((posed - plain).abs().max()) > 1e-3
    calls.clear()
    ours = with_pose(Poses(control_net, pose, 0.8), 0, None, list(given.values()))
    _, at_once = evaluate(pair_guider(model, *ours))
    assert calls == [4]
    assert torch.allclose(at_once, posed, atol=1e-4 * float(posed.abs().max()))


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(IdentityEditError, match="multiple of 16"):
        evaluate(pair_guider(tiny_models.sd1(), **conditionings()), shape=(1, 4, 6, 9))


def test_wrong_inputs_are_refused() -> None:
    model, given = tiny_models.sd1(), conditionings()
    with pytest.raises(IdentityEditError, match="target prompt is empty"):
        pair_guider(model, **{**given, "target": []})
    with pytest.raises(IdentityEditError, match="weights are 0"):
        pair_guider(model, **given, shared_weight=0.0, source_weight=0.0, target_weight=0.0)
    with pytest.raises(IdentityEditError, match="guidance_scale"):
        pair_guider(model, **given, guidance_scale=float("nan"))


def test_halves_put_together_are_the_whole() -> None:
    images = torch.rand(2, 6, 10, 3)
    assert torch.equal(torch.cat(halves(images, 2, "x"), dim=2), images)
    assert torch.equal(halves(doubled(images), 2, "x")[1], images)
    with pytest.raises(IdentityEditError, match="odd width 9"):
        halves(torch.rand(1, 4, 9, 3), 2, "The pair")


def test_weights_that_sum_to_one_leave_x_out() -> None:
    x, estimate = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 4, 8)
    assert torch.allclose(pair_estimate(estimate, estimate, estimate, x), estimate, atol=1e-6)


def test_an_area_outside_of_the_image_is_refused() -> None:
    sides = conditionings()
    embedding, options = sides["target"][0]
    sides["target"] = [[embedding, {**options, "area": (2, 2, 6, 0), "strength": 1.0}]]
    guider = pair_guider(
        tiny_models.sd1(), **sides, guidance_scale=2.0, shared_weight=0.1, source_weight=0.9, target_weight=0.9
    )
    with pytest.raises(IdentityEditError, match="The target conditioning has an area that starts outside"):
        evaluate(guider, shape=(1, 4, 6, 20))
