"""Reference-Guided Null-Text Optimizer on a tiny model: KSampler's noise, a true report, bad inputs refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from identity_edit_pack.nodes.hifi_tuner.reference_guidance import ReferenceGuidedNullTextOptimizer
from identity_edit_pack.pipelines.hifi_tuner.reference_guidance import first_pass_latent, reference_guided_sampling
from identity_edit_pack.pipelines.inversion import inversion
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests import tiny_flow_models, tiny_models

import nodes as stock_nodes

POSITIVE, NEGATIVE = tiny_models.conditioning(1), tiny_models.conditioning(2)
MASK = torch.zeros(1, 64, 64)
MASK[:, 16:48, 8:40] = 1.0
SEED = 123


def arguments(model: Any, batch: int = 1, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "model": model,
        "positive": POSITIVE,
        "negative": NEGATIVE,
        "latent": {"samples": torch.zeros(batch, 4, 8, 8)},
        "mask": MASK,
        "seed": SEED,
        "guidance_scale": 5.0,
        "start_percent": 0.2,
        "end_percent": 0.8,
        "inner_steps": 2,
        "learning_rate": 0.01,
        "early_stop": 0.0,
        "steps": 0,
        "checkpointing": False,
        **changes,
    }
    if "inversion" not in given:
        given["inversion"] = inversion.invert_image(model, tiny_models.latent(4), POSITIVE, steps=5, end_at_zero=True)
    return given


def test_without_guidance_it_is_ksampler() -> None:
    """The stock node, with the same seed and the scheduler of DDIM, for every latent of a batch and for one of it."""
    model = tiny_models.sd1(output_gain=0.05)
    given = arguments(model, batch=3, start_percent=1.0)
    (stock,) = stock_nodes.KSampler().sample(
        model, SEED, 5, 5.0, "ddim", "ddim_uniform", POSITIVE, NEGATIVE, given["latent"]
    )
    latent, report = ReferenceGuidedNullTextOptimizer.execute(**given).args
    assert float((latent["samples"] - stock["samples"]).norm() / stock["samples"].norm()) < 1e-5
    assert "0 of 5 steps guided" in report and "Warning: No step is guided" in report

    (picked,) = stock_nodes.LatentFromBatch().frombatch(given["latent"], 1, 1)
    one, _ = ReferenceGuidedNullTextOptimizer.execute(**{**given, "latent": picked}).args
    assert float((one["samples"] - stock["samples"][1:2]).norm() / stock["samples"][1:2].norm()) < 1e-5
    assert one["batch_index"] == [1]


def test_it_guides_and_reports() -> None:
    model = tiny_models.sd1(output_gain=0.05)
    given = arguments(model)
    latent, report = ReferenceGuidedNullTextOptimizer.execute(**given).args
    start = first_pass_latent(model, torch.zeros(1, 4, 8, 8), given["inversion"].sigmas, SEED)
    expected = reference_guided_sampling(
        model, start, given["inversion"], MASK, POSITIVE, NEGATIVE, guidance_scale=5.0, inner_steps=2
    )
    assert torch.equal(latent["samples"], expected.latent)
    assert "4 of 5 steps guided in 25 % of the image, 8 updates, 22 model calls" in report
    assert f"{float(expected.unguided_losses[0]):.1e} / {float(expected.final_losses[0]):.1e}" in report


def test_a_reference_inverted_with_guidance_is_used_with_a_warning() -> None:
    model = tiny_models.sd1(output_gain=0.05)
    guided = inversion.invert_image(model, tiny_models.latent(4), POSITIVE, NEGATIVE, steps=3, guidance_scale=3.0)
    _, report = ReferenceGuidedNullTextOptimizer.execute(**arguments(model, inversion=guided)).args
    assert "Warning: The reference was inverted with guidance scale 3" in report


def test_distilled_guidance_is_guided_by_blending() -> None:
    model = tiny_flow_models.flux(output_gain=0.1)
    pivot = inversion.invert_image(model, tiny_flow_models.latent(4), POSITIVE, steps=5, end_at_zero=True)
    empty = {"samples": torch.zeros(1, 16, 8, 8)}
    given = arguments(model, inversion=pivot, latent=empty, guidance_scale=1.0)
    latent, report = ReferenceGuidedNullTextOptimizer.execute(**given, blending=0.25).args
    start = first_pass_latent(model, empty["samples"], pivot.sigmas, SEED)
    expected = reference_guided_sampling(model, start, pivot, MASK, POSITIVE, NEGATIVE, 1.0, blending=0.25)
    assert torch.equal(latent["samples"], expected.latent)
    assert report == "Reference guidance: 4 of 5 steps guided in 25 % of the image, 25% blended in, 5 model calls."
    pasted = ReferenceGuidedNullTextOptimizer.execute(**given, blending=0.0).args
    assert "Warning: blending is 0, so the reference is pasted once" in pasted[1]
    twice = ReferenceGuidedNullTextOptimizer.execute(**{**given, "guidance_scale": 3.0}).args
    assert "Warning: The model has distilled guidance" in twice[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 20}, "5 steps but steps is 20"),
        ({"latent": {"samples": torch.zeros(1, 4, 8, 16)}}, "the latent is"),
        ({"latent": {}}, "contains no latents"),
        ({"latent": {"samples": torch.zeros(1, 4, 8, 8), "noise_mask": torch.ones(1, 8, 8)}}, "has a noise mask"),
        ({"mask": torch.zeros(1, 64, 64)}, "mask is empty"),
        ({"guidance_scale": 1.0}, "above 1"),
    ],
)
def test_bad_inputs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(IdentityEditError, match=message):
        ReferenceGuidedNullTextOptimizer.execute(**arguments(tiny_models.sd1(), **change))


def test_another_model_is_refused() -> None:
    given = arguments(tiny_models.sd1())
    with pytest.raises(IdentityEditError, match="another model"):
        ReferenceGuidedNullTextOptimizer.execute(**{**given, "model": tiny_models.sd1(seed=3)})


@pytest.mark.parametrize("make", [tiny_flow_models.sd3, tiny_flow_models.qwen_image])
def test_an_empty_latent_of_other_channels_is_the_models(make: Any) -> None:
    """As ComfyUI's samplers take Empty Latent Image for every model."""
    model = make(output_gain=0.05)
    image = tiny_flow_models.latent_for(model, 4)
    pivot = inversion.invert_image(model, image, POSITIVE, steps=5)
    empty, own = torch.zeros(1, 4, *image.shape[-2:]), torch.zeros_like(image)
    found = [
        ReferenceGuidedNullTextOptimizer.execute(
            **arguments(model, inversion=pivot, latent={"samples": each}, guidance_scale=1.0)
        ).args[0]["samples"]
        for each in (empty, own)
    ]
    assert torch.equal(*found)
    with pytest.raises(IdentityEditError, match="latent has 4 channels but the model takes 16"):
        ReferenceGuidedNullTextOptimizer.execute(**arguments(model, inversion=pivot, latent={"samples": empty + 1.0}))
