"""Augmentation by crops and homographies, beside scikit-image's warp in float64."""

from __future__ import annotations

import pytest
import torch
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.subjects.augmentation import augmented, source_corners
from identity_edit_pack.pipelines.training.loop import generator_of
from skimage.transform import ProjectiveTransform, warp

HEIGHT, WIDTH, COUNT = 40, 56, 4


def photos(count: int = 2) -> torch.Tensor:
    noise = torch.rand(count, 3, 10, 14, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, (HEIGHT, WIDTH), mode="bilinear").permute(0, 2, 3, 1).contiguous()


def test_every_image_is_the_warp_of_its_corners_and_the_mask_goes_with_it():
    images, masks = photos(), photos()[..., 0]
    made, warped = augmented(images, COUNT, smallest_crop=0.5, perspective=0.15, seed=3, masks=masks)
    assert warped is not None and made.shape == (8, HEIGHT, WIDTH, 3) and warped.shape == (8, HEIGHT, WIDTH)
    corners = torch.tensor([[0.0, 0.0], [WIDTH - 1, 0.0], [WIDTH - 1, HEIGHT - 1], [0.0, HEIGHT - 1]])
    for index in range(2):
        assert torch.equal(made[index * COUNT], images[index]) and torch.equal(warped[index * COUNT], masks[index])
        for number in range(1, COUNT):
            quad = source_corners(generator_of(3, index * COUNT + number, "augmentation"), 0.5, 0.15)
            photo = (quad * corners[2]).double().numpy()
            from_made = ProjectiveTransform.from_estimate(corners.double().numpy(), photo)  # of the new image's pixels
            place = index * COUNT + number
            for result, source in ((made[place], images[index]), (warped[place], masks[index])):
                expected = warp(source.double().numpy(), from_made, order=1, mode="edge")
                assert (result.double() - torch.from_numpy(expected)).abs().max() < 1e-4


def test_without_perspective_it_only_crops_and_the_seed_alone_decides():
    for index in range(50):
        (left, top), (_, right_top), (right, bottom), _ = source_corners(generator_of(1, index), 0.6, 0.0).tolist()
        assert right_top == top and 0.0 <= left < right <= 1.0 and 0.0 <= top < bottom <= 1.0
        assert right - left == pytest.approx(bottom - top, abs=1e-6) and right - left + 1e-6 >= 0.6
    first, no_mask = augmented(photos(), COUNT, seed=5)
    assert no_mask is None and torch.equal(first, augmented(photos(), COUNT, seed=5)[0])
    assert not torch.equal(first[1], augmented(photos(), COUNT, seed=6)[0][1])


@pytest.mark.parametrize("wrong", [{"count": 0}, {"smallest_crop": 0.0}, {"perspective": 0.3}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]):
    with pytest.raises(IdentityEditError, match="choose 1 or more, above 0 to 1, and 0 to 0.2"):
        augmented(photos(), **{"count": 2, **wrong})
