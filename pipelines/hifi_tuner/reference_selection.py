"""How alike two images of a subject look: features of images and their cosine similarity.

Wang et al. 2023 (section 3.3) choose as reference the source image whose features by DINO ViT-S/16 are the most alike
those of the first generated image, so that the guided generation has to change as little as possible.
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
"""Gray that takes the place of everything around the subject where only the subject counts."""
MARGIN = 0.1
"""[choice] Of the box around the subject, a share of its longer side."""


@dataclass(frozen=True)
class Choice:
    """The chosen reference.

    Attributes:
        index: which of the sources, from 0.
        similarities: [n] cosine similarity of each source to the generated image, -1 to 1; the mean over the
            generated images where there are several.
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
    """The source image that looks the most like the generated one (Wang et al. 2023, section 3.3).

    Args:
        generated: images [h, w, 3], 0 to 1; with several, the source that is the most alike all of them.
        sources: images [h, w, 3].
        encode: `histogram_features`, or what `encoder_of_folder` or `encoder_of_clip_vision` gives.
        generated_masks, source_masks: masks [h, w], 1 on the subject. Where an image has one, only the subject is
            looked at (see `subject_only`).

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
    """The subject on gray, cut to a square around it.

    Without this the background decides as much as the subject. The square keeps the subject's proportions, because
    encoders are given squares.

    Args:
        image: [h, w, 3].
        mask: [h, w] of any size, 1 on the subject.
        margin: around the subject's box, a share of its longer side.

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
    """Colors and orientations of edges, without any network: [n, 64 + 512].

    The image is brought to 64x64. First a histogram of 4x4x4 colors; then, in each of 8x8 cells, a histogram of the
    gradient's orientation in 8 directions weighed by its magnitude (Dalal and Triggs 2005), which says how the subject
    stands and where it looks. Each half has length 1 and counts the same. Written out in a few lines, because neither
    torchvision nor anything else in ComfyUI's requirements has such features, and scikit-image is not among them.
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
        cells = avg_pool2d(weighed, 8).sqrt().flatten()  # the root, so that one strong edge does not decide
        features.append(torch.cat([normalize(color, dim=0), normalize(cells, dim=0)]))
    return torch.stack(features)


def _pairs(
    images: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None] | None
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    masks = [None] * len(images) if masks is None else masks
    if len(masks) != len(images):
        raise IdentityEditError(
            f"There are {len(masks)} masks for {len(images)} images; give each image its mask, or no masks."
        )
    for image in images:
        if image.ndim != 3 or image.shape[-1] < 3 or image.numel() == 0:
            raise IdentityEditError(f"An image has the shape {tuple(image.shape)}; connect images with three channels.")
    return list(zip((image[..., :3].detach().cpu().float() for image in images), masks, strict=True))
