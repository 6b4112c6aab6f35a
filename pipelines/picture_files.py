"""Picture files of any kind and origin, read without trusting what they say about themselves."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .errors import IdentityEditError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 100_000_000
"""Of one picture: twice what cameras give. A file of some kilobytes can claim any number of them."""


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
        with Image.open(path) as file:
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
    return image
