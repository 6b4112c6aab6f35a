"""Flow models (ComfyUI's CONST) with the architecture of Flux or SD3, which predict the velocity eps - z_0 at any noise
level from 0 to 1.

Inversion, sampling, per-step embeddings and attention maps support them; gradients and training do not yet.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.model_sampling import CONST

from ...shared.errors import check_steps
from .base import Capability, Family
from .noise import FLOW, VELOCITY
from .schedule import Schedule, noise_levels


class Flow(Family):
    capabilities = frozenset({Capability.TEXT_ATTENTION})
    noise_path = FLOW
    tag_weights = ("diffusion_model.img_in.", "diffusion_model.x_embedder.", "diffusion_model.final_layer.")

    @classmethod
    def includes(cls, sampling: Any, network: Any) -> bool:
        return isinstance(sampling, CONST) and isinstance(network, (Flux, OpenAISignatureMMDITWrapper))

    def schedule(self, steps: int, end_at_zero: bool = False, room_below: bool = False) -> Schedule:
        """Evenly spaced over the model's shifted noise levels, starting at 1, like ComfyUI's "simple" scheduler. The
        timesteps are the levels times 1000."""
        table = noise_levels(self.sampling)
        levels = table.shape[0]
        check_steps(steps, levels - room_below)
        sigmas = table[[-1 - i * levels // steps for i in range(steps)]]
        end = torch.zeros(1) if end_at_zero or steps == levels else table[:1]
        return Schedule(timesteps=(1000 * sigmas).round().to(torch.int64), sigmas=torch.cat([sigmas, end]))

    @property
    def prediction(self) -> str:
        return VELOCITY

    @property
    def text_width(self) -> int:
        config = self.base.model_config.unet_config
        return int(config.get("context_in_dim") or config["context_embedder_config"]["params"]["in_features"])

    @property
    def pooled_width(self) -> int | None:
        config = self.base.model_config.unet_config
        width = config.get("vec_in_dim", config.get("adm_in_channels"))
        return None if width is None else int(width)

    @property
    def architecture(self) -> str:
        config = self.base.model_config.unet_config
        size = config.get("hidden_size", config.get("depth"))
        return f"{type(self.base).__name__}-{size}-{config['in_channels']}-{self.text_width}"
