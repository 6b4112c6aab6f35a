"""Masks from boxes that a user types."""

from __future__ import annotations

import math

import torch

from ..shared.errors import IdentityEditError
from ..shared.parsing import lines_of_numbers


def mask_of_boxes(text: str, height: int, width: int) -> torch.Tensor:
    """[1, height, width], 1 inside of the boxes; a line 'left, top, right, bottom' in pixels for each.

    Raises:
        IdentityEditError: for a line that is not a box inside of the image.
    """
    mask = torch.zeros(1, height, width)
    for line, numbers in lines_of_numbers(text):
        if numbers is None or len(numbers) != 4 or not all(map(math.isfinite, numbers)):
            raise IdentityEditError(f"boxes has the line '{line}'; write left, top, right, bottom in pixels.")
        left, top, right, bottom = (round(number) for number in numbers)
        if not (0 <= left < right and 0 <= top < bottom and left < width and top < height):
            raise IdentityEditError(f"boxes has '{line}', which is no box in an image of {width}x{height}; correct it.")
        mask[:, top:bottom, left:right] = 1.0
    return mask
