"""What Identity Attention records in runs that evaluate a source image beside the sampled one: the sampled one's
attention, in whichever order the nodes are connected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.patcher_extension
import comfy.samplers
import pytest
import tiny_flow_models
import tiny_models
import tiny_styles
import tiny_text_encoders
import torch
from identity_edit_pack.attention.identity_mask import rough_mask
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.attention_control.mutual_self_attention import mutual_self_attention
from identity_edit_pack.pipelines.attention_control.prompt_to_prompt import encode, prompt_to_prompt
from identity_edit_pack.pipelines.flow_editing.flow_edit import flow_edit_sampler
from identity_edit_pack.pipelines.flow_editing.uni_edit import uni_edit_sampler
from identity_edit_pack.pipelines.inversion.inversion import invert_image
from identity_edit_pack.pipelines.inversion.inverted_noise import InvertedNoise
from identity_edit_pack.pipelines.lipe.identity_prompt import capture_identity, contrast_for, encode_identity_prompt
from identity_edit_pack.pipelines.mcdm.pair_guidance import pair_guider
from identity_edit_pack.pipelines.pidiff.style_attention import apply_style_attention
from identity_edit_pack.pipelines.timestep_aware.text_optimization import optimize_text_embedding
from tiny_models import relative_error

from .test_flow_attention_control import CLIP as FLOW_CLIP

CLIP = tiny_text_encoders.clip("sd1")
SOURCE, TARGET = "a cat on the grass", "a dog on the grass"
STEPS = 4


@pytest.fixture(scope="module", params=["sd1", "flux"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_models.sd1() if request.param == "sd1" else tiny_flow_models.flux(output_gain=0.2, guidance_embed=False)


def image(model: Any) -> torch.Tensor:
    is_flow = engine.require(model).noise_path is engine.FLOW
    return tiny_flow_models.latent_for(model, 4, 1) if is_flow else tiny_models.latent(4)


def clip_of(model: Any) -> Any:
    return FLOW_CLIP if engine.is_joint(model) else CLIP


def prompt_of(model: Any, text: str) -> Any:
    return encode(clip_of(model), text)


def recording(model: Any, subject: str = "cat") -> tuple[Any, Any]:
    identity = encode_identity_prompt(clip_of(model), subject, contrast=contrast_for(model, "grass"))
    return capture_identity(model, identity)


def guided(model: Any, positive: Any) -> comfy.samplers.CFGGuider:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, prompt_of(model, ""))
    guider.set_cfg(3.0)
    return guider


def run(guider: Any, noise: torch.Tensor, latent: torch.Tensor, sampler: Any, sigmas: torch.Tensor) -> torch.Tensor:
    return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=0)


def euler() -> Any:
    return comfy.samplers.sampler_object("euler")


def test_mutual_self_attention_in_either_order(model: Any) -> None:
    latent = image(model)
    inversion = invert_image(model, latent, prompt_of(model, SOURCE), steps=STEPS)

    def attending(each: Any) -> Any:
        return mutual_self_attention(each, inversion, prompt_of(model, SOURCE), start_step=0.0)

    noise = InvertedNoise(model, inversion).generate_noise({"samples": latent})
    before, first = recording(model)
    after, second = recording(attending(model))
    images = [
        run(guided(each, prompt_of(model, TARGET)), noise, latent, euler(), inversion.sigmas)
        for each in (attending(model), attending(before), after)
    ]
    maps = [rough_mask(each) for each in (first, second)]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert first.evaluations == second.evaluations == STEPS
    of_source, source = recording(model)
    run(guided(of_source, prompt_of(model, SOURCE)), noise, latent, euler(), inversion.sigmas)
    assert relative_error(maps[0], maps[1]) < 1e-4
    assert relative_error(maps[0], rough_mask(source)) > 1e-3


def test_prompt_to_prompt_in_either_order(model: Any) -> None:
    latent = torch.zeros_like(image(model))
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
    sigmas = engine.require(model).schedule(STEPS, end_at_zero=True).sigmas
    maps = []
    for first in ("identity", "prompt-to-prompt"):
        recorder, attention = recording(model) if first == "identity" else (model, None)
        controlled, positive = prompt_to_prompt(recorder, clip_of(model), SOURCE, TARGET)
        if attention is None:
            controlled, attention = recording(controlled)
        run(guided(controlled, positive), noise, latent, euler(), sigmas)
        assert 0 < attention.evaluations <= STEPS
        maps.append(rough_mask(attention))
    of_source, source = recording(model)
    run(guided(of_source, prompt_of(model, SOURCE)), noise, latent, euler(), sigmas)
    assert maps[0].shape[0] == 1 and relative_error(maps[0], maps[1]) < 1e-4
    assert relative_error(maps[0], rough_mask(source)) > 1e-4


@pytest.mark.parametrize("sampler", [flow_edit_sampler, uni_edit_sampler])
def test_editing_samplers(model: Any, sampler: Callable[..., engine.EditSampler]) -> None:
    """Every evaluation that is read has the target prompt."""
    latent = image(model)
    sigmas = engine.require(model).schedule(STEPS, end_at_zero=True).sigmas
    recorder, attention = recording(model)
    prompts = [prompt_of(model, text) for text in (SOURCE, TARGET, "")]
    guider = engine.EditGuider(recorder, *prompts, 1.0, 1.0)
    read: list[bool] = []
    add = attention.add_cross_attention
    attention.add_cross_attention = lambda *given, **named: (read.append(guider._at_source), add(*given, **named))
    run(guider, torch.zeros_like(latent), latent, sampler(), sigmas)
    assert len(read) > 0 and not any(read)


def test_two_recorders_read_their_own_prompts(model: Any) -> None:
    latent = torch.zeros_like(image(model))
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
    sigmas = engine.require(model).schedule(STEPS, end_at_zero=True).sigmas

    def map_of(each: Any, attention: Any) -> torch.Tensor:
        run(guided(each, prompt_of(model, TARGET)), noise, latent, euler(), sigmas)
        return rough_mask(attention)

    alone = [map_of(*recording(model, subject)) for subject in ("cat", "dog")]
    one, first = recording(model, "cat")
    both, second = recording(one, "dog")
    map_of(both, second)
    for attention, expected in zip((first, second), alone, strict=True):
        assert relative_error(rough_mask(attention), expected) < 1e-4


def test_a_guider_of_several_prompts_does_not_evaluate_the_recorders(model: Any) -> None:
    sigmas = engine.require(model).schedule(STEPS, end_at_zero=True).sigmas
    latent = torch.zeros_like(image(model))
    counts = []
    for each in (model, recording(model)[0]):
        prompts = {name: prompt_of(model, name) for name in ("shared", "source", "target", "negative")}
        guider = pair_guider(each, **prompts)
        run(guider, torch.ones_like(latent), latent, euler(), sigmas)
        counts.append(guider.evaluations)
    assert counts[0] == counts[1]


def uses_of_other_gpus(clone: Any) -> list[bool]:
    """Filled with whether each evaluation of `clone` could use ComfyUI's clones on other GPUs."""
    used: list[bool] = []

    def calls(executor: Any, network: Any, conds: Any, x: Any, timestep: Any, options: dict[str, Any]) -> Any:
        used.append("multigpu_clones" in options)
        return executor(network, conds, x, timestep, {k: v for k, v in options.items() if k != "multigpu_clones"})

    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "test", calls)
    clone.model_options["multigpu_clones"] = {}
    return used


@pytest.mark.parametrize("technique", ["recorded", "attending", "controlled", "optimized"])
def test_attention_and_gradients_stay_on_the_models_own_gpu(model: Any, technique: str) -> None:
    """ComfyUI's clones on other GPUs have layers of their own, and run without gradients."""
    latent = image(model)
    inversion = invert_image(model, latent, prompt_of(model, SOURCE), steps=STEPS)
    positive, clone = prompt_of(model, TARGET), model.clone()
    if technique == "recorded":
        clone = recording(model)[0]
    elif technique == "attending":
        clone = mutual_self_attention(model, inversion, prompt_of(model, SOURCE), start_step=0.0)
    elif technique == "controlled":
        clone, positive = prompt_to_prompt(model, clip_of(model), SOURCE, TARGET, inversion=inversion)
    used = uses_of_other_gpus(clone)
    if technique == "optimized":
        optimize_text_embedding(clone, latent, positive, steps=2)
    else:
        noise = InvertedNoise(model, inversion).generate_noise({"samples": latent})
        run(guided(clone, positive), noise, latent, euler(), inversion.sigmas)
    assert len(used) > 0 and not all(used)


def test_styles_stay_on_the_models_own_gpu() -> None:
    model = tiny_models.sd1()
    styled = apply_style_attention(model, tiny_styles.style_attention(model), tiny_styles.w_plus(), strength=1.0)
    used = uses_of_other_gpus(styled)
    latent = tiny_models.latent(4)
    sigmas = engine.require(model).schedule(STEPS, end_at_zero=True).sigmas
    run(guided(styled, prompt_of(model, TARGET)), latent, torch.zeros_like(latent), euler(), sigmas)
    assert len(used) > 0 and not any(used)
