"""Algorithm 4: known transforms are found again, and the transform moves images where its matrix says."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from identity_edit_pack.demo_world.attributes import Attributes
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.pipelines.hifi_tuner import reference_alignment as alignment
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from scipy.spatial import cKDTree

SIZE = 512


@functools.cache
def case(seed: int) -> tuple[torch.Tensor, torch.Tensor, tuple[float, ...]]:
    """A random asymmetric mask, its image under a similarity transform (neither is resampled), and the transform."""
    generator = np.random.default_rng(seed)
    amplitudes = generator.normal(size=(7, 2)) * (0.25 / np.sqrt(np.arange(1, 8)))[:, None]

    def inside(points: np.ndarray) -> torch.Tensor:
        angle, radius = np.arctan2(points[..., 1], points[..., 0]), np.linalg.norm(points, axis=-1)
        waves = (a * np.cos(k * angle) + b * np.sin(k * angle) for k, (a, b) in enumerate(amplitudes, start=1))
        return torch.from_numpy(radius < 0.16 * SIZE * (1 + sum(waves)).clip(0.35, 2.0))

    center_r, center_g = generator.uniform(-40, 40, (2, 2))
    scale, rotation = generator.uniform(0.7, 1.3), generator.uniform(-40, 40)
    turn = np.deg2rad(rotation)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    translation = matrix.T @ center_g / scale - center_r
    grid = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE)), axis=-1) - (SIZE - 1) / 2
    mask, moved = inside(grid - center_r), inside(grid @ matrix / scale - translation - center_r)
    return mask, moved, (float(scale), float(rotation), *map(float, translation))


def recovered(found: alignment.Similarity, true: tuple[float, ...]) -> bool:
    distance = np.hypot(found.translation_x - true[2], found.translation_y - true[3])
    return abs(found.scale / true[0] - 1) < 0.02 and abs(found.rotation - true[1]) < 1.0 and float(distance) < 1.0


def test_known_transforms_of_random_masks_are_recovered() -> None:
    right = [recovered(alignment.align_masks(mask, moved), true) for mask, moved, true in map(case, range(20))]
    assert sum(right) >= 19


def test_gradient_descent_of_the_paper_reaches_the_same_place() -> None:
    mask, moved, true = case(0)
    found = alignment.align_masks(mask, moved, optimizer=alignment.GRADIENT_DESCENT)
    assert abs(found.scale / true[0] - 1) < 0.02 and abs(found.rotation - true[1]) < 2.0


def test_the_paper_s_sum_is_zero_wherever_the_reference_lies_inside() -> None:
    """Why the scale is bounded and both directions count: one alone lets the reference shrink to its bound."""
    mask, moved, true = case(1)
    shrunken = alignment.align_masks(mask, moved, symmetric=False, scale_limit=2.0)
    assert shrunken.distance < 0.1
    assert abs(alignment.align_masks(mask, moved, scale_limit=2.0).scale / true[0] - 1) < 0.02


def test_the_limits_hold() -> None:
    mask, moved, _ = case(2)
    area_ratio = float((moved.sum() / mask.sum()).sqrt())
    fixed = alignment.align_masks(mask, moved, scale_limit=1.0, rotation_limit=0.0)
    assert fixed.scale == pytest.approx(area_ratio) and fixed.rotation == 0.0
    bounded = alignment.align_masks(mask, moved, scale_limit=1.01, rotation_limit=5.0, symmetric=False)
    assert 1 / 1.0101 <= bounded.scale / area_ratio <= 1.0101 and abs(bounded.rotation) <= 5.0001


def test_nearest_distances_are_those_of_a_k_d_tree() -> None:
    mask = case(0)[0].numpy()
    field = alignment._DistanceField(mask)
    points = np.random.default_rng(0).integers(-400, 400, (500, 2)) + 0.5  # pixel centers: nothing is interpolated
    distances, gradients = field(points)
    rows, columns = np.nonzero(mask)
    tree = cKDTree(np.stack([columns, rows], axis=1) - (SIZE - 1) / 2)
    inside = np.abs(points).max(axis=1) < 370  # beyond, the field goes on linearly
    assert np.abs(distances[inside] - tree.query(points)[0][inside]).max() < 1e-3
    assert (distances[~inside] > 0).all() and (np.linalg.norm(gradients, axis=1) < 1.5).all()


def test_the_derivatives_are_those_of_the_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the optimizer is given, against central differences."""
    caught = {}

    def catch(function, start, jac, bounds, max_nfev):
        caught.update(function=function, jac=jac)
        return type("Result", (), {"x": start})

    monkeypatch.setattr("scipy.optimize.least_squares", catch)
    alignment.align_masks(*case(3)[:2])
    theta = np.array([0.05, 0.3, 0.21, -0.17])
    derivative = caught["jac"](theta)
    for i in range(4):
        step = np.eye(4)[i] * 1e-4
        difference = (caught["function"](theta + step) - caught["function"](theta - step)) / 2e-4
        # Distances have kinks at the borders of pixels, where differences and derivatives disagree.
        wrong = np.abs(difference - derivative[:, i]) > 1e-2 * np.abs(derivative).max()
        assert wrong.mean() < 0.01, i


def test_the_matrix_moves_first_then_turns_then_scales() -> None:
    """Eq. 8 multiplied out in float64."""
    found = alignment.Similarity(2.0, 90.0, 3.0, 4.0)
    assert np.allclose(found.matrix() @ [1.0, 0.0, 1.0], [2 * -4.0, 2 * (1.0 + 3.0), 1.0])


def test_images_move_as_the_matrix_says() -> None:
    image = torch.zeros(41, 61, 3)
    image[25, 34] = 1.0  # (x, y) = (4, 5) from the center
    similarity = alignment.Similarity(2.0, 90.0, 3.0, -1.0)
    x, y, _ = similarity.matrix() @ [4.0, 5.0, 1.0]
    moved = alignment.resample(image, similarity, (101, 91), "zeros")
    brightest = divmod(int(moved[..., 0].argmax()), 91)
    assert brightest == (round(y + 50), round(x + 45))
    same = alignment.resample(image, alignment.Similarity(1.0, 0.0, 0.0, 0.0), (41, 61), "zeros")
    assert torch.allclose(same, image, atol=1e-4)


def test_a_shrunken_image_keeps_its_mean() -> None:
    """Bilinear sampling alone would pick single pixels of a fine pattern."""
    image = ((torch.arange(128)[:, None] + torch.arange(128)) % 2).float().unsqueeze(-1).expand(-1, -1, 3)
    small = alignment.resample(image, alignment.Similarity(0.25, 0.0, 0.0, 0.0), (32, 32), "border")
    assert (small - 0.5).abs().max() < 0.05


def test_a_reference_of_the_demo_world_lies_on_another_pose() -> None:
    reference, generated = (
        tuple(torch.from_numpy(np.array(part)).float() / 255 for part in render(Attributes(pose=pose), seed))
        for pose, seed in (("standing", 3), ("sitting", 8))
    )
    before = ((reference[1] > 0.5) & (generated[1] > 0.5)).sum() / ((reference[1] > 0.5) | (generated[1] > 0.5)).sum()
    result = alignment.align_reference(*reference, generated[1])
    assert result.overlap > max(0.6, float(before))
    assert result.image.shape == reference[0].shape and result.warning is None
    # Nothing of the image is lost inside of the mask: its colors there are the reference's.
    inside = result.image[result.mask > 0].mean(0)
    assert torch.allclose(inside, reference[0][reference[1] > 0.5].mean(0), atol=0.03)


def test_references_of_other_sizes_take_the_generated_size() -> None:
    mask, moved, true = case(4)
    small = torch.nn.functional.avg_pool2d(moved[None].float(), 2)[0]
    result = alignment.align_reference(torch.rand(SIZE, SIZE, 3), mask.float(), small)
    assert result.image.shape == (256, 256, 3) and result.mask.shape == (256, 256)
    assert result.similarity.scale == pytest.approx(true[0] / 2, rel=0.03) and result.overlap > 0.95


def test_surroundings() -> None:
    mask = torch.zeros(64, 64)
    mask[40:60, 44:60] = 1
    mask[40:46, 30:60] = 1
    target = torch.roll(mask, (-30, -25), (0, 1))
    image = torch.full((64, 64, 3), 0.2)
    image[:, :, 0] = torch.linspace(0, 1, 64)
    generated = torch.full((64, 64, 3), 0.9)
    found = {
        kind: alignment.align_reference(image, mask, target, generated, surroundings=kind)
        for kind in alignment.SURROUNDINGS
    }
    inside = found[alignment.EDGE].mask > 0
    assert torch.equal(inside, found[alignment.GENERATED].mask > 0)
    for result in found.values():
        assert torch.allclose(result.image[inside], found[alignment.EDGE].image[inside], atol=1e-5)
    corner = {kind: result.image[-1, -1, 0].item() for kind, result in found.items()}
    assert corner[alignment.GRAY] == pytest.approx(0.5, abs=1e-3) and corner[alignment.EDGE] == pytest.approx(1.0)
    assert corner[alignment.GENERATED] == pytest.approx(0.9) and corner[alignment.REFLECT] < 0.75
    with pytest.raises(IdentityEditError, match="need generated_image"):
        alignment.align_reference(image, mask, target, surroundings=alignment.GENERATED)


def test_several_parts() -> None:
    mask = torch.zeros(64, 64)
    mask[10:40, 10:30] = 1
    mask[10:20, 10:50] = 1
    two = mask.clone()
    two[50:60, 50:60] = 1
    speck = mask.clone()
    speck[62, 62] = 1
    assert alignment.subject_part(mask, "The mask")[1] is None
    assert alignment.subject_part(speck, "The mask")[1] is None
    largest, note = alignment.subject_part(two, "The mask")
    assert torch.equal(largest, mask > 0) and note == "The mask has 2 separate parts; only the largest is used."
    everything, note = alignment.subject_part(two, "The mask", alignment.ALL_PARTS)
    assert torch.equal(everything, two > 0) and "all are used" in str(note)
    result = alignment.align_reference(torch.rand(64, 64, 3), two, mask)
    assert result.overlap > 0.97 and "The reference's mask has 2 separate parts" in str(result.warning)


def test_bad_input_is_named() -> None:
    mask, image = torch.zeros(8, 8), torch.rand(8, 8, 3)
    full = torch.ones(8, 8)
    with pytest.raises(IdentityEditError, match="The reference's mask is empty"):
        alignment.align_reference(image, mask, full)
    with pytest.raises(IdentityEditError, match="The generated mask is empty"):
        alignment.align_reference(image, full, mask)
    with pytest.raises(IdentityEditError, match="scale_limit is 0.5"):
        alignment.align_masks(full, full, scale_limit=0.5)
    with pytest.raises(IdentityEditError, match="rotation_limit is 190"):
        alignment.align_masks(full, full, rotation_limit=190)
    with pytest.raises(IdentityEditError, match="optimizer is 'adam'"):
        alignment.align_masks(full, full, optimizer="adam")
    with pytest.raises(IdentityEditError, match="parts is 'two'"):
        alignment.align_reference(image, full, full, parts="two")


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2), (1, 40)])
def test_images_of_a_few_pixels_are_aligned_too(size: tuple[int, int]) -> None:
    image, whole = torch.rand(*size, 3), torch.ones(size)
    result = alignment.align_reference(image, whole, whole, rotation_limit=0.0)
    assert result.overlap == 1.0
    torch.testing.assert_close(result.image, image, atol=1e-3, rtol=0)


def test_a_single_pixel_and_a_full_mask_do_not_break_it() -> None:
    dot = torch.zeros(32, 32)
    dot[5, 9] = 1
    result = alignment.align_reference(torch.rand(32, 32, 3), torch.ones(32, 32), dot)
    assert np.isfinite(result.similarity.matrix()).all() and bool(torch.isfinite(result.image).all())
    alignment.align_reference(torch.rand(32, 32, 3), dot, torch.ones(32, 32))
