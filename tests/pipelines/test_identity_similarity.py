"""Identity scores: the arithmetic on networks of our own, and real faces where photos and networks are at hand."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from identity_edit_pack.pipelines.faces import background
from identity_edit_pack.pipelines.faces import detection as faces
from identity_edit_pack.pipelines.faces import similarity as identity
from identity_edit_pack.pipelines.faces.alignment import align_arcface, align_ffhq
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests.real_faces import real_file, real_photo

PEOPLE = {"obama.jpg": "first", "obama2.jpg": "first", "obama3.jpg": "first", "biden.jpg": "second"}


class Session:
    """Stands in for onnxruntime: gives the pixels back that it was shown."""

    def __init__(self, path: str, providers: list[str]) -> None:
        assert providers == ["CPUExecutionProvider"]
        self.output: Any = lambda blob: blob.reshape(1, -1)[:, :512]
        self.shape: list[Any] = [1, 3, 112, 112]

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="input", shape=self.shape)]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="output", shape=[1, 512])]

    def run(self, names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        assert inputs["input"].dtype == np.float32 and inputs["input"].shape[0] == 1
        return [self.output(inputs["input"])]


@pytest.fixture
def onnxruntime_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_has_insightface", lambda: False)
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))


@pytest.mark.usefixtures("onnxruntime_alone")
def test_onnxruntime_alone_shows_the_network_what_insightface_would(tmp_path: Path) -> None:
    path = tmp_path / "arcface.onnx"
    path.write_bytes(b"a network")
    recognizer = identity.FaceRecognizer(str(path))
    images = torch.rand(2, 112, 112, 3)
    found = recognizer.embed(images)
    seen = ((images * 255).round() - 127.5).movedim(-1, 1).reshape(2, -1)[:, :512]  # red first
    torch.testing.assert_close(found, seen / seen.norm(dim=1, keepdim=True))
    path.write_bytes(b"... _minusscalar0 ... _mulscalar0")
    with pytest.raises(IdentityEditError, match="pip install insightface"):
        identity.FaceRecognizer(str(path))


def test_similarities_are_cosines() -> None:
    first = torch.nn.functional.normalize(torch.randn(2, 8), dim=1)
    second = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    found = identity.similarities(first, second)
    wanted = torch.nn.functional.cosine_similarity(first[:, None], second[None], dim=2)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(identity.similarities(first, first).diagonal(), torch.ones(2))
    with pytest.raises(IdentityEditError, match="different networks"):
        identity.similarities(first, torch.randn(1, 9))


def test_scores_in_words() -> None:
    assert identity.verdict(0.7) == "the same person"
    assert identity.verdict(0.1) == "not the same person" and identity.verdict(0.4) == "uncertain"


class SalientSession(Session):
    def __init__(self, path: str, providers: list[str]) -> None:
        super().__init__(path, providers)
        self.shape = [1, 3, 32, 32]
        self.output = lambda blob: blob[:, :1] * 7 + 3


def test_masks_of_the_subject(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=SalientSession))
    images = torch.zeros(1, 64, 64, 3)
    images[:, 16:48, 16:48] = 1.0
    masks = background.subject_masks(str(tmp_path / "u2net.onnx"), images)
    assert masks.shape == (1, 64, 64) and masks[0, 32, 32] > 0.95 and masks[0, 2, 2] < 0.05
    clean = background.without_background(torch.rand(1, 64, 64, 3), masks.round(), 0.5)
    assert bool((clean[0, :8] == 0.5).all())
    SalientSession.output = None
    monkeypatch.setattr(SalientSession, "__init__", Session.__init__)
    with pytest.raises(IdentityEditError, match="no salient-object network"):
        background.subject_masks(str(tmp_path / "arcface.onnx"), images)


# -- real networks and photos ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> tuple[dict[str, list[tuple[torch.Tensor, faces.Face]]], identity.FaceRecognizer]:
    pytest.importorskip("cv2")
    pytest.importorskip("onnxruntime")
    detector = faces.open_detector(str(real_file("face_detection_yunet_2023mar.onnx")))
    found = {}
    for name in (*PEOPLE, "t1.jpg"):
        photo = real_photo(name)
        found[name] = [(photo, face) for face in faces.detect_faces(detector, photo)]
    return found, identity.FaceRecognizer(str(real_file("fr_feature.onnx")))


def test_real_people_are_told_apart(real: Any) -> None:
    found, recognizer = real
    shown = [(PEOPLE.get(name, f"{name} {i}"), *each) for name in found for i, each in enumerate(found[name])]
    embedded = identity.embed_faces(recognizer, [(photo, face) for _, photo, face in shown])
    scores = identity.similarities(embedded, embedded)
    for i, (person, _, face) in enumerate(shown):
        for j, (other, _, its) in enumerate(shown[:i]):
            if person == other:
                assert scores[i, j] > identity.SAME_PERSON
            elif not any(faces.check_face(each, "x") for each in (face, its)):  # a face from the side is warned of
                assert scores[i, j] < identity.OTHER_PERSON
            else:
                assert scores[i, j] < identity.SAME_PERSON


def test_insightface_and_onnxruntime_alone_agree(real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("insightface")
    found, recognizer = real
    shown = [each for name in PEOPLE for each in found[name]]
    monkeypatch.setattr(identity, "_has_insightface", lambda: False)
    alone = identity.FaceRecognizer(str(real_file("fr_feature.onnx")))
    torch.testing.assert_close(
        identity.embed_faces(alone, shown), identity.embed_faces(recognizer, shown), atol=1e-4, rtol=0
    )


def test_our_crop_is_insightfaces(real: Any) -> None:
    face_align = pytest.importorskip("insightface.utils.face_align")
    photo, face = real[0]["obama.jpg"][0]
    theirs = face_align.norm_crop((photo * 255).byte().numpy(), face.points.astype(np.float32))
    difference = (align_arcface(photo, face.points) * 255 - torch.from_numpy(theirs).float()).abs()
    assert float(difference.max()) < 2.0


def test_aligned_faces_stay_the_same_person(real: Any) -> None:
    found, recognizer = real
    detector = faces.open_detector(str(real_file("face_detection_yunet_2023mar.onnx")))
    photo, face = found["obama.jpg"][0]
    for size in (256, 1024):
        aligned = align_ffhq(photo, face.points, size).image
        (again,) = faces.detect_faces(detector, aligned)
        before, after = identity.embed_faces(recognizer, [(photo, face), (aligned, again)])
        assert float(before @ after) > 0.9


def test_a_real_background_is_removed(real: Any) -> None:
    photo, face = real[0]["obama.jpg"][0]
    aligned = align_ffhq(photo, face.points, 256).image[None]
    (mask,) = background.subject_masks(str(real_file("u2netp.onnx")), aligned)
    assert mask[100:160, 100:160].min() > 0.9 and mask[:40, :40].max() < 0.1
