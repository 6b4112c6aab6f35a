"""Stable Diffusion 1.x, 2.x, XL and models derived from them: UNets that predict noise or v at discrete timesteps,
including zero-terminal-SNR models."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.model_sampling as kinds
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...shared.errors import IdentityEditError
from .base import Capability, Family
from .noise import DIFFUSION, EPS, V
from .schedule import Schedule, ddim_schedule

_BEHIND_THE_POOLED_OUTPUT = ((comfy.model_base.SDXL, 6 * 256), (comfy.model_base.SDXLRefiner, 5 * 256))
"""Channels that ComfyUI appends to the pooled output: image sizes and the refiner's score, 256 channels each."""


class UNet(Family):
    capabilities = frozenset(Capability) - {Capability.VELOCITY}
    noise_path = DIFFUSION
    tag_weights = ("diffusion_model.time_embed.", "diffusion_model.input_blocks.0.", "diffusion_model.out.")

    @classmethod
    def includes(cls, sampling: Any, network: Any) -> bool:
        # In ComfyUI, V_PREDICTION and X0 are both subclasses of EPS.
        predicts_noise = isinstance(sampling, kinds.EPS) and not isinstance(sampling, kinds.X0)
        return predicts_noise and isinstance(sampling, kinds.ModelSamplingDiscrete) and isinstance(network, UNetModel)

    def schedule(self, steps: int, end_at_zero: bool = False, room_below: bool = False) -> Schedule:
        return ddim_schedule(self.sampling, steps, end_at_zero, room_below)

    @property
    def prediction(self) -> str:
        return V if isinstance(self.sampling, kinds.V_PREDICTION) else EPS

    @property
    def text_width(self) -> int:
        for module in self.network.modules():
            if isinstance(module, SpatialTransformer):
                return int(module.transformer_blocks[0].attn2.to_k.in_features)
        raise IdentityEditError("The model has no cross-attention; load a text-to-image checkpoint.")

    @property
    def pooled_width(self) -> int | None:
        for kind, behind in _BEHIND_THE_POOLED_OUTPUT:
            if isinstance(self.base, kind):
                return int(self.base.adm_channels) - behind
        return None

    @property
    def width(self) -> int:
        return int(self.network.model_channels)

    @property
    def architecture(self) -> str:
        in_channels = self.network.input_blocks[0][0].in_channels
        return f"{type(self.base).__name__}-{self.network.model_channels}-{in_channels}-{self.text_width}"
