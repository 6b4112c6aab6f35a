"""Models that see a source image: ComfyUI's InstructPix2Pix family, whose UNets take eight input channels.

The first four are the noisy latent, scaled as the schedule says; the others are the source image's latent as the VAE
gives it, unscaled (`concat_latent_image` of a conditioning; zeros where a conditioning has none). ComfyUI knows the
family by the eight channels of `input_blocks.0.0.weight` (comfy/supported_models.py, SD15_instructpix2pix and
SDXL_instructpix2pix). It has none for SD2.x and would take such a checkpoint for an inpainting model of nine
channels; `register_families` adds it.
"""

from __future__ import annotations

import uuid
from typing import Any

import comfy.model_base
import comfy.supported_models
import torch

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
    """SD2.x with the latent of a source image beside the noisy one."""

    unet_config = {**comfy.supported_models.SD20.unet_config, "in_channels": 8}

    def model_type(self, state_dict: dict, prefix: str = "") -> Any:
        """ComfyUI's own rule for noise or velocity, which it applies to four channels only."""
        text_to_image = comfy.supported_models.SD20({**self.unet_config, "in_channels": 4})
        return text_to_image.model_type(state_dict, prefix)

    def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> Any:
        kind = self.model_type(state_dict, prefix)
        return comfy.model_base.SD15_instructpix2pix(self, model_type=kind, device=device)


def register_families() -> None:
    """Put SD2.x's edit family before SD2.x once, whatever module name the pack was loaded under."""
    families = comfy.supported_models.models
    if not any(family.__name__ == SD20InstructPix2Pix.__name__ for family in families):
        families.insert(families.index(comfy.supported_models.SD20), SD20InstructPix2Pix)


def input_channels(model: Any) -> int:
    """Input channels of the model's UNet: 4, or 8 with a source image, or 9 for inpainting."""
    return int(model.get_model_object("diffusion_model").input_blocks[0][0].in_channels)


def is_edit_model(model: Any) -> bool:
    """Whether ComfyUI gives the model's UNet a source image's latent."""
    return isinstance(model.model, comfy.model_base.IP2P)


def require_edit_model(model: Any) -> None:
    """Check that a model sees a source image.

    Raises:
        IdentityEditError: when it does not, with its number of input channels.
    """
    require(model, Capability.TRAINING)
    if not is_edit_model(model):
        raise IdentityEditError(
            f"The model {type(model.model).__name__} takes {input_channels(model)} input channels and cannot see a "
            f"source image; load a checkpoint of Train MCDM (8 channels)."
        )


def as_edit_model(model: Any) -> Any:
    """A model of the InstructPix2Pix family with a text-to-image model's weights and, for the source image, zeros.

    As long as these stay zero its output is the given model's, whatever the source image. LoRAs on the given model
    become part of the weights. A model of the family is copied as it is.

    Args:
        model: MODEL that predicts noise or velocity, with 4 input channels, or 8 of the family.

    Returns:
        MODEL (a ModelPatcher) on the CPU with memory of its own, in the given one's dtype.

    Raises:
        IdentityEditError: for a model of another kind.
    """
    require(model, Capability.TRAINING)
    channels, of_latent = input_channels(model), latent_channels(model)
    if channels != of_latent and not is_edit_model(model):
        raise IdentityEditError(
            f"The model takes {channels} input channels; load a text-to-image checkpoint ({of_latent} channels, no "
            f"inpainting model)."
        )
    for key, _, is_quantized in stored_weights(model, _MODEL_PREFIX):
        if is_quantized:
            raise IdentityEditError(
                f"The model's weights are quantized ({key}) and cannot be trained; load the checkpoint in float16, "
                f"bfloat16 or float32."
            )
    base = model.model
    config = object.__new__(type(base.model_config))  # a configuration answers None to what copy.copy asks it for
    config.__dict__.update(base.model_config.__dict__)
    config.unet_config = {**config.unet_config, "in_channels": 2 * of_latent}
    kinds = comfy.model_base
    kind = kinds.SDXL_instructpix2pix if isinstance(base, kinds.SDXL) else kinds.SD15_instructpix2pix
    cpu, model_type = torch.device("cpu"), base.model_type
    weights = {
        key.removeprefix(UNET_PREFIX): value
        for key, value in checkpoint_weights(model).items()
        if key.startswith(UNET_PREFIX)
    }
    first = weights[_FIRST_WEIGHT]
    weights[_FIRST_WEIGHT] = torch.cat([first, first.new_zeros(first[:, : 2 * of_latent - channels].shape)], dim=1)

    def make() -> Any:
        return kind(config, model_type=model_type, device=cpu).eval()

    made = make()
    made.diffusion_model.load_state_dict(weights)
    patcher = managed(made, load_device=model.load_device, offload_device=cpu, remake=make)
    if "model_sampling" in model.object_patches:  # of ModelSamplingDiscrete and the like
        patcher.add_object_patch("model_sampling", model.object_patches["model_sampling"])
    return patcher


def unet_keys(model: Any) -> list[str]:
    """Keys of all weights of the UNet in `model.model.state_dict()`."""
    return [_MODEL_PREFIX + key for key, _ in model.get_model_object("diffusion_model").named_parameters()]


def set_weights(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Replace weights of a model of one's own, by keys of `model.model.state_dict()`, in its own dtype."""
    with torch.no_grad():
        for key, weight in weights.items():
            parameter = model.model.get_parameter(key)
            parameter.copy_(weight.to(parameter))
    model.patches_uuid = uuid.uuid4()  # what ComfyUI has on the device is brought there anew


def checkpoint_tensors(
    model: Any, clip: Any | None, vae: Any | None, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What a checkpoint file of a model holds, by the names that ComfyUI's loaders read (as its Save Checkpoint does).

    Args:
        model: MODEL.
        clip, vae: CLIP and VAE that go into the file, or None: a file of the UNet alone, for Load Diffusion Model.
        weights: by keys of `model.model.state_dict()`, what the file has in the place of the model's own weights.
        dtype: in which all of it is stored.

    Returns:
        CPU tensors by name.
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
