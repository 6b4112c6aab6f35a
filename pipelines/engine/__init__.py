"""The only package of the pipelines that imports ComfyUI (`comfy.*`).

Model families and their capabilities (`families`), latents, prompts and fingerprints of a model (`model`), custom
loops inside ComfyUI's sampler (`loop`), custom guidance formulas (`guidance`), and gradients (`gradient_context`).
Everything works on a clone of the model; no global state is touched, and temporary changes are undone.

Read on ComfyUI 0.3.75: comfy/samplers.py, comfy/sampler_helpers.py, comfy/model_patcher.py, execution.py.
"""

from .editing import EditGuider, EditRun, EditSampler, Estimate
from .families.base import Capability, Family
from .families.noise import FLOW, NoisePath
from .families.registry import is_joint, require
from .guidance import CombiningGuider
from .loop import Callback, NetworkEvaluator, run_loop
from .managed_network import managed
from .model import (
    KEEPS_EMBEDDING,
    ModelTag,
    check_prompt,
    conditionings_of_the_prompt,
    conditionings_with_embedding,
    has_frames,
    image_of_run,
    latent_channels,
    model_latent,
    model_tag,
    pixels_per_latent_pixel,
    start_of_run,
    stop_step_caches,
    to_model_scale,
    to_socket_scale,
    with_wrappers,
)
from .side_prompts import conditionings_with_text, side_prompts, with_own_uuids

__all__ = [
    "FLOW",
    "KEEPS_EMBEDDING",
    "Callback",
    "Capability",
    "CombiningGuider",
    "EditGuider",
    "EditRun",
    "EditSampler",
    "Estimate",
    "Family",
    "ModelTag",
    "NetworkEvaluator",
    "NoisePath",
    "check_prompt",
    "conditionings_of_the_prompt",
    "conditionings_with_embedding",
    "conditionings_with_text",
    "has_frames",
    "image_of_run",
    "is_joint",
    "latent_channels",
    "managed",
    "model_latent",
    "model_tag",
    "pixels_per_latent_pixel",
    "require",
    "run_loop",
    "side_prompts",
    "start_of_run",
    "stop_step_caches",
    "to_model_scale",
    "to_socket_scale",
    "with_own_uuids",
    "with_wrappers",
]
