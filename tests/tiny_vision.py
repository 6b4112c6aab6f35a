"""A CLIP_VISION of ComfyUI's own class and a VAE, both at a size that a test runs in milliseconds."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import comfy.clip_vision
import torch
from identity_edit_pack.tests import tiny_models

WIDTH, TOKENS = 16, 17


def clip_vision(seed: int = 3, width: int = WIDTH, projection: int = tiny_models.CONTEXT) -> Any:
    """Four by four patches of a 32x32 image and a class token, as CLIP has them."""
    config = {
        "model_type": "clip_vision_model",
        "image_size": 32,
        "patch_size": 8,
        "num_channels": 3,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
        "projection_dim": projection,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        made = comfy.clip_vision.ClipVisionModel(str(path))
    made.model.float()
    tiny_models._draw_weights(made.model, seed)
    return made


class VAE:
    """Cuts an image into 8x8 patches and projects each to four numbers; what it decodes is only like the image."""

    latent_channels = 4

    def __init__(self, seed: int = 9) -> None:
        self.weight = torch.randn(4, 192, generator=torch.Generator().manual_seed(seed)) / 192**0.5

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        patches = torch.nn.functional.pixel_unshuffle(2.0 * images[..., :3].movedim(-1, 1) - 1.0, 8)
        return 8.0 * torch.einsum("oc,bchw->bohw", self.weight, patches)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        patches = torch.einsum("oc,bohw->bchw", self.weight, latents / 8.0)
        return (torch.nn.functional.pixel_shuffle(patches, 8).movedim(1, -1) + 1.0) / 2.0

    def get_sd(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}
