"""What the pack calls of ComfyUI's MODEL, CLIP, VAE and CLIP_VISION objects, as protocols for signatures.

Read on ComfyUI 0.3.75 and 0.33.0: comfy/model_patcher.py, comfy/sd.py, comfy/clip_vision.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

Tokens = dict[str, Any]
"""By text encoder ("l", "g", "h"): chunks of 77 (token or word vector [C], weight[, word id])."""


class Model(Protocol):
    """A MODEL, or the ModelPatcher of another network: the network with patches, wrappers and options.

    Attributes:
        model: the network as ComfyUI wraps it (BaseModel), with `diffusion_model` and `model_config`.
        model_options: options of a model call; "transformer_options" reach the attention layers.
        patches, object_patches: LoRAs and the like by key; replaced objects, such as `model_sampling`.
        backup, hook_backup: weights before such changes, by key.
        wrappers: by kind and key.
    """

    model: Any
    model_options: dict[str, Any]
    load_device: torch.device
    patches: dict[str, Any]
    object_patches: dict[str, Any]
    backup: dict[str, Any]
    hook_backup: dict[str, Any]
    wrappers: dict[str, dict[Any, Any]]
    patches_uuid: Any

    def clone(self) -> Model:
        """A copy that shares the network."""

    def get_model_object(self, name: str) -> Any:
        """`model_sampling`, `latent_format`, `diffusion_model`, ..., as replaced by object patches."""

    def model_dtype(self) -> torch.dtype: ...

    def model_size(self) -> int: ...

    def add_patches(self, patches: Mapping[str, Any], strength_patch: float) -> Any: ...

    def add_object_patch(self, name: str, obj: Any) -> None: ...

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable[..., Any]) -> None: ...

    def remove_wrappers_with_key(self, wrapper_type: str, key: str) -> None: ...

    def set_model_patch(self, patch: Callable[..., Any], name: str) -> None: ...

    def set_model_compute_dtype(self, dtype: torch.dtype) -> None: ...

    def patch_weight_to_device(self, key: str, **kwargs: Any) -> Any: ...

    def get_nested_additional_models(self) -> list[Any]: ...

    def model_patches_models(self) -> list[Any]: ...

    def set_additional_models(self, key: str, models: list[Any]) -> None: ...

    def pre_run(self) -> None: ...

    def cleanup(self) -> None: ...


class Clip(Protocol):
    """A CLIP: text encoders with their tokenizer.

    Attributes:
        patcher: ModelPatcher of the text encoders.
        layer_idx: the output layer chosen by CLIP Set Last Layer, or None.
    """

    patcher: Any
    cond_stage_model: Any
    tokenizer: Any
    layer_idx: int | None

    def clone(self) -> Clip: ...

    def add_patches(self, patches: Mapping[str, Any], strength_patch: float) -> Any: ...

    def tokenize(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> Tokens: ...

    def encode_from_tokens(self, tokens: Tokens) -> Any:
        """Embedding [1, T, C]."""

    def encode_from_tokens_scheduled(self, tokens: Tokens) -> list[list[Any]]:
        """CONDITIONING of one entry [embedding [1, T, C], options]."""

    def get_sd(self) -> dict[str, torch.Tensor]: ...

    def state_dict_for_saving(self) -> dict[str, Any]:
        """Newer than 0.3.75."""


class Vae(Protocol):
    """A VAE: encodes images [B, H, W, 3] of 0 to 1 as latents [B, C, H / 8, W / 8] in the scale of LATENT sockets."""

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor: ...

    def get_sd(self) -> dict[str, torch.Tensor]: ...


class ClipVision(Protocol):
    """A CLIP_VISION: an image encoder."""

    model: Any

    def encode_image(self, image: torch.Tensor, crop: bool = True) -> Mapping[str, Any]:
        """Of images [B, H, W, 3]: `image_embeds` [B, P] and `last_hidden_state` [B, N, D]."""

    def get_sd(self) -> dict[str, torch.Tensor]: ...
