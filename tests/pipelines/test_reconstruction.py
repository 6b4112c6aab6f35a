"""PSNR against its definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from identity_edit_pack.pipelines.inversion import reconstruction
from identity_edit_pack.pipelines.shared.errors import IdentityEditError


def test_psnr_of_a_known_difference():
    image = 0.9 * torch.rand(2, 6, 5, 3)
    changed = image.clone()
    changed[0] += 0.1
    changed[1] += 0.01
    torch.testing.assert_close(
        reconstruction.psnr(image, changed), torch.tensor([20.0, 40.0], dtype=torch.float64), atol=1e-3, rtol=0
    )
    assert reconstruction.psnr(image, image).tolist() == [math.inf, math.inf]


def test_what_no_cut_of_vae_encode_explains_is_refused():
    with pytest.raises(IdentityEditError, match="image has 26x17 pixels and reconstruction 26x16, a larger difference"):
        reconstruction.psnr(torch.rand(1, 17, 26, 3), torch.rand(1, 16, 26, 3))
    with pytest.raises(IdentityEditError, match="image holds 3 images and reconstruction 2"):
        reconstruction.psnr(torch.rand(3, 16, 16, 3), torch.rand(2, 16, 16, 3))


def test_the_warning_names_the_images_below():
    assert reconstruction.reconstruction_warning(torch.tensor([25.0, 30.0])) is None
    warning = reconstruction.reconstruction_warning(torch.tensor([25.0, 12.34, math.nan]))
    assert warning is not None and "2 (12.3 dB), 3 (nan dB)" in warning
