"""Finding faces: by anything that detects, by points that are given, and by real networks where they are at hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import folder_paths
import numpy as np
import pytest
import torch
from identity_edit_pack.pipelines.faces import detection as faces
from identity_edit_pack.pipelines.faces.detection import Face
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.shared.images import as_color
from identity_edit_pack.tests.real_faces import real_file, real_photo

POINTS = np.array([[60.0, 80.0], [100.0, 80.0], [80.0, 102.0], [65.0, 124.0], [95.0, 124.0]])


def face(shift: float = 0.0, scale: float = 1.0, score: float = 0.9) -> Face:
    points = POINTS * scale + [shift, 0.0]
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    return Face((left, top, right, bottom), points, score)


class Spots:
    """A detector of bright spots: sees those of a size between 4 and 40 pixels, whatever the image's size."""

    name = "spots"

    def __init__(self) -> None:
        self.shown: list[tuple[int, int]] = []

    def detect(self, image: np.ndarray) -> list[Face]:
        self.shown.append(image.shape[:2])
        bright = image[..., 0] > 128
        side = float(bright.sum()) ** 0.5
        if not 4 <= side <= 40:
            return []
        y, x = np.nonzero(bright)
        if min(x.min(), y.min()) == 0:  # cut off by the border
            return []
        box = (float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1))
        middle = np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
        return [Face(box, middle + (POINTS - POINTS.mean(axis=0)) * side / 60, 0.8)]


def spot(height: int, width: int, left: int, top: int, side: int) -> torch.Tensor:
    image = torch.zeros(height, width, 3)
    image[top : top + side, left : left + side] = 1.0
    return image


def test_faces_keep_their_place_in_images_of_any_size() -> None:
    for height, width, side in ((200, 300, 20), (2600, 2000, 50), (2600, 2000, 130)):
        detector = Spots()
        found = faces.detect_faces(detector, spot(height, width, 90, 70, side))
        assert len(found) == 1
        np.testing.assert_allclose(found[0].box, (90, 70, 90 + side, 70 + side), atol=max(height, width) / 320)
        np.testing.assert_allclose(found[0].points.mean(axis=0), (90 + side / 2, 70 + side / 2), atol=8)
    assert detector.shown == [(1280, 985), (640, 492)]


def test_faces_that_fill_the_image_are_seen_with_a_margin() -> None:
    detector = Spots()
    found = faces.detect_faces(detector, torch.ones(30, 30, 3))
    assert detector.shown == [(30, 30), (60, 60)] and found[0].box == (0, 0, 30, 30)
    np.testing.assert_allclose(found[0].points.mean(axis=0), (15, 15))
    assert faces.detect_faces(detector, torch.zeros(30, 30, 3)) == []


def test_which_face_is_meant() -> None:
    small_left, large, small_right = face(0, 0.5), face(200, 2.0), face(600, 0.4)
    found = [large, small_left, small_right]
    assert faces.choose_faces(found, faces.LARGEST, 9, "image 1") == [large]
    assert faces.choose_faces(found, faces.ALL, 9, "image 1") == [small_left, large, small_right]
    assert faces.choose_faces(found, faces.INDEX, 3, "image 1") == [small_right]
    with pytest.raises(IdentityEditError, match="index is 4, but image 7 has 3 faces"):
        faces.choose_faces(found, faces.INDEX, 4, "image 7")
    with pytest.raises(IdentityEditError, match="No face was found in image 3"):
        faces.choose_faces([], faces.LARGEST, 1, "image 3")


def test_small_and_turned_faces_are_named() -> None:
    assert faces.check_face(face(), "image 1") is None
    assert "small (80 pixels" in str(faces.check_face(face(scale=0.5), "image 2"))
    with pytest.raises(IdentityEditError, match="face in image 3 is too small: its crop has 40 pixels"):
        faces.check_face(face(scale=0.25), "image 3")
    turned = face()
    turned.points[2] = [58.0, 100.0]
    assert "from the side" in str(faces.check_face(turned, "image 4"))


def test_points_in_every_form() -> None:
    listed = POINTS.tolist()
    lines = "\n".join(f"{x}, {y}" for x, y in listed)
    for text in (lines, lines.replace("\n", ";"), json.dumps(listed), json.dumps([listed, listed])):
        found = faces.parse_points(text, 2)
        assert len(found) == 2 and all(np.array_equal(each[0].points, POINTS) for each in found)
    for_each = faces.parse_points(lines + "\n" + lines.replace("60.0, 80.0", "61, 80"), 2)
    assert for_each[1][0].points[0, 0] == 61
    named = json.dumps([{"image": 2, "points": listed}, {"image": 1, "points": listed}, {"image": 2, "points": listed}])
    assert [len(each) for each in faces.parse_points(named, 2)] == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1, 2", "1 of five"),
        ("1, 2\nthree, 4", "three"),
        ("1, 2, 3", "1, 2, 3"),
        (json.dumps(POINTS[:4].tolist()), "points"),
        (json.dumps([POINTS.tolist()] * 3), "for each of 2"),
        (json.dumps([{"image": 3, "points": POINTS.tolist()}]), "image 3"),
        (json.dumps([{"image": 1, "points": POINTS.tolist()}]), "none for image 2"),
        (json.dumps([[1, 1]] * 5), "coincide"),
        ('{"points": 1}', "points must be"),
        ("7", "points"),
    ],
)
def test_points_that_are_none(text: str, message: str) -> None:
    with pytest.raises(IdentityEditError, match=message):
        faces.parse_points(text, 2)


def test_images_of_every_kind() -> None:
    color = torch.rand(2, 8, 9, 3, generator=torch.Generator().manual_seed(0))
    gray = color[..., :1]
    assert torch.equal(as_color(gray), gray.expand(-1, -1, -1, 3))
    assert torch.equal(as_color(torch.cat([gray, 0 * gray], -1)), gray.expand(-1, -1, -1, 3))
    assert torch.equal(as_color(torch.cat([color, 0 * gray], -1)), color)
    torch.testing.assert_close(as_color(color.double()), color)
    sixteen = (color * 65535).round().to(torch.uint16)
    torch.testing.assert_close(as_color(sixteen), color, atol=1e-5, rtol=0)
    torch.testing.assert_close(as_color((color * 255).round().byte()), color, atol=2.1e-3, rtol=0)
    for wrong, message in (
        (color * 65535, "0 to 1"),
        (color * float("nan"), "NaN"),
        (color[0], "images"),
        (color.long(), "type"),
    ):
        with pytest.raises(IdentityEditError, match=message):
            as_color(wrong)


# -- files and packages ------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.delitem(folder_paths.folder_names_and_paths, faces.FOLDER, raising=False)
    (tmp_path / "insightface" / "models" / "buffalo_l").mkdir(parents=True)
    (tmp_path / "insightface" / "models" / "empty").mkdir()
    (tmp_path / "insightface" / "models" / "buffalo_l" / "det_10g.onnx").write_bytes(b"scrfd")
    (tmp_path / "insightface" / "yunet.onnx").write_bytes(b"... kps_8 ... obj_8 ...")
    (tmp_path / "insightface" / "scrfd.onnx").write_bytes(b"...")
    return tmp_path


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_packs_and_files_are_listed(models: Path) -> None:
    assert list(faces.list_detectors()) == ["models/buffalo_l", "scrfd.onnx", "yunet.onnx"]
    deeper = models / "insightface" / "models" / "antelopev2" / "antelopev2"  # as its archive unpacks
    deeper.mkdir(parents=True)
    (deeper / "scrfd_10g_bnkps.onnx").write_bytes(b"scrfd")
    assert faces.list_detectors()["models/antelopev2"] == str(deeper)


def test_missing_files_and_packages_are_named(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        IdentityEditError, match=r"'models/antelopev2' is not in .*insightface; put there .*det_10g.onnx"
    ):
        faces.load_detector("models/antelopev2")
    without(monkeypatch, "cv2", "onnxruntime", "insightface", "facenet_pytorch")
    with pytest.raises(IdentityEditError, match="pip install opencv-python-headless"):
        faces.load_detector("yunet.onnx")
    with pytest.raises(IdentityEditError, match="pip install onnxruntime"):
        faces.load_detector("scrfd.onnx")
    with pytest.raises(IdentityEditError, match="pip install --no-deps facenet-pytorch"):
        faces.load_detector(faces.MTCNN)


class Scrfd:
    """What insightface gives for a detector."""

    taskname = "detection"

    def prepare(self, **options: Any) -> None:
        self.options = options

    def detect(self, image: np.ndarray, max_num: int) -> tuple[np.ndarray, np.ndarray]:
        self.seen = image
        boxes = np.array([[50, 70, 110, 130, 0.7]], np.float32)
        return boxes, POINTS[None].astype(np.float32)


def fake_insightface(monkeypatch: pytest.MonkeyPatch, pack: dict[str, Any], alone: Any) -> dict[str, Any]:
    """Stands in for the package; returns how it was asked for a pack."""
    asked: dict[str, Any] = {}

    class FaceAnalysis:
        def __init__(self, **options: Any) -> None:
            asked.update(options)
            assert "detection" in pack
            self.models = pack

    names = ("insightface", "insightface.app", "insightface.model_zoo", "onnxruntime")
    modules = {name: ModuleType(name) for name in names}
    modules["insightface.app"].FaceAnalysis = FaceAnalysis
    modules["insightface.model_zoo"].model_zoo = SimpleNamespace(get_model=lambda path, providers: alone)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_insightface_gets_packs_and_images_as_it_wants_them(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Scrfd()
    asked = fake_insightface(monkeypatch, {"detection": network}, None)
    detector = faces.load_detector("models/buffalo_l", score=0.4)
    assert (asked["name"], asked["root"]) == ("buffalo_l", str(models / "insightface"))
    assert network.options["det_thresh"] == 0.4
    deeper = models / "insightface" / "models" / "antelopev2" / "antelopev2"
    deeper.mkdir(parents=True)
    (deeper / "scrfd_10g_bnkps.onnx").write_bytes(b"scrfd")
    faces.load_detector("models/antelopev2")
    assert (asked["name"], asked["root"]) == ("antelopev2/antelopev2", str(models / "insightface"))
    red = np.zeros((200, 200, 3), np.uint8)
    red[..., 0] = 255
    found = detector.detect(red)
    assert network.seen[0, 0].tolist() == [0, 0, 255], "insightface takes blue before red"
    assert np.array_equal(found[0].points, POINTS) and found[0].box == (50, 70, 110, 130)
    assert found[0].score == pytest.approx(0.7)


def test_packs_that_cannot_detect_are_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_insightface(monkeypatch, {}, SimpleNamespace(taskname="recognition"))
    with pytest.raises(IdentityEditError, match="insightface cannot load .*buffalo_l"):
        faces.load_detector("models/buffalo_l")
    with pytest.raises(IdentityEditError, match="scrfd.onnx is no network for face detection"):
        faces.load_detector("scrfd.onnx")


def test_mtcnn_gives_its_faces_as_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class MTCNN:
        """What facenet-pytorch gives: nothing for an image without a face, else all faces, sure or not."""

        def __init__(self, **options: Any) -> None:
            assert options["keep_all"] and not options["post_process"]

        def detect(self, image: np.ndarray, landmarks: bool) -> tuple[Any, Any, Any]:
            assert landmarks and image.dtype == np.uint8
            if image.max() == 0:
                return None, [None], None
            boxes = np.array([[50, 70, 110, 130], [0, 0, 20, 20]], np.float32)
            return boxes, np.array([0.9, 0.3]), np.stack([POINTS, POINTS]).astype(np.float32)

    module = ModuleType("facenet_pytorch")
    module.MTCNN = MTCNN
    monkeypatch.setitem(sys.modules, "facenet_pytorch", module)
    detector = faces.load_detector(faces.MTCNN, score=0.6)
    assert detector.detect(np.zeros((200, 200, 3), np.uint8)) == []
    found = detector.detect(np.full((200, 200, 3), 255, np.uint8))
    assert len(found) == 1, "the unsure one is left out"
    assert found[0].box == (50, 70, 110, 130) and np.array_equal(found[0].points, POINTS)
    assert found[0].score == pytest.approx(0.9)


# -- real networks and photos ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("obama.jpg", 1), ("biden.jpg", 1), ("t1.jpg", 6)])
def test_yunet_finds_the_faces_of_real_photos(name: str, count: int) -> None:
    pytest.importorskip("cv2")
    path, photo = real_file("face_detection_yunet_2023mar.onnx"), real_photo(name)
    assert faces.is_yunet(str(path))
    found = faces.detect_faces(faces.open_detector(str(path)), photo)
    assert len(found) == count
    for each in found:
        left, top, right, bottom = each.box
        inside = (each.points > (left, top)) & (each.points < (right, bottom))
        assert inside.mean() > 0.7 and each.points[0, 0] < each.points[1, 0] and each.points[3, 1] > each.points[0, 1]


@pytest.mark.parametrize("name", ["obama.jpg", "biden.jpg", "t1.jpg"])
def test_mtcnn_and_yunet_see_the_same_faces(name: str) -> None:
    pytest.importorskip("cv2")
    pytest.importorskip("facenet_pytorch")
    if not hasattr(torch.ops.torchvision, "nms"):
        pytest.skip("this torchvision has no compiled operations, which MTCNN needs")
    path, photo = real_file("face_detection_yunet_2023mar.onnx"), real_photo(name)
    theirs = faces.detect_faces(faces.open_detector(str(path)), photo)
    ours = faces.detect_faces(faces.load_detector(faces.MTCNN, score=0.9), photo)
    assert len(ours) == len(theirs)
    for face in theirs:
        nearest = min(ours, key=lambda other: float(np.abs(other.points - face.points).max()))
        assert np.abs(nearest.points - face.points).mean() < 0.06 * face.side
