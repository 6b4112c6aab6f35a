"""Models conditioned on a source image: ComfyUI's InstructPix2Pix family, whose UNets take eight input channels.

The first four channels are the noisy latent, scaled by the schedule; the others are the source image's latent from the
VAE, unscaled (`concat_latent_image` of a conditioning; zeros where it is missing). ComfyUI detects the family by the
eight channels of `input_blocks.0.0.weight` (comfy/supported_models.py, SD15_instructpix2pix and SDXL_instructpix2pix).
It has no such class for SD2.x and would load these checkpoints as inpainting models with nine channels;
`register_families` adds one.
"""

from __future__ import annotations

import uuid
from typing import Any

import comfy.model_base
import comfy.supported_models
import torch

from ..shared.comfy_types import Clip, Model, Vae
from ..shared.errors import IdentityEditError
from .families.base import Capability
from .families.registry import require
from .managed_network import managed
from .model import latent_channels
from .weights import checkpoint_weights, stored_weights

UNET_PREFIX = "model.diffusion_model."
_MODEL_PREFIX = "diffusion_model."
_FIRST_WEIGHT = "input_blocks.0.0.weight"


class SD20InstructPix2Pix(comfy.supported_models.SD20):
    """SD2.x with a source image's latent concatenated to the noisy latent."""

    unet_config = {**comfy.supported_models.SD20.unet_config, "in_channels": 8}

    def model_type(self, state_dict: dict, prefix: str = "") -> Any:
        """ComfyUI's rule for noise or v prediction, which it applies to four channels only."""
        text_to_image = comfy.supported_models.SD20({**self.unet_config, "in_channels": 4})
        return text_to_image.model_type(state_dict, prefix)

    def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> Any:
        kind = self.model_type(state_dict, prefix)
        return comfy.model_base.SD15_instructpix2pix(self, model_type=kind, device=device)


def register_families() -> None:
    """Insert SD2.x's edit family before SD2.x, once, even if the pack is loaded under several module names."""
    families = comfy.supported_models.models
    if not any(family.__name__ == SD20InstructPix2Pix.__name__ for family in families):
        families.insert(families.index(comfy.supported_models.SD20), SD20InstructPix2Pix)


def input_channels(model: Model) -> int:
    """Input channels of the model's UNet: 4 (text-to-image), 8 (with a source image) or 9 (inpainting)."""
    return int(model.get_model_object("diffusion_model").input_blocks[0][0].in_channels)


def is_edit_model(model: Model) -> bool:
    """Whether ComfyUI passes a source image's latent to the model's UNet."""
    return isinstance(model.model, comfy.model_base.IP2P)


def require_edit_model(model: Model) -> None:
    """Raise `IdentityEditError` unless a model is conditioned on a source image."""
    require(model, Capability.TRAINING)
    if not is_edit_model(model):
        raise IdentityEditError(
            f"The model {type(model.model).__name__} takes {input_channels(model)} input channels and no source image; "
            f"load a checkpoint from Train MCDM (8 channels)."
        )


def as_edit_model(model: Model) -> Model:
    """Convert a text-to-image model to the InstructPix2Pix family: its weights, and zeros for the source channels.

    With zeros, the output is that of the original model for any source image. LoRAs on the model are merged into the
    weights. A model of the family is copied unchanged.

    Args:
        model: MODEL that predicts noise or v, with 4 input channels, or 8 in the InstructPix2Pix family.

    Returns:
        MODEL (a ModelPatcher) on the CPU, sharing no memory with the original, in its dtype.

    Raises:
        IdentityEditError: for an unsupported model or quantized weights.
    """
    require(model, Capability.TRAINING)
    channels, latent = input_channels(model), latent_channels(model)
    if channels != latent and not is_edit_model(model):
        raise IdentityEditError(
            f"The model takes {channels} input channels; load a text-to-image checkpoint ({latent} channels, not an "
            f"inpainting model)."
        )
    for key, _, is_quantized in stored_weights(model, _MODEL_PREFIX):
        if is_quantized:
            raise IdentityEditError(
                f"The model's weights are quantized ({key}) and cannot be trained; load the checkpoint in float16, "
                f"bfloat16 or float32."
            )
    base = model.model
    config = object.__new__(type(base.model_config))  # copy.copy fails: its __getattr__ returns None for dunder names
    config.__dict__.update(base.model_config.__dict__)
    config.unet_config = {**config.unet_config, "in_channels": 2 * latent}
    kinds = comfy.model_base
    kind = kinds.SDXL_instructpix2pix if isinstance(base, kinds.SDXL) else kinds.SD15_instructpix2pix
    cpu, model_type = torch.device("cpu"), base.model_type
    weights = {
        key.removeprefix(UNET_PREFIX): value
        for key, value in checkpoint_weights(model).items()
        if key.startswith(UNET_PREFIX)
    }
    first = weights[_FIRST_WEIGHT]
    weights[_FIRST_WEIGHT] = torch.cat([first, first.new_zeros(first[:, : 2 * latent - channels].shape)], dim=1)

    def make() -> Any:
        return kind(config, model_type=model_type, device=cpu).eval()

    edit_model = make()
    edit_model.diffusion_model.load_state_dict(weights)
    patcher = managed(edit_model, load_device=model.load_device, offload_device=cpu, remake=make)
    if "model_sampling" in model.object_patches:  # from ModelSamplingDiscrete and similar nodes
        patcher.add_object_patch("model_sampling", model.object_patches["model_sampling"])
    return patcher


def unet_keys(model: Model) -> list[str]:
    """Keys of all UNet weights in `model.model.state_dict()`."""
    return [_MODEL_PREFIX + key for key, _ in model.get_model_object("diffusion_model").named_parameters()]


def set_weights(model: Model, weights: dict[str, torch.Tensor]) -> None:
    """Overwrite weights of a model, by keys of `model.model.state_dict()`, in the model's dtype."""
    with torch.no_grad():
        for key, weight in weights.items():
            parameter = model.model.get_parameter(key)
            parameter.copy_(weight.to(parameter))
    model.patches_uuid = uuid.uuid4()  # makes ComfyUI reload the weights to the device


def checkpoint_tensors(
    model: Model, clip: Clip | None, vae: Vae | None, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file, with the names that ComfyUI's loaders expect (as in Save Checkpoint).

    Args:
        model: MODEL.
        clip, vae: CLIP and VAE to include, or None for a UNet-only file (Load Diffusion Model).
        weights: replacements for weights of the model, by keys of `model.model.state_dict()`.
        dtype: data type of all saved tensors.
    """
    tensors = checkpoint_weights(model, clip, vae)
    sampling = require(model, Capability.TRAINING).sampling
    if "v_pred" in tensors and getattr(sampling, "zsnr", False):
        tensors["ztsnr"] = torch.tensor([])
    for key, weight in weights.items():
        tensors[UNET_PREFIX + key.removeprefix(_MODEL_PREFIX)] = weight
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() and tensor.numel() else tensor).detach().cpu()
        for name, tensor in tensors.items()
    }
