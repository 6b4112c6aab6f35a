"""Edit-friendly DDPM inversion against the papers' formulas in float64, diffusers' scheduler, and the real sampler."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import tiny_flow_models
import tiny_models
import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine.families.noise import DIFFUSION
from identity_edit_pack.pipelines.engine.families.schedule import ddim_timesteps
from identity_edit_pack.pipelines.inversion import edit_friendly, inversion
from identity_edit_pack.pipelines.inversion.inverted_noise import InvertedNoise
from identity_edit_pack.pipelines.shared import files
from identity_edit_pack.pipelines.shared.errors import IdentityEditError

POSITIVE, NEGATIVE, TARGET = (tiny_models.conditioning(seed) for seed in (1, 2, 3))


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours.detach().double() - expected.double()).norm() / expected.double().norm())


def alphas_cumprod() -> torch.Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def literal_inversion(
    patcher: Any, family: str, z_0: torch.Tensor, steps: int, guidance: float, eta: float, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The formulas as the reference implementation has them, in the papers' scale, everything in float64.

    Returns z_t from the noisiest to the image, and the noise map of each step.
    """
    network = copy.deepcopy(patcher.model.diffusion_model).double()
    network.dtype = torch.float64
    abar, timesteps = alphas_cumprod(), ddim_timesteps(steps).tolist()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((steps, *z_0.shape[1:]), generator=generator).double()
    z_0 = z_0.double()

    def predict_noise(z: torch.Tensor, t: int, side: list[Any]) -> torch.Tensor:
        vector = None
        if family == "sdxl":
            angles = lambda v: v * torch.exp(-math.log(10000.0) * torch.arange(128) / 128)  # noqa: E731
            height, width = 8 * z.shape[2], 8 * z.shape[3]
            sizes = [torch.cat([angles(v).cos(), angles(v).sin()]) for v in (height, width, 0, 0, height, width)]
            vector = torch.cat([side[0][1]["pooled_output"], torch.cat(sizes).unsqueeze(0)], dim=1).double()
        out = network(z, torch.tensor([float(t)]), context=side[0][0].double(), y=vector, transformer_options={})
        return abar[t] ** 0.5 * out + (1 - abar[t]) ** 0.5 * z if family == "sd2_v" else out

    x = [abar[t] ** 0.5 * z_0 + (1 - abar[t]) ** 0.5 * noise[i] for i, t in enumerate(timesteps)] + [z_0]
    z = []
    with torch.no_grad():
        for i, t in enumerate(timesteps):
            uncond, cond = predict_noise(x[i], t, NEGATIVE), predict_noise(x[i], t, POSITIVE)
            eps_hat = uncond + guidance * (cond - uncond)
            previous = t - 1000 // steps
            abar_p = abar[previous] if previous >= 0 else abar[0]
            variance = (1 - abar_p) / (1 - abar[t]) * (1 - abar[t] / abar_p)
            x0_hat = (x[i] - (1 - abar[t]) ** 0.5 * eps_hat) / abar[t] ** 0.5
            mu = abar_p**0.5 * x0_hat + (1 - abar_p - eta * variance) ** 0.5 * eps_hat
            z.append((x[i + 1] - mu) / (eta * variance**0.5))
            x[i + 1] = mu + eta * variance**0.5 * z[i]
    return x, z


@pytest.mark.parametrize(
    ("family", "steps", "eta"),
    [("sd1", 50, 1.0), ("sd1", 7, 0.6), ("sd2_v", 10, 1.0), ("sdxl", 10, 1.0)],
)
def test_latents_and_noise_maps_agree_with_the_formulas(family: str, steps: int, eta: float):
    patcher, latent = tiny_models.FAMILIES[family](), tiny_models.latent(2, width=12)
    ours = edit_friendly.edit_friendly_ddpm_inversion(
        patcher, latent, POSITIVE, NEGATIVE, steps=steps, guidance_scale=3.5, eta=eta, seed=7
    )
    assert (ours.method, ours.eta, ours.guidance_scale, ours.steps) == (inversion.EDIT_FRIENDLY_DDPM, eta, 3.5, steps)
    z_0 = engine.to_model_scale(patcher, latent)
    expected_latents, expected_maps = literal_inversion(patcher, family, z_0, steps, 3.5, eta, seed=7)
    assert ours.noise_maps is not None
    for i in range(steps + 1):
        z = ours.trajectory[i] / DIFFUSION.scale(ours.sigmas[i])
        assert relative_error(z, expected_latents[i]) < 1e-3, i
    for i in range(steps):
        assert relative_error(ours.noise_maps[i], expected_maps[i]) < 1e-3, i


@pytest.mark.parametrize(("family", "steps"), [("sd1", 30), ("sd2_v", 6), ("sdxl", 6)])
def test_the_image_comes_back(family: str, steps: int):
    patcher, latent = tiny_models.FAMILIES[family](), tiny_models.latent(2, batch=2, width=12)
    made = edit_friendly.edit_friendly_ddpm_inversion(patcher, latent, POSITIVE, NEGATIVE, steps=steps)
    assert relative_error(inversion.sample_inversion(patcher, made, POSITIVE, NEGATIVE, 3.5), latent) < 1e-4
    assert relative_error(made.end_latent(patcher), latent) < 1e-4
    for skip in (0, steps // 2, steps - 1):
        again = inversion.sample_inversion(patcher, made, POSITIVE, NEGATIVE, 3.5, skip)
        assert relative_error(again, latent) < 1e-4, skip
    assert relative_error(inversion.sample_inversion(patcher, made, TARGET, NEGATIVE, 3.5), latent) > 1e-2


def test_a_zeroed_last_noise_map_is_the_only_difference():
    patcher, latent = tiny_models.sd1(), tiny_models.latent(2)
    exact, zeroed = (
        edit_friendly.edit_friendly_ddpm_inversion(
            patcher, latent, POSITIVE, NEGATIVE, steps=10, zero_last_noise_map=zero
        )
        for zero in (False, True)
    )
    assert torch.equal(exact.noise_maps[:-1], zeroed.noise_maps[:-1]) and not zeroed.noise_maps[-1].any()
    assert torch.equal(exact.trajectory, zeroed.trajectory)
    error = relative_error(inversion.sample_inversion(patcher, zeroed, POSITIVE, NEGATIVE, 3.5), latent)
    assert 1e-3 < error < 0.5


@pytest.mark.parametrize("steps", [1, 10, 30])
def test_every_step_is_diffusers_ddpm_step(steps: int):
    """diffusers' DDIMScheduler with eta 1 and given noise, on arbitrary estimates, down to the end of the schedule."""
    from diffusers import DDIMScheduler

    patcher = tiny_models.sd1()
    made = edit_friendly.edit_friendly_ddpm_inversion(patcher, tiny_models.latent(2), POSITIVE, NEGATIVE, steps=steps)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(1)
    for i, t in enumerate(scheduler.timesteps):
        sigma, sigma_next = made.sigmas[i], made.sigmas[i + 1]
        z, eps = torch.randn(2, 1, 4, 8, 8, generator=generator)
        x = z * DIFFUSION.scale(sigma)
        ours = inversion.sampling_step(made, i, x, x - sigma * eps)
        theirs = scheduler.step(eps, t, z, eta=1.0, variance_noise=made.noise_maps[i]).prev_sample
        assert relative_error(ours / DIFFUSION.scale(sigma_next), theirs) < 2e-5, i


def test_a_deterministic_inversion_steps_with_euler():
    patcher = tiny_models.sd1()
    made = inversion.invert_image(patcher, tiny_models.latent(2), POSITIVE, steps=4)
    assert made.noise_maps is None and made.eta == 0.0
    x, denoised = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = denoised + (x - denoised) / made.sigmas[1] * made.sigmas[2]
    assert relative_error(inversion.sampling_step(made, 1, x, denoised), expected) < 1e-6


def test_noise_is_independent_between_steps_and_images():
    patcher = tiny_models.sd1()
    latent = tiny_models.latent(2, height=32, width=32).expand(2, -1, -1, -1)
    made = edit_friendly.edit_friendly_ddpm_inversion(patcher, latent, POSITIVE, steps=6, guidance_scale=1.0, seed=3)
    z_0 = engine.to_model_scale(patcher, latent)
    noise = ((made.trajectory[:-1] - z_0) / made.sigmas[:-1].view(-1, 1, 1, 1, 1)).flatten(0, 1).flatten(1)
    correlation = torch.corrcoef(noise)
    assert torch.allclose(correlation, torch.eye(12), atol=0.08)  # 5 deviations of 4096 samples


def test_the_first_image_of_a_batch_is_inverted_as_it_is_alone():
    patcher, latent = tiny_models.sd1(), tiny_models.latent(2, batch=2)
    both = edit_friendly.edit_friendly_ddpm_inversion(patcher, latent, POSITIVE, NEGATIVE, steps=5, seed=3)
    alone = edit_friendly.edit_friendly_ddpm_inversion(patcher, latent[:1], POSITIVE, NEGATIVE, steps=5, seed=3)
    assert relative_error(both.noise_maps[:, :1], alone.noise_maps) < 1e-4
    other = edit_friendly.edit_friendly_ddpm_inversion(patcher, latent[:1], POSITIVE, NEGATIVE, steps=5, seed=4)
    assert relative_error(other.noise_maps, alone.noise_maps) > 0.5


@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize(
    ("family", "guidance_scale"), [("sd1", 1.0), ("sd1", 5.0), ("sd3", 5.0), ("qwen_image", 5.0), ("flux2", 1.0)]
)
def test_the_stock_sampler_with_the_noise_maps_gives_the_same(skip: int, family: str, guidance_scale: float):
    if family == "sd1":
        patcher, latent = tiny_models.sd1(), tiny_models.latent(2, batch=2)
    else:
        patcher = tiny_flow_models.ALL[family](output_gain=0.2)
        latent = tiny_flow_models.latent_for(patcher, 2, 2)
    made = edit_friendly.edit_friendly_ddpm_inversion(patcher, latent, POSITIVE, NEGATIVE, steps=8)
    # A flow model's latent at noise level 1 does not fit into a LATENT: it starts from noise.
    noise = InvertedNoise(patcher, made, skip).generate_noise({"samples": latent})
    start = made.start_latent(patcher, skip) if family == "sd1" else latent
    seen: list[int] = []
    stock = comfy.sample.sample_custom(
        patcher, torch.zeros_like(start) if family == "sd1" else noise, guidance_scale,
        comfy.samplers.KSAMPLER(edit_friendly.edit_friendly_sampler(patcher, made)),
        made.sigmas[skip:], TARGET, NEGATIVE, start, disable_pbar=True, seed=0,
        callback=lambda step, denoised, x, total: seen.append(total),
    )  # fmt: skip
    ours = inversion.sample_inversion(patcher, made, TARGET, NEGATIVE, guidance_scale, skip)
    assert relative_error(stock, ours) < (1e-6 if family == "sd1" else 1e-5)
    assert seen == [8 - skip] * (8 - skip)


def test_split_sigmas_continue_where_they_were_cut():
    patcher = tiny_models.sd1()
    made = edit_friendly.edit_friendly_ddpm_inversion(patcher, tiny_models.latent(2), POSITIVE, NEGATIVE, steps=8)
    sampler = comfy.samplers.KSAMPLER(edit_friendly.edit_friendly_sampler(patcher, made))
    x = made.start_latent(patcher)
    for sigmas in (made.sigmas[:4], made.sigmas[3:]):
        x = comfy.sample.sample_custom(
            patcher, torch.zeros_like(x), 3.5, sampler, sigmas, POSITIVE, NEGATIVE, x, disable_pbar=True, seed=0
        )
    assert relative_error(x, tiny_models.latent(2)) < 1e-4


def test_other_sigmas_latents_and_inversions_are_refused():
    patcher = tiny_models.sd1()
    made = edit_friendly.edit_friendly_ddpm_inversion(
        patcher, tiny_models.latent(2, batch=2), POSITIVE, NEGATIVE, steps=8
    )
    sampler = comfy.samplers.KSAMPLER(edit_friendly.edit_friendly_sampler(patcher, made))

    def sample(sigmas: torch.Tensor, latent: torch.Tensor) -> None:
        comfy.sample.sample_custom(
            patcher, torch.zeros_like(latent), 1.0, sampler, sigmas, POSITIVE, NEGATIVE, latent, disable_pbar=True
        )

    with pytest.raises(IdentityEditError, match="skip noise levels"):
        sample(made.sigmas[::2], made.start_latent(patcher))
    with pytest.raises(IdentityEditError, match="the inversion does not contain"):
        sample(torch.tensor([9.0, 3.0, 0.0]), made.start_latent(patcher))
    with pytest.raises(IdentityEditError, match="2 entries for a batch of 3"):
        sample(made.sigmas, tiny_models.latent(2, batch=3))
    with pytest.raises(IdentityEditError, match="inversion's latent"):
        sample(made.sigmas, tiny_models.latent(2, batch=2, width=16))
    plain = inversion.invert_image(patcher, tiny_models.latent(2), POSITIVE, steps=4)
    with pytest.raises(IdentityEditError, match="connect one from Edit-Friendly DDPM Inversion"):
        edit_friendly.edit_friendly_sampler(patcher, plain)
    with pytest.raises(IdentityEditError, match="skip is 8 of 8"):
        inversion.sample_inversion(patcher, made, TARGET, NEGATIVE, 15.0, skip=8)


def test_skip_is_a_share_of_the_steps():
    assert [edit_friendly.skipped_steps(steps) for steps in (100, 50, 10, 1)] == [36, 18, 4, 0]
    assert edit_friendly.skipped_steps(10, 1.0) == 9
    with pytest.raises(IdentityEditError, match="skip is 36; choose a number from 0 to 1"):
        edit_friendly.skipped_steps(10, 36)


def test_bad_settings_are_refused():
    patcher, latent = tiny_models.sd1(), tiny_models.latent(2)
    for eta in (0.0, -1.0, 1.1, math.nan):
        with pytest.raises(IdentityEditError, match="Noise Inversion"):
            edit_friendly.edit_friendly_ddpm_inversion(patcher, latent, POSITIVE, NEGATIVE, steps=2, eta=eta)
    with pytest.raises(IdentityEditError, match="needs a negative"):
        edit_friendly.edit_friendly_ddpm_inversion(patcher, latent, POSITIVE, steps=2)
    with pytest.raises(IdentityEditError, match="from 1 to 999"):
        edit_friendly.edit_friendly_ddpm_inversion(patcher, latent, POSITIVE, NEGATIVE, steps=1000)


def test_save_and_load_keep_the_noise_maps(tmp_path: Path):
    patcher = tiny_models.sd1()
    made = edit_friendly.edit_friendly_ddpm_inversion(
        patcher, tiny_models.latent(2), POSITIVE, NEGATIVE, steps=4, eta=0.75
    )
    path = str(tmp_path / "image.safetensors")
    inversion.save_inversion(made, path)
    loaded = inversion.load_inversion(path)
    assert loaded.method == inversion.EDIT_FRIENDLY_DDPM and loaded.eta == 0.75
    assert torch.equal(loaded.noise_maps, made.noise_maps) and torch.equal(loaded.trajectory, made.trajectory)
    inversion.check_inversion(loaded, patcher, steps=4)
    for damaged in (made.noise_maps[1:], None):
        inversion.save_inversion(replace(made, noise_maps=damaged), path)
        with pytest.raises(IdentityEditError, match="inconsistent noise maps"):
            inversion.load_inversion(path)


def test_files_without_noise_maps_and_eta_still_load(tmp_path: Path):
    made = inversion.invert_image(tiny_models.sd1(), tiny_models.latent(2), POSITIVE, steps=3)
    path = str(tmp_path / "image.safetensors")
    inversion.save_inversion(made, path)
    tensors, description = files.read_tensors(path, "inversion")
    del description["eta"]
    files.write_tensors(path, tensors, {**description, "format": 1})
    loaded = inversion.load_inversion(path)
    assert loaded.noise_maps is None and loaded.eta == 0.0 and loaded.method == inversion.DDIM
    files.write_tensors(path, tensors, {**description, "format": 99})
    with pytest.raises(IdentityEditError, match="newer version"):
        inversion.load_inversion(path)


def test_evaluations_are_two_a_step():
    counts: list[int] = []
    patcher = tiny_models.sd1().clone()
    patcher.set_model_unet_function_wrapper(
        lambda apply, given: (
            counts.append(len(given["cond_or_uncond"])) or apply(given["input"], given["timestep"], **given["c"])
        )
    )
    made = edit_friendly.edit_friendly_ddpm_inversion(patcher, tiny_models.latent(2), POSITIVE, NEGATIVE, steps=5)
    assert sum(counts) == 10
    counts.clear()
    inversion.sample_inversion(patcher, made, TARGET, NEGATIVE, 15.0, skip=2)
    assert sum(counts) == 6
