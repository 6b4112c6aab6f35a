"""Nodes that find and align faces, and say whether two images show the same person."""

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
from ...pipelines.faces import similarity as identity_similarity
from ...pipelines.faces.background import ENDINGS as BACKGROUND_ENDINGS
from ...pipelines.faces.background import FOLDER as BACKGROUND_FOLDER
from ...pipelines.faces.background import NEEDED as BACKGROUND_NEEDED
from ...pipelines.faces.background import subject_masks, without_background
from ...pipelines.networks.model_folders import list_models, missing_model, model_path
from ...pipelines.shared.errors import IdentityEditError
from ...pipelines.shared.images import as_color
from ...pipelines.shared.masks import masks_for
from ..sockets import FaceDetector, checked, mask_input, schema, show_text

MODEL_FOLDERS = (pipeline.FOLDER, BACKGROUND_FOLDER)
NO_MODEL = "no model"
BY_DETECTOR, BY_POINTS, WHOLE = "detector", "points", "whole image"
METHODS = (BY_DETECTOR, BY_POINTS, WHOLE)
KEEP, REMOVE = "keep", "remove"
MOST_SIMILAR = "most similar"
STOP, ZERO, LEAVE_OUT = "stop with an error", "count as 0", "leave out"


class LoadFaceDetector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditLoadFaceDetector",
            display_name="Load Face Detector",
            category="identity",
            search_aliases=["insightface", "SCRFD", "YuNet", "MTCNN", "buffalo_l", "face detection"],
            description="Loads a network that finds faces and five points in each, from files that you have.",
            inputs=[
                io.Combo.Input(
                    "detector",
                    options=[NO_MODEL, *pipeline.list_detectors(), pipeline.MTCNN],
                    tooltip=f"In models/{pipeline.FOLDER}: a model pack of insightface (models/PACK), a single SCRFD, "
                    "or a YuNet of OpenCV. Nothing is downloaded. MTCNN brings its weights with its package.",
                ),
                io.Float.Input(
                    "score",
                    default=pipeline.SCORE,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How sure it must be of a face. 0.6 found all faces of the photos in "
                    "benchmarks/results/face_identity.md, and no others.",
                ),
            ],
            outputs=[
                FaceDetector.Output(
                    "face_detector", display_name="face detector", tooltip="For Align Face and Identity Similarity."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, detector: str) -> bool | str:
        if detector == pipeline.MTCNN or detector in pipeline.list_detectors():
            return True
        return pipeline.missing_file(detector)

    @classmethod
    @checked
    def execute(cls, detector: str, score: float) -> io.NodeOutput:
        return io.NodeOutput(pipeline.load_detector(detector, score))


class AlignFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditAlignFace",
            display_name="Align Face",
            category="identity",
            search_aliases=["FFHQ", "crop face", "face alignment", "PIDiff", "remove background", "rembg"],
            description=(
                "Cuts faces out of images as the images of FFHQ are cut, on which e4e was trained: upright, eyes "
                "and mouth at fixed places; and removes their background (PIDiff, Gu et al. 2025, "
                "section 2.2.2)."
            ),
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="One or more images; gray and RGBA ones too."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=BY_DETECTOR,
                    tooltip="How faces are found: by a face detector, by the five points that you give, or not at all: "
                    "whole image takes images that are aligned already, or drawn.",
                ),
                io.Combo.Input(
                    "choice",
                    options=list(pipeline.CHOICES),
                    default=pipeline.LARGEST,
                    tooltip="Which of several faces in an image: the largest, the one of an index, or all of them as "
                    "a batch, from left to right.",
                ),
                io.Int.Input(
                    "index",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="For the choice 'index': which face, counted from the left. 1 is the leftmost.",
                ),
                io.Int.Input(
                    "size",
                    default=256,
                    min=64,
                    max=2048,
                    step=8,
                    tooltip="Pixels along a side of the aligned faces. 256 is what e4e takes, 1024 what FFHQ has.",
                ),
                io.Int.Input(
                    "smallest_face",
                    default=pipeline.SMALLEST_SIDE,
                    min=8,
                    max=2048,
                    tooltip="Pixels along a side of a face's crop below which it cannot be used. 48: smaller faces "
                    "were no longer recognized for sure (benchmarks/results/face_identity.md).",
                ),
                io.Combo.Input(
                    "background",
                    options=[KEEP, REMOVE],
                    default=REMOVE,
                    tooltip="Remove paints an even gray where mask, or else background_model, sees no subject. Gu et "
                    "al. 2025 remove it, so that backgrounds are not taken for the person.",
                ),
                io.Combo.Input(
                    "background_model",
                    options=[NO_MODEL, *list_models(BACKGROUND_FOLDER, BACKGROUND_ENDINGS)],
                    tooltip=f"A salient-object network in models/{BACKGROUND_FOLDER} ({BACKGROUND_NEEDED}), for "
                    "images without a mask. Nothing is downloaded.",
                ),
                io.Float.Input(
                    "gray",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="What is painted on the background: 0 is black, 1 is white. Gu et al. 2025 name none; 0.5 "
                    "is the middle of the range that encoders take.",
                ),
                io.String.Input(
                    "points",
                    default="",
                    multiline=True,
                    tooltip="For the method 'points': five lines 'x, y' in pixels, as seen in the image: left eye, "
                    "right eye, tip of the nose, left and right corner of the mouth. Five for all images, or five "
                    "for each; or JSON, such as what this node gives as its points.",
                ),
                FaceDetector.Input(
                    "face_detector", optional=True, tooltip="For the method 'detector': Load Face Detector."
                ),
                mask_input(
                    "mask",
                    "Mask of the person: 1 on the person, such as Segment Subject's, of any size; one for all images "
                    "or one for each. It is aligned with the images.",
                    optional=True,
                ),
                io.Combo.Input(
                    "without_face",
                    options=[LEAVE_OUT, STOP],
                    default=LEAVE_OUT,
                    optional=True,
                    tooltip="What to do with an image without a face that can be used, or with an empty mask. Leave "
                    "out goes on with the others, and the report says which it was.",
                ),
            ],
            outputs=[
                io.Image.Output("faces", display_name="faces", tooltip="The aligned faces, one batch."),
                io.Mask.Output(
                    "face_mask",
                    display_name="mask",
                    tooltip="The person in the aligned faces; without a mask all that lies within the image.",
                ),
                io.Image.Output(
                    "preview", display_name="preview", tooltip="The images with the points and crops of the faces."
                ),
                io.String.Output(
                    "face_points",
                    display_name="points",
                    tooltip="JSON: the image's number, points, box and score of each face.",
                ),
                io.String.Output("report", display_name="report", tooltip="What was found, and warnings."),
            ],
        )

    @classmethod
    def validate_inputs(cls, background: str = KEEP, background_model: str = NO_MODEL) -> bool | str:
        found = list_models(BACKGROUND_FOLDER, BACKGROUND_ENDINGS)
        if background == KEEP or background_model == NO_MODEL or background_model in found:
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
        faults = _Faults(without_face)
        usable = []
        for number in range(len(images)):
            with faults.of_a_image():
                _check_mask(masks, number)
                usable.append(number)
        found: list[list[pipeline.Face]] = [[] for _ in images]
        if method == WHOLE:
            faults.stop_if_nothing_is_left(usable)
            faces, face_masks = _whole_images(images[usable], None if masks is None else masks[usable], size)
            text = f"{len(faces)} whole image{'s' if len(faces) > 1 else ''}"
        else:
            candidates, choice = _find(images, method, choice, points, face_detector)
            aligned = []
            for number in usable:
                chosen: list[pipeline.Face] = []
                with faults.of_a_image():
                    chosen = pipeline.choose_faces(candidates[number], choice, index, _name(number))
                for face in chosen:
                    with faults.of_a_image():
                        note = pipeline.check_face(face, _name(number), smallest_face)
                        own = None if masks is None else masks[number]
                        aligned.append(face_alignment.align_ffhq(images[number], face.points, size, own))
                        found[number].append(face)
                        notes += [note] if note else []
            faults.stop_if_nothing_is_left(aligned)
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
            for number, faces_of_it in enumerate(found, start=1)
            for face in faces_of_it
        ]
        return io.NodeOutput(
            faces,
            face_masks,
            pipeline.drawn_faces(images, found),
            json.dumps(entries),
            show_text(cls, f"{text}, {size}x{size}.", " ".join(notes) or None),
            ui=ui.PreviewImage(faces, cls=cls),
        )


class IdentitySimilarity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditIdentitySimilarity",
            display_name="Identity Similarity",
            category="identity",
            search_aliases=["ArcFace", "face similarity", "ID score", "same person", "insightface", "cosine"],
            description=(
                "Says how much the people in two sets of images are alike: the cosine of ArcFace embeddings of "
                "their faces (PIDiff, Gu et al. 2025, section 3.2, its measure ID)."
            ),
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The images to score, such as generated ones; each gets its own."),
                io.Image.Input(
                    "reference",
                    tooltip="Images of the person; the largest face of each. Every image is compared with the one "
                    "that it is most like, as in Gu et al. 2025 (section 3.3.1).",
                ),
                FaceDetector.Input("face_detector", tooltip="From Load Face Detector."),
                io.Combo.Input(
                    "recognizer",
                    options=[NO_MODEL, *pipeline.list_detectors()],
                    tooltip=f"An ArcFace in models/{pipeline.FOLDER}: a model pack of insightface (models/PACK) or a "
                    "single .onnx, such as w600k_r50.onnx. Nothing is downloaded.",
                ),
                io.Combo.Input(
                    "choice",
                    options=[pipeline.LARGEST, MOST_SIMILAR],
                    default=pipeline.LARGEST,
                    tooltip="Which face counts where an image has several: the largest, or the one most like the "
                    "reference.",
                ),
                io.Combo.Input(
                    "without_face",
                    options=[STOP, ZERO, LEAVE_OUT],
                    default=STOP,
                    tooltip="What to do with an image in which no face is found. Counting it as 0 keeps a long "
                    "comparison from ending; leave out takes the mean without it, and the report says which it was.",
                ),
                io.Combo.Input(
                    "reference_without_face",
                    options=[LEAVE_OUT, STOP],
                    default=LEAVE_OUT,
                    optional=True,
                    tooltip="What to do with a reference in which no face is found. Leave out goes on with the others, "
                    "and the report says which it was.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    "score",
                    display_name="score",
                    tooltip="Mean over the images, -1 to 1. Above 0.5 it is the same person, below 0.35 another "
                    "(benchmarks/results/face_identity.md).",
                ),
                io.Float.Output("lowest", display_name="lowest", tooltip="The score of the least similar image."),
                io.String.Output("report", display_name="report", tooltip="The score of every image, and warnings."),
            ],
        )

    @classmethod
    def validate_inputs(cls, recognizer: str) -> bool | str:
        if recognizer in pipeline.list_detectors():
            return True
        return pipeline.missing_file(recognizer, identity_similarity.NEEDED)

    @classmethod
    @checked
    def execute(
        cls,
        images: torch.Tensor,
        reference: torch.Tensor,
        face_detector: Any,
        recognizer: str,
        choice: str,
        without_face: str,
        reference_without_face: str = LEAVE_OUT,
    ) -> io.NodeOutput:
        images, reference = as_color(images), as_color(reference, "reference")
        network = identity_similarity.load_recognizer(recognizer)
        notes: list[str] = []
        known = []
        faults = _Faults(reference_without_face)
        for number, image in enumerate(reference):
            name = f"reference {number + 1}"
            faces = pipeline.detect_faces(face_detector, image)
            with faults.of_a_image():
                face = pipeline.choose_faces(faces, pipeline.LARGEST, 1, name)[0]
                notes += _warning(face, name)
                known.append((image, face))
        faults.stop_if_nothing_is_left(known)
        notes += faults.note()
        embedded = identity_similarity.embed_faces(network, known)

        scores, lines = [], []
        faults = _Faults(without_face)
        for number, image in enumerate(images):
            stop_if_interrupted()
            found = pipeline.detect_faces(face_detector, image)
            if not found and without_face == ZERO:
                scores.append(0.0)
                lines.append(f"{_name(number)}: 0 (no face)")
                continue
            candidates: list[pipeline.Face] = []
            with faults.of_a_image():
                candidates = pipeline.choose_faces(
                    found, pipeline.ALL if choice == MOST_SIMILAR else pipeline.LARGEST, 1, _name(number)
                )
            if not candidates:
                lines.append(f"{_name(number)}: left out (no face)")
                continue
            own = identity_similarity.embed_faces(network, [(image, face) for face in candidates])
            best = identity_similarity.similarities(own, embedded).amax(dim=1)
            chosen = int(best.argmax())
            notes += _warning(candidates[chosen], _name(number))
            scores.append(float(best[chosen]))
            lines.append(f"{_name(number)}: {scores[-1]:.3f} ({identity_similarity.verdict(scores[-1])})")
        faults.stop_if_nothing_is_left(scores)
        notes += faults.note()
        mean = sum(scores) / len(scores)
        text = f"Identity similarity {mean:.3f}\n" + "\n".join(lines)
        text = show_text(cls, text, " ".join(notes) or None)
        return io.NodeOutput(mean, min(scores), text, ui=ui.PreviewText(text))


class _Faults:
    """Images that cannot be used: the first one stops the node, or they are left out.

    Args:
        choice: STOP, or any other to go on without them.
    """

    def __init__(self, choice: str) -> None:
        self._stops = choice == STOP
        self._found: list[IdentityEditError] = []

    @contextmanager
    def of_a_image(self) -> Iterator[None]:
        """What may fail for an image alone."""
        try:
            yield
        except IdentityEditError as error:
            if self._stops:
                raise
            self._found.append(error)

    def stop_if_nothing_is_left(self, usable: Sequence[Any]) -> None:
        """Raise the first fault where there is nothing to go on with."""
        if not usable:
            raise self._found[0]

    def note(self) -> list[str]:
        """A sentence that says what was left out and why."""
        reasons = "; ".join(str(error).split(";")[0] for error in self._found)
        return [f"Left out: {reasons}."] if reasons else []


def _check_mask(masks: torch.Tensor | None, number: int) -> None:
    if masks is not None and not bool((masks[number] > 0).any()):
        raise IdentityEditError(
            f"The mask of {_name(number)} is empty; paint the person, connect Segment Subject, or take the mask away."
        )


def _find(
    images: torch.Tensor, method: str, choice: str, points: str, detector: Any
) -> tuple[list[list[pipeline.Face]], str]:
    """The faces of every image, the largest first, and the choice among them."""
    if method == BY_POINTS:
        if not points.strip():
            raise IdentityEditError(
                "points is empty; write five lines 'x, y', or choose the method 'detector' or 'whole image'."
            )
        given = pipeline.parse_points(points, len(images))
        several = any(len(faces) > 1 for faces in given)
        ordered = [sorted(faces, key=lambda face: face.area, reverse=True) for faces in given]
        return ordered, choice if several else pipeline.LARGEST
    if method != BY_DETECTOR:
        raise IdentityEditError(f"method is {method!r}; choose one of {', '.join(METHODS)}.")
    if detector is None:
        raise IdentityEditError(
            "The method 'detector' needs a face detector; connect Load Face Detector, or choose 'points' or 'whole "
            "image'."
        )
    found = []
    for image in images:
        stop_if_interrupted()
        found.append(pipeline.detect_faces(detector, image))
    return found, choice


def _whole_images(images: torch.Tensor, masks: torch.Tensor | None, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and masks at a size, from the middle square of images that are not square."""
    given = torch.ones(images.shape[:3]) if masks is None else masks
    layers = torch.cat([images, given[..., None]], dim=-1).movedim(-1, 1)
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
            "Removing the background needs a mask or a background_model; connect one, choose the other, or set "
            "background to 'keep'."
        )
    return model_path(BACKGROUND_FOLDER, name, BACKGROUND_NEEDED, BACKGROUND_ENDINGS)


def _warning(face: pipeline.Face, name: str) -> list[str]:
    note = pipeline.check_face(face, name, smallest=0.0)
    return [note] if note else []


def _name(number: int) -> str:
    return f"image {number + 1}"


NODES: list[type[io.ComfyNode]] = [LoadFaceDetector, AlignFace, IdentitySimilarity]
