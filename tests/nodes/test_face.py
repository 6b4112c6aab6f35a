"""The face nodes as the graph calls them, with a detector and a recognizer whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from identity_edit_pack.nodes.pidiff import face as nodes
from identity_edit_pack.nodes.pidiff import identity_similarity as score_nodes
from identity_edit_pack.pipelines.faces import detection as pipeline
from identity_edit_pack.pipelines.faces import similarity as identity_similarity
from identity_edit_pack.pipelines.faces.alignment import align_ffhq
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests.real_faces import real_file, real_photo

POINTS = np.array([[60.0, 80.0], [100.0, 80.0], [80.0, 102.0], [65.0, 124.0], [95.0, 124.0]])
LINES = "\n".join(f"{x}, {y}" for x, y in POINTS)
SETTINGS: dict[str, Any] = {
    item.id: item.default if getattr(item, "default", None) is not None else nodes.NO_MODEL
    for item in nodes.AlignFace.define_schema().inputs
    if item.id not in ("images", "face_detector", "mask")
}
IMAGES = torch.rand(2, 200, 180, 3, generator=torch.Generator().manual_seed(0))


class Detector:
    """Finds given faces in images that are not black."""

    name = "given"

    def __init__(self, *shifts: float) -> None:
        self.shifts = shifts

    def detect(self, image: np.ndarray) -> list[pipeline.Face]:
        if image.max() == 0:
            return []
        return [pipeline.Face((50 + shift, 70, 110 + shift, 130), POINTS + [shift, 0], 0.9) for shift in self.shifts]


def align(images: torch.Tensor = IMAGES, **inputs: Any) -> tuple[Any, ...]:
    return nodes.AlignFace.execute(images, **{**SETTINGS, "background": nodes.KEEP, **inputs}).args


def test_the_detectors_faces_are_aligned() -> None:
    faces, mask, preview, points, report = align(face_detector=Detector(0.0, 40.0), choice=pipeline.ALL, size=128)
    assert faces.shape == (4, 128, 128, 3) and mask.shape == (4, 128, 128) and preview.shape == IMAGES.shape
    wanted = align_ffhq(IMAGES[1], POINTS + [40, 0], 128)
    assert torch.equal(faces[3], wanted.image) and torch.equal(mask[3], wanted.mask)
    assert [entry["image"] for entry in json.loads(points)] == [1, 1, 2, 2]
    assert "4 faces of 2 image(s), 128x128." in report and not torch.equal(preview, IMAGES)
    right = align(face_detector=Detector(0.0, 40.0), choice=pipeline.INDEX, index=2, size=128)[0]
    assert torch.equal(right, faces[1::2])
    again = align(method=nodes.BY_POINTS, points=points, choice=pipeline.ALL, size=128)[0]
    assert torch.equal(again, faces), "the points that it gives are not those that it takes"


def test_points_and_whole_images_need_no_detector() -> None:
    faces = align(method=nodes.BY_POINTS, points=LINES)[0]
    assert torch.equal(faces[0], align_ffhq(IMAGES[0], POINTS, 256).image)
    square = IMAGES[:, :128, :128]
    whole, mask, _, points, report = align(square, method=nodes.WHOLE, size=128)
    assert torch.equal(whole, square) and bool((mask == 1).all()) and points == "[]" and "2 whole images" in report
    assert align(method=nodes.WHOLE, size=64)[0].shape == (2, 64, 64, 3)


def test_gray_and_rgba_images_give_the_same_faces() -> None:
    gray = IMAGES[..., :1]
    wanted = align(gray.expand(-1, -1, -1, 3), method=nodes.BY_POINTS, points=LINES)[0]
    for images in (gray, torch.cat([gray.expand(-1, -1, -1, 3), 0 * gray], dim=-1)):
        assert torch.equal(align(images, method=nodes.BY_POINTS, points=LINES)[0], wanted)


def test_the_background_is_removed_by_a_mask() -> None:
    mask = torch.zeros(1, 200, 180)
    mask[:, 60:140, 50:120] = 1.0
    inputs = dict(method=nodes.BY_POINTS, points=LINES, mask=mask, gray=0.25)
    faces, found, *_ = align(background=nodes.REMOVE, **inputs)
    kept = align(**inputs)[0]
    assert bool((faces[found == 0] == 0.25).all()) and torch.equal(faces[found == 1], kept[found == 1])
    assert bool((found == 0).any()) and bool((found == 1).any())
    half = torch.nn.functional.avg_pool2d(mask, 2)
    torch.testing.assert_close(align(**{**inputs, "mask": half})[1], found, atol=0.6, rtol=0)


def test_the_background_is_removed_by_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_background_model", lambda name: name)
    monkeypatch.setattr(nodes, "subject_masks", lambda path, faces: torch.ones(faces.shape[:3]))
    lines = "\n".join(f"{x - 40}, {y - 40}" for x, y in POINTS)
    inputs = dict(method=nodes.BY_POINTS, points=lines)
    faces, mask, *_ = align(background=nodes.REMOVE, background_model="u2net.onnx", **inputs)
    assert torch.equal(mask, align(**inputs)[1]), "what lies outside of the image belongs to the person"
    assert bool((mask == 0).any()) and bool((faces[mask == 0] == 0.5).all())


def test_what_cannot_be_aligned_is_named() -> None:
    black = torch.cat([IMAGES[:1], torch.zeros_like(IMAGES[:1])])
    with pytest.raises(IdentityEditError, match="No face was found in image 2"):
        align(black, face_detector=Detector(0.0), without_face=nodes.STOP)
    with pytest.raises(IdentityEditError, match="No face was found in image 1"):
        align(torch.zeros_like(black), face_detector=Detector(0.0))
    with pytest.raises(IdentityEditError, match="index is 3, but image 1 has 2 faces"):
        align(face_detector=Detector(0.0, 40.0), choice=pipeline.INDEX, index=3)
    with pytest.raises(IdentityEditError, match="face in image 1 is too small"):
        align(face_detector=Detector(0.0), smallest_face=400)
    with pytest.raises(IdentityEditError, match="points is empty"):
        align(method=nodes.BY_POINTS)
    with pytest.raises(IdentityEditError, match="needs a mask or a background_model"):
        align(method=nodes.WHOLE, background=nodes.REMOVE)
    with pytest.raises(IdentityEditError, match="mask of image 1 is empty"):
        align(method=nodes.WHOLE, mask=torch.zeros(1, 200, 180))
    with pytest.raises(IdentityEditError, match="mask holds 3 masks for 2 images"):
        align(method=nodes.WHOLE, mask=torch.ones(3, 200, 180))


def test_without_a_face_detector_images_count_as_aligned_and_identity_is_not_measured() -> None:
    loaded = nodes.LoadFaceDetector.execute(nodes.NO_MODEL, 0.6)[0]
    assert loaded is None and nodes.LoadFaceDetector.validate_inputs(nodes.NO_MODEL) is True
    faces, mask, *_, report = align(face_detector=loaded, size=64)
    expected, expected_mask, *_ = align(method=nodes.WHOLE, size=64)
    assert torch.equal(faces, expected) and torch.equal(mask, expected_mask)
    assert "no face detector" in report
    settings = dict(recognizer=nodes.NO_MODEL, choice=pipeline.LARGEST, without_face=nodes.STOP)
    assert score_nodes.IdentitySimilarity.validate_inputs(nodes.NO_MODEL) is True
    score, lowest, report = score_nodes.IdentitySimilarity.execute(
        IMAGES, IMAGES, face_detector=loaded, **settings
    ).args
    assert isinstance(score, ExecutionBlocker) and isinstance(lowest, ExecutionBlocker)
    assert "a face detector" in report


def test_profiles_and_small_faces_are_warned_of() -> None:
    turned = POINTS.copy()
    turned[2] = [58.0, 100.0]
    lines = "\n".join(f"{x}, {y}" for x, y in turned / 2)
    report = align(method=nodes.BY_POINTS, points=lines)[4]
    assert "Warning" in report and "small (80 pixels" in report and "image 2" in report and "from the side" in report


def test_missing_files_are_named_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    for folder in nodes.MODEL_FOLDERS:
        monkeypatch.delitem(folder_paths.folder_names_and_paths, folder, raising=False)
    message = str(nodes.LoadFaceDetector.validate_inputs("models/buffalo_l"))
    assert str(tmp_path / "insightface") in message and "det_10g.onnx" in message
    assert "w600k_r50.onnx" in str(score_nodes.IdentitySimilarity.validate_inputs("arcface.onnx"))
    assert str(tmp_path / "rembg") in str(nodes.AlignFace.validate_inputs(nodes.REMOVE, "u2net.onnx"))
    assert nodes.AlignFace.validate_inputs(nodes.KEEP, "u2net.onnx") is True
    assert nodes.LoadFaceDetector.validate_inputs(pipeline.MTCNN) is True


def test_the_packs_folders_are_registered(pack: Any, node_classes: dict[str, Any]) -> None:
    assert set(node_classes) >= {"IdentityEditAlignFace", "IdentityEditLoadFaceDetector"}
    for folder in nodes.MODEL_FOLDERS:
        assert any(path.endswith(folder) for path in folder_paths.get_folder_paths(folder))


class Recognizer:
    """Embeds a face by the color of its middle."""

    def embed(self, faces: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(faces[:, 40:80, 40:80].mean(dim=(1, 2)), dim=1)


def uniform(*colors: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(colors, dtype=torch.float32)[:, None, None].expand(-1, 200, 180, -1)


def score(monkeypatch: pytest.MonkeyPatch, images: torch.Tensor, reference: torch.Tensor, **inputs: Any) -> Any:
    monkeypatch.setattr(identity_similarity, "load_recognizer", lambda name: Recognizer())
    settings = dict(face_detector=Detector(0.0), recognizer="x", choice=pipeline.LARGEST, without_face=nodes.STOP)
    return score_nodes.IdentitySimilarity.execute(images, reference, **{**settings, **inputs}).args


def test_every_image_is_compared_with_the_reference_most_like_it(monkeypatch: pytest.MonkeyPatch) -> None:
    images = uniform((1, 0, 0), (0, 1, 0), (1, 1, 0))
    mean, lowest, report = score(monkeypatch, images, uniform((1, 0, 0), (0, 1, 0)))
    assert lowest == pytest.approx(0.5**0.5, abs=1e-5) and mean == pytest.approx((2 + 0.5**0.5) / 3, abs=1e-5)
    assert "image 1: 1.000 (the same person)" in report
    assert "not the same person" in score(monkeypatch, uniform((0, 0, 1)), uniform((1, 0, 0)))[2]


def test_images_without_a_face(monkeypatch: pytest.MonkeyPatch) -> None:
    images = uniform((1, 0, 0), (0, 0, 0))
    with pytest.raises(IdentityEditError, match="No face was found in image 2"):
        score(monkeypatch, images, uniform((1, 0, 0)))
    mean, lowest, report = score(monkeypatch, images, uniform((1, 0, 0)), without_face=score_nodes.ZERO)
    assert (round(mean, 4), lowest) == (0.5, 0.0) and "image 2: 0 (no face)" in report
    with pytest.raises(IdentityEditError, match="No face was found in reference 1"):
        score(monkeypatch, images, uniform((0, 0, 0)), without_face=score_nodes.ZERO)


def test_the_face_most_like_the_reference_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    image = uniform((0, 0, 1)).clone()
    image[:, :, 100:] = torch.tensor((1.0, 0.0, 0.0))
    two = Detector(-45.0, 60.0)
    largest = score(monkeypatch, image, uniform((1, 0, 0)), face_detector=two)[0]
    best = score(monkeypatch, image, uniform((1, 0, 0)), face_detector=two, choice=score_nodes.MOST_SIMILAR)[0]
    assert largest < 0.2 and best > 0.9


def test_the_whole_way_on_real_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cv2")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    for folder in nodes.MODEL_FOLDERS:
        monkeypatch.delitem(folder_paths.folder_names_and_paths, folder, raising=False)
    for folder, name in (
        ("insightface", "face_detection_yunet_2023mar.onnx"),
        ("insightface", "fr_feature.onnx"),
        ("rembg", "u2netp.onnx"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).symlink_to(real_file(name))
    detector = nodes.LoadFaceDetector.execute("face_detection_yunet_2023mar.onnx", pipeline.SCORE).args[0]
    group = real_photo("t1.jpg")[None]
    faces, *_, report = align(group, choice=pipeline.ALL, face_detector=detector)
    assert faces.shape == (6, 256, 256, 3) and "from the side" in report
    chosen = dict(face_detector=detector, background=nodes.REMOVE, background_model="u2netp.onnx")
    faces, mask, *_ = align(group, **chosen)
    assert 0.2 < float(mask.mean()) < 0.9 and bool((faces[mask == 0] == 0.5).all())
    first, second = real_photo("obama.jpg")[None], real_photo("obama2.jpg")[None]
    settings = dict(recognizer="fr_feature.onnx", choice=pipeline.LARGEST, without_face=nodes.STOP)
    same = score_nodes.IdentitySimilarity.execute(first, second, detector, **settings).args
    other = score_nodes.IdentitySimilarity.execute(first, real_photo("biden.jpg")[None], detector, **settings).args
    assert same[0] > 0.5 and other[0] < 0.35
