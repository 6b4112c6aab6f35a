"""Visualization of attention maps and masks: heat colors and outlines over an image, and maps by step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import interpolate, max_pool2d

from ...attention.capture import IdentityAttention
from ...attention.identity_mask import rough_mask
from ..shared.errors import IdentityEditError
from ..shared.images import from_pillow

# Black, purple, red, yellow, white: brightness increases with the value, also in grayscale and for the color-blind.
_COLORS = ((0.0, 0.0, 0.02), (0.34, 0.06, 0.43), (0.73, 0.21, 0.33), (0.98, 0.56, 0.04), (0.99, 1.0, 0.64))
_OUTLINE = (0.1, 1.0, 0.3)


def heat_colors(values: torch.Tensor) -> torch.Tensor:
    """Colors [..., 3] of values [...] in [0, 1]."""
    colors = torch.tensor(_COLORS, device=values.device)
    position = values.clamp(0.0, 1.0) * (len(_COLORS) - 1)
    below = position.floor().long().clamp(max=len(_COLORS) - 2)
    share = (position - below).unsqueeze(-1)
    return colors[below] * (1 - share) + colors[below + 1] * share


def lay_over(image: torch.Tensor, values: torch.Tensor, opacity: float = 0.6) -> torch.Tensor:
    """Overlay a map [1 or B, h, w] in [0, 1] as heat colors on an IMAGE [B, H, W, 3]; opacity 0 is only the image."""
    colors = heat_colors(enlarged(values.to(image.device), image))
    return image[..., :3] * (1 - opacity) + colors * opacity


def outlined(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Draw the contour of a mask [1 or B, h, w], thresholded at one half, on an IMAGE [B, H, W, 3]."""
    inside = (enlarged(mask.to(image.device), image) > 0.5).float().unsqueeze(1)
    width = 1 + 2 * max(1, min(image.shape[1:3]) // 256)
    grown = max_pool2d(inside, width, stride=1, padding=width // 2)
    line = (grown - inside).squeeze(1).unsqueeze(-1)
    return image[..., :3] * (1 - line) + torch.tensor(_OUTLINE, device=image.device) * line


def maps_by_step(
    attention: IdentityAttention, image: torch.Tensor, steps: Sequence[int], opacity: float = 0.6
) -> tuple[torch.Tensor, list[str]]:
    """Every token's map at some steps over an IMAGE, as in figure 3 of Wang et al. 2023, each divided by its maximum as
    in Hertz et al. 2023.

    Args:
        attention: recorded with `by_step`.
        image: IMAGE [B, H, W, 3] that was sampled.
        steps: steps from 1, the first of the run; empty for up to five from the first to the last.
        opacity: see `lay_over`.

    Returns:
        [steps * B * tokens, H + strip, W, 3] with a label below each, in this order, and the labels.

    Raises:
        IdentityEditError: when no maps by step were recorded, or a step has none.
    """
    recorded, count = sorted(attention.steps), attention.step_count
    if not recorded:
        raise IdentityEditError(
            "identity_attention has no maps by step; turn on by_step in Identity Attention, sample with its model "
            "first, and connect the result to image."
        )
    if not steps:
        places = sorted({round(place * (len(recorded) - 1) / 4) for place in range(5)})
        steps = [recorded[place] + 1 for place in places]
    shown, labels = [], []
    for step in steps:
        if step - 1 not in attention.steps:
            raise IdentityEditError(
                f"steps has {step}, but the maps are of steps {recorded[0] + 1} to {recorded[-1] + 1}."
            )
        maps = rough_mask(attention.steps[step - 1])
        maps = maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        for number, token_map in enumerate(maps):
            of_image, token = divmod(number, len(attention.columns))
            if of_image >= len(image):
                raise IdentityEditError(
                    f"The maps are of more images than the {len(image)} connected; connect the images that were "
                    f"sampled with it."
                )
            labels.append(f"step {step} of {count}, token {attention.columns[token]}")
            shown.append(labeled(lay_over(image[of_image : of_image + 1], token_map[None], opacity)[0], labels[-1]))
    return torch.stack(shown), labels


def labeled(image: torch.Tensor, text: str) -> torch.Tensor:
    """An image [H, W, 3] with a line of text in a strip below it."""
    from PIL import Image, ImageDraw, ImageFont

    height = max(14, image.shape[0] // 16)
    strip = Image.new("RGB", (image.shape[1], height))
    fits = (image.shape[1] - 4) / ImageFont.load_default(0.7 * height).getlength(text)
    font = ImageFont.load_default(max(1.0, 0.7 * height * min(1.0, fits)))
    ImageDraw.Draw(strip).text((2, height / 2), text, "white", font, anchor="lm")
    return torch.cat([image.cpu(), from_pillow(strip)])


def enlarged(values: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Resize a map [1 or B, h, w] to an IMAGE's size [B, H, W], bilinear.

    Raises:
        IdentityEditError: when the numbers of maps and images differ.
    """
    if values.shape[0] not in (1, image.shape[0]):
        raise IdentityEditError(
            f"The map is of {values.shape[0]} images but {image.shape[0]} are connected; connect the images that were "
            f"sampled with it."
        )
    large = interpolate(values.float().unsqueeze(1), size=tuple(image.shape[1:3]), mode="bilinear").squeeze(1)
    return large.expand(image.shape[0], -1, -1)
