"""DDIM inversion and sampling against a reference loop on diffusers' UNet with the same weights."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import reference_null_text
import tiny_models
import torch
from comfy_extras import nodes_sag
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine.families.noise import DIFFUSION
from identity_edit_pack.pipelines.engine.families.schedule import ddim_timesteps
from identity_edit_pack.pipelines.inversion import inversion
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.text.step_embeddings import constant_embedding

SD_SCALE = 0.18215


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


def diffusers_loop_scale(steps: int) -> reference_null_text.DdimScale:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return reference_null_text.DdimScale(torch.cumprod(1 - betas, 0).float(), ddim_timesteps(steps).tolist())


def diffusers_loop(patcher, steps: int):
    """(predict_noise, scale) of the twin, on alpha_bars computed in float64."""
    twin = tiny_models.diffusers_twin(patcher)
    predict_noise = lambda z, t, embedding: twin(z, t, embedding.expand(z.shape[0], -1, -1)).sample  # noqa: E731
    return predict_noise, diffusers_loop_scale(steps)


def test_the_twin_predicts_the_same_noise():
    patcher = tiny_models.sd1()
    x, embedding = tiny_models.latent(1, batch=2, width=12), tiny_models.conditioning(1, batch=2)[0][0]
    timesteps = torch.tensor([5, 700])
    with torch.no_grad():
        ours = patcher.model.diffusion_model(x, timesteps.float(), context=embedding, transformer_options={})
        theirs = tiny_models.diffusers_twin(patcher)(x, timesteps, embedding).sample
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("steps", [10, 30, 50])
def test_inversion_agrees_with_the_reference(steps: int):
    patcher = tiny_models.sd1()
    positive, latent = tiny_models.conditioning(1), tiny_models.latent(2, height=8, width=12)
    ours = inversion.invert_image(patcher, latent, positive, steps=steps)
    predict_noise, scale = diffusers_loop(patcher, steps)
    expected = reference_null_text.invert(predict_noise, scale, latent * SD_SCALE, positive[0][0])
    for i in range(steps + 1):
        z = ours.trajectory[steps - i] / DIFFUSION.scale(ours.sigmas[steps - i])
        assert relative_error(z, expected[i]) < 1e-4, i


def test_sampling_agrees_with_diffusers_ddim():
    from diffusers import DDIMScheduler

    patcher, steps = tiny_models.sd1(), 20
    positive, negative = tiny_models.conditioning(1), tiny_models.conditioning(2)
    pivot = inversion.invert_image(patcher, tiny_models.latent(2), positive, steps=steps)
    ours = inversion.sample_inversion(patcher, pivot, positive, negative, guidance_scale=3.0)

    twin = tiny_models.diffusers_twin(patcher)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    z = pivot.trajectory[0] / DIFFUSION.scale(pivot.sigmas[0])
    with torch.no_grad():
        for t in scheduler.timesteps:
            cond, uncond = (twin(z, t, side[0][0]).sample for side in (positive, negative))
            z = scheduler.step(uncond + 3.0 * (cond - uncond), t, z).prev_sample
    assert relative_error(ours * SD_SCALE, z) < 1e-4


def test_guided_inversion_agrees_with_the_reference():
    patcher, steps, scale_of_guidance = tiny_models.sd1(), 10, 2.5
    positive, negative = tiny_models.conditioning(1), tiny_models.conditioning(2)
    ours = inversion.invert_image(patcher, tiny_models.latent(2), positive, negative, steps, scale_of_guidance)
    predict_noise, scale = diffusers_loop(patcher, steps)

    def guided(z: torch.Tensor, t: int, _: torch.Tensor) -> torch.Tensor:
        cond, uncond = (predict_noise(z, t, side[0][0]) for side in (positive, negative))
        return uncond + scale_of_guidance * (cond - uncond)

    expected = reference_null_text.invert(guided, scale, tiny_models.latent(2) * SD_SCALE, positive[0][0])
    assert relative_error(ours.trajectory[0] / DIFFUSION.scale(ours.sigmas[0]), expected[-1]) < 1e-4


def network_loop(patcher, family: str, positive, steps: int):
    """(predict_noise, scale) that call the UNet directly, with v and SDXL's vector conditioning written out."""
    scale = diffusers_loop_scale(steps)

    def sinusoid(value: float) -> torch.Tensor:
        angles = value * torch.exp(-math.log(10000.0) * torch.arange(128) / 128)
        return torch.cat([angles.cos(), angles.sin()])

    def predict_noise(z: torch.Tensor, t: int, embedding: torch.Tensor) -> torch.Tensor:
        height, width = 8 * z.shape[2], 8 * z.shape[3]
        vector = None
        if family == "sdxl":
            sizes = torch.cat([sinusoid(value) for value in (height, width, 0, 0, height, width)])
            vector = torch.cat([positive[0][1]["pooled_output"], sizes.expand(z.shape[0], -1)], dim=1)
        timesteps = torch.full((z.shape[0],), float(t))
        out = patcher.model.diffusion_model(z, timesteps, context=embedding, y=vector, transformer_options={})
        if family == "sd2_v":
            alpha_bar = scale.alpha_bar(t)
            return alpha_bar**0.5 * out + (1 - alpha_bar) ** 0.5 * z
        return out

    return predict_noise, scale


@pytest.mark.parametrize("family", ["sd1", "sd2_v", "sdxl"])
def test_every_family_agrees_with_the_papers_formulas(family: str):
    patcher, steps = tiny_models.FAMILIES[family](), 10
    positive, latent = tiny_models.conditioning(1, batch=2), tiny_models.latent(2, batch=2, width=12)
    ours = inversion.invert_image(patcher, latent, positive, steps=steps)
    predict_noise, scale = network_loop(patcher, family, positive, steps)
    z_0 = engine.to_model_scale(patcher, latent)
    expected = reference_null_text.invert(predict_noise, scale, z_0, positive[0][0])
    for i in range(steps + 1):
        assert relative_error(ours.trajectory[i] / DIFFUSION.scale(ours.sigmas[i]), expected[steps - i]) < 1e-4, i


def test_zero_terminal_snr_starts_from_the_last_timestep():
    patcher = tiny_models.sd2_v(zero_snr=True)
    sigmas = engine.require(patcher).sampling.sigmas
    assert float(sigmas[-1]) > 4000
    timesteps = torch.tensor([999, 600, 200, 1])
    start = engine.to_model_scale(patcher, sigmas[-1] * tiny_models.latent(2))
    run = inversion.Inversion(
        trajectory=start.expand(5, *start.shape), sigmas=torch.cat([sigmas[timesteps], torch.zeros(1)]),
        method=inversion.DDIM, guidance_scale=1.0, model=engine.model_tag(patcher),
    )  # fmt: skip
    z_0 = inversion.sample_inversion(patcher, run, tiny_models.conditioning(1))
    assert bool(torch.isfinite(z_0).all()) and float(z_0.std()) < 100


def test_a_batch_is_its_latents_one_by_one():
    patcher = tiny_models.sd1()
    positive, latent = tiny_models.conditioning(1, batch=2), tiny_models.latent(2, batch=2)
    both = inversion.invert_image(patcher, latent, positive, steps=10)
    for b in range(2):
        own = [[positive[0][0][b : b + 1], {}]]
        alone = inversion.invert_image(patcher, latent[b : b + 1], own, steps=10)
        assert relative_error(both.trajectory[:, b : b + 1], alone.trajectory) < 1e-5


def test_the_stock_sampler_follows_the_same_path():
    patcher = tiny_models.sd1()
    positive, negative = tiny_models.conditioning(1), tiny_models.conditioning(2)
    pivot = inversion.invert_image(patcher, tiny_models.latent(2), positive, steps=12, end_at_zero=True)
    start = pivot.start_latent(patcher)
    stock = comfy.sample.sample_custom(
        patcher, torch.zeros_like(start), 4.0, comfy.samplers.sampler_object("euler"), pivot.sigmas, positive, negative,
        start, disable_pbar=True, seed=0,
    )  # fmt: skip
    ours = inversion.sample_inversion(patcher, pivot, positive, negative, 4.0)
    assert relative_error(ours, stock) < 1e-5


def test_a_patch_that_wants_both_sides_gets_them_without_a_negative_prompt():
    """Stock Self-Attention Guidance blurs by the attention of the negative side, at guidance scale 1 too."""
    patcher = nodes_sag.SelfAttentionGuidance.execute(tiny_models.sd1(), 2.0, 1.0).result[0]
    positive = tiny_models.conditioning(1)
    pivot = inversion.invert_image(tiny_models.sd1(), tiny_models.latent(2), positive, steps=4, end_at_zero=True)
    start = pivot.start_latent(patcher)
    ours = inversion.sample_inversion(patcher, pivot, positive)
    stock = comfy.sample.sample_custom(
        patcher, torch.zeros_like(start), 1.0, comfy.samplers.sampler_object("euler"), pivot.sigmas, positive, positive,
        start, disable_pbar=True, seed=0,
    )  # fmt: skip
    assert relative_error(ours, stock) < 1e-5
    assert relative_error(ours, inversion.sample_inversion(tiny_models.sd1(), pivot, positive)) > 1e-3


def test_evaluations_progress_and_preview_are_reported():
    seen: list[tuple[int, int]] = []
    counts: list[int] = []
    patcher = tiny_models.sd1().clone()
    patcher.set_model_unet_function_wrapper(
        lambda apply, given: (
            counts.append(len(given["cond_or_uncond"])) or apply(given["input"], given["timestep"], **given["c"])
        )
    )
    inversion.invert_image(
        patcher, tiny_models.latent(2), tiny_models.conditioning(1), steps=7,
        callback=lambda step, denoised, x, total: seen.append((step, total)),
    )  # fmt: skip
    assert seen == [(i, 7) for i in range(7)]
    assert sum(counts) == 7  # guidance scale 1 does not evaluate a negative side


def test_an_interrupt_stops_at_the_next_evaluation():
    calls: list[int] = []

    def cancel_at_third(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
        calls.append(step)
        if step == 2:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        inversion.invert_image(
            tiny_models.sd1(), tiny_models.latent(2), tiny_models.conditioning(1), steps=9, callback=cancel_at_third
        )
    assert calls == [0, 1, 2]


def test_it_works_in_the_inference_mode_of_a_prompt():
    with torch.inference_mode():
        patcher = tiny_models.sd1()
        prompt = inversion.invert_image(patcher, tiny_models.latent(2), tiny_models.conditioning(1), steps=5)
    plain = inversion.invert_image(tiny_models.sd1(), tiny_models.latent(2), tiny_models.conditioning(1), steps=5)
    assert torch.equal(prompt.trajectory, plain.trajectory)


def test_save_and_load_give_the_same_inversion(tmp_path: Path):
    patcher = tiny_models.sdxl()
    positive = tiny_models.conditioning(1, batch=2)
    made = inversion.invert_image(patcher, tiny_models.latent(2, batch=2), positive, steps=4)
    table = constant_embedding(made.sigmas, positive[0][0], positive[0][1]["pooled_output"])
    made = made.with_embeddings(replace(table, guidance_scale=6.5))
    path = tmp_path / "new folder" / "image.safetensors"
    inversion.save_inversion(made, str(path))
    loaded = inversion.load_inversion(str(path))
    for name in ("trajectory", "sigmas"):
        assert torch.equal(getattr(loaded, name), getattr(made, name))
    assert loaded.embeddings is not None and made.embeddings is not None
    assert torch.equal(loaded.embeddings.embeddings, made.embeddings.embeddings)
    assert torch.equal(loaded.embeddings.pooled, made.embeddings.pooled)
    assert loaded.embeddings.guidance_scale == 6.5
    assert (loaded.method, loaded.guidance_scale) == ("ddim", 1.0)
    inversion.check_inversion(loaded, patcher, steps=4, latent_shape=(2, 4, 8, 8))
    assert [file.name for file in path.parent.iterdir()] == ["image.safetensors"]


@pytest.fixture(scope="module")
def made():
    return inversion.invert_image(tiny_models.sd1(), tiny_models.latent(2), tiny_models.conditioning(1), steps=3)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: tiny_models.sd1(seed=1), "weights"),
        (lambda: tiny_models.sd2_v(), "prediction"),
        (lambda: tiny_models.sdxl(), "architecture"),
    ],
)
def test_another_model_is_refused(made: inversion.Inversion, other, words: str):
    with pytest.raises(IdentityEditError, match=words):
        inversion.check_inversion(made, other())


def test_other_precision_and_patches_are_the_same_model(made: inversion.Inversion):
    for dtype in (torch.float16, torch.bfloat16):
        inversion.check_inversion(made, tiny_models.sd1(dtype=dtype))
    patched = tiny_models.sd1().clone()
    key = "diffusion_model.out.2.weight"
    patched.add_patches({key: ("diff", (torch.ones_like(patched.model.state_dict()[key]),))})
    comfy.model_management.load_models_gpu([patched])
    inversion.check_inversion(made, patched)


def test_other_step_counts_and_sizes_are_refused(made: inversion.Inversion):
    with pytest.raises(IdentityEditError, match="set steps to 3"):
        inversion.check_inversion(made, tiny_models.sd1(), steps=4)
    with pytest.raises(IdentityEditError, match="size and batch"):
        inversion.check_inversion(made, tiny_models.sd1(), latent_shape=(1, 4, 8, 16))


def test_damaged_and_foreign_files_are_refused(made: inversion.Inversion, tmp_path: Path):
    from safetensors.torch import save_file

    path = tmp_path / "file.safetensors"
    with pytest.raises(IdentityEditError, match="does not exist"):
        inversion.load_inversion(str(path))
    inversion.save_inversion(made, str(path))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(IdentityEditError, match="cannot be read"):
        inversion.load_inversion(str(path))
    save_file({"lora": torch.zeros(2)}, str(path))
    with pytest.raises(IdentityEditError, match="contains no inversion"):
        inversion.load_inversion(str(path))
    inversion.save_inversion(replace(made, trajectory=made.trajectory[:-1]), str(path))
    with pytest.raises(IdentityEditError, match="damaged"):
        inversion.load_inversion(str(path))


def test_a_failed_write_leaves_the_old_file(made: inversion.Inversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"old")

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", disk_full)
    with pytest.raises(IdentityEditError, match="No space left"):
        inversion.save_inversion(made, str(path))
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_an_unwritable_folder_is_refused(made: inversion.Inversion, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(IdentityEditError, match="cannot be written"):
        inversion.save_inversion(made, str(tmp_path / "file" / "inside.safetensors"))


@pytest.mark.parametrize(
    ("latent", "words"),
    [
        (torch.full((1, 4, 8, 8), torch.nan), "NaN"),
        (torch.zeros(1, 16, 8, 8), "16 channels"),
        (torch.zeros(0, 4, 8, 8), "empty"),
        (torch.zeros(65, 4, 8, 8), "split the batch"),
        (torch.zeros(1, 4, 2, 8, 8), "batch of image latents"),
    ],
)
def test_bad_latents_are_refused(latent: torch.Tensor, words: str):
    with pytest.raises(IdentityEditError, match=words):
        inversion.invert_image(tiny_models.sd1(), latent, tiny_models.conditioning(1), steps=2)


def test_bad_conditionings_and_models_are_refused():
    patcher, latent = tiny_models.sd1(), tiny_models.latent(2)
    with pytest.raises(IdentityEditError, match="positive conditioning is empty"):
        inversion.invert_image(patcher, latent, [], steps=2)
    with pytest.raises(IdentityEditError, match="needs a negative"):
        inversion.invert_image(patcher, latent, tiny_models.conditioning(1), steps=2, guidance_scale=3.0)
    flow = patcher.clone()

    class FlowSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    flow.add_object_patch("model_sampling", FlowSampling())
    with pytest.raises(IdentityEditError, match="BaseModel is not a noise-predicting"):
        engine.require(flow, engine.Capability.DISCRETE_TIMESTEPS)


def test_nothing_keeps_the_model_after_a_run():
    """Without the garbage collector's help, no clone of the model outlives the run (ComfyUI reports one as a leak)."""
    model = tiny_models.sd1()

    def clones() -> int:
        return sum(isinstance(thing, type(model)) for thing in gc.get_objects())

    gc.collect()
    before = clones()
    gc.disable()
    try:
        inversion.invert_image(model, tiny_models.latent(3), tiny_models.conditioning(4), steps=2)
        assert clones() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("area", [(2, 2, 0, 12), (2, 2, 8, 0), ("percentage", 0.5, 0.5, 0.0, 1.0)])
def test_an_area_outside_of_the_image_is_refused(area: tuple):
    """ComfyUI's own message for it is that of a failed slice."""
    latent, conditioning = tiny_models.latent(2, height=8, width=12), tiny_models.conditioning(1)
    outside = [[conditioning[0][0], {**conditioning[0][1], "area": area, "strength": 1.0}]]
    with pytest.raises(IdentityEditError, match="The positive conditioning has an area that starts outside"):
        inversion.invert_image(tiny_models.sd1(), latent, outside, steps=2)
    inside = [[conditioning[0][0], {**conditioning[0][1], "area": (4, 20, 4, 8), "strength": 1.0}]]
    inversion.invert_image(tiny_models.sd1(), latent, conditioning + inside, steps=2)
