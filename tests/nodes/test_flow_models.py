"""Nodes with a flow model like Flux: those whose technique needs no further capability work, all others refuse it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
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
from PIL import Image

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


@pytest.mark.parametrize(
    "name", ["IdentityAttention", "IdentityAwareMaskBlend", "SegmentSubject", "PromptToPrompt", "GeneratePairs"]
)
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
    elif name == "GeneratePairs":
        inputs |= {"folder": "pairs/flux", "conditions": None}
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


class FramesVAE(SixteenChannelVAE):
    """Of Qwen-Image and Wan: a batch of images is one video, and the latents have frames."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return super().encode(images).movedim(0, 1)[None]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.stack([super(FramesVAE, self).decode(video.movedim(1, 0)) for video in latents])


@pytest.mark.parametrize("name", ["GeneratePairs", "SegmentSubject"])
def test_latents_with_frames_are_made_of_images_and_become_images(
    name: str, world: World, of_flux: dict[str, Any]
) -> None:
    model = tiny_flow_models.qwen_image(output_gain=0.2)
    inputs = {**good(world, name), "model": model, "vae": FramesVAE(), "clip": world.clip}
    if name == "GeneratePairs":
        inputs["folder"] = "pairs/frames"
    else:
        inputs |= {"contrast": "grass", "images": torch.cat([inputs["images"], 1.0 - inputs["images"]])}
    found = CLASSES[name].execute(**as_comfyui_gives(name, inputs)).args
    if name == "GeneratePairs":
        sizes = [Image.open(path).size for path in sorted(Path(found[1]).rglob("*.png"))]
        assert len(sizes) >= 2 and set(sizes) == {(inputs["width"], inputs["height"])}
        return
    for number in range(2):  # the frames of one video would not be segmented alike
        alone = {**inputs, "images": inputs["images"][number : number + 1]}
        mask = CLASSES[name].execute(**as_comfyui_gives(name, alone)).args[0]
        assert mask.shape == found[0][number : number + 1].shape and 0.0 < float(mask.mean()) < 1.0


@pytest.mark.parametrize("size", [64, 72])
def test_pairs_of_flux_2_have_the_size_that_was_asked_for(size: int, world: World, of_flux: dict[str, Any]) -> None:
    """Its latent pixels have 16 image pixels."""

    class VAE(SixteenChannelVAE):
        latent_channels = 128

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return super().decode(latents.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))

    model = tiny_flow_models.flux2(output_gain=0.2)
    inputs = {**good(world, "GeneratePairs"), "model": model, "vae": VAE(), "folder": f"pairs/flux2_{size}"}
    inputs |= {"clip": world.clip, "width": size, "height": 64, "count": 1}
    if size % 16:
        with pytest.raises(IdentityEditError, match="width is 72; choose a multiple of 16"):
            CLASSES["GeneratePairs"].execute(**as_comfyui_gives("GeneratePairs", inputs))
        return
    folder = Path(CLASSES["GeneratePairs"].execute(**as_comfyui_gives("GeneratePairs", inputs)).args[1])
    images = [Image.open(path).size for path in sorted(folder.rglob("*.png"))]
    assert images.count((64, 64)) >= 2, images


def test_a_second_guidance_of_a_distilled_model_is_said(
    world: World, of_flux: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    inputs = {**good(world, "EditFriendlyDDPMInversion"), "model": of_flux["MODEL"], "latent": of_flux["LATENT"]}
    inputs |= {"source": of_flux["CONDITIONING"], "negative": of_flux["CONDITIONING"], "steps": 2}
    for scale in (3.5, 1.0):
        caplog.clear()
        given = as_comfyui_gives("EditFriendlyDDPMInversion", {**inputs, "guidance_scale": scale})
        CLASSES["EditFriendlyDDPMInversion"].execute(**given)
        assert ("adds a second guidance; set it to 1" in caplog.text) == (scale != 1.0)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_negative_prompt_inversion_needs_true_guidance(name: str, world: World, of_flux: dict[str, Any]) -> None:
    model = tiny_flow_models.FAMILIES[name](output_gain=0.2)
    prompt = tiny_models.conditioning(1)
    found = inversion.invert_image(model, of_flux["LATENT"]["samples"], prompt, steps=3)
    inputs = {**good(world, "NullTextOptimization"), "model": model, "inversion": found, "source": prompt}
    inputs |= {"negative": tiny_models.conditioning(2), "method": "negative-prompt inversion (fast)"}
    if name == "flux":
        with pytest.raises(IdentityEditError, match="distilled guidance and no unconditional side"):
            CLASSES["NullTextOptimization"].execute(**as_comfyui_gives("NullTextOptimization", inputs))
    else:
        CLASSES["NullTextOptimization"].execute(**as_comfyui_gives("NullTextOptimization", inputs))
        inputs |= {"method": "automatic", "inner_steps": 1}
        report = CLASSES["NullTextOptimization"].execute(**as_comfyui_gives("NullTextOptimization", inputs)).args[4]
        assert report.startswith("Null-text optimization (adaptive)")
