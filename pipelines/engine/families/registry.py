"""Finds a model's family from ComfyUI's classes, never from the checkpoint's name."""

from __future__ import annotations

from ...shared.comfy_types import Model
from ...shared.errors import IdentityEditError
from .base import Capability, Family
from .flow import Flow
from .unet import UNet

FAMILIES: tuple[type[Family], ...] = (UNet, Flow)


def family_of(model: Model) -> Family | None:
    """The `Family` of a MODEL, or None if it is unsupported."""
    sampling, network = model.get_model_object("model_sampling"), model.get_model_object("diffusion_model")
    for family in FAMILIES:
        if family.includes(sampling, network):
            return family(model, sampling, network)
    return None


def require(model: Model, *capabilities: Capability) -> Family:
    """The `Family` of a MODEL, which can be sampled and has these capabilities.

    Raises:
        IdentityEditError: for no model, an unsupported one, or a missing capability.
    """
    if model is None:
        raise IdentityEditError("There is no model; connect a Load Checkpoint node.")
    family = family_of(model)
    missing = [each for each in capabilities if family is None or each not in family.capabilities]
    if family is None or missing:
        needed = missing[0] if missing else Capability.DISCRETE_TIMESTEPS
        raise IdentityEditError(f"The model {type(model.model).__name__} {needed.value}.")
    return family


def is_joint(model: Model) -> bool:
    """Whether a supported model has joint attention over text and image instead of cross-attention."""
    capabilities = require(model).capabilities
    return Capability.TEXT_ATTENTION in capabilities and Capability.CROSS_ATTENTION not in capabilities
