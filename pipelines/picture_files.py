"""Picture files of any kind and origin, read without trusting what they say about themselves."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from .errors import IdentityEditError
from .input_checks import BRIGHTEST_HDR

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 100_000_000
"""Of one picture: twice what cameras give. A file of some kilobytes can claim any number of them."""
_NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
"""Formats that Pillow knows without reading pixels from them, or only by another program (Ghostscript)."""


def picture_formats() -> dict[str, str]:
    """The format of every file ending, with its dot and in lower case, whose pictures Pillow reads here.

    Other packs may bring further ones, as pillow_heif does.
    """
    from PIL import Image

    readable = _readable()
    return {ending: name for ending, name in Image.registered_extensions().items() if name in readable}


def _readable() -> list[str]:
    """Pillow's formats in the order in which it tries them."""
    from PIL import Image

    Image.init()
    return [name for name in Image.ID if name in Image.OPEN and name not in _NO_PICTURES]


def open_picture(path: str | os.PathLike[str], name: str, remedy: str = "save it again, or delete it") -> Image:
    """A picture file in upright orientation, wholly decoded, eight bits a channel.

    Args:
        path: the file; its content, not its ending, says what it is. Of an animation it is the first picture.
        name: its name for messages.
        remedy: the end of the messages.

    Raises:
        IdentityEditError: when it is missing, damaged, no picture, or larger than `MOST_PIXELS`.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=_readable()) as file:
            if file.width * file.height > MOST_PIXELS:
                raise IdentityEditError(
                    f"The picture {name} claims {file.width}x{file.height} pixels, more than can be read; {remedy}."
                )
            image = ImageOps.exif_transpose(file)
            image.load()
    except IdentityEditError:
        raise
    except Exception as error:  # Pillow's readers raise whatever damaged bytes lead them to
        raise IdentityEditError(f"The picture {name} cannot be read ({error}); {remedy}.") from error
    if image.mode.startswith("I"):  # 16 bits; convert() would cut values above 255 off
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257.0).round().clip(0, 255).astype(np.uint8))
    if image.mode == "F":  # 0 to 1 and above, or levels of 8 or 16 bits; convert() takes all for levels of 8
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        brightest = values.max()
        one = 1.0 if brightest <= BRIGHTEST_HDR else 255.0 if brightest <= 255.0 else 65535.0
        image = Image.fromarray((values / one * 255.0).round().clip(0, 255).astype(np.uint8))
    return image


def read_picture(path: str | os.PathLike[str], name: str) -> torch.Tensor:
    """A picture file as an IMAGE [1, H, W, C] float32, 0 to 1: four channels where it has transparency, else three.

    Raises:
        IdentityEditError: as `open_picture`.
    """
    import numpy as np

    image = open_picture(path, name)
    pixels = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"), dtype=np.float32)
    return torch.from_numpy(pixels / 255.0)[None]
