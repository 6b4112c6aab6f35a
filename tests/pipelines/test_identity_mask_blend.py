"""NIMA against plain sampling, the inversion itself, and a literal loop of algorithm 1."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import tiny_flow_models
import tiny_models
import torch
from identity_edit_pack.attention.identity_mask import identity_mask
from identity_edit_pack.attention.masks import feathered
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine.families.noise import DIFFUSION
from identity_edit_pack.pipelines.inversion import null_text
from identity_edit_pack.pipelines.inversion.edit_friendly import edit_friendly_ddpm_inversion
from identity_edit_pack.pipelines.inversion.inversion import Inversion, invert_image, sample_inversion, sampling_step
from identity_edit_pack.pipelines.lipe import identity_mask_blend
from identity_edit_pack.pipelines.lipe.identity_mask_blend import REPLACE, UNITE, BlendSettings
from identity_edit_pack.pipelines.lipe.identity_prompt import IdentityPrompt, capture_identity
from identity_edit_pack.pipelines.shared.errors import IdentityEditError

SOURCE, TARGET, NEGATIVE, IDENTITY_WORDS = (tiny_models.conditioning(seed) for seed in (1, 2, 3, 4))
IDENTITY = IdentityPrompt(IDENTITY_WORDS[0][0], (1, 2))
STEPS = 5


def invert(model: Any, method: str = "ddim", batch: int = 1, height: int = 8, width: int = 12) -> Inversion:
    latent = tiny_models.latent(4, batch, height, width)
    if method == "ddim":
        return invert_image(model, latent, SOURCE, steps=STEPS)
    return edit_friendly_ddpm_inversion(model, latent, SOURCE, NEGATIVE, steps=STEPS, seed=3)


def blend(model: Any, inversion: Inversion, **options: Any) -> identity_mask_blend.IdentityMaskBlend:
    of_settings = {field.name: options.pop(field.name) for field in fields(BlendSettings) if field.name in options}
    settings = replace(options.pop("settings", BlendSettings()), **of_settings)
    options = {"guidance_scale": 3.0, "settings": settings, **options}
    return identity_mask_blend.identity_mask_blend(model, inversion, SOURCE, TARGET, IDENTITY, NEGATIVE, **options)


def full_masks(inversion: Inversion, value: float) -> dict[str, torch.Tensor]:
    _, _, _, height, width = inversion.trajectory.shape
    return {name: torch.full((1, 8 * height, 8 * width), value) for name in ("source_mask", "target_mask")}


@pytest.mark.parametrize("family", list(tiny_models.FAMILIES))
@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_an_empty_mask_gives_the_inverted_image(family: str, method: str) -> None:
    model = tiny_models.FAMILIES[family]()
    inversion = invert(model, method, batch=2)
    result = blend(model, inversion, **full_masks(inversion, 0.0))
    assert torch.equal(result.latent, inversion.end_latent(model))
    assert "source mask is empty" in result.warning


@pytest.mark.parametrize("family", list(tiny_models.FAMILIES))
def test_a_full_mask_gives_plain_sampling(family: str) -> None:
    model = tiny_models.FAMILIES[family]()
    inversion = invert(model, batch=2)
    result = blend(model, inversion, **full_masks(inversion, 1.0))
    expected = sample_inversion(model, inversion, TARGET, NEGATIVE, 3.0)
    assert torch.equal(result.latent, expected)
    assert result.evaluations == 2 * STEPS, "nothing had to be found"
    # Found masks do not change that: united with full ones they are full, and recording changes no bit.
    united = blend(model, inversion, **full_masks(inversion, 1.0), given_masks=UNITE)
    assert torch.equal(united.latent, expected)
    assert united.evaluations == 3 * STEPS


def test_a_full_mask_gives_plain_edit_friendly_sampling() -> None:
    model = tiny_models.sd1()
    inversion = invert(model, "ddpm")
    for skip, first in ((0.0, 0), (0.36, 2)):
        result = blend(model, inversion, **full_masks(inversion, 1.0), skip=skip)
        assert torch.equal(result.latent, sample_inversion(model, inversion, TARGET, NEGATIVE, 3.0, first))
        assert result.evaluations == 2 * (STEPS - first)


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_the_blend_is_algorithm_1(method: str) -> None:
    """Every step written out with two runs of the capture, one step longer each time."""
    model = tiny_models.sd1()
    inversion = invert(model, method, batch=2)
    settings = BlendSettings(threshold=0.45, power=2, layers="1, 2", feathering=0.7)
    result = blend(model, inversion, settings=settings, blend_until=0.8)
    height, width = inversion.trajectory.shape[-2:]
    trajectory, sigmas = inversion.trajectory, inversion.sigmas

    def run(conditioning: Any, negative: Any, body: Any) -> Any:
        recording, attention = capture_identity(model, IDENTITY, "1, 2")
        return engine.run_loop(
            recording, conditioning, negative, trajectory[0], sigmas, lambda evaluator, _: body(evaluator, attention)
        )

    def reconstruction(evaluator: Any, attention: Any) -> torch.Tensor:
        for x, sigma in zip(trajectory[:-1], sigmas[:-1], strict=True):
            evaluator.denoised(x, sigma)
        return identity_mask(attention, height, width, 0.45, 2)

    m_source = run(SOURCE, None, reconstruction)
    assert torch.equal(result.source_mask, m_source)
    assert 0 < float(m_source.mean()) < 1

    def denoise(evaluator: Any, attention: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x, masks = trajectory[0], []
        for i in range(STEPS):
            x = sampling_step(inversion, i, x, evaluator.guided(x, sigmas[i], 3.0))
            m_target = identity_mask(attention, height, width, 0.45, 2)
            if i < 4:  # 0.8 of 5 steps
                m = feathered(torch.maximum(m_source, m_target), 0.7).unsqueeze(1)
                x = m * x + (1 - m) * trajectory[i + 1]
                masks.append(m.squeeze(1))
        return x, [*masks, m_target]

    x, masks = run(TARGET, NEGATIVE, denoise)
    assert torch.equal(result.latent, engine.to_socket_scale(model, x / DIFFUSION.scale(sigmas[-1])))
    assert torch.equal(result.target_mask, masks[-1])
    assert result.evaluations == 3 * STEPS and result.warning is None


def test_outside_of_the_masks_the_image_is_kept_exactly() -> None:
    model = tiny_models.sd1()
    inversion = invert(model, batch=2)
    source_mask, target_mask = torch.zeros(2, 64, 96), torch.zeros(1, 8, 12)
    source_mask[0, :16] = 1
    target_mask[:, :, 4:6] = 1
    result = blend(model, inversion, source_mask=source_mask, target_mask=target_mask)
    union = target_mask.repeat(2, 1, 1)
    union[0, :2] = 1
    changed = (result.latent != inversion.end_latent(model)).any(dim=1)
    assert torch.equal(changed, union.bool())
    assert torch.equal(result.source_mask[0, :, 0], (torch.arange(8) < 2).float())


def test_given_masks_replace_or_join_the_found_ones() -> None:
    model = tiny_models.sd1()
    inversion = invert(model)
    found = blend(model, inversion)
    given = torch.zeros(1, 8, 12)
    given[:, :2, :3] = 1
    replaced = blend(model, inversion, source_mask=given, given_masks=REPLACE)
    assert torch.equal(replaced.source_mask, given) and replaced.source_attention is None
    assert replaced.evaluations == found.evaluations - STEPS
    assert replaced.target_attention is not None
    united = blend(model, inversion, source_mask=given, given_masks=UNITE)
    assert torch.equal(united.source_mask, torch.maximum(found.source_mask, given))
    only_target = blend(model, inversion, target_mask=given)
    assert torch.equal(only_target.target_mask, given) and only_target.target_attention is None
    assert torch.equal(only_target.source_mask, found.source_mask)


def test_null_text_embeddings_bring_their_negative_side_and_scale() -> None:
    model = tiny_models.sd1(output_gain=0.1)
    inversion = invert(model)
    found = null_text.null_text_optimization(model, inversion, SOURCE, NEGATIVE, guidance_scale=4.0, inner_steps=1)
    pivot = inversion.with_embeddings(found.embeddings)
    masks = full_masks(inversion, 1.0)
    result = identity_mask_blend.identity_mask_blend(model, pivot, SOURCE, TARGET, IDENTITY, **masks)
    expected = sample_inversion(model, pivot, TARGET, NEGATIVE, 4.0)
    # Prompts of two kinds, CONDITIONING and table rows, need not go through the network in one batch.
    assert tiny_models.relative_error(result.latent, expected) < 1e-5
    other = blend(model, pivot, guidance_scale=5.0)
    assert "optimized for 4" in other.warning


def test_the_default_guidance_scale_is_the_methods_own() -> None:
    model = tiny_models.sd1()
    for method, scale in (("ddim", 7.5), ("ddpm", 15.0)):
        inversion = invert(model, method)
        given = blend(model, inversion, guidance_scale=scale)
        assert torch.equal(blend(model, inversion, guidance_scale=None).latent, given.latent)


def test_the_default_guidance_scale_of_flow_models() -> None:
    """4, and with distilled guidance 1, which needs no negative."""
    for make, scale in ((tiny_flow_models.sd3, 4.0), (tiny_flow_models.flux, 1.0)):
        model = make(output_gain=0.2)
        pivot = edit_friendly_ddpm_inversion(model, tiny_flow_models.latent(4), SOURCE, NEGATIVE, steps=3)
        inside = torch.ones(1, 8, 8)
        default, given = (
            identity_mask_blend.identity_mask_blend(
                model, pivot, SOURCE, TARGET, None, None if scale == 1.0 else NEGATIVE, guidance_scale=each,
                source_mask=inside, target_mask=inside,
            )
            for each in (None, scale)
        )  # fmt: skip
        assert torch.equal(default.latent, given.latent)


def test_guidance_scale_1_needs_no_negative_and_half_the_evaluations() -> None:
    model = tiny_models.sd1()
    result = identity_mask_blend.identity_mask_blend(model, invert(model), SOURCE, TARGET, IDENTITY, guidance_scale=1.0)
    assert result.evaluations == 2 * STEPS
    with pytest.raises(IdentityEditError, match="needs a negative conditioning"):
        identity_mask_blend.identity_mask_blend(model, invert(model), SOURCE, TARGET, IDENTITY)


def test_progress_runs_once_through_both_passes() -> None:
    model = tiny_models.sd1()
    seen = []
    blend(model, invert(model), callback=lambda step, denoised, x, total: seen.append((step, total)))
    assert seen == [(i, 2 * STEPS) for i in range(2 * STEPS)]


def test_a_prompt_that_begins_later_blends_with_the_source_mask_until_then() -> None:
    model = tiny_models.sd1()
    late = [[TARGET[0][0], {**TARGET[0][1], "start_percent": 0.6}]]
    early = [[SOURCE[0][0], {**SOURCE[0][1], "end_percent": 0.0}]]
    result = identity_mask_blend.identity_mask_blend(
        model, invert(model), SOURCE, early + late, IDENTITY, NEGATIVE, guidance_scale=3.0
    )
    assert bool(torch.isfinite(result.latent).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_mask": torch.zeros(3, 64, 96)}, "The target mask holds 3 masks for 1 image"),
        ({"target_mask": torch.full((1, 64, 96), float("nan"))}, "The target mask contains NaN"),
        ({"source_mask": torch.zeros(1, 3, 64, 96)}, "The source mask must be a mask"),
        ({"given_masks": "both"}, "given_masks is 'both'"),
        ({"skip": 1.5}, "skip is 1.5"),
        ({"blend_until": 1.5}, "blend_until is 1.5"),
        ({"threshold": 2.0}, "threshold is 2"),
        ({"power": -2}, "self_attention_power is -2"),
        ({"layers": "8"}, "layers is '8'"),
    ],
)
def test_what_cannot_be_used_is_named(options: dict[str, Any], message: str) -> None:
    model = tiny_models.sd1()
    with pytest.raises(IdentityEditError, match=message):
        blend(model, invert(model), **options)


def test_a_mask_of_an_image_that_the_vae_crops_is_taken() -> None:
    model = tiny_models.sd1()
    result = blend(model, invert(model), source_mask=torch.ones(1, 71, 96), target_mask=torch.ones(64, 103))
    assert torch.equal(result.source_mask, torch.ones(1, 8, 12))


def test_the_inversion_and_the_text_encoder_must_be_the_models() -> None:
    model = tiny_models.sd1()
    inversion = invert(model)
    with pytest.raises(IdentityEditError, match="another model"):
        blend(tiny_models.sd1(seed=1), inversion)
    wide = replace(IDENTITY, embedding=torch.zeros(1, 8, 64))
    with pytest.raises(IdentityEditError, match="CLIP of the same checkpoint"):
        identity_mask_blend.identity_mask_blend(model, inversion, SOURCE, TARGET, wide, NEGATIVE)
