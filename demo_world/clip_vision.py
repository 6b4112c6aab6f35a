"""The demo world's CLIP vision: a small version of ComfyUI's CLIP image encoder, trained on the demo world's images.

The stock "Load CLIP Vision" node recognizes published models by their number of layers and supports no smaller ones,
so the demo world needs its own loader, which returns the stock CLIP_VISION object.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

if TYPE_CHECKING:
    from comfy.clip_vision import ClipVisionModel

# Not in the weights folder, whose files ComfyUI lists as checkpoints.
CLIP_VISION_PATH = Path(__file__).parent / "vision" / "identity-edit-demo-clip-vision.safetensors"
CONFIG_KEY = "demo_world.clip_vision_config"

CLIP_VISION_CONFIG: dict = {
    "model_type": "clip_vision_model",
    "image_size": 128,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 768,
    "projection_dim": 128,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def load_clip_vision(path: Path = CLIP_VISION_PATH) -> ClipVisionModel:
    """The demo world's image encoder as ComfyUI's stock CLIP vision object.

    ``encode_image`` of images [B, H, W, 3] in [0, 1] gives ``image_embeds`` [B, 128], ``last_hidden_state`` and
    ``penultimate_hidden_states`` [B, 65, 192] (the class token and 8x8 patches of the 128x128 image).
    """
    import comfy.clip_vision

    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()[CONFIG_KEY])
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    # The stock class reads its configuration from a JSON file.
    with tempfile.TemporaryDirectory() as folder:
        config_path = Path(folder) / "config.json"
        config_path.write_text(json.dumps(config), encoding="utf-8")
        encoder = comfy.clip_vision.ClipVisionModel(str(config_path))
    missing, unexpected = encoder.load_sd(state)
    if missing or unexpected:
        raise ValueError(f"{path.name} is not the demo world's CLIP vision: missing {missing}, unexpected {unexpected}")
    return encoder
