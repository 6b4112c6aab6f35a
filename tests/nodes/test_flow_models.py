"""Nodes with a flow model like Flux: those whose technique needs no further capability work, all others refuse it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.text_encoders.flux
import pytest
import tiny_flow_models
import tiny_models
import torch
from identity_edit_pack.pipelines.inversion import edit_friendly, inversion
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests.nodes.bad_values import SixteenChannelVAE
from identity_edit_pack.tests.nodes.good_inputs import CLASSES, World, good, world_in
from identity_edit_pack.tests.nodes.test_bad_inputs import as_comfyui_gives, complaint_about_message

WORKING = {
    "NoiseInversion", "EditFriendlyDDPMInversion", "InversionSampler", "TimestepAwareTextInjection",
    "TimestepAwareTextInjectionModel", "TimestepAwareTextInjectionSampler", "IdentityAttention",
    "IdentityAwareMaskBlend", "SegmentSubject", "DiffEdit",
    "ApplySubject", "MutualSelfAttention",
    "SourceTargetGuider", "DirectInversionSampler", "OptimizeTextEmbedding",
    "MCDMEditMask", "PairGuider", "GeneratePairs", "ReferenceGuidedNullTextOptimizer",
}  # fmt: skip


class FluxClip:
    """The world's CLIP with a pooled output as wide as the tiny Flux takes."""

    def __init__(self, clip: Any) -> None:
        self._clip = clip

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clip, name)

    def encode_from_tokens_scheduled(self, tokens: Any) -> Any:
        return [
            [embedding, {**options, "pooled_output": options["pooled_output"][:, : tiny_models.POOLED]}]
            for embedding, options in self._clip.encode_from_tokens_scheduled(tokens)
        ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        yield world_in(tmp_path_factory.mktemp("comfyui"), patch)


@pytest.fixture(scope="module")
def of_flux(world: World) -> dict[str, Any]:
    """By socket, values that fit each other."""
    model, prompt, latent = (
        tiny_flow_models.flux(output_gain=0.2),
        tiny_models.conditioning(1),
        tiny_flow_models.latent(4),
    )
    return {
        "MODEL": model, "CONDITIONING": prompt, "LATENT": {"samples": latent}, "VAE": SixteenChannelVAE(),
        "CLIP": FluxClip(world.clip),
        "ddim": inversion.invert_image(model, latent, prompt, steps=3),
        "edit-friendly ddpm": edit_friendly.edit_friendly_ddpm_inversion(model, latent, prompt, prompt, steps=3),
    }  # fmt: skip


def takes_a_model(name: str) -> bool:
    return any(item.get_io_type() == "MODEL" for item in CLASSES[name].GET_SCHEMA().inputs)


@pytest.mark.parametrize("name", list(filter(takes_a_model, CLASSES)))
def test_a_node_works_or_refuses_by_its_technique(name: str, world: World, of_flux: dict[str, Any]) -> None:
    inputs = dict(good(world, name))
    for item in CLASSES[name].GET_SCHEMA().inputs:
        kind, value = item.get_io_type(), inputs.get(item.id)
        if value is not None:
            kind = value.method if kind == "INVERSION" else kind
            inputs[item.id] = of_flux.get(kind, value)
    try:
        with torch.inference_mode():
            CLASSES[name].execute(**as_comfyui_gives(name, inputs))
    except IdentityEditError as error:
        assert name not in WORKING, error
        assert complaint_about_message(str(error)) is None
    else:
        assert name in WORKING


@pytest.mark.parametrize("name", ["IdentityAttention", "IdentityAwareMaskBlend", "SegmentSubject", "PromptToPrompt"])
def test_text_encoders_of_flow_models_serve_where_their_tokens_are_known(
    name: str, world: World, of_flux: dict[str, Any]
) -> None:
    """T5's tokens with Flux's own tokenizer; other nodes refuse it by name, with any model."""

    class Clip:
        tokenizer = comfy.text_encoders.flux.FluxTokenizer()

        def tokenize(self, text: str, return_word_ids: bool = False) -> Any:
            return self.tokenizer.tokenize_with_weights(text, return_word_ids=return_word_ids)

        def encode_from_tokens_scheduled(self, tokens: Any) -> Any:
            numbers = torch.tensor([token for token, *_ in tokens["t5xxl"][0]])
            embedding = torch.nn.functional.one_hot(numbers % tiny_models.CONTEXT, tiny_models.CONTEXT)
            return [[embedding[None].float(), {"pooled_output": torch.zeros(1, tiny_models.POOLED)}]]

    inputs = {**good(world, name), **{key: of_flux[kind] for key, kind in (("model", "MODEL"), ("vae", "VAE"))
                                      if key in good(world, name)}}  # fmt: skip
    if name == "PromptToPrompt":
        inputs |= {"reweight": "", "inversion": of_flux["ddim"]}
    elif name != "IdentityAwareMaskBlend":
        inputs["contrast"] = "grass"
    else:
        inputs |= {"blend_settings": {"contrast": "grass"},
                   "inversion": of_flux["ddim"], "source": of_flux["CONDITIONING"], "target": of_flux["CONDITIONING"],
                   "negative": of_flux["CONDITIONING"], "source_mask": None, "target_mask": None}  # fmt: skip
    result = CLASSES[name].execute(**as_comfyui_gives(name, {**inputs, "clip": Clip()}))
    assert result.args
    with pytest.raises(IdentityEditError, match=r"clip belongs to another model family \(Flux"):
        CLASSES["ApplySubject"].execute(**{**good(world, "ApplySubject"), "model": of_flux["MODEL"], "clip": Clip()})
