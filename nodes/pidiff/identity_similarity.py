"""The node that measures whether two images show the same person."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from ...pipelines.engine.host import stop_if_interrupted
from ...pipelines.faces import detection as pipeline
from ...pipelines.faces import similarity as identity_similarity
from ...pipelines.shared.images import as_color
from ..idle import first_said
from ..sockets import FaceDetector, blocked, checked, recognizer_exists, recognizer_input, schema, show_text
from .face import LEAVE_OUT, NO_MODEL, STOP, Faults, name_of

MOST_SIMILAR = "most similar"
ZERO = "count as 0"


class IdentitySimilarity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditIdentitySimilarity",
            display_name="Identity Similarity",
            category="face",
            search_aliases=["ArcFace", "face similarity", "ID score", "same person", "insightface", "cosine"],
            advanced=["reference_without_face"],
            description=(
                "Measures how similar the people in two sets of images are: the cosine similarity of the "
                "ArcFace embeddings of their faces (PIDiff, Gu et al. 2025, section 3.2, metric ID)."
            ),
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="Images to score, such as generated ones; each gets its own score."),
                io.Image.Input(
                    "reference",
                    tooltip="Images of the person; the largest face in each is used. Every image is compared with "
                    "its most similar reference, as in Gu et al. 2025 (section 3.3.1).",
                ),
                FaceDetector.Input(
                    "face_detector",
                    optional=True,
                    tooltip="Face detector, from Load Face Detector. Without one, identity is not measured.",
                ),
                recognizer_input(NO_MODEL),
                io.Combo.Input(
                    "choice",
                    options=[pipeline.LARGEST, MOST_SIMILAR],
                    default=pipeline.LARGEST,
                    tooltip="Face to use when an image has several: the largest, or the one most similar to "
                    "the reference.",
                ),
                io.Combo.Input(
                    "without_face",
                    options=[STOP, ZERO, LEAVE_OUT],
                    default=STOP,
                    tooltip="Handling of images in which no face is found. Counting them as 0 keeps a long "
                    "comparison running; leave out excludes them from the mean and lists them in the report.",
                ),
                io.Combo.Input(
                    "reference_without_face",
                    options=[LEAVE_OUT, STOP],
                    default=LEAVE_OUT,
                    optional=True,
                    tooltip="Handling of references in which no face is found. Leave out continues with the other "
                    "references and lists the skipped ones in the report.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    "score",
                    tooltip="Mean score of the images, -1 to 1. Above 0.5 is the same person, below 0.35 a different "
                    "person (benchmarks/results/face_identity.md).",
                ),
                io.Float.Output("lowest", tooltip="Score of the least similar image."),
                io.String.Output("report", tooltip="Score of every image, and warnings."),
            ],
        )

    @classmethod
    def validate_inputs(cls, recognizer: str | None) -> bool | str:
        return recognizer_exists(recognizer, NO_MODEL)

    @classmethod
    @checked
    def execute(
        cls,
        images: torch.Tensor,
        reference: torch.Tensor,
        recognizer: str,
        choice: str,
        without_face: str,
        face_detector: Any = None,
        reference_without_face: str = LEAVE_OUT,
    ) -> io.NodeOutput:
        images, reference = as_color(images), as_color(reference, "reference")
        missing = first_said(
            (face_detector is None, "a face detector in Load Face Detector"), (recognizer == NO_MODEL, "a recognizer")
        )
        if missing:
            text = show_text(cls, "Identity was not measured.", f"It needs {missing}.")
            return io.NodeOutput(blocked(), blocked(), text, ui=ui.PreviewText(text))
        network = identity_similarity.load_recognizer(recognizer)
        notes: list[str] = []
        known = []
        faults = Faults(reference_without_face)
        for number, image in enumerate(reference):
            name = f"reference {number + 1}"
            faces = pipeline.detect_faces(face_detector, image)
            with faults.of_one_image():
                face = pipeline.choose_faces(faces, pipeline.LARGEST, 1, name)[0]
                notes += _warning(face, name)
                known.append((image, face))
        faults.stop_if_none(known)
        notes += faults.note()
        references = identity_similarity.embed_faces(network, known)

        scores, lines = [], []
        faults = Faults(without_face)
        for number, image in enumerate(images):
            stop_if_interrupted()
            detected = pipeline.detect_faces(face_detector, image)
            if not detected and without_face == ZERO:
                scores.append(0.0)
                lines.append(f"{name_of(number)}: 0 (no face)")
                continue
            candidates: list[pipeline.Face] = []
            with faults.of_one_image():
                candidates = pipeline.choose_faces(
                    detected, pipeline.ALL if choice == MOST_SIMILAR else pipeline.LARGEST, 1, name_of(number)
                )
            if not candidates:
                lines.append(f"{name_of(number)}: left out (no face)")
                continue
            embeddings = identity_similarity.embed_faces(network, [(image, face) for face in candidates])
            best = identity_similarity.similarities(embeddings, references).amax(dim=1)
            chosen = int(best.argmax())
            notes += _warning(candidates[chosen], name_of(number))
            scores.append(float(best[chosen]))
            lines.append(f"{name_of(number)}: {scores[-1]:.3f} ({identity_similarity.verdict(scores[-1])})")
        faults.stop_if_none(scores)
        notes += faults.note()
        mean = sum(scores) / len(scores)
        text = f"Identity similarity {mean:.3f}\n" + "\n".join(lines)
        text = show_text(cls, text, " ".join(notes) or None)
        return io.NodeOutput(mean, min(scores), text, ui=ui.PreviewText(text))


def _warning(face: pipeline.Face, name: str) -> list[str]:
    note = pipeline.check_face(face, name, smallest=0.0)
    return [note] if note else []


NODES: list[type[io.ComfyNode]] = [IdentitySimilarity]
