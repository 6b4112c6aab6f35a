"""Flow models (ComfyUI's CONST), which predict the velocity eps - z_0 at any noise level from 0 to 1: Flux.1, Kontext,
Flux.2, Chroma, Stable Diffusion 3, Qwen-Image, Lumina 2, Z-Image, AuraFlow, HiDream, and every other text-to-image
transformer of this kind, including video models for one frame.

Inversion, sampling and edits of the noise path need nothing else of a model. Where a network has its text input is
known for the architectures of `_TEXT_INPUTS`; the text of others is passed on unchecked.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from comfy.model_sampling import CONST

from ....attention.joint import has_joint_attention
from ...shared.comfy_types import Model
from ...shared.errors import check_steps
from .base import Capability, Family
from .noise import FLOW, VELOCITY
from .schedule import Schedule, noise_levels

END_OF_NOISE_MAPS = 0.02
"""Last noise level of a schedule whose last step has a noise map. Closer to 0, the map would be a large multiple of the
error of the model's last estimate; Stable Diffusion's schedule ends at 0.029."""

_TEXT_INPUTS = ("txt_in", "context_embedder", "cap_embedder.1", "cond_seq_linear", "text_embedding.0")
"""First linear layer of the text: Flux, Chroma and Qwen-Image; Stable Diffusion 3; Lumina 2 and Z-Image; AuraFlow;
Wan."""
_POOLED_INPUTS = ("vector_in.in_layer", "y_embedder.mlp.0", "p_embedder.pooled_embedder.linear_1")
"""First linear layer of the pooled output: Flux, Stable Diffusion 3, HiDream."""
_SEVERAL_TEXTS = ("caption_projection", "llm_adapter")
"""HiDream's projections and Anima's adapter of the texts of several encoders, of which a CONDITIONING's embedding is
only one."""


class Flow(Family):
    noise_path = FLOW
    tag_weights: ClassVar[tuple[str, ...]] = tuple(
        f"diffusion_model.{name}."
        for name in ("img_in", "x_embedder", "init_x_linear", "patch_embedding", "final_layer", "proj_out", "head")
    )

    def __init__(self, model: Model, sampling: Any, network: Any) -> None:
        super().__init__(model, sampling, network)
        self.capabilities = frozenset(
            capability
            for capability, offered in (
                (Capability.VELOCITY, True),
                (Capability.TEXT_ATTENTION, has_joint_attention(network)),
                (Capability.GRADIENTS, self.text_width > 0),
                (Capability.TRUE_GUIDANCE, not self.has_distilled_guidance),
                (Capability.ONE_TEXT, not any(hasattr(network, name) for name in _SEVERAL_TEXTS)),
            )
            if offered
        )

    @classmethod
    def includes(cls, sampling: Any, network: Any) -> bool:
        # Image-to-image models derive from CONST with an estimate of their own.
        return isinstance(sampling, CONST) and type(sampling).calculate_denoised is CONST.calculate_denoised

    def schedule(self, steps: int, end_at_zero: bool = False, room_below: bool = False) -> Schedule:
        """Evenly spaced over the model's shifted noise levels, starting at 1, like ComfyUI's "simple" scheduler. The
        timesteps are the levels times 1000."""
        table = noise_levels(self.sampling)
        levels = table.shape[0]
        check_steps(steps, levels - room_below)
        sigmas = table[[-1 - i * levels // steps for i in range(steps)]]
        if room_below:
            end = (sigmas[-1:] / 2).clamp(max=END_OF_NOISE_MAPS)
        else:
            end = torch.zeros(1) if end_at_zero or steps == levels else table[:1]
        return Schedule(timesteps=(1000 * sigmas).round().to(torch.int64), sigmas=torch.cat([sigmas, end]))

    @property
    def has_distilled_guidance(self) -> bool:
        """Whether the guidance scale is an input of the network, as in Flux.1 dev."""
        return bool(getattr(getattr(self.network, "params", None), "guidance_embed", False))

    @property
    def prediction(self) -> str:
        return VELOCITY

    @property
    def text_width(self) -> int:
        return _size_of(self.network, _TEXT_INPUTS, "in_features") or 0

    @property
    def pooled_width(self) -> int | None:
        return _size_of(self.network, _POOLED_INPUTS, "in_features")

    @property
    def width(self) -> int:
        return _size_of(self.network, _TEXT_INPUTS, "out_features") or 0

    @property
    def architecture(self) -> str:
        config = self.base.model_config.unet_config
        size = next((config[name] for name in ("hidden_size", "dim", "depth", "num_layers") if name in config), "")
        return f"{type(self.base).__name__}-{size}-{self.base.latent_format.latent_channels}-{self.text_width}"


def _size_of(network: Any, layers: tuple[str, ...], side: str) -> int | None:
    """Channels on one side of the first of these linear layers that a network has, or None."""
    for name in layers:
        try:
            width = getattr(network.get_submodule(name), side, None)
        except AttributeError:
            continue
        if width is not None:
            return int(width)
    return None
