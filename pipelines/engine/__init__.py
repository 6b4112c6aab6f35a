"""The one place of the pipelines that speaks to ComfyUI (`comfy.*`).

What a model's family tells the techniques (`families`), its latents, prompts and tag (`model`), how to run a loop of
one's own inside ComfyUI's sampling machinery (`loop`), how to combine estimates by a formula of one's own (`guidance`),
and how to obtain gradients there (`gradient_context`). Everything works on a clone of the model; nothing global is
touched, and what is changed for the time of a loop is put back.

Read on ComfyUI 0.3.75: comfy/samplers.py, comfy/sampler_helpers.py, comfy/model_patcher.py, execution.py.
"""

from .families.base import Capability, Family
from .families.noise import NoisePath
from .families.registry import require
from .guidance import CombiningGuider
from .loop import Callback, NetworkEvaluator, run_loop
from .managed_network import managed
from .model import (
    KEEPS_EMBEDDING,
    ModelTag,
    check_prompt,
    conditionings_of_the_prompt,
    conditionings_with_embedding,
    context_channels,
    latent_channels,
    model_latent,
    model_tag,
    to_model_scale,
    to_socket_scale,
    with_wrappers,
)

__all__ = [
    "KEEPS_EMBEDDING",
    "Callback",
    "Capability",
    "CombiningGuider",
    "Family",
    "ModelTag",
    "NetworkEvaluator",
    "NoisePath",
    "check_prompt",
    "conditionings_of_the_prompt",
    "conditionings_with_embedding",
    "context_channels",
    "latent_channels",
    "managed",
    "model_latent",
    "model_tag",
    "require",
    "run_loop",
    "to_model_scale",
    "to_socket_scale",
    "with_wrappers",
]
