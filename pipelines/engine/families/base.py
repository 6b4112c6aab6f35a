"""Capabilities that a technique can require of a model, and the interface of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import Any, ClassVar

import torch

from ...shared.comfy_types import Model
from .noise import NoisePath
from .schedule import Schedule


class Capability(Enum):
    """What a technique needs beyond sampling. Each value is the rest of the error message "The model NAME ...",
    and names the family that has every capability."""

    DISCRETE_TIMESTEPS = (
        "is not a noise-predicting UNet with discrete timesteps; load a Stable Diffusion 1.x, 2.x or XL checkpoint"
    )
    CROSS_ATTENTION = (
        "has no text cross-attention that this node could read or change; load a Stable Diffusion 1.x, 2.x or XL "
        "checkpoint"
    )
    TEXT_ATTENTION = (
        "has no attention between image and text that this node could read or change; load a Stable Diffusion, Flux, "
        "Chroma, Qwen-Image, Lumina 2, Z-Image, AuraFlow or HiDream checkpoint"
    )
    GRADIENTS = (
        "is of an architecture whose gradients are not supported; load a Stable Diffusion, Flux, Chroma, Qwen-Image, "
        "Lumina 2, Z-Image or AuraFlow checkpoint"
    )
    TRAINING = "cannot be trained here; load a Stable Diffusion 1.x, 2.x or XL checkpoint"
    TRUE_GUIDANCE = (
        "has distilled guidance and no unconditional side; use Edit-Friendly DDPM Inversion or the FlowEdit Sampler, "
        "or load a model with classifier-free guidance (Stable Diffusion, Chroma, Qwen-Image, Z-Image Base)"
    )
    VELOCITY = "is not a flow model; choose another method, or load Flux, Stable Diffusion 3 or Qwen-Image"
    ONE_TEXT = (
        "reads the texts of several encoders, which cannot be exchanged for a learned one; use Timestep-Aware Text "
        "Injection, which switches whole prompts, or load another model"
    )


class Family(ABC):
    """One MODEL as a member of its family.

    Attributes:
        capabilities: supported capabilities; of the family, or of one model.
        noise_path: how its latents mix image and noise.
        tag_weights: key prefixes of the weights that distinguish models of the family.
        sampling: the model's noise levels (ComfyUI's `model_sampling`).
        network: the diffusion model.
    """

    capabilities: frozenset[Capability]
    noise_path: ClassVar[NoisePath]
    tag_weights: ClassVar[tuple[str, ...]]

    def __init__(self, model: Model, sampling: Any, network: Any) -> None:
        self.base = model.model
        self.sampling = sampling
        self.network = network

    @classmethod
    @abstractmethod
    def includes(cls, sampling: Any, network: Any) -> bool:
        """Whether a model with this `model_sampling` and diffusion model belongs to the family."""

    @abstractmethod
    def schedule(self, steps: int, end_at_zero: bool = False, room_below: bool = False) -> Schedule:
        """Noise levels for `steps` sampling steps on the model's training schedule; see `schedule.ddim_schedule`.

        Raises:
            IdentityEditError: when `steps` is outside its range.
        """

    @property
    def noise_scale(self) -> float:
        """Standard deviation of the noise that the model was trained with, by which noise drawn for it is multiplied:
        1, or that of ComfyUI's Model Noise Scale node and of HiDream-O1."""
        half = torch.full((1,), 0.5)
        start = self.sampling.noise_scaling(half, torch.ones(1), torch.zeros(1))
        return float(start / half)

    @property
    @abstractmethod
    def prediction(self) -> str:
        """Prediction type of the network: `noise.EPS`, V or VELOCITY."""

    @property
    @abstractmethod
    def text_width(self) -> int:
        """Channels of the model's text embeddings (768 for SD1.x, 1024 for SD2.x, 2048 for SDXL), or 0 if the
        architecture is unknown."""

    @property
    @abstractmethod
    def pooled_width(self) -> int | None:
        """Channels of the pooled output, or None if the model takes none or its architecture is unknown."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of the network's blocks, for estimates of memory; 0 if the architecture is unknown."""

    @property
    @abstractmethod
    def architecture(self) -> str:
        """Class, size and text embedding width, for `ModelTag`."""
