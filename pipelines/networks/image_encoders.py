"""Image encoders (one feature vector per image): from a folder in transformers or timm format, or ComfyUI's
CLIP_VISION."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import interpolate

from ..shared.comfy_types import ClipVision
from ..shared.errors import IdentityEditError, first_line
from ..shared.images import to_pillow
from .model_folders import check_preprocessor, loaded, opened_folder, read_config

NEEDED = (
    "config.json, model.safetensors and preprocessor_config.json of an image encoder, such as DINO ViT-S/16, DINOv2 or "
    "CLIP, in transformers format, or config.json and model.safetensors in timm format"
)
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet color statistics, with which most networks normalize images."""
_CLASS_TOKEN = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "deit", "ijepa")
_PROJECTED = {"clip": "CLIPVisionModelWithProjection", "clip_vision_model": "CLIPVisionModelWithProjection"}
_POOLED = {"siglip": "SiglipVisionModel", "siglip_vision_model": "SiglipVisionModel"}

Encoder = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""Features [n, D] of n images [h, w, 3] in [0, 1] whose sizes may differ."""


def encoder_of_clip_vision(clip_vision: ClipVision) -> Encoder:
    """Image embeddings of ComfyUI's CLIP_VISION (Load CLIP Vision), or the class token for DINOv2."""

    def encode(images: Sequence[torch.Tensor]) -> torch.Tensor:
        features_of_images = []
        for image in images:
            # crop=False, because the subject may be at the border.
            output = clip_vision.encode_image(image[None, ..., :3], crop=False)
            features = output["image_embeds"]
            if features is None or features.ndim != 2:
                features = output["last_hidden_state"][:, 0]
            features_of_images.append(features.float().cpu())
        return torch.cat(features_of_images)

    return encode


def encoder_of_folder(path: str) -> Encoder:
    """Features from an image encoder in a local folder, in transformers or timm format.

    For DINO, DINOv2 and other vision transformers, the class token after the last layer, as in DreamBooth's DINO score
    (Ruiz et al. 2023); for CLIP, the projected image embedding; for SigLIP, the pooled one. The network is loaded when
    images are encoded and freed afterwards.

    Args:
        path: a folder; see `NEEDED`.

    Raises:
        IdentityEditError: when files are missing or the network is not supported.
    """
    config = read_config(path, NEEDED)
    kind = config.get("model_type")
    if kind is None and isinstance(config.get("architecture"), str):
        return _timm_encoder(path, config)
    if kind not in (*_CLASS_TOKEN, *_PROJECTED, *_POOLED):
        raise IdentityEditError(
            f"The model in {path} is '{kind}', which is not a supported image encoder; choose DINO, DINOv2, CLIP, "
            f"SigLIP or a vision transformer of timm."
        )
    check_preprocessor(path)
    classes = _PROJECTED.get(kind) or _POOLED.get(kind) or "AutoModel", "AutoImageProcessor"

    def encode(images: Sequence[torch.Tensor]) -> torch.Tensor:
        found = []
        with opened_folder(path, NEEDED, (kind,), "", *classes) as (network, processor, device):
            for image in images:
                output = network(**processor(images=to_pillow(image), return_tensors="pt").to(device))
                if kind in _PROJECTED:
                    features = output.image_embeds
                else:
                    features = output.pooler_output if kind in _POOLED else output.last_hidden_state[:, 0]
                found.append(features.float().cpu())
        return torch.cat(found)

    return encode


def _timm_encoder(path: str, config: dict[str, Any]) -> Encoder:
    """A timm encoder, with its architecture in config.json and its weights in model.safetensors."""
    try:
        import timm
    except ImportError as error:
        raise IdentityEditError(
            f"The model in {path} needs timm, which is not installed; run `pip install timm`, or choose a model in "
            f"transformers format."
        ) from error

    def load() -> tuple[Any, Any]:
        from safetensors.torch import load_file

        network = timm.create_model(config["architecture"], pretrained=False, num_classes=0)
        weights = load_file(os.path.join(path, "model.safetensors"))
        missing, _ = network.load_state_dict(weights, strict=False)  # ignores a classifier head
        if missing:
            raise IdentityEditError(
                f"The weights in {path} lack {len(missing)} tensors ({missing[0]}, ...); copy the model's files again."
            )
        return network, config.get("pretrained_cfg") or {}

    def encode(images: Sequence[torch.Tensor]) -> torch.Tensor:
        found = []
        with loaded(path, load) as (network, prepared, device):
            size = tuple(prepared.get("input_size", (3, 224, 224)))[1:]
            # timm's default: ImageNet statistics
            mean = torch.tensor(prepared.get("mean", IMAGENET_MEAN)).view(1, 3, 1, 1)
            deviation = torch.tensor(prepared.get("std", IMAGENET_DEVIATION)).view(1, 3, 1, 1)
            for image in images:
                scaled = image[..., :3].float().cpu().permute(2, 0, 1)[None]
                scaled = interpolate(scaled, size=size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
                try:
                    features = network(((scaled - mean) / deviation).to(device))
                except RuntimeError as error:
                    raise IdentityEditError(
                        f"The model in {path} cannot read an image ({first_line(error)}); choose another."
                    ) from error
                found.append(features.flatten(1).float().cpu())
        return torch.cat(found)

    return encode
