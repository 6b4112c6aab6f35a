"""Alignment against the formulas written another way, and against where marked points end up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from identity_edit_pack.pipelines.faces import alignment
from identity_edit_pack.pipelines.shared.errors import IdentityEditError

FACE = np.array([[60.0, 80.0], [100.0, 78.0], [81.0, 102.0], [65.0, 124.0], [97.0, 122.0]])


def random_faces(count: int) -> list[np.ndarray]:
    """Faces of all sizes, places and turns."""
    draw = np.random.default_rng(0)
    faces = []
    for _ in range(count):
        angle, scale = draw.uniform(-np.pi, np.pi), draw.uniform(0.2, 20)
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        faces.append((FACE - 80 + draw.normal(0, 6, (5, 2))) @ turn.T + draw.uniform(-500, 2000, 2))
    return faces


def quad_by_complex_numbers(points: np.ndarray) -> np.ndarray:
    """FFHQ's formula in the complex plane, where a quarter turn is a multiplication by i."""
    left_eye, right_eye, _, left_mouth, right_mouth = (complex(*point) for point in points)
    eyes, mouth = (left_eye + right_eye) / 2, (left_mouth + right_mouth) / 2
    between, down = right_eye - left_eye, mouth - eyes
    x = between - 1j * down
    x *= max(2.0 * abs(between), 1.8 * abs(down)) / abs(x)
    y = 1j * x
    center = eyes + 0.1 * down
    return np.array(
        [[corner.real, corner.imag] for corner in (center - x - y, center - x + y, center + x + y, center + x - y)]
    )


def test_the_quad_is_ffhqs() -> None:
    for points in random_faces(200):
        quad = alignment.ffhq_quad(points)
        assert quad.dtype == np.float64
        np.testing.assert_allclose(quad, quad_by_complex_numbers(points), rtol=0, atol=1e-6)


def test_the_transform_to_arcface_is_the_best_similarity() -> None:
    transform = pytest.importorskip("skimage.transform")
    for points in random_faces(50):
        wanted = transform.SimilarityTransform.from_estimate(points, np.array(alignment.ARCFACE_POINTS)).params[:2]
        np.testing.assert_allclose(alignment.arcface_transform(points), wanted, rtol=0, atol=1e-6)


def image_with_points(points: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Dark, with a soft bright spot at every point."""
    y, x = np.mgrid[:height, :width]
    spots = sum(np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 3.0**2)) for px, py in points)
    return torch.from_numpy(np.repeat(spots[..., None], 3, axis=2)).float().clamp(0, 1)


def brightest(image: torch.Tensor, near: np.ndarray, radius: int = 6) -> np.ndarray:
    """Center of the brightness around a place."""
    x0, y0 = (int(round(value)) for value in near)
    part = image[y0 - radius : y0 + radius + 1, x0 - radius : x0 + radius + 1, 0].double().numpy()
    y, x = np.mgrid[y0 - radius : y0 + radius + 1, x0 - radius : x0 + radius + 1]
    return np.array([(part * x).sum(), (part * y).sum()]) / part.sum()


@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["as it is", "shrunk"])
@pytest.mark.parametrize("shift", [0.0, -30.0], ids=["inside", "padded"])
def test_points_end_up_where_the_quad_says(scale: float, shift: float) -> None:
    points = (FACE + shift) * scale
    height, width = int(220 * scale), int(200 * scale)
    aligned = alignment.align_ffhq(image_with_points(points, height, width), points, 256)
    upper_left, lower_left, _, upper_right = aligned.quad
    across, down = (upper_right - upper_left) / 256, (lower_left - upper_left) / 256
    for point in points:
        # Pixels of the result are counted from their corners here, those of the image from their centers.
        place = np.linalg.solve(np.stack([across, down], axis=1), point - upper_left) - 0.5
        np.testing.assert_allclose(brightest(aligned.image, place), place, atol=0.35)


def test_what_lies_outside_is_blurred_reflection_and_not_the_person() -> None:
    image = torch.rand(120, 110, 3, generator=torch.Generator().manual_seed(0))
    aligned = alignment.align_ffhq(image, FACE - [40, 40], 256)
    assert torch.isfinite(aligned.image).all()
    outside = aligned.mask < 0.01
    assert 0.2 < outside.float().mean() < 0.8
    assert aligned.image[outside].std() < 0.5 * aligned.image[aligned.mask > 0.99].std()
    inside = alignment.align_ffhq(torch.rand(400, 400, 3), FACE + 100, 256)
    assert bool((inside.mask == 1).all())


def test_a_mask_goes_the_way_of_its_image() -> None:
    image = torch.rand(300, 260, 1, generator=torch.Generator().manual_seed(1)).expand(-1, -1, 3)
    points = FACE + [60, 50]
    aligned = alignment.align_ffhq(image, points, 256, mask=image[..., 0])
    torch.testing.assert_close(aligned.mask, aligned.image[..., 0])


def test_sixteen_bits_stay_sixteen_bits() -> None:
    fine = (torch.arange(300)[:, None].expand(300, 300) / 65535.0 + 0.5)[..., None].expand(-1, -1, 3)
    aligned = alignment.align_ffhq(fine, FACE + 60, 256)
    assert len(aligned.image.mul(65535).round().unique()) > 50  # of the one level that 8 bits would leave
    assert len(alignment.align_arcface(fine, FACE + 60).mul(65535).round().unique()) > 50


def test_arcface_points_end_up_where_they_belong() -> None:
    points = FACE * 3.0
    cropped = alignment.align_arcface(image_with_points(points, 600, 500), points)
    transform = alignment.arcface_transform(points)
    for point in points:
        place = transform @ [*point, 1.0]
        np.testing.assert_allclose(brightest(cropped, place, radius=4), place, atol=0.35)


def test_a_face_turned_aside_is_seen() -> None:
    assert abs(alignment.turned_aside(FACE)) < 0.1
    turned = FACE.copy()
    turned[2] = [58.0, 100.0]
    assert alignment.turned_aside(turned) < -alignment.PROFILE
    np.testing.assert_allclose(alignment.turned_aside(FACE * 7 + 100), alignment.turned_aside(FACE))


@pytest.mark.parametrize("points", [FACE[:4], FACE * np.nan, "five", np.zeros((5, 2))])
def test_points_that_are_no_face_are_refused(points: object) -> None:
    with pytest.raises(IdentityEditError, match="five points|coincide"):
        alignment.ffhq_quad(points)
    with pytest.raises(IdentityEditError, match="five points|coincide"):
        alignment.arcface_transform(points)


def test_points_outside_of_the_image_are_refused() -> None:
    with pytest.raises(IdentityEditError, match="outside the image"):
        alignment.align_ffhq(torch.rand(100, 100, 3), FACE + 1000, 256)
