"""One edit to be made, whatever dataset it comes from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.subjects.words import with_token
from PIL import Image, ImageOps, UnidentifiedImageError


@dataclass(frozen=True)
class EditCase:
    """An image and what is to become of it. Files are read when asked for, so that listing thousands costs little.

    Attributes:
        name: unique in its dataset, usable as a file name.
        group: the dataset's own kind of edit ("pose", "3_delete_object"), or the subject; "" without.
        image: the source image's file.
        source_prompt: what it shows; "" where the dataset does not say.
        target_prompt: what the edited image shows. Prompts call a subject by its class word; `named` adds the token.
        instruction: the edit as an instruction, for InstructPix2Pix.
        mask: an image, white where the edit may change something.
        target: the true edit, where the dataset knows it (the demo world does).
        references: other images of the subject, each with a caption in a .txt beside it or without.
        subject_word: the rare token that names the subject ("sks").
        class_word: what the subject is ("dog").
    """

    name: str
    group: str
    image: Path
    source_prompt: str
    target_prompt: str
    instruction: str = ""
    mask: Path | None = None
    target: Path | None = None
    references: tuple[Path, ...] = ()
    subject_word: str = ""
    class_word: str = ""

    def load_image(self, size: int) -> torch.Tensor:
        """[1, size, size, 3] in [0, 1]; see `load_square`."""
        return load_square(self.image, size)

    def load_target(self, size: int) -> torch.Tensor | None:
        """The true edit [1, size, size, 3] in [0, 1], or None."""
        return None if self.target is None else load_square(self.target, size)

    def load_mask(self, size: int) -> torch.Tensor | None:
        """[1, size, size], 1 where the edit may change the image and 0 elsewhere, or None."""
        if self.mask is None:
            return None
        mask = load_square(self.mask, size, Image.Resampling.NEAREST)
        return (mask.mean(-1) >= 0.5).float()

    def load_references(self, size: int) -> list[torch.Tensor]:
        """Each [size, size, 3] in [0, 1]."""
        return [load_square(path, size)[0] for path in self.references]

    def named(self) -> EditCase:
        """The same edit for a method that has learned the subject: "a sks dog in the snow" for "a dog in the snow"."""
        if not (self.subject_word and self.class_word):
            return self
        source, target = (
            with_token(prompt, self.class_word, self.subject_word)
            for prompt in (self.source_prompt, self.target_prompt)
        )
        return dataclasses.replace(self, source_prompt=source, target_prompt=target)


def load_square(path: Path, size: int, resampling: Image.Resampling = Image.Resampling.BICUBIC) -> torch.Tensor:
    """An image's center square, resized: [1, size, size, 3] in [0, 1].

    As the code of PIE-Bench (utils.py, `load_512`) and diffusers' training script of DreamBooth do; both resize with
    Pillow's bicubic filter, and the latter also turns images as their cameras say.

    Raises:
        IdentityEditError: when the file is missing or holds no image.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError as error:
        raise IdentityEditError(f"The image {path} is missing; download the dataset again.") from error
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise IdentityEditError(f"{path} cannot be read as an image; download the dataset again.") from error
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    square = image.crop((left, top, left + side, top + side)).resize((size, size), resampling)
    return torch.from_numpy(np.array(square)).float()[None] / 255


def save_image(image: torch.Tensor, path: Path) -> Path:
    """Write an image [H, W, 3] in [0, 1] as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    pixels = (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(temporary, "PNG")
    temporary.replace(path)
    return path
