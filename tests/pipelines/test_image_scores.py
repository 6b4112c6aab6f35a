"""MSE, PSNR and SSIM against scikit-image, torchmetrics and float64 arithmetic, of wholes and of parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from identity_edit_pack.pipelines.inversion.reconstruction import psnr
from identity_edit_pack.pipelines.scores import pixels as image_scores

GENERATOR = torch.Generator().manual_seed(4)
SOURCE = torch.nn.functional.interpolate(torch.rand(2, 3, 9, 7, generator=GENERATOR), size=(48, 40)).movedim(1, -1)
EDITED = (SOURCE + 0.2 * torch.randn(SOURCE.shape, generator=GENERATOR)).clamp(0.0, 1.0)
MASK = (torch.rand(2, 48, 40, generator=GENERATOR) > 0.7).float()


def skimage_map(number: int) -> np.ndarray:
    """SSIM of every pixel and color with the settings of Wang et al. 2004."""
    from skimage.metrics import structural_similarity

    pair = [images[number].double().numpy() for images in (EDITED, SOURCE)]
    settings = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=-1)
    _, found = structural_similarity(*pair, full=True, **settings)
    return found[5:-5, 5:-5].mean(axis=-1)


def test_ssim_is_that_of_scikit_image_and_of_torchmetrics() -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = image_scores.ssim(EDITED, SOURCE)
    assert found.dtype == torch.float64 and found.shape == (2,)
    assert found.tolist() == pytest.approx([skimage_map(0).mean(), skimage_map(1).mean()], abs=2e-6)
    pair = [images.movedim(-1, 1).double() for images in (EDITED, SOURCE)]
    _, full = structural_similarity_index_measure(*pair, data_range=1.0, reduction="none", return_full_image=True)
    without_border = full[:, :, 5:-5, 5:-5].mean(dim=(1, 2, 3))
    assert found.tolist() == pytest.approx(without_border.tolist(), abs=2e-6)
    assert image_scores.ssim(SOURCE, SOURCE).tolist() == pytest.approx([1.0, 1.0])


def test_ssim_of_a_part_is_the_mean_of_its_windows() -> None:
    found = image_scores.ssim(EDITED, SOURCE, MASK)
    for number in range(2):
        weights = MASK[number, 5:-5, 5:-5].double().numpy()
        assert float(found[number]) == pytest.approx((skimage_map(number) * weights).sum() / weights.sum(), abs=5e-6)


def test_errors_are_those_of_numpy_and_torchmetrics() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    error = image_scores.mean_squared_error(EDITED, SOURCE)
    for number in range(2):
        difference = EDITED[number].double().numpy() - SOURCE[number].double().numpy()
        assert float(error[number]) == pytest.approx((difference**2).mean())
        wanted = peak_signal_noise_ratio(EDITED[number].double(), SOURCE[number].double(), data_range=1.0)
        assert float(image_scores.psnr_of_error(error)[number]) == pytest.approx(float(wanted))
    torch.testing.assert_close(image_scores.psnr_of_error(error), psnr(EDITED, SOURCE))
    assert image_scores.psnr_of_error(torch.zeros(1)).tolist() == [math.inf]


def test_only_pixels_of_the_part_count() -> None:
    found = image_scores.mean_squared_error(EDITED, SOURCE, MASK)
    for number in range(2):
        inside = MASK[number].bool()
        wanted = (EDITED[number][inside].double() - SOURCE[number][inside].double()).square().mean()
        assert float(found[number]) == pytest.approx(float(wanted))
    half = image_scores.mean_squared_error(EDITED, SOURCE, 0.5 * MASK)
    torch.testing.assert_close(half, found)


def test_a_mask_of_ones_is_the_whole_and_one_of_zeros_is_nothing() -> None:
    ones, zeros = torch.ones(2, 48, 40), torch.zeros(2, 48, 40)
    for score in (image_scores.mean_squared_error, image_scores.ssim):
        torch.testing.assert_close(score(EDITED, SOURCE, ones), score(EDITED, SOURCE))
        assert bool(score(EDITED, SOURCE, zeros).isnan().all())


def test_multiplied_images_are_black_outside() -> None:
    found = image_scores.multiplied(EDITED, MASK)
    assert torch.equal(found, EDITED * MASK[..., None]) and found.dtype == EDITED.dtype
    # Over all pixels the error of the part is thinned out by the rest, which is equal now: PIE-Bench's rule.
    thinned = image_scores.mean_squared_error(found, image_scores.multiplied(SOURCE, MASK))
    part = image_scores.mean_squared_error(EDITED, SOURCE, MASK)
    torch.testing.assert_close(thinned, part * MASK.double().mean(dim=(1, 2)))


def test_images_smaller_than_a_window_have_no_ssim() -> None:
    assert bool(image_scores.ssim(EDITED[:, :10], SOURCE[:, :10]).isnan().all())
    assert not bool(image_scores.ssim(EDITED[:, :11], SOURCE[:, :11]).isnan().any())
