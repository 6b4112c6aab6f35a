"""Edit masks against the papers' steps written out with diffusers' UniPC, and the settings around them."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_flow_models
import tiny_models
import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.mcdm import edit_mask as edit_masks
from identity_edit_pack.pipelines.mcdm.edit_mask import EditMaskSettings, edit_mask
from identity_edit_pack.pipelines.shared.errors import IdentityEditError

from .test_inversion_methods import velocity_of


def unipc_masks(
    model: Any, target: Any, source: Any, latent: torch.Tensor, settings: EditMaskSettings, seed: int
) -> torch.Tensor:
    """Chen et al. 2024, supplement 1.3, in the papers' scale: noise the image to step 10 of 20, one UniPC step with
    each prompt, N(|z_{t-1} - z'_{t-1}|) > lambda over ten seeds."""
    from diffusers import UniPCMultistepScheduler
    from torchvision.transforms.functional import gaussian_blur

    twin = tiny_models.diffusers_twin(model)
    z_0 = engine.to_model_scale(model, latent)
    total = torch.zeros(latent.shape[0], *latent.shape[2:])
    for i in range(settings.seeds):
        results = []
        noise = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(seed + i))
        for conditioning in (target, source):
            scheduler = UniPCMultistepScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
            )
            scheduler.set_timesteps(settings.steps)
            t = scheduler.timesteps[settings.steps - settings.noise_steps]
            z_t = scheduler.add_noise(z_0, noise, t.reshape(1))
            scheduler.set_begin_index(settings.steps - settings.noise_steps)
            context = conditioning[0][0].expand(z_0.shape[0], -1, -1)
            with torch.no_grad():
                predicted = twin(z_t, t, encoder_hidden_states=context).sample
            results.append(scheduler.step(predicted, t, z_t).prev_sample)
        total += (results[0] - results[1]).abs().mean(dim=1)
    masks = []
    for difference in total / settings.seeds:
        if settings.outliers:
            difference = difference.clamp(max=settings.outliers * float(difference.mean()))
        scaled = (difference - difference.min()) / (difference.max() - difference.min())
        masks.append((gaussian_blur(scaled[None], settings.kernel)[0] > settings.threshold).float())
    return torch.stack(masks)


@pytest.mark.parametrize(
    "settings", [EditMaskSettings(seeds=2), EditMaskSettings(seeds=2, threshold=0.5, outliers=1.5, noise_steps=8)]
)
def test_masks_are_those_of_the_papers_steps(settings: EditMaskSettings):
    model = tiny_models.sd1()
    target, source = tiny_models.conditioning(1), tiny_models.conditioning(2)
    latent = tiny_models.latent(3, batch=2, height=32, width=40)
    found = edit_mask(model, target, source, latent, settings, seed=5)
    expected = unipc_masks(model, target, source, latent, settings, seed=5)
    assert float((found.mask == expected).float().mean()) >= 0.999
    assert 0.02 < float(found.mask.mean()) < 0.98
    assert found.evaluations == 2 * settings.seeds and found.warning is None


@pytest.mark.parametrize("family", tiny_flow_models.ALL)
def test_masks_of_a_flow_model_are_differences_of_velocities(family: str):
    """At noise level one half, whatever the model's shift, averaged over three noise samples; the velocities differ as
    the estimates."""
    model = tiny_flow_models.ALL[family]()
    latent = tiny_flow_models.latent_for(model, 3, 2)
    target, source = tiny_models.conditioning(1), tiny_models.conditioning(2)
    found = edit_mask(model, target, source, latent, EditMaskSettings(seeds=3, kernel=1), seed=5)
    sigma = torch.tensor(0.5, dtype=torch.float64)
    z_0 = engine.to_model_scale(model, latent).double()
    total = torch.zeros(2, *latent.shape[-2:], dtype=torch.float64)
    for i in range(3):
        noise = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(5 + i)).double()
        x = (1 - sigma) * z_0 + sigma * noise
        with_target, with_source = (velocity_of(model, prompt)(x, sigma) for prompt in (target, source))
        total += (with_target - with_source).abs().mean(dim=1).reshape(total.shape)
    low, high = (total.amin(dim=(1, 2), keepdim=True), total.amax(dim=(1, 2), keepdim=True))
    torch.testing.assert_close(found.contrast.double(), (total - low) / (high - low), atol=1e-3, rtol=0)


def test_a_mask_is_the_same_again_and_another_for_another_seed():
    model = tiny_models.sd1()
    arguments = (model, tiny_models.conditioning(1), tiny_models.conditioning(2), tiny_models.latent(3, 1, 16, 16))
    few = EditMaskSettings(seeds=2)
    first, again = (edit_mask(*arguments, few, seed=1).contrast for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, edit_mask(*arguments, few, seed=2).contrast)
    assert float(first.min()) >= 0.0 and float(first.max()) <= 1.0


def test_prompts_that_say_the_same_give_an_empty_mask_and_a_warning():
    model, same = tiny_models.sd1(), tiny_models.conditioning(1)
    found = edit_mask(model, same, same, tiny_models.latent(3), EditMaskSettings(seeds=1))
    assert float(found.mask.sum()) == 0.0 and "is empty or covers" in str(found.warning)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_steps": 21}, "noise_steps is 21; choose a number from 1 to 20"),
        ({"seeds": 0}, "seeds is 0"),
        ({"kernel": 4}, "choose an odd size such as 5"),
        ({"threshold": 1.5}, "threshold 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(IdentityEditError, match=message):
        EditMaskSettings(**changes)


def test_a_latent_smaller_than_the_kernel_is_refused():
    latent = tiny_models.latent(3, 1, 2, 2)
    with pytest.raises(IdentityEditError, match="smaller than kernel"):
        edit_masks.edit_mask(tiny_models.sd1(), tiny_models.conditioning(1), tiny_models.conditioning(2), latent)


def test_the_cells_of_a_mask_are_those_that_diffusers_chooses():
    """StableDiffusionDiffEditPipeline.generate_mask on the same weights, noise and noise level.

    It cuts the difference at three times its mean and takes what is above half of that, without normalizing to the
    smallest difference first; so the order of the cells must be the same, and the mask for the threshold that its
    choice amounts to.
    """
    from diffusers import DDIMInverseScheduler, StableDiffusionDiffEditPipeline
    from identity_edit_pack.evaluation import diffusers_models

    model = tiny_models.sd1()
    target, source = tiny_models.conditioning(1), tiny_models.conditioning(2)
    latent = tiny_models.latent(3, height=32, width=32)
    settings = EditMaskSettings(steps=1000, noise_steps=500, seeds=2, outliers=3.0, kernel=1, threshold=0.5)
    found = edit_mask(model, target, source, latent, settings, seed=5)

    scheduler = diffusers_models.scheduler()
    pipe = StableDiffusionDiffEditPipeline(
        vae=diffusers_models.autoencoder(None, model, 256), text_encoder=None, tokenizer=None,
        unet=diffusers_models.unet(model), scheduler=scheduler,
        inverse_scheduler=DDIMInverseScheduler.from_config(scheduler.config), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    empty = torch.zeros_like(target[0][0])
    theirs = pipe.generate_mask(
        image=engine.to_model_scale(model, latent), target_prompt_embeds=target[0][0],
        target_negative_prompt_embeds=empty, source_prompt_embeds=source[0][0], source_negative_prompt_embeds=empty,
        num_maps_per_mask=settings.seeds, mask_encode_strength=0.5, mask_thresholding_ratio=3.0,
        num_inference_steps=1000, guidance_scale=7.5, output_type="np",
        generator=[torch.Generator().manual_seed(5 + i) for i in range(settings.seeds)],
    )  # fmt: skip
    chosen = torch.from_numpy(theirs) > 0
    assert 0.01 < float(chosen.float().mean()) < 0.99
    inside, outside = found.contrast[chosen], found.contrast[~chosen]
    assert float(inside.min()) > float(outside.max()) - 1e-5
