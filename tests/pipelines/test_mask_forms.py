"""Masks brought to the size of an image or latent, against what ComfyUI itself does."""

from __future__ import annotations

import comfy.sd
import comfy.utils
import pytest
import tiny_flow_models
import tiny_models
import torch
from identity_edit_pack.nodes.sockets import at_image_size
from identity_edit_pack.pipelines.shared import masks
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.shared.images import matched_images, middle


def test_a_mask_grows_and_halves_as_comfyui_does_it() -> None:
    mask = torch.rand(2, 64, 48)
    for height, width in ((128, 96), (100, 300), (32, 24)):
        core = comfy.utils.common_upscale(mask[:, None], width, height, "bilinear", "disabled")[:, 0]
        torch.testing.assert_close(masks.of_size(mask, height, width), core)


@pytest.mark.parametrize("size", [(97, 131), (103, 135), (96, 129), (101, 128)])
def test_what_vae_encode_cuts_off_an_image_is_cut_off_its_mask(size: tuple[int, int]) -> None:
    mask = torch.rand(1, *size)
    vae = comfy.sd.VAE.__new__(comfy.sd.VAE)
    vae.downscale_ratio, vae.crop_input, vae.latent_dim, vae.output_channels = 8, True, 2, 1
    kept = vae.vae_encode_crop_pixels(mask[..., None])[..., 0]
    assert kept.shape == (1, 96, 128) and torch.equal(middle(mask), kept)
    assert torch.equal(masks.of_size(mask, 96, 128), kept)
    of_cells = torch.nn.functional.avg_pool2d(kept[:, None], 8)[:, 0]
    torch.testing.assert_close(masks.of_size(mask, 12, 16), of_cells)
    images = mask[..., None].expand(-1, -1, -1, 3)
    first, second, note = matched_images(images, kept[..., None], ("photo", "edit"))
    assert torch.equal(first, second) and note is not None and note.startswith("photo (")


@pytest.mark.parametrize("size", [(97, 131), (111, 143), (104, 136)])
def test_a_vae_of_16_pixels_cuts_more(size: tuple[int, int]) -> None:
    """Flux.2's: the latent of an image of 97x131 is that of its middle 96x128, and 104x136 lose 8 more."""
    mask = torch.rand(1, *size)
    vae = comfy.sd.VAE.__new__(comfy.sd.VAE)
    vae.downscale_ratio, vae.crop_input, vae.latent_dim, vae.output_channels = 16, True, 2, 1
    kept = vae.vae_encode_crop_pixels(mask[..., None])[..., 0]
    assert torch.equal(masks.of_size(mask, 96, 128), kept)
    torch.testing.assert_close(masks.of_size(mask, 6, 8), torch.nn.functional.avg_pool2d(kept[:, None], 16)[:, 0])


def test_masks_of_latent_pixels_are_shown_at_the_images_size() -> None:
    mask = torch.rand(1, 4, 6)
    for make, pixels in ((tiny_models.sd1, 8), (tiny_flow_models.flux, 8), (tiny_flow_models.flux2, 16)):
        shown = at_image_size(mask, make())
        assert shown.shape == (1, 4 * pixels, 6 * pixels)
        assert torch.equal(shown[:, ::pixels, ::pixels], mask)


def test_one_mask_is_for_all_images() -> None:
    mask = torch.rand(1, 8, 8)
    assert torch.equal(masks.masks_for(mask, "mask", 8, 8, 3), mask.expand(3, -1, -1))
    with pytest.raises(IdentityEditError, match="mask holds 2 masks for 3 images; connect one mask, or one per image"):
        masks.masks_for(mask.expand(2, -1, -1), "mask", 8, 8, 3)
