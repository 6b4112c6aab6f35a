"""Nodes with a flow model like Flux: those whose technique needs no further capability work, all others refuse it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
    "DDIMInversion", "EditFriendlyDDPMInversion", "EditFriendlyDDPMSampler", "TimestepAwareTextInjection",
    "TimestepAwareTextInjectionModel", "TimestepAwareTextInjectionSampler",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        yield world_in(tmp_path_factory.mktemp("comfyui"), patch)


@pytest.fixture(scope="module")
def of_flux() -> dict[str, Any]:
    """By socket, values that fit each other."""
    model, prompt, latent = (
        tiny_flow_models.flux(output_gain=0.2),
        tiny_models.conditioning(1),
        tiny_flow_models.latent(4),
    )
    return {
        "MODEL": model, "CONDITIONING": prompt, "LATENT": {"samples": latent}, "VAE": SixteenChannelVAE(),
        "ddim": inversion.ddim_inversion(model, latent, prompt, steps=3),
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
