"""Settings with which a node can change nothing are said in one line, and those that change something are not."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from identity_edit_pack.nodes.idle import noise_mask_left_out, same_prompt
from identity_edit_pack.pipelines.inversion.methods import MIDPOINT
from identity_edit_pack.pipelines.inversion.rf_inversion import RF_INVERSION
from identity_edit_pack.tests import tiny_models
from identity_edit_pack.tests.nodes.good_inputs import CLASSES, World, good, world_in


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        yield world_in(tmp_path_factory.mktemp("comfyui"), patch)


def run(name: str, inputs: dict[str, Any], caplog: pytest.LogCaptureFixture) -> tuple[tuple[Any, ...], list[str]]:
    """A node's outputs, and what it warned of."""
    caplog.clear()
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        outputs = CLASSES[name].execute(**inputs).args
    return outputs, [message for message in caplog.messages if message.startswith("IdentityEdit: ")]


EMPTY = torch.zeros(1, 48, 80)
SAME = {"source_prompt": "a cat on the grass", "target_prompt": "a cat on the grass"}
NO_ATTENTION = {"cross_replace_steps": 0.0, "self_replace_steps": 0.0, "reweight": "", "blend_words": ""}
IDLE: list[tuple[str, dict[str, Any], str]] = [
    ("NoiseInversion", {"latent": "masked"}, "noise mask"),
    ("EditFriendlyDDPMInversion", {"latent": "masked"}, "noise mask"),
    ("OptimizeTextEmbedding", {"latent": "masked"}, "noise mask"),
    ("MCDMEditMask", {"latent": "masked"}, "noise mask"),
    ("ImagicFineTuning", {"learning_rate": 2e-6}, "low rank hardly learns"),
    ("NoiseInversion", {"method": "fixed point", "iterations": 1}, "fixed point has not converged"),
    *(
        (name, {"inversion": MIDPOINT}, "euler) do not reverse")
        for name in (
            "TimestepAwareTextInjectionSampler", "IdentityAwareMaskBlend", "ReferenceGuidedNullTextOptimizer"
        )
    ),
    ("InversionSampler", {"skip": 1.0}, "skip is 1"),
    ("InversionSampler", {"inversion": RF_INVERSION, "skip": 0.0}, "connect RF-Inversion Sampler"),
    ("RFInversionSampler", {"eta": 0.0}, "eta is 0"),
    ("RFInversionSampler", {"stop": 0.0}, "stop is not above start"),
    ("SourceTargetGuider", {"target": "source", "target_guidance_scale": 1.0}, "are the same"),
    *(
        (f"TimestepAwareTextInjection{form}", change, said)
        for form in ("", "Model", "Sampler")
        for change, said in (
            ({"ratio": 1.0}, "ratio is 1"),
            ({"ratio": 0.0}, "ratio is 0"),
            ({"target": "source", "optimized": None}, "are the same"),
            ({"eta": 1.0, "optimized": "target"}, "eta is 1"),
        )
    ),
    ("IdentityAwareMaskBlend", {"target": "source"}, "are the same"),
    ("IdentityAwareMaskBlend", {"blend_until": 0.0}, "blend_until is 0"),
    ("MutualSelfAttention", {"start_step": 1.0}, "start_step is 1"),
    ("PromptToPrompt", {**SAME, "blend_words": "", "reweight": ""}, "are the same"),
    ("PromptToPrompt", {**SAME, "blend_words": "", "reweight": "cat: 1"}, "are the same"),
    ("PromptToPrompt", NO_ATTENTION, "as without this node"),
    ("PromptToPrompt", {"reweight": "dog: 1"}, "The weight 1 for 'dog'"),
    ("PromptToPrompt", {"reweight": "dog: 2", "cross_replace_steps": 0.0}, "reweight has no effect"),
    ("PromptToPrompt", {"blend_words": "cat", "blend_threshold": 1.0}, "blend_threshold is 1"),
    ("PromptToPrompt", {"blend_words": "cat", "blend_start": 1.0}, "blend_start is 1"),
    ("ReplaceSubject", {**SAME, "subject_words": "cat", "target": None}, "are the same"),
    ("ReplaceSubject", {"cross_replace_steps": 0.0, "local_blend": False}, "attention is kept"),
    ("ReplaceSubject", {"local_blend": True, "blend_threshold": 1.0}, "blend_threshold is 1"),
    ("ReferenceGuidedNullTextOptimizer", {"inner_steps": 0}, "inner_steps is 0"),
    ("ReferenceGuidedNullTextOptimizer", {"start_percent": 0.9, "end_percent": 0.1}, "No step is guided"),
    ("ReferenceGuidedNullTextOptimizer", {"early_stop": 1.0}, "early_stop"),
    ("TrainingSettings", {"warmup_steps": 5}, "warmup_steps has no effect with the schedule constant"),
    ("TrainingSettings", {"optimizer": "Adam", "weight_decay": 0.1}, "weight_decay has no effect with Adam"),
    ("PairGuider", {"target": "source"}, "are identical"),
    ("PairGuider", {"guidance_scale": 0.0}, "no prompt has an effect"),
    ("PairGuider", {"source_weight": 0.0, "target_weight": 0.0}, "source_weight and target_weight are 0"),
    (
        "GeneratePairs",
        {"settings": ({"source_weight": 0.0, "target_weight": 0.0}, None)},
        "source_weight and target_weight are 0",
    ),
    ("MCDMGuider", {"mask": EMPTY}, "mask is empty"),
    ("MCDMGuider", {"image_scale": 0.0, "spatial_scale": 0.0, "text_scale": 0.0}, "All scales are 0"),
    ("MCDMGuider", {"text_scale": 0.0}, "text_scale is 0"),
    ("MCDMGuider", {"positive": "source"}, "the same prompt"),
    ("MCDMEditMask", {"target": "source"}, "both prompts differ"),
    ("DiffEdit", {"mask": torch.zeros(1, 64, 64)}, "mask is empty for an image"),
    ("DiffEdit", {"mask": torch.ones(1, 64, 64)}, "mask covers the whole image"),
    ("ApplyStyleCrossAttention", {"strength": 0.0}, "strength is 0"),
    ("ApplyStyleCrossAttention", {"mask": EMPTY}, "mask is empty"),
    ("ApplyStyleCrossAttention", {"start_percent": 0.5, "end_percent": 0.5}, "start_percent is 0.5"),
    ("ApplyStyleCrossAttention", {"schedule": "0 0, 0"}, "factors of schedule"),
    ("LoadIdentityPrior", {"strength_model": 0.0, "strength_clip": 0.0}, "strength_model and strength_clip are 0"),
    ("MixWPlus", {"weight": 0.0}, "weight is 0"),
    ("MixWPlus", {"second": "first"}, "the same W+ codes"),
]  # fmt: skip


def inputs_of(name: str, changes: dict[str, Any], world: World) -> dict[str, Any]:
    """Good inputs with changes; a text in the place of a socket names the input whose value it gets."""
    inputs = good(world, name)
    for key, value in changes.items():
        if key == "latent":
            value = {**inputs[key], "noise_mask": torch.zeros(1, 8, 8)}
        elif key in ("target", "positive", "second", "optimized") and isinstance(value, str):
            value = inputs[value]
        elif key == "inversion":
            value = dataclasses.replace(inputs[key], method=value, embeddings=None, noise_maps=None, eta=0.0)
        inputs[key] = value
    return inputs


@pytest.mark.parametrize(("name", "changes", "said"), IDLE)
def test_what_changes_nothing_is_said(
    name: str, changes: dict[str, Any], said: str, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    _, warnings = run(name, inputs_of(name, changes, world), caplog)
    assert len(warnings) == 1 and said in warnings[0], warnings


@pytest.mark.parametrize("name", sorted({name for name, _, _ in IDLE}))
def test_what_changes_something_is_not_said(name: str, world: World, caplog: pytest.LogCaptureFixture) -> None:
    changes: dict[str, Any] = {"optimized": None, "ratio": 0.5} if name.startswith("TimestepAware") else {}
    if name == "GeneratePairs":
        changes = {"folder": "pairs/others"}
    _, warnings = run(name, {**good(world, name), **changes}, caplog)
    idle = [text for each, _, text in IDLE if each == name]
    assert not [warning for warning in warnings if any(text in warning for text in idle)], warnings


def test_prompts_are_the_same_only_with_all_that_they_carry() -> None:
    first, again, other = tiny_models.conditioning(1), tiny_models.conditioning(1), tiny_models.conditioning(2)
    assert same_prompt(first, again) and not same_prompt(first, other)
    assert not same_prompt(first, first + other)
    for options in ({"area": (1, 1, 0, 0)}, {"pooled_output": torch.zeros(1, 16)}, {"mask": torch.ones(1, 8, 8)}):
        changed = [[again[0][0], {**again[0][1], **options}]]
        assert not same_prompt(first, changed) and same_prompt(changed, [[first[0][0], {**first[0][1], **options}]])


def test_a_noise_mask_of_the_whole_image_leaves_nothing_out() -> None:
    assert noise_mask_left_out({"samples": 0}) is None
    assert noise_mask_left_out({"noise_mask": torch.ones(1, 1, 8, 8)}) is None
    assert "noise mask" in str(noise_mask_left_out({"noise_mask": torch.ones(1, 8, 8).tril()}))
