"""Models that were trained with noise of another standard deviation (HiDream-O1, ComfyUI's Model Noise Scale node)."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_flow_models
import tiny_models
import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.flow_editing.flow_edit import flow_edit_sampler
from identity_edit_pack.pipelines.inversion import edit_friendly, inversion, rf_inversion
from identity_edit_pack.pipelines.inversion.inverted_noise import InvertedNoise
from identity_edit_pack.pipelines.lipe.attention_segmentation import record_attention
from identity_edit_pack.pipelines.mcdm.edit_mask import edit_mask
from identity_edit_pack.pipelines.timestep_aware.text_optimization import optimize_text_embedding
from tiny_models import relative_error

from .test_flow_masks import IDENTITY

SCALE = 8.0
SOURCE, TARGET, NEGATIVE = (tiny_models.conditioning(seed) for seed in (1, 2, 3))


def scaled(model: Any) -> Any:
    """The model whose images and noise are SCALE times those of `model`, and which estimates SCALE times its z_0."""
    model = model.clone()
    sampling = model.get_model_object("model_sampling")

    class Scaled(type(sampling)):  # type: ignore[misc]
        def noise_scaling(self, sigma: Any, noise: Any, *args: Any, **kwargs: Any) -> Any:
            return super().noise_scaling(sigma, SCALE * noise, *args, **kwargs)

    other = Scaled(model.model.model_config)
    other.set_parameters(shift=sampling.shift)
    model.add_object_patch("model_sampling", other)
    model.set_model_unet_function_wrapper(
        lambda apply, call: SCALE * apply(call["input"] / SCALE, call["timestep"], **call["c"])
    )
    return model


def sample(model: Any, sampler: engine.EditSampler, latent: torch.Tensor, noise: torch.Tensor, see: Any) -> None:
    sigmas = engine.require(model).schedule(6, end_at_zero=True).sigmas
    guider = engine.EditGuider(model, SOURCE, TARGET, NEGATIVE, 1.0, 3.0)
    mask = torch.zeros(1, 1, *latent.shape[-2:])
    mask[..., :4] = 1.0
    guider.sample(noise, latent, sampler, sigmas, denoise_mask=mask, callback=see, disable_pbar=True, seed=3)


def flow_edit(model: Any, latent: torch.Tensor, see: Any) -> None:
    sample(model, flow_edit_sampler(last_steps=0.3), latent, torch.zeros_like(latent), see)


def rf_inversion_and_sampler(model: Any, latent: torch.Tensor, see: Any) -> None:
    made = rf_inversion.rf_inversion(model, latent, SOURCE, steps=6, end_at_zero=True, callback=see)
    noise = InvertedNoise(model, made).generate_noise({"samples": latent})
    sample(model, rf_inversion.rf_inversion_sampler(), latent, noise, see)


def edit_friendly_inversion(model: Any, latent: torch.Tensor, see: Any) -> None:
    made = edit_friendly.edit_friendly_ddpm_inversion(model, latent, SOURCE, NEGATIVE, steps=6, callback=see)
    again = inversion.sample_inversion(model, made, SOURCE, NEGATIVE, 3.5)
    assert relative_error(again, latent) < 1e-4


def edit_masks(model: Any, latent: torch.Tensor, see: Any) -> None:
    edit_mask(model, TARGET, SOURCE, latent, callback=see)


def text_optimization(model: Any, latent: torch.Tensor, see: Any) -> None:
    optimize_text_embedding(model, latent, TARGET, steps=3, callback=see)


def segment_subject(model: Any, latent: torch.Tensor, see: Any) -> None:
    record_attention(model, latent, IDENTITY, SOURCE, timesteps=(200, 600), callback=see)


@pytest.mark.parametrize(
    "technique",
    [flow_edit, rf_inversion_and_sampler, edit_friendly_inversion, edit_masks, text_optimization, segment_subject],
)
def test_a_model_of_scaled_images_and_noise_is_the_model_scaled(technique: Any) -> None:
    plain = tiny_flow_models.chroma(output_gain=0.2)
    seen: list[list[torch.Tensor]] = []
    for model, factor in ((plain, 1.0), (scaled(plain), SCALE)):
        latent = engine.to_socket_scale(
            model, factor * engine.to_model_scale(plain, tiny_flow_models.latent_for(plain, 4))
        )
        xs: list[torch.Tensor] = []
        technique(model, latent, lambda step, denoised, x, total, xs=xs: xs.append(x.clone()))
        seen.append(xs)
    assert len(seen[0]) == len(seen[1]) > 0
    for one, other in zip(*seen, strict=True):
        assert relative_error(other, SCALE * one) < 1e-3


def test_noise_is_as_wide_as_the_model_says() -> None:
    for make in (tiny_models.sd1, tiny_models.sd2_v, tiny_flow_models.flux, tiny_flow_models.sd3):
        assert engine.require(make()).noise_scale == 1.0
    assert engine.require(scaled(tiny_flow_models.sd3())).noise_scale == SCALE
