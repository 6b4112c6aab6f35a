"""Prompt-to-Prompt and Replace Subject as nodes, under the stock samplers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_extras import nodes_custom_sampler as stock
from identity_edit_pack.nodes.attention_control.prompt_to_prompt import PromptToPrompt
from identity_edit_pack.nodes.hifi_tuner.replace_subject import ReplaceSubject
from identity_edit_pack.nodes.inversion.noise_inversion import NoiseInversion
from identity_edit_pack.nodes.inversion.null_text import NullTextOptimization
from identity_edit_pack.pipelines.attention_control import prompt_to_prompt as p2p
from identity_edit_pack.pipelines.hifi_tuner import subject_replacement as replacement
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests import tiny_models, tiny_text_encoders

CAT, DOG = "a photo of a cat in the snow", "a photo of a dog in the snow"
LATENT = {"samples": tiny_models.latent(4, width=12)}


@pytest.fixture(scope="module")
def clip() -> Any:
    return tiny_text_encoders.clip("sd1")


def defaults(node: Any, **changes: Any) -> dict[str, Any]:
    """A node's inputs as on the page: what has a default, and `changes`."""
    widgets = {item.id: item.default for item in node.GET_SCHEMA().inputs if getattr(item, "default", None) is not None}
    return {**widgets, **changes}


def sample(
    model: Any, positive: Any, negative: Any, latent: Any, sigmas: torch.Tensor, add_noise: bool
) -> torch.Tensor:
    guider = stock.CFGGuider.execute(model, positive, negative, 4.0).args[0]
    noise = stock.RandomNoise.execute(3).args[0] if add_noise else stock.DisableNoise.execute().args[0]
    sampler = stock.KSamplerSelect.execute("euler").args[0]
    with torch.no_grad():
        return stock.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args[0]["samples"]


def test_a_generated_image_by_a_stock_sampler(clip: Any) -> None:
    model, negative = tiny_models.sd1(), p2p.encode(clip, "")
    sigmas = stock.BasicScheduler.execute(model, "normal", 5, 1.0).args[0]
    empty = {"samples": torch.zeros(1, 4, 8, 12)}
    given = defaults(PromptToPrompt, model=model, clip=clip, source_prompt=CAT, target_prompt=DOG)
    controlled, positive = PromptToPrompt.execute(**given).args
    both = sample(controlled, positive, negative, empty, sigmas, True)
    plain = sample(model, p2p.encode(clip, CAT), negative, empty, sigmas, True)
    assert both.shape[0] == 2 and torch.equal(both[:1], plain)
    expected, positive = p2p.prompt_to_prompt(model, clip, CAT, DOG)
    assert torch.equal(both, sample(expected, positive, negative, empty, sigmas, True))
    given |= dict(edit="refine", reweight="snow: 2", blend_words="cat dog", blend_threshold=0.8, blend_start=0.0)
    given |= dict(cross_replace_steps=0.5, self_replace_steps=0.2, self_attention_grid="2")
    controlled, positive = PromptToPrompt.execute(**given).args
    settings = p2p.ControlSettings(0.5, 0.2, "2", 0.8, 0.0)
    expected, positive = p2p.prompt_to_prompt(model, clip, CAT, DOG, "refine", {"snow": 2.0}, "cat dog", settings)
    ours = sample(controlled, positive, negative, empty, sigmas, True)
    assert torch.equal(ours, sample(expected, positive, negative, empty, sigmas, True))
    assert not torch.equal(ours, both)


def test_under_ksampler_with_partial_denoising_and_a_mask(clip: Any) -> None:
    import nodes as comfy_nodes

    model, negative = tiny_models.sd1(), p2p.encode(clip, "")
    mask = torch.zeros(1, 8, 12)
    mask[:, 2:6] = 1.0
    latent = {"samples": tiny_models.latent(4, 2, width=12), "noise_mask": mask}
    given = defaults(PromptToPrompt, model=model, clip=clip, source_prompt=CAT, target_prompt=CAT)
    controlled, positive = PromptToPrompt.execute(**given).args
    rest = (4, 4.0, "euler", "normal", positive, negative, latent)
    with torch.no_grad():
        both, plain = (comfy_nodes.common_ksampler(m, 5, *rest, denoise=0.6)[0]["samples"] for m in (controlled, model))
    assert torch.equal(both, torch.cat([plain, plain]))


def with_null_text(model: Any, clip: Any) -> Any:
    source, empty = p2p.encode(clip, CAT), p2p.encode(clip, "")
    pivot = NoiseInversion.execute(model, source, LATENT, "DDIM", 3, 1.0, False, 5, 0.5, 0).args[0]
    node = NullTextOptimization
    given = defaults(node, model=model, inversion=pivot, source=source, negative=empty, inner_steps=1)
    found = node.execute(**given).args
    return next(output for output in found if hasattr(output, "trajectory"))


def test_a_real_image_and_its_subject(clip: Any) -> None:
    model = tiny_models.sd1(output_gain=0.3)
    pivot = with_null_text(model, clip)
    given = defaults(PromptToPrompt, model=model, clip=clip, source_prompt=CAT, target_prompt=DOG, inversion=pivot)
    controlled, positive = PromptToPrompt.execute(**given).args
    start = {"samples": pivot.start_latent(model)}
    edited = sample(controlled, positive, p2p.encode(clip, "anything"), start, pivot.sigmas, False)
    again = sample(controlled, positive, p2p.encode(clip, ""), start, pivot.sigmas, False)
    assert edited.shape == LATENT["samples"].shape and torch.equal(edited, again)

    node = ReplaceSubject
    given = defaults(node, model=model, clip=clip, inversion=pivot, source_prompt=CAT, target_prompt=DOG)
    latent, report = node.execute(**given).args
    expected = replacement.subject_replacement(model, clip, pivot, CAT, DOG)
    assert torch.equal(latent["samples"], expected.latent)
    assert report == "Tokens with their own attention: 5. 9 model calls."
    target = p2p.encode(clip, DOG)
    changed = dict(target=target, subject_tokens=3, self_replace_steps=0.4, cross_replace_steps=0.7, local_blend=True)
    latent, report = node.execute(**{**given, **changed, "guidance_scale": 2.0, "blend_threshold": 0.6}).args
    expected = replacement.subject_replacement(
        model, clip, pivot, CAT, DOG, target, "", 3, guidance_scale=2.0, self_replace_steps=0.4,
        cross_replace_steps=0.7, local_blend=True, blend_threshold=0.6,
    )  # fmt: skip
    assert torch.equal(latent["samples"], expected.latent) and "5, 74, 75, 76" in report
    assert "Warning: The guidance scale is 2" in report


def test_errors_reach_the_node(clip: Any) -> None:
    model = tiny_models.sd1()
    given = defaults(PromptToPrompt, model=model, clip=clip, source_prompt=CAT, target_prompt=DOG)
    for changes, message in (
        (dict(reweight="snow"), "each word with its factor"),
        (dict(blend_words="rabbit"), "contains the word 'rabbit'"),
        (dict(target_prompt=""), "use refine"),
    ):
        with pytest.raises(IdentityEditError, match=message):
            PromptToPrompt.execute(**{**given, **changes})
