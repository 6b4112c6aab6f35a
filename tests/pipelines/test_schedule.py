"""The schedule against diffusers' DDIMScheduler and against formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine.families import schedule
from identity_edit_pack.pipelines.engine.families.noise import DIFFUSION
from identity_edit_pack.pipelines.shared.errors import IdentityEditError


def _diffusers_scheduler(steps: int):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps)
    return scheduler


def test_timesteps_are_those_of_diffusers_for_every_step_count():
    for steps in range(1, 1000):
        ours = schedule.ddim_timesteps(steps)
        assert ours.tolist() == _diffusers_scheduler(steps).timesteps.tolist(), steps


def test_the_well_known_fifty_steps():
    assert schedule.ddim_timesteps(50).tolist() == list(range(981, 0, -20))


def test_a_thousand_steps_use_every_timestep_once_and_end_at_zero():
    sampling = engine.require(tiny_models.sd1()).sampling
    full = schedule.ddim_schedule(sampling, 1000)
    assert full.timesteps.tolist() == list(range(999, -1, -1))
    assert full.sigmas[-1] == 0 and bool((full.sigmas[:-1] > full.sigmas[1:]).all())


@pytest.mark.parametrize("steps", [1, 7, 30, 50, 999])
@pytest.mark.parametrize("end_at_zero", [False, True])
def test_sigmas_follow_from_the_betas(steps: int, end_at_zero: bool):
    sampling = engine.require(tiny_models.sd1()).sampling
    ours = schedule.ddim_schedule(sampling, steps, end_at_zero)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = np.cumprod(1 - betas)
    sigmas = np.sqrt((1 - alpha_bar) / alpha_bar)
    end = 0.0 if end_at_zero else sigmas[0]
    expected = np.append(sigmas[ours.timesteps.numpy()], end)
    np.testing.assert_allclose(ours.sigmas.numpy(), expected, rtol=3e-5)
    assert ours.steps == steps


def test_the_model_finds_the_timesteps_of_the_sigmas():
    for family in tiny_models.FAMILIES.values():
        sampling = engine.require(family()).sampling
        ours = schedule.ddim_schedule(sampling, 37)
        assert sampling.timestep(ours.sigmas[:-1]).tolist() == ours.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_step_counts_out_of_range_are_refused(steps: int):
    with pytest.raises(IdentityEditError, match="1 to 1000"):
        schedule.ddim_timesteps(steps)


def test_euler_in_sigma_is_the_ddim_step_of_diffusers():
    steps = 13
    scheduler = _diffusers_scheduler(steps)
    sampling = engine.require(tiny_models.sd1()).sampling
    ours = schedule.ddim_schedule(sampling, steps)
    generator = torch.Generator().manual_seed(0)
    for i, timestep in enumerate(scheduler.timesteps):
        z, noise = torch.randn(2, 2, 4, 5, 6, generator=generator)
        expected = scheduler.step(noise, timestep, z).prev_sample
        sigma, sigma_next = ours.sigmas[i], ours.sigmas[i + 1]
        x = z * DIFFUSION.scale(sigma)
        stepped = DIFFUSION.step(x, x - sigma * noise, sigma, sigma_next) / DIFFUSION.scale(sigma_next)
        torch.testing.assert_close(stepped, expected, rtol=1e-4, atol=2e-5)
