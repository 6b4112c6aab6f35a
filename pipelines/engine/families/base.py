"""What a technique may need of a model, and what a family of models tells it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import Any, ClassVar

from .noise import NoisePath
from .schedule import Schedule


class Capability(Enum):
    """What a technique needs beyond sampling; the values end the sentence in which a model without it is refused."""

    DISCRETE_TIMESTEPS = (
        "is not a noise-predicting UNet with discrete timesteps; load a Stable Diffusion 1.x, 2.x or XL checkpoint "
        "(flow and EDM models cannot be inverted by this node)"
    )
    CROSS_ATTENTION = (
        "has no cross-attention to the text that could be read or changed; load a Stable Diffusion 1.x, 2.x or XL "
        "checkpoint"
    )
    GRADIENTS = "does not give gradients; load a Stable Diffusion 1.x, 2.x or XL checkpoint"
    TRAINING = "cannot be trained here; load a Stable Diffusion 1.x, 2.x or XL checkpoint"


class Family(ABC):
    """One MODEL as a member of its family.

    Attributes:
        capabilities: what the family has.
        noise: its path from an image to noise.
        tag_weights: beginnings of the keys of weights that tell models of the family apart.
        sampling: the model's own noise levels (ComfyUI's `model_sampling`).
        network: its diffusion model.
    """

    capabilities: ClassVar[frozenset[Capability]]
    noise: ClassVar[NoisePath]
    tag_weights: ClassVar[tuple[str, ...]]

    def __init__(self, model: Any, sampling: Any, network: Any) -> None:
        self.base = model.model
        self.sampling = sampling
        self.network = network

    @classmethod
    @abstractmethod
    def includes(cls, sampling: Any, network: Any) -> bool:
        """Whether a model with this `model_sampling` and diffusion model is of the family."""

    @abstractmethod
    def schedule(self, steps: int, end_at_zero: bool = False, room_below: bool = False) -> Schedule:
        """Noise levels of a run of `steps` steps, as the model was trained with; see `schedule.ddim_schedule`.

        Raises:
            IdentityEditError: when `steps` is outside its range.
        """

    @property
    @abstractmethod
    def prediction(self) -> str:
        """What the network predicts: `noise.EPS`, V or VELOCITY."""

    @property
    @abstractmethod
    def text_width(self) -> int:
        """Channels of the text embeddings that the model takes (768 for SD1.x, 1024 for SD2.x, 2048 for SDXL)."""

    @property
    @abstractmethod
    def pooled_width(self) -> int | None:
        """Channels of the pooled output that it takes, or None where it takes none."""

    @property
    @abstractmethod
    def architecture(self) -> str:
        """Class, size and width of the text embeddings, for `ModelTag`."""
