"""What a CLIP_VISION sees in an image, token by token, and what identifies one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..shared.errors import IdentityEditError, check_finite

_POSITIONS = "vision_model.embeddings.position_embedding.weight"
_NORM = "vision_model.post_layernorm."
_PROJECTION = "visual_projection.weight"


@dataclass(frozen=True)
class VisionTag:
    """What a file keeps of the CLIP vision that it was made with.

    Attributes:
        tokens: N, the class token and the patches.
        width: D of a token.
        weights: a few of its weights.
    """

    tokens: int
    width: int
    weights: tuple[float, ...]

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> VisionTag:
        """The tag that a file's description holds.

        Raises:
            KeyError, TypeError, ValueError: when it holds something else; see `files.understanding`.
        """
        weights = tuple(float(weight) for weight in description["weights"])
        return cls(int(description["tokens"]), int(description["width"]), weights)

    def difference(self, other: VisionTag) -> str | None:
        """What tells two apart, in words, or None. Weights are compared within the rounding of bfloat16."""
        if (self.tokens, self.width) != (other.tokens, other.width):
            return f"{self.tokens} tokens of {self.width} numbers instead of {other.tokens} of {other.width}"
        mine, its = torch.tensor(self.weights), torch.tensor(other.weights)
        if mine.shape != its.shape or float((mine - its).norm()) > 0.01 * float(its.norm()):
            return "different weights"
        return None


def vision_tag(clip_vision: Any) -> VisionTag:
    """The tag of a CLIP_VISION.

    Raises:
        IdentityEditError: when it is none of CLIP's (or SigLIP's) image encoders.
    """
    positions = _weight(clip_vision, _POSITIONS)
    if positions is None:
        raise IdentityEditError(
            "The CLIP vision is not a CLIP image encoder; load one such as CLIP-ViT-L-14 (Load CLIP Vision)."
        )
    flat = positions.flatten()
    chosen = flat[:: max(1, flat.shape[0] // 64)][:64]
    return VisionTag(int(positions.shape[0]), int(positions.shape[1]), tuple(chosen.tolist()))


def vision_tokens(clip_vision: Any, images: torch.Tensor) -> torch.Tensor:
    """The image encoder's last hidden states, normalized as CLIP normalizes its class token before projecting it.

    Args:
        clip_vision: CLIP_VISION.
        images: [B, H, W, 3] float32, 0 to 1; squeezed to the encoder's square, so that nothing is cut off.

    Returns:
        [B, N, D] float32 CPU: the class token first, then the patches row by row.
    """
    tokens = clip_vision.encode_image(images, crop=False)["last_hidden_state"].detach().float().cpu()
    scale, shift = (_weight(clip_vision, _NORM + part) for part in ("weight", "bias"))
    normalizes_itself = getattr(getattr(clip_vision.model, "vision_model", None), "output_layernorm", False)  # SigLIP
    if scale is not None and not normalizes_itself:
        tokens = torch.nn.functional.layer_norm(tokens, scale.shape, scale, shift)
    check_finite(tokens, "What the CLIP vision sees")
    return tokens


def vision_projection(clip_vision: Any) -> torch.Tensor | None:
    """CLIP's own projection [P, D] of a token to the space that it shares with CLIP's texts, where it has one."""
    return _weight(clip_vision, _PROJECTION)


def _weight(clip_vision: Any, name: str) -> torch.Tensor | None:
    weight = clip_vision.get_sd().get(name)
    return None if weight is None else weight.detach().float().cpu()
