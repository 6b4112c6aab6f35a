"""Image conversion: to RGB float 0 to 1 of matching sizes, to and from Pillow, and reading of untrusted files."""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image, ImageOps

from .comfy_types import Vae
from .errors import IdentityEditError, check_finite, not_finite
from .input_checks import BRIGHTEST_HDR, check_images

PIXELS_PER_LATENT_PIXEL = 8
"""Image pixels per latent pixel of Stable Diffusion and most flow models, along each side."""
CROPS = (8, 16)
"""VAE Encode crops images to multiples of these, by VAE (16: Flux.2's)."""
MOST_PIXELS = 100_000_000
"""Largest accepted image, twice the resolution of cameras. (A file of a few kilobytes can claim any size.)"""
_NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
"""Formats that Pillow identifies but cannot decode, or only with an external program (Ghostscript)."""


def as_color(images: torch.Tensor, name: str = "images") -> torch.Tensor:
    """Convert gray, RGB or RGBA images to RGB.

    Args:
        images: [B, H, W, C] with 1 (gray), 2 (gray and alpha), 3 or 4 (RGBA) channels: floating point of 0 to 1, or
            unsigned integers of 8 or 16 bits. Alpha is dropped, as everywhere in ComfyUI.
        name: the input's name as the user sees it.

    Returns:
        [B, H, W, 3] float32 CPU, 0 to 1.

    Raises:
        IdentityEditError: for another shape, NaN, or values out of range.
    """
    return _colors(_values(images, name))


def on_white(images: torch.Tensor, name: str = "images") -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Images as `as_color` takes them, composited over white, and their opacity.

    Returns:
        [B, H, W, 3] float32 CPU, 0 to 1, and for each image its opacity [H, W], or None if it is fully opaque.

    Raises:
        IdentityEditError: as `as_color`.
    """
    values = _values(images, name)
    colors = _colors(values)
    if values.shape[-1] in (1, 3):
        return colors, [None] * len(values)
    opacity = values[..., -1].clamp(0.0, 1.0)
    flat = colors * opacity[..., None] + (1.0 - opacity[..., None])
    return flat, [each.clone() if float(each.min()) < 1.0 else None for each in opacity]


def _values(images: torch.Tensor, name: str) -> torch.Tensor:
    check_images(images, name)
    values = images.detach().cpu()
    return values.float() if values.is_floating_point() else values.float() / torch.iinfo(images.dtype).max


def _colors(values: torch.Tensor) -> torch.Tensor:
    if values.shape[-1] <= 2:
        values = values[..., :1].expand(*values.shape[:-1], 3)
    return values[..., :3].clamp(0.0, 1.0)


def middle(batch: torch.Tensor, multiple: int = PIXELS_PER_LATENT_PIXEL) -> torch.Tensor:
    """Center crop of images [B, H, W, C] or masks [B, H, W] to multiples of so many pixels, as VAE Encode does.

    Smaller sides are kept; such images have no latent.
    """
    for dimension in (1, 2):
        side = batch.shape[dimension]
        kept = side // multiple * multiple or side
        batch = batch.narrow(dimension, (side - kept) // 2, kept)
    return batch


def matched_images(
    first: torch.Tensor, second: torch.Tensor, names: tuple[str, str]
) -> tuple[torch.Tensor, torch.Tensor, str | None]:
    """Two batches of images as RGB, with equal sizes and counts, for a pixel-by-pixel comparison.

    If the sizes differ only by VAE Encode's crop, the larger images are cropped; a batch of one is repeated.

    Args:
        first, second: as `as_color` takes them.
        names: the inputs' names as the user sees them.

    Returns:
        both [B, H, W, 3] float32 CPU, 0 to 1, and a sentence for the report if one was cropped.

    Raises:
        IdentityEditError: for invalid images, or sizes or counts that do not match.
    """
    images = [as_color(each, name) for each, name in zip((first, second), names, strict=True)]
    sizes = [f"{each.shape[2]}x{each.shape[1]}" for each in images]
    note = None
    if images[0].shape[1:] != images[1].shape[1:]:
        for cut, other, multiple in ((*pair, multiple) for multiple in CROPS for pair in ((0, 1), (1, 0))):
            smaller = middle(images[cut], multiple)
            if smaller.shape[1:] == images[other].shape[1:]:
                images[cut] = smaller
                note = f"{names[cut]} ({sizes[cut]}) was center-cropped to {sizes[other]}, as VAE Encode does."
                break
        else:
            raise IdentityEditError(
                f"{names[0]} has {sizes[0]} pixels and {names[1]} {sizes[1]}, a larger difference than VAE Encode's "
                f"crop; scale both to the same size."
            )
    counts = [len(each) for each in images]
    if counts[0] != counts[1] and 1 not in counts:
        raise IdentityEditError(
            f"{names[0]} holds {counts[0]} images and {names[1]} {counts[1]}; use equal numbers, or a single image for "
            f"one of them."
        )
    images = [each.expand(max(counts), -1, -1, -1) for each in images]
    return images[0], images[1], note


def encoded(vae: Vae, images: torch.Tensor, name: str, *, with_frames: bool = False) -> torch.Tensor:
    """Encode images with a VAE.

    Args:
        vae: VAE.
        images: [B, H, W, 3], 0 to 1; the VAE crops sides to multiples of 8 pixels.
        name: the images' name for messages.
        with_frames: for a model whose latents have frames, such as Qwen-Image: its VAE takes a batch for the frames of
            one video, so every image is encoded alone.

    Returns:
        [B, C, h, w] float32 CPU, in the scale of LATENT sockets; [B, C, 1, h, w] with frames.

    Raises:
        IdentityEditError: for images below 8 pixels, latents of a video VAE, or values that are not finite.
    """
    height, width = images.shape[1:3]
    if min(height, width) < PIXELS_PER_LATENT_PIXEL:
        raise IdentityEditError(f"{name} is {width}x{height} pixels; use one of 64 or more.")
    batches = images[..., :3].split(1) if with_frames else [images[..., :3]]
    latents = torch.cat([vae.encode(batch).detach().float().cpu() for batch in batches])
    if latents.ndim != 4 and not with_frames:
        raise IdentityEditError(
            f"The vae returns latents {tuple(latents.shape)}, as video VAEs do; use the VAE of the same checkpoint as "
            f"the model."
        )
    check_finite(latents, not_finite(latents, f"The latent of {name[:1].lower()}{name[1:]}") or "")
    return latents


# --- From and to Pillow, and files -----------------------------------------------------------------------------------


def as_bytes(image: torch.Tensor) -> np.ndarray:
    """An image [H, W, 3 or more] or mask [H, W], 0 to 1, as uint8 RGB [H, W, 3] or [H, W]."""
    colors = image if image.ndim == 2 else image[..., :3]
    return (colors.detach().float().clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).cpu().numpy()


def to_pillow(image: torch.Tensor) -> Image.Image:
    """The same as a Pillow image."""
    return Image.fromarray(as_bytes(image))


def from_pillow(image: Image.Image) -> torch.Tensor:
    """[H, W, channels] or, of a gray image, [H, W]; float32, 0 to 1."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)


def image_formats() -> dict[str, str]:
    """Format by file extension (lower case, with its dot) for all images that Pillow can read here.

    Other packs may add formats, as pillow_heif does.
    """
    readable = _readable()
    return {ending: name for ending, name in Image.registered_extensions().items() if name in readable}


def _readable() -> list[str]:
    """Pillow's formats in the order in which it tries them."""
    Image.init()
    return [name for name in Image.ID if name in Image.OPEN and name not in _NO_IMAGES]


def open_image(path: str | os.PathLike[str], name: str, remedy: str = "save it again, or delete it") -> Image.Image:
    """Open and decode an image file: EXIF orientation applied, eight bits per channel.

    Args:
        path: the file; its format is detected from its content, not its extension. An animation gives its first frame.
        name: its name for messages.
        remedy: end of the messages.

    Raises:
        IdentityEditError: when it is missing, damaged, not an image, or larger than `MOST_PIXELS`.
    """
    try:
        with Image.open(path, formats=_readable()) as file:
            if file.width * file.height > MOST_PIXELS:
                raise IdentityEditError(
                    f"The image {name} claims {file.width}x{file.height} pixels, which is too large; {remedy}."
                )
            image = ImageOps.exif_transpose(file)
            image.load()
    except IdentityEditError:
        raise
    except Exception as error:  # Pillow's readers raise exceptions of any kind on damaged files
        raise IdentityEditError(f"The image {name} cannot be read ({error}); {remedy}.") from error
    if image.mode.startswith("I"):  # 16 bits; convert() would clip values above 255
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257.0).round().clip(0, 255).astype(np.uint8))
    if image.mode == "F":  # 0 to 1 and above, or 8- or 16-bit levels; convert() assumes 8-bit levels
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        brightest = values.max()
        one = 1.0 if brightest <= BRIGHTEST_HDR else 255.0 if brightest <= 255.0 else 65535.0
        image = Image.fromarray((values / one * 255.0).round().clip(0, 255).astype(np.uint8))
    return image


def read_image(path: str | os.PathLike[str], name: str) -> torch.Tensor:
    """An image file as an IMAGE [1, H, W, C] float32, 0 to 1: four channels where it has transparency, else three.

    Raises:
        IdentityEditError: as `open_image`.
    """
    image = open_image(path, name)
    return from_pillow(image.convert("RGBA" if image.has_transparency_data else "RGB"))[None]
