"""A CLIP or a prompt of another model family is refused by its name, in every node alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models_base
import comfy.text_encoders.flux
import comfy.text_encoders.qwen_image
import comfy.text_encoders.sd3_clip
import pytest
import torch
from identity_edit_pack.nodes.inversion.noise_inversion import NoiseInversion
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests import tiny_models
from identity_edit_pack.tests.nodes.good_inputs import CLASSES, World, good, world_in

FAMILIES = {
    "Flux": (comfy.text_encoders.flux.FluxTokenizer, "t5xxl"),
    "SD3": (comfy.text_encoders.sd3_clip.SD3Tokenizer, "t5xxl"),
    "QwenImage": (comfy.text_encoders.qwen_image.QwenImageTokenizer, "qwen25_7b"),
    "StableCascade": (comfy.sdxl_clip.StableCascadeTokenizer, "g"),
}
NODES = [
    (name, item.id)
    for name, node in CLASSES.items()
    for item in node.define_schema().inputs
    if item.get_io_type() == "CLIP"
]


class Encoder(torch.nn.Module):
    """As wide as the tiny models, so that only its tokens tell a family."""

    def __init__(self, device: Any = None, dtype: Any = None, model_options: Any = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.dtypes = {torch.float32}

    def set_clip_options(self, options: Any) -> None: ...

    def reset_clip_options(self) -> None: ...

    def encode_token_weights(self, tokens: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        length = sum(len(chunk) for chunk in next(iter(tokens.values())))
        return torch.randn(1, length, tiny_models.CONTEXT), torch.randn(1, tiny_models.POOLED)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        yield world_in(tmp_path_factory.mktemp("comfyui"), patch)


@pytest.fixture(scope="module", params=FAMILIES)
def other(request: pytest.FixtureRequest) -> tuple[str, str, Any]:
    tokenizer, encoder = FAMILIES[request.param]
    target = comfy.supported_models_base.ClipTarget(tokenizer, Encoder)
    return request.param, encoder, comfy.sd.CLIP(target, model_options={"dtype": torch.float32})


@pytest.mark.parametrize(("name", "input_name"), NODES)
def test_a_clip_of_another_family_is_named(
    name: str, input_name: str, other: tuple[str, str, Any], world: World
) -> None:
    family, encoder, clip = other
    node = CLASSES[name]
    inputs = {**good(world, name), input_name: clip}
    if node.define_schema().is_input_list:
        inputs = {key: value if value is None or isinstance(value, list) else [value] for key, value in inputs.items()}
    encoders = rf".*\b{re.escape(encoder)}\b.*"
    message = rf"^{input_name} belongs to another model family \({family}: {encoders}\); connect the CLIP"
    with pytest.raises(IdentityEditError, match=message):
        node.execute(**inputs)


@pytest.mark.parametrize("kind", ["clip_vision", "model", "vae"])
def test_what_is_no_clip_is_named(kind: str, world: World) -> None:
    """As a node whose output is of any type can bring it."""
    with pytest.raises(IdentityEditError, match=r"^clip is not a text encoder \(\w+\); connect the CLIP"):
        CLASSES["IdentityAttention"].execute(**{**good(world, "IdentityAttention"), "clip": getattr(world, kind)})


def test_the_refiner_needs_a_pooled_output() -> None:
    model = tiny_models.sdxl_refiner()
    prompt = tiny_models.conditioning(1)
    latent = {"samples": tiny_models.latent(4)}
    made = NoiseInversion.execute(model, prompt, latent, "DDIM", 2, 1.0, False, 5, 0.5, 0).args[0]
    assert bool(torch.isfinite(made.trajectory).all())
    for options in ({}, {"pooled_output": torch.zeros(1, tiny_models.POOLED + 256)}):  # as of SDXL's own width
        with pytest.raises(IdentityEditError, match="source has .*pooled output.* takes one of 16;"):
            NoiseInversion.execute(model, [[prompt[0][0], options]], latent, "DDIM", 2, 1.0, False, 5, 0.5, 0)


@pytest.mark.parametrize(
    ("node", "name"),
    [
        (node, item.id)
        for node, kind in CLASSES.items()
        for item in kind.define_schema().inputs
        if item.get_io_type() == "CLIP_VISION"
    ],
)
def test_a_clip_vision_that_is_none_is_named(node: str, name: str, world: World) -> None:
    inputs = {**good(world, node), name: world.model}
    with pytest.raises(IdentityEditError, match=f"^{name} is not a CLIP vision model; connect a Load CLIP Vision"):
        CLASSES[node].execute(**inputs)
