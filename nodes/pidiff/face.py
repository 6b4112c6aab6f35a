"""Nodes that detect and align faces."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch.nn.functional import interpolate

from ...pipelines.engine.host import stop_if_interrupted
from ...pipelines.faces import alignment as face_alignment
from ...pipelines.faces import detection as pipeline
from ...pipelines.faces.background import ENDINGS as BACKGROUND_ENDINGS
from ...pipelines.faces.background import FOLDER as BACKGROUND_FOLDER
from ...pipelines.faces.background import NEEDED as BACKGROUND_NEEDED
from ...pipelines.faces.background import subject_masks, without_background
from ...pipelines.networks.model_folders import list_models, missing_model, model_path
from ...pipelines.shared.errors import IdentityEditError
from ...pipelines.shared.images import as_color
from ...pipelines.shared.masks import masks_for
from ..sockets import FaceDetector, checked, fraction_input, mask_input, schema, show_text

MODEL_FOLDERS = (pipeline.FOLDER, BACKGROUND_FOLDER)
NO_MODEL = "no model"
BY_DETECTOR, BY_POINTS, WHOLE = "detector", "points", "whole image"
METHODS = (BY_DETECTOR, BY_POINTS, WHOLE)
KEEP, REMOVE = "keep", "remove"
STOP, LEAVE_OUT = "stop with an error", "leave out"


class LoadFaceDetector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditLoadFaceDetector",
            display_name="Load Face Detector",
            category="face",
            search_aliases=["insightface", "SCRFD", "YuNet", "MTCNN", "buffalo_l", "face detection"],
            advanced=["score"],
            description="Loads a face detector with five facial landmarks from local files.",
            inputs=[
                io.Combo.Input(
                    "detector",
                    options=[NO_MODEL, *pipeline.list_detectors(), pipeline.MTCNN],
                    tooltip=f"Detector in models/{pipeline.FOLDER}: an insightface model pack (models/PACK), a single "
                    "SCRFD file, or OpenCV's YuNet. Nothing is downloaded. MTCNN includes its weights in its package. "
                    "No model: Align Face uses the images as they are, and Identity Similarity measures nothing.",
                ),
                fraction_input(
                    "score",
                    pipeline.SCORE,
                    "Minimum detection confidence. 0.6 found all faces in the photos of "
                    "benchmarks/results/face_identity.md, and nothing else.",
                ),
            ],
            outputs=[
                FaceDetector.Output("face_detector", tooltip="Face detector for Align Face and Identity Similarity.")
            ],
        )

    @classmethod
    def validate_inputs(cls, detector: str | None) -> bool | str:
        if detector is None or detector in (NO_MODEL, pipeline.MTCNN, *pipeline.list_detectors()):
            return True
        return pipeline.missing_file(detector)

    @classmethod
    @checked
    def execute(cls, detector: str, score: float) -> io.NodeOutput:
        return io.NodeOutput(None if detector == NO_MODEL else pipeline.load_detector(detector, score))


class AlignFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditAlignFace",
            display_name="Align Face",
            category="face",
            search_aliases=["FFHQ", "crop face", "face alignment", "PIDiff", "remove background", "rembg"],
            advanced=["smallest_face", "gray", "without_face"],
            description=(
                "Crops faces as in FFHQ, the training set of e4e: upright, with eyes and mouth at fixed "
                "positions; and removes the background (PIDiff, Gu et al. 2025, section 2.2.2)."
            ),
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="One or more images; grayscale and RGBA work too."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=BY_DETECTOR,
                    tooltip="Method that locates faces: by a face detector, by the five landmarks in points, or not at "
                    "all: whole image is for images that are already aligned, or for drawings. Detector without a "
                    "face detector is the same.",
                ),
                io.Combo.Input(
                    "choice",
                    options=list(pipeline.CHOICES),
                    default=pipeline.LARGEST,
                    tooltip="Face to use when an image has several: the largest, the one at an index, or all "
                    "of them as a batch, from left to right.",
                ),
                io.Int.Input(
                    "index",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="Face number for the choice 'index', counted from the left. 1 is the leftmost.",
                ),
                io.Int.Input(
                    "size",
                    default=256,
                    min=64,
                    max=2048,
                    step=8,
                    tooltip="Width and height of the aligned faces in pixels. e4e uses 256, FFHQ has 1024.",
                ),
                io.Int.Input(
                    "smallest_face",
                    default=pipeline.SMALLEST_SIDE,
                    min=8,
                    max=2048,
                    tooltip="Minimum side length of a face crop in pixels; smaller faces are not used. 48 leaves "
                    "a margin: faces were recognized down to 40 (benchmarks/results/face_identity.md).",
                ),
                io.Combo.Input(
                    "background",
                    options=[KEEP, REMOVE],
                    default=REMOVE,
                    tooltip="Background. Remove fills it with gray, outside mask or, without one, outside the "
                    "subject that background_model finds. Gu et al. 2025 remove it so that it is not learned as part "
                    "of the identity.",
                ),
                io.Combo.Input(
                    "background_model",
                    options=[NO_MODEL, *list_models(BACKGROUND_FOLDER, BACKGROUND_ENDINGS)],
                    tooltip=f"Salient-object network in models/{BACKGROUND_FOLDER} ({BACKGROUND_NEEDED}), for images "
                    "without a mask. Nothing is downloaded.",
                ),
                fraction_input(
                    "gray",
                    0.5,
                    "Gray level of the removed background: 0 is black, 1 is white. Gu et al. 2025 do not "
                    "report theirs; 0.5 is the middle of the encoders' input range.",
                ),
                io.String.Input(
                    "points",
                    default="",
                    multiline=True,
                    tooltip="Landmarks for the method 'points': five lines 'x, y' in pixels: left eye, right eye, "
                    "tip of the nose, left and right corner of the mouth, with left and right as seen in the image. "
                    "Five for all images, or five per image; or JSON, such as the points output of this node.",
                ),
                FaceDetector.Input(
                    "face_detector",
                    optional=True,
                    tooltip="Face detector for the method 'detector', from Load Face Detector.",
                ),
                mask_input(
                    "mask",
                    "Mask of the person: 1 on the person, for example from Segment Subject, of any size; one "
                    "for all images or one per image. It is aligned with the images.",
                    optional=True,
                ),
                io.Combo.Input(
                    "without_face",
                    options=[LEAVE_OUT, STOP],
                    default=LEAVE_OUT,
                    optional=True,
                    tooltip="Handling of images without a usable face, or with an empty mask. Leave out continues "
                    "with the other images and lists the skipped ones in the report.",
                ),
            ],
            outputs=[
                io.Image.Output("faces", tooltip="The aligned faces as one batch."),
                io.Mask.Output(
                    "face_mask",
                    display_name="mask",
                    tooltip="Mask of the person in the aligned faces; without a mask, the area inside the image.",
                ),
                io.Image.Output("preview", tooltip="The images with landmarks and crops drawn in."),
                io.String.Output(
                    "face_points",
                    display_name="points",
                    tooltip="JSON with the image number, landmarks, box and score of each face.",
                ),
                io.String.Output("report", tooltip="Faces found, and warnings."),
            ],
        )

    @classmethod
    def validate_inputs(cls, background: str | None = KEEP, background_model: str | None = NO_MODEL) -> bool | str:
        models = list_models(BACKGROUND_FOLDER, BACKGROUND_ENDINGS)
        if background_model is None or background in (None, KEEP) or background_model in (NO_MODEL, *models):
            return True
        return missing_model(BACKGROUND_FOLDER, background_model, BACKGROUND_NEEDED)

    @classmethod
    @checked
    def execute(
        cls,
        images: torch.Tensor,
        method: str,
        choice: str,
        index: int,
        size: int,
        smallest_face: int,
        background: str,
        background_model: str,
        gray: float,
        points: str,
        face_detector: Any = None,
        mask: torch.Tensor | None = None,
        without_face: str = LEAVE_OUT,
    ) -> io.NodeOutput:
        images = as_color(images)
        masks = None if mask is None else masks_for(mask, "mask", images.shape[1], images.shape[2], len(images))
        notes: list[str] = []
        faults = Faults(without_face)
        usable = []
        for number in range(len(images)):
            with faults.of_one_image():
                _check_mask(masks, number)
                usable.append(number)
        detected: list[list[pipeline.Face]] = [[] for _ in images]
        if method == BY_DETECTOR and face_detector is None:
            method = WHOLE
            notes.append("There is no face detector, so the images count as aligned; select one in Load Face Detector.")
        if method == WHOLE:
            faults.stop_if_none(usable)
            faces, face_masks = _whole_images(images[usable], None if masks is None else masks[usable], size)
            text = f"{len(faces)} whole image{'s' if len(faces) > 1 else ''}"
        else:
            candidates, choice = _find(images, method, choice, points, face_detector)
            aligned = []
            for number in usable:
                chosen: list[pipeline.Face] = []
                with faults.of_one_image():
                    chosen = pipeline.choose_faces(candidates[number], choice, index, name_of(number))
                for face in chosen:
                    with faults.of_one_image():
                        note = pipeline.check_face(face, name_of(number), smallest_face)
                        face_mask = None if masks is None else masks[number]
                        aligned.append(face_alignment.align_ffhq(images[number], face.points, size, face_mask))
                        detected[number].append(face)
                        notes += [note] if note else []
            faults.stop_if_none(aligned)
            faces = torch.stack([each.image for each in aligned])
            face_masks = torch.stack([each.mask for each in aligned])
            text = f"{len(faces)} face{'s' if len(faces) > 1 else ''} of {len(images)} image(s)"
        notes += faults.note()
        if background == REMOVE:
            if masks is None:
                face_masks = face_masks * subject_masks(_background_model(background_model), faces)
            faces = without_background(faces, face_masks, gray)
        entries = [
            {
                "image": number,
                "points": [[round(value, 2) for value in point] for point in face.points.tolist()],
                "box": [round(value, 2) for value in face.box],
                "score": round(face.score, 3),
            }
            for number, faces_of_it in enumerate(detected, start=1)
            for face in faces_of_it
        ]
        return io.NodeOutput(
            faces,
            face_masks,
            pipeline.drawn_faces(images, detected),
            json.dumps(entries),
            show_text(cls, f"{text}, {size}x{size}.", " ".join(notes) or None),
            ui=ui.PreviewImage(faces, cls=cls),
        )


class Faults:
    """Images that cannot be used: the first one stops the node, or all are skipped.

    Args:
        choice: STOP, or any other value to skip them.
    """

    def __init__(self, choice: str) -> None:
        self._stops = choice == STOP
        self._errors: list[IdentityEditError] = []

    @contextmanager
    def of_one_image(self) -> Iterator[None]:
        """Context manager for work on a single image, which may fail."""
        try:
            yield
        except IdentityEditError as error:
            if self._stops:
                raise
            self._errors.append(error)

    def stop_if_none(self, usable: Sequence[Any]) -> None:
        """Raise the first fault when no image is usable."""
        if not usable:
            raise self._errors[0]

    def note(self) -> list[str]:
        """A sentence with the reasons why images were skipped."""
        reasons = "; ".join(str(error).split(";")[0] for error in self._errors)
        return [f"Left out: {reasons}."] if reasons else []


def _check_mask(masks: torch.Tensor | None, number: int) -> None:
    if masks is not None and not bool((masks[number] > 0).any()):
        raise IdentityEditError(
            f"The mask of {name_of(number)} is empty; paint the person, connect Segment Subject, or disconnect the "
            f"mask."
        )


def _find(
    images: torch.Tensor, method: str, choice: str, points: str, detector: Any
) -> tuple[list[list[pipeline.Face]], str]:
    """Faces of every image, largest first, and which of them to use."""
    if method == BY_POINTS:
        if not points.strip():
            raise IdentityEditError(
                "points is empty; write five lines 'x, y', or choose the method 'detector' or 'whole image'."
            )
        parsed = pipeline.parse_points(points, len(images))
        several = any(len(faces) > 1 for faces in parsed)
        ordered = [sorted(faces, key=lambda face: face.area, reverse=True) for faces in parsed]
        return ordered, choice if several else pipeline.LARGEST
    if method != BY_DETECTOR:
        raise IdentityEditError(f"method is {method!r}; choose one of {', '.join(METHODS)}.")
    detected = []
    for image in images:
        stop_if_interrupted()
        detected.append(pipeline.detect_faces(detector, image))
    return detected, choice


def _whole_images(images: torch.Tensor, masks: torch.Tensor | None, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and masks at a size, center-cropped to a square."""
    alpha = torch.ones(images.shape[:3]) if masks is None else masks
    layers = torch.cat([images, alpha[..., None]], dim=-1).movedim(-1, 1)
    height, width = layers.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    layers = layers[:, :, top : top + side, left : left + side]
    if side != size:
        layers = interpolate(layers, size=(size, size), mode="bilinear", antialias=True)
    return layers[:, :3].movedim(1, -1).contiguous(), layers[:, 3].contiguous()


def _background_model(name: str) -> str:
    if name == NO_MODEL:
        raise IdentityEditError(
            "Removing the background needs a mask or a background_model; connect a mask, choose a model, or "
            "set background to 'keep'."
        )
    return model_path(BACKGROUND_FOLDER, name, BACKGROUND_NEEDED, BACKGROUND_ENDINGS)


def name_of(number: int) -> str:
    return f"image {number + 1}"


NODES: list[type[io.ComfyNode]] = [LoadFaceDetector, AlignFace]
