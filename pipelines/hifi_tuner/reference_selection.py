"""Reference selection by cosine similarity of image features.

Wang et al. 2023 (section 3.3) choose the source image whose DINO ViT-S/16 features are most similar to those of the
first generated image, so that guided generation changes as little as possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import avg_pool2d, conv2d, interpolate, normalize, one_hot, pad

from ..networks.image_encoders import Encoder
from ..shared.errors import IdentityEditError, check_finite
from ..shared.masks import masks_for

BACKGROUND = 0.5
"""Gray level that replaces the background when only the subject is compared."""
MARGIN = 0.1
"""[choice] Margin around the subject's box, as a fraction of its longer side."""


@dataclass(frozen=True)
class Choice:
    """The chosen reference.

    Attributes:
        index: index of the source, from 0.
        similarities: [n] cosine similarity of each source to the generated image (or mean over several), -1 to 1.
    """

    index: int
    similarities: torch.Tensor


def select_reference(
    generated: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    encode: Encoder,
    *,
    generated_masks: Sequence[torch.Tensor | None] | None = None,
    source_masks: Sequence[torch.Tensor | None] | None = None,
) -> Choice:
    """Select the source image most similar to the generated one (Wang et al. 2023, section 3.3).

    Args:
        generated: images [h, w, 3], 0 to 1; similarities are averaged over several.
        sources: images [h, w, 3].
        encode: `histogram_features`, or the result of `encoder_of_folder` or `encoder_of_clip_vision`.
        generated_masks, source_masks: masks [h, w], 1 on the subject. For images with a mask, only the subject is
            compared (see `subject_only`).

    Raises:
        IdentityEditError: when there is no image, or a mask is empty.
    """
    if len(sources) == 0 or len(generated) == 0:
        raise IdentityEditError("There is no image to choose from; connect the subject's images.")
    features = [
        encode([image if mask is None else subject_only(image, mask) for image, mask in _pairs(images, masks)])
        for images, masks in ((generated, generated_masks), (sources, source_masks))
    ]
    similarities = (normalize(features[1].float(), dim=1) @ normalize(features[0].float(), dim=1).T).mean(dim=1)
    check_finite(similarities, "The images' features", "choose another encoder, or load it in float32")
    return Choice(int(similarities.argmax()), similarities)


def subject_only(image: torch.Tensor, mask: torch.Tensor, margin: float = MARGIN) -> torch.Tensor:
    """The subject on gray, cropped to a square around it.

    Otherwise the background would matter as much as the subject. The crop is square because encoders resize to squares,
    which would distort the subject.

    Args:
        image: [h, w, 3].
        mask: [h, w] of any size, 1 on the subject.
        margin: margin around the subject's box, as a fraction of its longer side.

    Returns:
        [side, side, 3].

    Raises:
        IdentityEditError: when the mask is empty.
    """
    inside = masks_for(mask, "A mask", image.shape[0], image.shape[1], 1)[0].to(image)
    rows, columns = torch.nonzero((inside > 0.5).any(1)).flatten(), torch.nonzero((inside > 0.5).any(0)).flatten()
    if len(rows) == 0:
        raise IdentityEditError("A mask is empty; connect one that is white on the subject, as of Segment Subject.")
    on_gray = image * inside.unsqueeze(-1) + BACKGROUND * (1 - inside.unsqueeze(-1))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    side = max(1, round(max(bottom - top, right - left) * (1 + 2 * margin)))
    top, left = (top + bottom - side) // 2, (left + right - side) // 2
    height, width = image.shape[:2]
    around = (max(0, -left), max(0, left + side - width), max(0, -top), max(0, top + side - height))
    padded = pad(on_gray.permute(2, 0, 1), around, value=BACKGROUND)
    top, left = top + around[2], left + around[0]
    return padded[:, top : top + side, left : left + side].permute(1, 2, 0)


def histogram_features(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Color and gradient histograms as features [n, 64 + 512], without a network.

    The image is resized to 64x64. The features are a histogram of 4x4x4 colors, and, for 8x8 cells, histograms of the
    gradient orientation in 8 directions weighted by magnitude (Dalal and Triggs 2005), which depend on the subject's
    pose. Each half is normalized to length 1. None of ComfyUI's requirements provides such features.
    """
    features = []
    for image in images:
        small = interpolate(
            image[..., :3].float().cpu().permute(2, 0, 1)[None], size=(64, 64), mode="bilinear", antialias=True
        ).clamp(0.0, 1.0)
        levels = (small * 4).long().clamp(max=3)[0]
        color = (levels[0] * 16 + levels[1] * 4 + levels[2]).flatten().bincount(minlength=64).float().sqrt()
        gray = pad(small.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        kernel = torch.tensor([[[[0.0, 0, 0], [-1, 0, 1], [0, 0, 0]]], [[[0.0, -1, 0], [0, 0, 0], [0, 1, 0]]]])
        dx, dy = conv2d(gray, kernel)[0]
        direction = ((torch.atan2(dy, dx) / (2 * torch.pi)) * 8).round().long() % 8
        weighed = one_hot(direction, 8).permute(2, 0, 1) * torch.hypot(dx, dy)
        cells = avg_pool2d(weighed, 8).sqrt().flatten()  # the root limits the influence of single strong edges
        features.append(torch.cat([normalize(color, dim=0), normalize(cells, dim=0)]))
    return torch.stack(features)


def _pairs(
    images: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None] | None
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    masks = [None] * len(images) if masks is None else masks
    if len(masks) != len(images):
        raise IdentityEditError(
            f"There are {len(masks)} masks for {len(images)} images; connect one mask per image, or none."
        )
    for image in images:
        if image.ndim != 3 or image.shape[-1] < 3 or image.numel() == 0:
            raise IdentityEditError(f"An image has the shape {tuple(image.shape)}; connect images with three channels.")
    return list(zip((image[..., :3].detach().cpu().float() for image in images), masks, strict=True))
