"""Register Edit and Keep the Rest against warps by scipy in float64, scikit-image, and the renderer's true edits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from identity_edit_pack.benchmarks.keep_rest import rendered_case
from identity_edit_pack.demo_world import attributes as world
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.nodes.keep_rest.select import table_line
from identity_edit_pack.pipelines.keep_rest import blending, boxes, colors, identity, selection
from identity_edit_pack.pipelines.keep_rest import keep as pipeline
from identity_edit_pack.pipelines.keep_rest.registration import LARGEST_DOUBT, LEAST_SUPPORT, register
from identity_edit_pack.pipelines.keep_rest.transform import Transform, moved_back, sampling_grid
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from scipy import ndimage
from skimage import data
from skimage.registration import phase_cross_correlation


def photo(name: str, step: int = 2) -> np.ndarray:
    """[H, W, 3] float64, 0 to 1."""
    return getattr(data, name)()[::step, ::step].astype(np.float64) / 255.0


def moved(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """An image whose content moved by `Transform.matrix`: spline interpolation in float64."""
    height, width = image.shape[:2]
    swap = np.array([[0.0, 1.0], [1.0, 0.0]])
    back = swap @ np.linalg.inv(matrix[:, :2]) @ swap
    center = np.array([(height - 1) / 2, (width - 1) / 2])
    offset = center - back @ (center + swap @ matrix[:, 2])
    planes = [
        ndimage.affine_transform(plane, back, offset, order=3, mode="reflect") for plane in image.T.swapaxes(1, 2)
    ]
    return np.stack(planes, axis=-1).clip(0.0, 1.0)


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).float()


def corner_error(found: Transform, true: Transform, width: int, height: int) -> float:
    corners = np.array([[x, y, 1.0] for x in (-width / 2, width / 2) for y in (-height / 2, height / 2)])
    return float(np.linalg.norm(corners @ (found.matrix() - true.matrix()).T, axis=1).max())


def with_disc(image: np.ndarray, radius: float, center: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """An image with a green disc, and its mask; center in parts of height and width, radius of the height."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    mask = (y - center[0] * height) ** 2 + (x - center[1] * width) ** 2 < (radius * height) ** 2
    edited = image.copy()
    edited[mask] = (0.1, 0.8, 0.2)
    return edited, mask


TRUE = Transform(1.03, 1.015, 0.6, 4.3, -5.7)


@pytest.mark.parametrize("name", ["astronaut", "coffee"])
def test_a_transform_is_found_although_a_third_was_edited_and_the_colors_changed(name: str) -> None:
    image = photo(name)
    edited, _ = with_disc(image, 0.36, (0.5, 0.5))
    seen = moved(edited, TRUE.matrix()) ** 1.2 * (0.9, 1.0, 0.85) + 0.04
    found = register(tensor(image), tensor(seen))
    assert found.fault is None
    assert corner_error(found.transform, TRUE, image.shape[1], image.shape[0]) < 0.2


def smooth_drift(height: int, width: int, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Movement of 1.5 pixels, down and to the right, that no transform undoes."""
    return (
        1.5 * np.sin(2 * np.pi * x / width + 0.5) * np.cos(np.pi * y / height),
        1.5 * np.cos(2 * np.pi * y / height) * np.sin(np.pi * x / width),
    )


@pytest.mark.parametrize("name", ["astronaut", "coffee"])
def test_dense_flow_undoes_a_known_smooth_warp_beside_an_edit(name: str) -> None:
    image = photo(name)
    edited, mask = with_disc(image, 0.2, (0.5, 0.5))
    height, width = mask.shape
    y, x = np.mgrid[:height, :width].astype(np.float64)
    from_y, from_x = y, x
    for _ in range(20):  # the place that moved here
        down, right = smooth_drift(height, width, from_y, from_x)
        from_y, from_x = y - down, x - right
    planes = [
        ndimage.map_coordinates(plane, [from_y, from_x], order=3, mode="reflect") for plane in edited.transpose(2, 0, 1)
    ]
    seen = tensor(np.stack(planes, axis=-1).clip(0.0, 1.0) ** 1.1 * 0.95 + 0.02)
    down, right = smooth_drift(height, width, y, x)
    outside = ~ndimage.binary_dilation(mask, iterations=8)
    errors = {}
    for with_flow in (False, True):
        found = register(tensor(image), seen, with_flow)
        grid = sampling_grid(found.transform.matrix(), (height, width), (0, height), found.flow).numpy()
        places = (grid + 1.0) * (width / 2, height / 2) - 0.5
        errors[with_flow] = np.hypot(places[..., 0] - x - right, places[..., 1] - y - down)[outside].mean()
    assert found.fault is None and errors[False] > 0.6 and errors[True] < 0.15
    exact = register(tensor(image), tensor(edited), True)
    assert exact.flow is not None and float(exact.flow.abs().max()) * width / 2 < 0.5


def test_a_pure_shift_is_what_scikit_image_finds() -> None:
    image = photo("astronaut")
    true = Transform(shift_x=3.4, shift_y=-2.6)
    seen = moved(image, true.matrix())
    shift, _, _ = phase_cross_correlation(image.mean(-1), seen.mean(-1), upsample_factor=20)
    found = register(tensor(image), tensor(seen)).transform
    assert [found.shift_y, found.shift_x] == pytest.approx([-value for value in shift], abs=0.15)


def test_applying_a_transform_undoes_it() -> None:
    image = ndimage.gaussian_filter(photo("coffee"), (2.0, 2.0, 0.0))
    registered, covered = moved_back(TRUE, tensor(image), tensor(moved(image, TRUE.matrix())))
    inside = ndimage.binary_erosion(covered.numpy() > 0, iterations=6)
    assert np.abs(registered.numpy() - image)[inside].max() < 0.02
    assert torch.equal(registered[covered == 0], tensor(image)[covered == 0])
    assert 0.9 < float(covered.mean()) < 1.0


def test_an_edit_cropped_to_another_aspect_and_size_returns_to_the_original() -> None:
    image = photo("coffee", 1)
    square = tensor(image[:, 100:500]).movedim(-1, 0)[None]
    edited = torch.nn.functional.interpolate(square, size=(320, 320), mode="bicubic", antialias=True)[0].movedim(0, -1)
    found = register(tensor(image), edited)
    assert found.fault is None
    # The crop of 400 of 600 columns is stretched by 1.5 to the frame.
    true = Transform(1.5, 1.0)
    assert corner_error(found.transform, true, 400, 400) < 1.0


@pytest.mark.parametrize("pair", [("astronaut", "coffee"), ("cat", "rocket"), ("rocket", "astronaut")])
def test_another_image_is_not_registered(pair: tuple[str, str]) -> None:
    for with_flow in (False, True):
        found = register(tensor(photo(pair[0])), tensor(photo(pair[1])), with_flow)
        assert found.fault is not None and found.fault.endswith(".")


@pytest.mark.parametrize("shift", [(3, 0), (0, -2)])
def test_a_compromise_between_halves_that_moved_differently_is_not_trusted(shift: tuple[int, int]) -> None:
    image = photo("coffee")
    edited = image.copy()
    edited[:, :150] = np.roll(image, shift, (0, 1))[:, :150]
    found = register(tensor(image), tensor(edited))
    assert found.fault is not None and "halves" in found.fault


def test_a_subject_that_jumped_through_a_plain_scene_is_not_taken_for_the_image() -> None:
    """All of what is found again is the subject, a seventh of the side away."""
    _, image, edited = rendered_case(394, np.random.default_rng([0, 0, 394]))
    true = Transform(0.9538, 0.9417, -0.97, -6.68, -14.11)
    seen = moved(edited, true.matrix())
    found = register(tensor(image), tensor(seen))
    assert found.support > LEAST_SUPPORT and found.doubt < LARGEST_DOUBT, "nothing else speaks against it"
    assert corner_error(found.transform, true, 512, 512) > 50
    assert found.fault is not None and "moved" in found.fault


def test_flat_and_tiny_images_are_not_registered() -> None:
    assert register(torch.ones(64, 64, 3), torch.zeros(64, 64, 3)).fault is not None
    assert register(torch.rand(1, 1, 3), torch.rand(80, 80, 3)).fault is not None


def kept_disc(
    center: tuple[float, float] = (0.5, 0.5), **options: object
) -> tuple[pipeline.Kept, np.ndarray, np.ndarray]:
    """Keep the Rest on a photo with a disc, softened and with a color cast; also the mask and the true edit."""
    image = photo("astronaut")
    edited, mask = with_disc(image, 0.15, center)
    seen = ndimage.gaussian_filter(edited, (0.7, 0.7, 0.0)) * (0.92, 1.0, 0.9) + 0.03
    noise = np.random.default_rng(0).normal(0.0, 0.006, seen.shape)
    result = pipeline.keep_rest(tensor(image), tensor((seen + noise).clip(0.0, 1.0)), **options)
    return result, mask, edited


@pytest.mark.parametrize("center", [(0.5, 0.5), (0.0, 0.5), (0.95, 0.95)])
def test_the_change_is_found_and_everything_else_is_equal_to_the_bit(center: tuple[float, float]) -> None:
    result, mask, edited = kept_disc(center)
    assert torch.equal(result.image[result.mask == 0.0], tensor(photo("astronaut"))[result.mask == 0.0])
    exact, _, _ = kept_disc(center, grow=0.0, feather=0.0)
    found = exact.mask.numpy() > 0.5
    assert (found & mask).sum() / (found | mask).sum() > 0.85
    # Inside, at the frame too, the colors of the edit come back without the cast.
    inside = ndimage.binary_erosion(mask, iterations=4, border_value=1)
    assert np.abs(result.image.numpy() - edited)[inside].mean() < 0.03
    assert result.changed < 0.25 and result.cast > 0.02


def test_an_edit_that_changed_nothing_returns_the_original() -> None:
    image = tensor(photo("coffee"))
    noisy = (image + 0.01 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))).clamp(0.0, 1.0)
    for seen in (image, noisy):
        result = pipeline.keep_rest(image, seen)
        assert torch.equal(result.image, image) and not bool(result.mask.any())


def test_an_edit_that_changed_everything_is_returned_with_a_warning() -> None:
    image, other = tensor(photo("astronaut")), tensor(photo("rocket", 1)[:256, :256])
    result = pipeline.keep_rest(image, other)
    assert torch.equal(result.image, other) and result.warning


@pytest.mark.parametrize("name, kind", [("rocket", "paste"), ("rocket", "recolor"), ("cat", "recolor")])
def test_an_edit_of_more_than_half_of_the_image_is_found(name: str, kind: str) -> None:
    image = photo(name)
    height, width = image.shape[:2]
    edited, mask = image.copy(), np.zeros((height, width), bool)
    mask[:, : width * 13 // 20] = True
    other = photo("astronaut")
    pasted = other[np.arange(height) * 256 // height][:, np.arange(width) * 256 // width]
    recolored = (image[..., [2, 0, 1]] * (0.9, 1.0, 0.7) + 0.1).clip(0.0, 1.0)
    edited[mask] = (pasted if kind == "paste" else recolored)[mask]
    noise = np.random.default_rng(0).normal(0.0, 0.008, edited.shape)
    result = pipeline.keep_rest(tensor(image), tensor((edited * 0.99 + 0.004 + noise).clip(0.0, 1.0)))
    assert result.mask.numpy()[mask].mean() > 0.98 and result.mask.numpy()[~mask].mean() < 0.1


def test_alpha_and_gray_are_kept() -> None:
    image = photo("astronaut")
    edited, _ = with_disc(image, 0.15, (0.5, 0.5))
    alpha = torch.rand(256, 256, 1, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.8
    original = torch.cat([tensor(image), alpha], dim=-1)
    result = pipeline.keep_rest(original, torch.cat([tensor(edited), alpha], dim=-1))
    assert result.image.shape == (256, 256, 4) and torch.equal(result.image[..., 3:], alpha)
    assert torch.equal(result.image[result.mask == 0.0], original[result.mask == 0.0])


def test_masks_and_boxes_limit_the_change() -> None:
    image = photo("astronaut")
    edited, left = with_disc(image, 0.12, (0.5, 0.2))
    edited, right = with_disc(edited, 0.12, (0.5, 0.8))
    mask = boxes.mask_of_boxes("128, 0, 256, 256", 256, 256)[0]
    result = pipeline.keep_rest(tensor(image), tensor(edited), mask=mask)
    assert result.mask[torch.from_numpy(right)].mean() > 0.95 and result.mask[torch.from_numpy(left)].max() == 0.0
    touched = pipeline.keep_rest(tensor(image), tensor(edited), mask=torch.roll(mask, 70, 1), mask_use=pipeline.GROWN)
    assert touched.mask[torch.from_numpy(right)].mean() > 0.95
    with pytest.raises(IdentityEditError, match="boxes"):
        boxes.mask_of_boxes("5, 5, 2, 9", 64, 64)


@pytest.mark.parametrize("attribute, value", [("costume", "crown"), ("expression", "smiling"), ("color", "blue")])
def test_the_renderers_edits_are_found(attribute: str, value: str) -> None:
    source = world.Attributes(expression="neutral")
    original, edited = (
        render(each, 5)[0].astype(np.float64) / 255 for each in (source, source.replace(**{attribute: value}))
    )
    true = np.abs(original - edited).max(axis=-1) > 8 / 255
    transform = Transform(1.02, 1.02, 0.0, 2.3, -1.4)
    seen = moved(edited, transform.matrix()) * (0.95, 1.0, 0.93) + 0.02
    found = register(tensor(original), tensor(seen))
    assert found.fault is None and corner_error(found.transform, transform, 128, 128) < 0.5
    registered, _ = moved_back(found.transform, tensor(original), tensor(seen))
    result = pipeline.keep_rest(tensor(original), registered)
    change = np.abs(edited - original).sum(axis=-1)
    lost = (change * (1.0 - result.mask.numpy()))[true].sum() / change[true].sum()
    assert lost < 0.02
    assert (result.mask.numpy() > 0)[~ndimage.binary_dilation(true, iterations=6)].mean() < 0.02


def test_colors_come_back_and_a_recolored_object_does_not() -> None:
    image = photo("coffee")
    edited, mask = with_disc(image, 0.3, (0.5, 0.5))
    seen = (edited**1.1 * (0.9, 1.0, 0.95) + 0.02).clip(0.0, 1.0)
    fitted = colors.fit_colors(tensor(image), tensor(seen), torch.ones(image.shape[:2]))
    corrected = fitted(tensor(seen)).numpy()
    assert np.abs(corrected - image)[~mask].mean() < 0.012 < np.abs(seen - image)[~mask].mean()
    assert np.abs(corrected - edited)[mask].mean() < 0.06


def test_a_membrane_is_exact_for_a_constant_and_near_for_a_plane() -> None:
    y, x = torch.meshgrid(torch.arange(61.0), torch.arange(83.0), indexing="ij")
    known = torch.ones(61, 83)
    known[20:50, 30:] = 0.0  # reaches the frame
    constant = torch.full((3, 61, 83), 0.3)
    assert torch.allclose(blending.membrane(constant, known), constant, atol=1e-5)
    plane = (0.002 * y)[None].expand(3, -1, -1)
    assert float((blending.membrane(plane, known) - plane).abs().max()) < 0.03


def test_large_images_are_compared_small_and_kept_at_full_size() -> None:
    image = np.kron(photo("coffee", 1), np.ones((4, 5, 1)))  # 4.8 megapixels
    edited, mask = with_disc(image, 0.2, (0.5, 0.5))
    small = torch.nn.functional.interpolate(tensor(edited).movedim(-1, 0)[None], size=(800, 1000), mode="area")
    found = register(tensor(image), small[0].movedim(0, -1))
    registered, _ = moved_back(found.transform, tensor(image), small[0].movedim(0, -1))
    result = pipeline.keep_rest(tensor(image), registered)
    assert result.image.shape == image.shape
    assert torch.equal(result.image[result.mask == 0.0], tensor(image)[result.mask == 0.0])
    assert float(result.mask[torch.from_numpy(mask)].mean()) > 0.98 and result.changed < 0.25


class Faces:
    """Finds the faces that a test placed."""

    name = "given"

    def __init__(self, places: list[list[float]]) -> None:
        self.places = places

    def detect(self, image: np.ndarray) -> list[object]:
        from identity_edit_pack.pipelines.faces.detection import Face

        points = np.array([[20.0, 24.0], [40.0, 24.0], [30.0, 34.0], [22.0, 44.0], [38.0, 44.0]]) - (30.0, 34.0)
        middles = self.places.pop(0)
        return [Face((x - 20.0, 60.0, x + 20.0, 100.0), points + (x, 80.0), 0.9) for x in middles]


class Colors:
    """Embeds a face by its mean color."""

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(images.mean(dim=(1, 2)) - 0.5, dim=1)


def test_the_face_that_drifted_is_named() -> None:
    original = torch.zeros(160, 320, 3)
    original[:, :160, 0], original[:, 160:, 1] = 1.0, 1.0
    edited = original.clone()
    edited[:, 160:] = torch.tensor([0.0, 0.0, 1.0])
    found = identity.compare_faces(original, edited, Faces([[250.0, 80.0], [80.0, 252.0]]), Colors())
    assert [face.number for face in found] == [1, 2]
    assert [face.drifted for face in found] == [False, True]
    assert identity.lowest(found) == found[1].similarity
    gone = identity.compare_faces(original, edited, Faces([[80.0, 250.0], [80.0]]), Colors())
    assert gone[1].similarity is None and "gone" in str(gone[1])


def test_identity_is_compared_before_and_after() -> None:
    original = torch.zeros(160, 320, 3)
    original[:, :160, 0], original[:, 160:, 1] = 1.0, 1.0
    drifted = original.clone()
    drifted[:, 160:] = torch.tensor([0.0, 0.0, 1.0])
    places = [[80.0, 250.0] for _ in range(4)]  # of the original and of the edit, after and before
    scores = selection.score_edits(
        original, original[None], None, before=drifted[None], faces=(Faces(places), Colors())
    )[0]
    after, before = scores.faces, scores.faces_before
    assert [face.drifted for face in after] == [False, False] and [face.drifted for face in before] == [False, True]
    assert f"{before[1].figure} before and {after[1].figure} after for face 2" in table_line(1, scores)
