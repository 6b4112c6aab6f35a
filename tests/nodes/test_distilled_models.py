"""Every node on a model whose table of noise levels is shortened, as ComfyUI's ModelSamplingDiscrete does for LCM."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import comfy_extras.nodes_model_advanced
import pytest
import torch
from identity_edit_pack.nodes.hifi_tuner import subject_embedding
from identity_edit_pack.nodes.inversion.edit_friendly import EditFriendlyDDPMInversion
from identity_edit_pack.nodes.inversion.noise_inversion import NoiseInversion
from identity_edit_pack.pipelines.engine.families import schedule
from identity_edit_pack.pipelines.hifi_tuner.subject_embedding import step_boundaries
from identity_edit_pack.pipelines.inversion.inversion import sample_inversion
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.shared.parsing import whole_numbers
from identity_edit_pack.tests import tiny_models
from identity_edit_pack.tests.nodes.good_inputs import CLASSES, World, good, world_in
from identity_edit_pack.tests.nodes.test_bad_inputs import run, tensors_in

pytestmark = pytest.mark.slow

SOURCE, NEGATIVE = (tiny_models.conditioning(seed) for seed in (1, 3))
NODES = [
    name for name, node in CLASSES.items() if "MODEL" in [item.get_io_type() for item in node.define_schema().inputs]
]


def lcm(model: Any) -> Any:
    return comfy_extras.nodes_model_advanced.ModelSamplingDiscrete().patch(model, "lcm", False)[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        yield world_in(tmp_path_factory.mktemp("comfyui"), patch)


@pytest.mark.parametrize("name", NODES)
def test_a_nodes_defaults_run(name: str, world: World) -> None:
    """Those of whatever counts steps or timesteps, but the updates of a training, which are no noise levels."""
    inputs = good(world, name)
    for item in CLASSES[name].define_schema().inputs:
        default = getattr(item, "default", None)
        trains = item.id == "steps" and name.startswith(("Train", "OptimizeTextEmbedding", "ImagicFineTuning"))
        if (
            default is not None
            and "step" in item.id
            and not trains
            and item.id not in ("inner_steps", "updates_per_step")
        ):
            inputs[item.id] = default
    inputs |= {"model": lcm(inputs["model"])}
    for tensor in tensors_in(run(name, inputs, world)):
        assert bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize(("steps", "taken"), [(1, 1), (4, 4), (20, 20), (49, 49), (50, 50), (51, 50), (1000, 50)])
def test_steps_are_spread_as_lcms_own_sampler_does(steps: int, taken: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    ours = schedule.ddim_schedule(lcm(tiny_models.sd1()).get_model_object("model_sampling"), steps)
    theirs = diffusers.LCMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    theirs.set_timesteps(taken, original_inference_steps=50)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    alpha_bar = theirs.alphas_cumprod[theirs.timesteps]
    torch.testing.assert_close(ours.sigmas[:-1], ((1 - alpha_bar) / alpha_bar).sqrt(), rtol=1e-4, atol=0)
    assert bool((ours.sigmas[:-1] > ours.sigmas[1:]).all())


@pytest.mark.parametrize("node", [NoiseInversion, EditFriendlyDDPMInversion])
def test_more_steps_than_levels_are_all_of_them_and_said(node: Any, caplog: pytest.LogCaptureFixture) -> None:
    latent, model = {"samples": tiny_models.latent(4)}, lcm(tiny_models.sd1())
    more: dict[str, Any] = {"guidance_scale": 1.0}
    if node is NoiseInversion:
        more |= {"method": "DDIM", "end_at_zero": False, "iterations": 5, "gamma": 0.5, "seed": 0}
    else:
        more |= {"eta": 1.0, "seed": 0, "zero_last_noise_map": False}
    for steps in (10, 100):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            made = node.execute(model=model, source=SOURCE, latent=latent, steps=steps, **more).args[0]
        if steps == 10:
            # ComfyUI's own warning of a model that an earlier test has left is not this run's.
            said = [message for message in caplog.messages if "memory leak with model" not in message]
            assert made.steps == 10 and not said
        else:
            assert made.steps in (49, 50)
            assert f"(LCM sampling), so {made.steps} steps are used instead of 100" in caplog.text
        if node is EditFriendlyDDPMInversion:  # and they still carry the image
            back = sample_inversion(model, made, SOURCE, None, 1.0)
            torch.testing.assert_close(back, latent["samples"], rtol=0, atol=1e-3)


def test_timesteps_are_those_of_the_training() -> None:
    """The nearest level of a model with fewer: never a row of its table."""
    plain = tiny_models.sd1()
    sampling = lcm(plain).get_model_object("model_sampling")
    full = plain.get_model_object("model_sampling")
    asked = [999, 981, 500, 201, 101, 60, 19, 1, 0]
    rows = schedule.rows_of(sampling, asked)
    assert (rows * 20 + 19 - torch.tensor(asked)).abs().max() <= 19 and rows.tolist()[-2:] == [0, 0]
    assert schedule.rows_of(full, asked).tolist() == asked
    for text in ("1, 101 201", "1\uff0c101\u3001201,"):
        assert whole_numbers(text) == [1, 101, 201]


@pytest.mark.parametrize("steps", [10, 50, 100, 1000])
def test_step_wise_embeddings_of_the_plain_model_fit(steps: int) -> None:
    plain = tiny_models.sd1()
    timesteps = tuple(schedule.ddim_timesteps(steps).tolist())
    ours, expected = (step_boundaries(model, timesteps) for model in (lcm(plain), plain))
    assert bool((ours[:-1] > ours[1:]).all())
    inside = expected > float(lcm(plain).get_model_object("model_sampling").sigmas[0])
    torch.testing.assert_close(ours[inside], expected[inside], rtol=0.05, atol=0)
    with pytest.raises(IdentityEditError, match="up to timestep 1000 but the model has 1000"):
        step_boundaries(lcm(plain), (1000, 1))


def test_a_subject_trained_on_it_keeps_timesteps_of_the_training(world: World) -> None:
    inputs = good(world, "TrainSubjectEmbedding") | {"sampling_steps": 60, "updates_per_step": 1, "steps": 1}
    made, *_, report = subject_embedding.TrainSubjectEmbedding.execute(**inputs | {"model": lcm(world.model)}).args
    assert made.timesteps == tuple(range(999, 0, -20))
    assert "50 steps are used instead of 60" in report
