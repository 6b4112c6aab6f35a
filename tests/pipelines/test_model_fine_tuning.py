"""Imagic's model fine-tuning against a plain loop with diffusers' network."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_models
import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.timestep_aware.model_fine_tuning import FineTuningSettings, fine_tune_model
from identity_edit_pack.pipelines.training.loop import generator_of
from identity_edit_pack.pipelines.training.weights import LOW_RANK

SETTINGS = FineTuningSettings(steps=3, learning_rate=1e-4, precision="float32", seed=4)
LATENT, E_OPT = tiny_models.latent(3), tiny_models.conditioning(2)


def test_the_same_weights_as_a_plain_loop():
    model = tiny_models.sd1(output_gain=0.1)
    with torch.inference_mode():  # as in ComfyUI
        patched, run = fine_tune_model(model, LATENT, E_OPT, SETTINGS)
    unet = tiny_models.diffusers_twin(tiny_models.sd1(output_gain=0.1))
    before = {key: weight.detach().clone() for key, weight in unet.named_parameters()}
    optimizer = torch.optim.Adam(unet.parameters(), lr=SETTINGS.learning_rate)
    alphas = 1.0 / (1.0 + model.model.model_sampling.sigmas**2)
    z_0, losses = engine.to_model_scale(model, LATENT), []
    for step in range(SETTINGS.steps):
        generator = generator_of(SETTINGS.seed, step, "image")
        t = torch.randint(1000, (1,), generator=generator)
        eps = torch.randn(z_0.shape, generator=generator)
        z_t = alphas[t].sqrt() * z_0 + (1 - alphas[t]).sqrt() * eps
        loss = (unet(z_t, t, encoder_hidden_states=E_OPT[0][0]).sample - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert run.losses == pytest.approx(losses, rel=1e-4)
    changes = {key: value[0][1][1][0] for key, value in patched.patches.items()}
    for key, name in (
        ("diffusion_model.out.2.weight", "conv_out.weight"),
        ("diffusion_model.time_embed.0.weight", "time_embedding.linear_1.weight"),
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
         "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
    ):  # fmt: skip
        expected = dict(unet.named_parameters())[name].detach() - before[name]
        # Adam's first steps are of the size of the learning rate, with the sign of the gradient.
        assert tiny_models.relative_error(changes[key].float(), expected) < 0.02, key
    assert len(changes) == len(before) and not model.patches


@pytest.mark.parametrize("family", ["sd2_v", "sdxl"])
def test_the_image_is_learned(family: str):
    model = tiny_models.FAMILIES[family](output_gain=0.1)
    settings = dataclasses.replace(SETTINGS, steps=40, learning_rate=1e-3, checkpointing=True)
    _, run = fine_tune_model(model, LATENT, E_OPT, settings)
    assert sum(run.losses[-10:]) < 0.9 * sum(run.losses[:10])


def test_low_rank_changes_attention_alone():
    patched, _ = fine_tune_model(
        tiny_models.sd1(), LATENT, E_OPT, dataclasses.replace(SETTINGS, weights=LOW_RANK, rank=2, learning_rate=1e-2)
    )
    assert patched.patches and all(".attn" in key for key in patched.patches)


def test_several_images_are_refused():
    with pytest.raises(IdentityEditError, match="fine-tuned to one"):
        fine_tune_model(tiny_models.sd1(), tiny_models.latent(3, batch=2), E_OPT, SETTINGS)
