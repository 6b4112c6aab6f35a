"""The layers that the walk finds against what the network itself reports while it runs, and against known models."""

from __future__ import annotations

import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from identity_edit_pack.attention import sites, unet
from identity_edit_pack.tests import tiny_models
from identity_edit_pack.tests.attention.sampling import sample

SD15 = {
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}
SDXL = {
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
}


def network(**config) -> UNetModel:
    """The published models' layout at a width of 32 channels."""
    common = dict(image_size=32, in_channels=4, out_channels=4, model_channels=32, num_heads=2, num_head_channels=-1)
    with torch.device("meta"):
        return UNetModel(**common, context_dim=16, use_spatial_transformer=True, legacy=False, **config)


def numbers(found: list[unet.AttentionLayer], downsampling: int) -> dict[str, list[int]]:
    result: dict[str, set[int]] = {}
    for layer in found:
        if layer.downsampling == downsampling:
            result.setdefault(layer.key[0], set()).add(layer.key[1])
    return {name: sorted(values) for name, values in result.items()}


def test_stable_diffusion_1_has_its_known_layers() -> None:
    found = unet.attention_layers(network(**SD15))
    assert len(found) == 16
    assert numbers(found, 1) == {"input": [1, 2], "output": [9, 10, 11]}
    assert numbers(found, 2) == {"input": [4, 5], "output": [6, 7, 8]}
    assert numbers(found, 4) == {"input": [7, 8], "output": [3, 4, 5]}
    assert numbers(found, 8) == {"middle": [0]}
    chosen = sites.choose_layers(found, 64, 64, sites.AUTOMATIC)
    assert {layer.grid(64, 64) for layer in chosen} == {(32, 32), (16, 16)}


def test_stable_diffusion_xl_has_its_known_layers() -> None:
    found = unet.attention_layers(network(**SDXL))
    assert len(found) == 70
    assert numbers(found, 2) == {"input": [4, 5], "output": [3, 4, 5]}
    assert numbers(found, 4) == {"input": [7, 8], "middle": [0], "output": [0, 1, 2]}
    chosen = sites.choose_layers(found, 128, 128, sites.AUTOMATIC)
    assert {layer.grid(128, 128) for layer in chosen} == {(64, 64), (32, 32)}


def test_small_latents_use_the_finest_grids() -> None:
    found = unet.attention_layers(network(**SD15))
    assert sites.automatic_factors(found, 16, 16) == (1, 2)
    assert sites.automatic_factors(found, 16, 40) == (2, 4)
    assert sites.automatic_factors(unet.attention_layers(network(**SDXL)), 16, 16) == (2, 4)


@pytest.mark.parametrize("family", list(tiny_models.FAMILIES))
def test_keys_and_grids_are_those_that_patches_see(family: str) -> None:
    model = tiny_models.FAMILIES[family]()
    seen = []

    def note(n, context, value, extra):
        seen.append(((*extra["block"], extra["block_index"]), tuple(extra["activations_shape"][2:])))
        return n, context, value

    patched = model.clone()
    patched.set_model_attn2_patch(note)
    sample(patched, tiny_models.latent(1, height=9, width=14), cfg=1.0)
    found = unet.attention_layers(model.model.diffusion_model)
    assert seen == [(layer.key, layer.grid(9, 14)) for layer in found] * 3


def test_choices_that_a_model_lacks_are_refused() -> None:
    found = unet.attention_layers(network(**SDXL))
    for choice in ("1", "2, 3", "", "coarse"):
        with pytest.raises(ValueError, match="choose from 2, 4, or automatic"):
            sites.choose_layers(found, 128, 128, choice)
    assert len(sites.choose_layers(found, 128, 128, sites.ALL)) == 70
    with pytest.raises(ValueError, match="Linear"):
        unet.attention_layers(torch.nn.Linear(1, 1))
