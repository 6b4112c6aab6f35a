"""Face detection with five landmarks per face, by a detector or from landmarks entered by the user.

Users provide detector files in models/insightface; nothing is downloaded:

- a model pack of insightface, models/insightface/models/PACK/*.onnx (buffalo_l, antelopev2, ...), through its own API;
- a single detector of its kind, SCRFD or RetinaFace, models/insightface/*.onnx, likewise;
- YuNet (Wu et al. 2023), models/insightface/*.onnx, through OpenCV's FaceDetectorYN. insightface would misread such a
  file, so files are distinguished by the names of their outputs;
- MTCNN (Zhang et al. 2016), used by PIDiff for alignment before scoring, from the package facenet-pytorch.

They run on the CPU, which takes a fraction of a second per image and gives the same results everywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..networks.model_folders import model_roots
from ..networks.optional import import_optional
from ..shared.errors import IdentityEditError, first_line, for_console
from ..shared.images import as_bytes, from_pillow, to_pillow
from ..shared.parsing import lines_of_numbers
from .alignment import PROFILE, check_points, ffhq_quad, quad_side, turned_aside

if TYPE_CHECKING:
    import numpy as np

FOLDER = "insightface"
PACKS = "models"
MTCNN = "MTCNN (package facenet-pytorch)"
NEEDED = (
    "a model pack with its .onnx files as models/PACK, such as models/buffalo_l/det_10g.onnx, or a detector such as "
    "face_detection_yunet_2023mar.onnx or scrfd_10g_bnkps.onnx"
)
SCORE = 0.6
"""Default confidence threshold: OpenCV's for YuNet; SCRFD's is 0.5."""
LARGEST, INDEX, ALL = "largest", "index", "all"
CHOICES = (LARGEST, INDEX, ALL)
SMALLEST_SIDE = 48
"""Minimum side of a face's FFHQ crop in pixels; smaller faces were no longer recognized as the same person
(benchmarks/results/face_identity.md)."""
SMALL_SIDE = 96
"""Side below which a warning is shown, because similarity starts to decrease."""
LONGEST_SIDES = (1280, 640, 320)
"""Image sizes tried until a face is found: the first for small faces, the last for faces that fill a large image."""
_MARGIN = 0.5
_YUNET_OUTPUTS = (b"kps_8", b"obj_8")


@dataclass(frozen=True)
class Face:
    """A face in an image.

    Attributes:
        box: (left, top, right, bottom) in pixels.
        points: [5, 2] float64 in pixels, image left before image right: eyes, tip of the nose, corners of the mouth.
        score: the detector's confidence, 0 to 1; 1 for points entered by the user.
    """

    box: tuple[float, float, float, float]
    points: np.ndarray
    score: float = 1.0

    @property
    def side(self) -> float:
        """Side of its FFHQ crop in pixels."""
        return quad_side(ffhq_quad(self.points))

    @property
    def area(self) -> float:
        """Area of the box in square pixels."""
        return max(0.0, self.box[2] - self.box[0]) * max(0.0, self.box[3] - self.box[1])


class FaceDetector(Protocol):
    """A face detector; `name` is shown to users."""

    name: str

    def detect(self, image: np.ndarray) -> list[Face]:
        """Faces in an image [H, W, 3] uint8 RGB, in no particular order."""
        ...


# -- looking for faces -------------------------------------------------------------------------------------------------


def detect_faces(detector: FaceDetector, image: torch.Tensor) -> list[Face]:
    """All faces in an image, the largest first.

    The image is tried at `LONGEST_SIDES` until faces are found, and finally with a margin around it, for images that a
    face fills completely.

    Args:
        detector: the detector.
        image: [H, W, 3] float32, 0 to 1.
    """
    import numpy as np
    from PIL import Image

    pixels = as_bytes(image)
    height, width = pixels.shape[:2]
    margin_y, margin_x = round(height * _MARGIN), round(width * _MARGIN)
    framed = np.pad(pixels, ((margin_y, margin_y), (margin_x, margin_x), (0, 0)))
    attempts = [
        (pixels, limit, (0, 0)) for limit in LONGEST_SIDES if limit == LONGEST_SIDES[0] or limit < max(height, width)
    ]
    attempts.append((framed, LONGEST_SIDES[1], (margin_x, margin_y)))
    for shown, limit, offset in attempts:
        factor = min(1.0, limit / max(shown.shape[:2]))
        if factor < 1.0:
            size = tuple(max(1, round(length * factor)) for length in (shown.shape[1], shown.shape[0]))
            shown = np.asarray(Image.fromarray(shown).resize(size, Image.Resampling.LANCZOS))
        found = [
            Face(
                box=tuple((value / factor - offset[i % 2]) for i, value in enumerate(face.box)),
                points=face.points / factor - offset,
                score=face.score,
            )
            for face in detector.detect(np.ascontiguousarray(shown))
        ]
        if found:
            return sorted(found, key=lambda face: face.area, reverse=True)
    return []


def choose_faces(faces: Sequence[Face], choice: str, index: int, name: str) -> list[Face]:
    """Select among an image's faces.

    Args:
        faces: the largest first.
        choice: "largest", "index" or "all".
        index: number of the face for "index", from 1, from left to right.
        name: the image's name or number, for messages.

    Raises:
        IdentityEditError: when there is no face, or none of this index.
    """
    if choice not in CHOICES:
        raise IdentityEditError(f"choice is {choice!r}; choose one of {', '.join(CHOICES)}.")
    if not faces:
        raise IdentityEditError(
            f"No face was found in {name}; use an image that shows one from the front, lower score in Load Face "
            f"Detector, or leave the image out."
        )
    if choice == LARGEST:
        return [faces[0]]
    from_left = sorted(faces, key=lambda face: face.box[0] + face.box[2])
    if choice == ALL:
        return from_left
    if not 1 <= index <= len(faces):
        raise IdentityEditError(
            f"index is {index}, but {name} has {len(faces)} face{'s' if len(faces) > 1 else ''}; choose one from 1 "
            f"(leftmost) to {len(faces)}."
        )
    return [from_left[index - 1]]


def check_face(face: Face, name: str, smallest: float = SMALLEST_SIDE) -> str | None:
    """A warning about a face that is small or seen from the side, or None.

    Raises:
        IdentityEditError: when its crop is smaller than `smallest` pixels.
    """
    side = face.side
    if side < smallest:
        raise IdentityEditError(
            f"The face in {name} is too small: its crop has {side:.0f} pixels along a side, fewer than {smallest:g}; "
            f"use a larger image of it, or lower smallest_face."
        )
    notes = []
    if side < SMALL_SIDE:
        notes.append(f"small ({side:.0f} pixels along a side of its crop)")
    if abs(turned_aside(face.points)) > PROFILE:
        notes.append("seen from the side, which is difficult for encoders trained on frontal faces")
    return f"The face in {name} is {' and '.join(notes)}." if notes else None


def drawn_faces(images: torch.Tensor, found: Sequence[Sequence[Face]]) -> torch.Tensor:
    """Images [B, H, W, 3] with the points and the FFHQ crops of their faces drawn on them."""
    from PIL import ImageDraw

    drawn = []
    for image, faces in zip(images, found, strict=True):
        canvas = to_pillow(image)
        pen = ImageDraw.Draw(canvas)
        width = max(1, max(canvas.size) // 400)
        for face in faces:
            corners = [tuple(corner) for corner in ffhq_quad(face.points).tolist()]
            pen.line([*corners, corners[0]], fill=(0, 220, 90), width=width)
            for x, y in face.points.tolist():
                pen.ellipse((x - 2 * width, y - 2 * width, x + 2 * width, y + 2 * width), fill=(255, 60, 60))
        drawn.append(from_pillow(canvas))
    return torch.stack(drawn)


# -- points that a user gives ------------------------------------------------------------------------------------------


_HOW = "write five lines 'x, y' (left eye, right eye, nose, left and right corner of the mouth) or the same as JSON"


def parse_points(text: str, images: int) -> list[list[Face]]:
    """Parse faces from five points each.

    Args:
        text: JSON: five times [x, y] for the same face points in every image, a list of these with one face per image,
            or the points output of Align Face: [{"image": 1, "points": [[x, y], ...]}, ...]. Or plain lines 'x, y',
            five for every image or five per image. Pixels from the upper left corner.
        images: number of images.

    Returns:
        the faces of each image.

    Raises:
        IdentityEditError: when the text is invalid or does not match the number of images.
    """
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if content is None:
        content = _points_of_lines(text)
    elif isinstance(content, list) and content and all(isinstance(entry, dict) for entry in content):
        return _faces_by_image(content, images)
    elif isinstance(content, list) and len(content) == 5 and all(_is_pair(point) for point in content):
        content = [content]
    if not isinstance(content, list) or len(content) not in (1, images):
        raise IdentityEditError(f"points must be of one face, or of one for each of {images} images; {_HOW}.")
    faces = [_given(points) for points in content]
    return [[face] for face in (faces * images if len(faces) == 1 else faces)]


def _points_of_lines(text: str) -> list[list[list[float]]]:
    """Five points for each face from lines 'x, y'."""
    points = []
    for line, numbers in lines_of_numbers(text):
        if numbers is None or len(numbers) not in (0, 2):
            raise IdentityEditError(f"points has the line '{line}'; {_HOW}.")
        points += [numbers] if numbers else []
    if not points or len(points) % 5:
        raise IdentityEditError(f"points has {len(points)} of five points; {_HOW}.")
    return [points[i : i + 5] for i in range(0, len(points), 5)]


def _faces_by_image(entries: list[dict[str, Any]], images: int) -> list[list[Face]]:
    """Faces from the points output of Align Face."""
    found: list[list[Face]] = [[] for _ in range(images)]
    for entry in entries:
        number = entry.get("image", 1)
        if not isinstance(number, int) or not 1 <= number <= images:
            raise IdentityEditError(f"points names the image {number}, but there are {images}; correct it.")
        found[number - 1].append(_given(entry.get("points")))
    missing = [str(number) for number, faces in enumerate(found, start=1) if not faces]
    if missing:
        raise IdentityEditError(f"points has none for image {', '.join(missing)}; {_HOW}.")
    return found


def _given(points: Any) -> Face:
    array = check_points(points)
    ffhq_quad(array)  # says what is wrong with points on one another
    low, high = array.min(axis=0), array.max(axis=0)
    return Face((float(low[0]), float(low[1]), float(high[0]), float(high[1])), array)


def _is_pair(point: Any) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(isinstance(value, (int, float)) for value in point)


# -- detectors ---------------------------------------------------------------------------------------------------------


class _YuNet:
    """OpenCV's FaceDetectorYN with one of its files."""

    def __init__(self, path: str, score: float) -> None:
        cv2 = import_optional("cv2", "opencv-python-headless", path)
        if not hasattr(cv2, "FaceDetectorYN"):
            raise IdentityEditError(
                "This OpenCV has no FaceDetectorYN; update it (pip install -U opencv-python-headless)."
            )
        self.name = os.path.basename(path)
        self._cv2 = cv2
        try:
            self._network = cv2.FaceDetectorYN.create(path, "", (320, 320), score, 0.3, 5000)
        except cv2.error as error:
            raise IdentityEditError(
                f"OpenCV cannot load the detector {path} ({first_line(error)}); use face_detection_yunet_2023mar.onnx, "
                f"or update OpenCV."
            ) from error

    def detect(self, image: np.ndarray) -> list[Face]:
        self._network.setInputSize((image.shape[1], image.shape[0]))
        _, rows = self._network.detect(self._cv2.cvtColor(image, self._cv2.COLOR_RGB2BGR))
        faces = []
        for row in [] if rows is None else rows.astype("float64"):
            left, top, width, height = row[:4].tolist()
            faces.append(Face((left, top, left + width, top + height), row[4:14].reshape(5, 2), float(row[14])))
        return faces


class _InsightFace:
    """A detector of insightface: SCRFD or RetinaFace, alone or from a pack."""

    def __init__(self, network: Any, name: str) -> None:
        self.name = name
        self._network = network

    def detect(self, image: np.ndarray) -> list[Face]:
        boxes, points = self._network.detect(image[..., ::-1].copy(), max_num=0)
        if points is None:
            raise IdentityEditError(
                f"The detector {self.name} gives boxes without points; choose one with points, such as det_10g.onnx."
            )
        return [
            Face(tuple(box[:4].tolist()), five.astype("float64").reshape(5, 2), float(box[4]))
            for box, five in zip(boxes, points, strict=True)
        ]


class _MTCNN:
    """facenet-pytorch's MTCNN; the package includes its weights."""

    def __init__(self, score: float) -> None:
        facenet = import_optional("facenet_pytorch", "--no-deps facenet-pytorch", MTCNN)
        self.name = MTCNN
        self._score = score
        self._network = facenet.MTCNN(keep_all=True, device="cpu", post_process=False)

    def detect(self, image: np.ndarray) -> list[Face]:
        with torch.inference_mode(False):
            boxes, scores, points = self._network.detect(image, landmarks=True)
        if boxes is None:
            return []
        return [
            Face(tuple(box.tolist()), five.astype("float64").reshape(5, 2), float(score))
            for box, score, five in zip(boxes, scores, points, strict=True)
            if score >= self._score
        ]


def list_detectors() -> dict[str, str]:
    """Possible detectors, path by name: insightface packs and single .onnx files."""
    found: dict[str, str] = {}
    for root in model_roots(FOLDER):
        packs = os.path.join(root, PACKS)
        for name in sorted(os.listdir(packs)) if os.path.isdir(packs) else []:
            folder = os.path.join(packs, name)
            for place in (folder, os.path.join(folder, name)):  # an archive may contain a top-level folder
                if os.path.isdir(place) and any(file.lower().endswith(".onnx") for file in os.listdir(place)):
                    found.setdefault(f"{PACKS}/{name}", place)
        for name in sorted(os.listdir(root)) if os.path.isdir(root) else []:
            if name.lower().endswith(".onnx"):
                found.setdefault(name, os.path.join(root, name))
    return found


def load_detector(name: str, score: float = SCORE) -> FaceDetector:
    """A detector by its name in `list_detectors`, or `MTCNN`.

    Args:
        score: confidence threshold, 0 to 1.

    Raises:
        IdentityEditError: when the file or its package is missing, or the file is not a detector.
    """
    if name == MTCNN:
        return _MTCNN(score)
    paths = list_detectors()
    if name not in paths:
        raise IdentityEditError(missing_file(name))
    return open_detector(paths[name], score)


def open_detector(path: str, score: float = SCORE) -> FaceDetector:
    """A detector from a file, or from a pack's folder (its parent must be called "models"); see `load_detector`."""
    if not os.path.isdir(path) and is_yunet(path):
        return _YuNet(path, score)
    network = insightface_model(path, "detection")
    network.prepare(ctx_id=-1, input_size=(640, 640), det_thresh=score)
    return _InsightFace(network, os.path.basename(path))


def is_yunet(path: str) -> bool:
    """Whether an ONNX file is a YuNet, by the names of its outputs."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise IdentityEditError(f"The file {path} cannot be read ({error.strerror}); choose another.") from error
    return all(name in content for name in _YUNET_OUTPUTS)


def insightface_model(path: str, task: str) -> Any:
    """A network of insightface from a file or a pack's folder, on the CPU.

    Args:
        path: an .onnx file, or the folder ROOT/models/PACK, or PACK in one of that name.
        task: "detection" or "recognition".

    Raises:
        IdentityEditError: when insightface is missing, or the file or pack has no network for the task.
    """
    import_optional("onnxruntime", "onnxruntime", path)
    import_optional("insightface", "insightface", path)
    from insightface.app import FaceAnalysis
    from insightface.model_zoo import model_zoo

    providers = ["CPUExecutionProvider"]
    try:
        if os.path.isdir(path):
            packs = os.path.dirname(path)
            if os.path.basename(packs) == os.path.basename(path):
                packs = os.path.dirname(packs)
            name, root = os.path.relpath(path, packs), os.path.dirname(packs)
            wanted = ["detection"] if task == "detection" else ["detection", task]
            pack = FaceAnalysis(name=name, root=root, allowed_modules=wanted, providers=providers)
            network = pack.models.get(task)
        else:
            network = model_zoo.get_model(path, providers=providers)
    except Exception as error:  # a pack without a detector is a bare AssertionError, a broken file many other kinds
        raise IdentityEditError(
            f"insightface cannot load {path} ({first_line(error)}); download it again, and keep all .onnx files of a "
            f"pack together."
        ) from error
    if network is None or getattr(network, "taskname", None) != task:
        raise IdentityEditError(
            f"{path} is no network for face {task}; choose "
            f"{'a detector such as det_10g.onnx' if task == 'detection' else 'one such as w600k_r50.onnx'}."
        )
    return network


def missing_file(name: str, needed: str = NEEDED) -> str:
    """The sentence that says where a detector should be and which files there are."""
    return for_console(f"'{name}' is not in {model_roots(FOLDER)[0]}; put there {needed}, and press R.")
