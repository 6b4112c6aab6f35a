"""The weights that a fine-tuning changes: the attention layers', low-rank changes of these, or all."""

from __future__ import annotations

import re

from ..engine.weights import weight_shapes
from ..shared.comfy_types import Clip, Model

ATTENTION, LOW_RANK, ALL = "attention layers", "low rank", "all weights"
WEIGHTS = (ATTENTION, LOW_RANK, ALL)
RANK = 16
"""[choice] Between the 4 of diffusers' DreamBooth LoRA script and the 64 of Save Identity Prior as LoRA."""
MOST_RANK = 1024

CLIP_ATTENTION = re.compile(r"clip_\w\..+\.self_attn\.(q|k|v|out)_proj\.(weight|bias)")
_MODEL_ATTENTION = re.compile(r"diffusion_model\..+\.attn[12]\.to_(q|k|v|out\.0)\.(weight|bias)")
_ALL_OF_MODEL = re.compile(r"diffusion_model\..+")
_ALL_OF_CLIP = re.compile(r"clip_\w\.transformer\..+")


def model_keys(model: Model, weights: str = ATTENTION) -> list[str]:
    """Keys of the MODEL's trained weights, for a choice of WEIGHTS; LOW_RANK changes matrices only, not biases."""
    return _keys(model, weights, _ALL_OF_MODEL if weights == ALL else _MODEL_ATTENTION)


def clip_keys(clip: Clip, weights: str = ATTENTION) -> list[str]:
    """Likewise for the CLIP text encoders of a CLIP."""
    return _keys(clip.patcher, weights, _ALL_OF_CLIP if weights == ALL else CLIP_ATTENTION)


def _keys(patcher: Model, weights: str, chosen: re.Pattern[str]) -> list[str]:
    keys = [key for key in weight_shapes(patcher.model) if chosen.fullmatch(key)]
    return [key for key in keys if key.endswith(".weight")] if weights == LOW_RANK else keys
