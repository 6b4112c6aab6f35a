"""Image tokens and fingerprints of a CLIP_VISION."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..shared.comfy_types import ClipVision
from ..shared.errors import IdentityEditError, check_finite

_POSITIONS = "vision_model.embeddings.position_embedding.weight"
_NORM = "vision_model.post_layernorm."
_PROJECTION = "visual_projection.weight"


@dataclass(frozen=True)
class VisionTag:
    """Fingerprint of a CLIP vision model, stored in files made with it.

    Attributes:
        tokens: N, the class token and the patches.
        width: D, the channels of a token.
        weights: a sample of its weights.
    """

    tokens: int
    width: int
    weights: tuple[float, ...]

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> VisionTag:
        """Parse a tag from a file's description.

        Raises:
            KeyError, TypeError, ValueError: when it is invalid; see `files.parsing_file`.
        """
        weights = tuple(float(weight) for weight in description["weights"])
        return cls(int(description["tokens"]), int(description["width"]), weights)

    def difference(self, other: VisionTag) -> str | None:
        """A description of the difference, or None. Weights are compared within the rounding of bfloat16."""
        if (self.tokens, self.width) != (other.tokens, other.width):
            return f"{self.tokens} tokens of width {self.width} instead of {other.tokens} of width {other.width}"
        mine, its = torch.tensor(self.weights), torch.tensor(other.weights)
        if mine.shape != its.shape or float((mine - its).norm()) > 0.01 * float(its.norm()):
            return "different weights"
        return None


def vision_tag(clip_vision: ClipVision) -> VisionTag:
    """The tag of a CLIP_VISION.

    Raises:
        IdentityEditError: when it is not a CLIP (or SigLIP) image encoder.
    """
    positions = _weight(clip_vision, _POSITIONS)
    if positions is None:
        raise IdentityEditError(
            "The CLIP vision is not a CLIP image encoder; load one such as CLIP-ViT-L-14 (Load CLIP Vision)."
        )
    flat = positions.flatten()
    chosen = flat[:: max(1, flat.shape[0] // 64)][:64]
    return VisionTag(int(positions.shape[0]), int(positions.shape[1]), tuple(chosen.tolist()))


def vision_tokens(clip_vision: ClipVision, images: torch.Tensor) -> torch.Tensor:
    """The image encoder's last hidden states, normalized like CLIP's class token before its projection.

    Args:
        clip_vision: CLIP_VISION.
        images: [B, H, W, 3] float32, 0 to 1; resized to the encoder's square without cropping.

    Returns:
        [B, N, D] float32 CPU: the class token, then the patches row by row.
    """
    tokens = clip_vision.encode_image(images, crop=False)["last_hidden_state"].detach().float().cpu()
    scale, shift = (_weight(clip_vision, _NORM + part) for part in ("weight", "bias"))
    normalizes_itself = getattr(getattr(clip_vision.model, "vision_model", None), "output_layernorm", False)  # SigLIP
    if scale is not None and not normalizes_itself:
        tokens = torch.nn.functional.layer_norm(tokens, scale.shape, scale, shift)
    check_finite(tokens, "The CLIP vision output")
    return tokens


def vision_projection(clip_vision: ClipVision) -> torch.Tensor | None:
    """CLIP's projection matrix [P, D] from a token to the joint text and image space, or None if it has none."""
    return _weight(clip_vision, _PROJECTION)


def _weight(clip_vision: ClipVision, name: str) -> torch.Tensor | None:
    weight = clip_vision.get_sd().get(name)
    return None if weight is None else weight.detach().float().cpu()
