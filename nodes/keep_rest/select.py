"""Node that selects the best of several edits by identity, prompt and preservation."""

from __future__ import annotations

import math
from typing import Any

import torch
from comfy_api.latest import io, ui

from ...pipelines.faces.similarity import NEEDED, load_recognizer
from ...pipelines.keep_rest.selection import EditScores, score_edits
from ...pipelines.scores.clip import SocketClip
from ...pipelines.shared.errors import IdentityEditError
from ...pipelines.shared.images import as_color, matched_images
from ...pipelines.shared.masks import masks_for
from ..sockets import FaceDetector, checked, mask_input, recognizer_exists, recognizer_input, schema, show_text

NONE = "none"


class SelectEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def weight(name: str, of: str) -> io.Float.Input:
            return io.Float.Input(
                name, default=1.0, min=0.0, max=10.0, step=0.1, tooltip=f"Weight of {of} in the total score."
            )

        return schema(
            node_id="IdentityEditSelectEdit",
            display_name="Select Edit",
            category="keep the rest",
            search_aliases=["best of batch", "identity check", "face drift", "ArcFace", "pick best"],
            advanced=["identity_weight", "prompt_weight", "rest_weight"],
            description="Compares several edits of one original: identity of every face, prompt fidelity and "
            "preservation of the rest. Outputs the best one and names the faces that drifted.",
            is_output_node=True,
            inputs=[
                io.Image.Input("original", tooltip="Original image before the edit."),
                io.Image.Input("edits", tooltip="Registered edits of the original, or results of Keep the Rest."),
                recognizer_input(NONE),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="Prompt that describes the edited image, for clip and clip_vision.",
                ),
                weight("identity_weight", "identity"),
                weight("prompt_weight", "prompt fidelity"),
                weight("rest_weight", "preservation"),
                FaceDetector.Input("face_detector", optional=True, tooltip="Face detector, from Load Face Detector."),
                io.Clip.Input(
                    "clip", optional=True, tooltip="Text encoder with a projection, from an SDXL or SD 2.x checkpoint."
                ),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="Image encoder trained with clip, from Load CLIP Vision."
                ),
                mask_input(
                    "mask",
                    "Mask of the change, from Keep the Rest; preservation is measured outside of it.",
                    optional=True,
                ),
                io.Image.Input(
                    "before",
                    optional=True,
                    tooltip="Edits before Keep the Rest, one for each of edits. The report compares the identity of "
                    "every face before and after.",
                ),
            ],
            outputs=[
                io.Image.Output("best", tooltip="Edit with the highest total score."),
                io.Int.Output("number", tooltip="Number of that edit in the batch, from 1."),
                io.String.Output("report", tooltip="Scores of every edit, and faces that drifted."),
            ],
        )

    @classmethod
    def validate_inputs(cls, recognizer: str | None = NONE) -> bool | str:
        return recognizer_exists(recognizer, NONE)

    @classmethod
    @checked
    def execute(
        cls,
        original: torch.Tensor,
        edits: torch.Tensor,
        recognizer: str,
        prompt: str,
        identity_weight: float,
        prompt_weight: float,
        rest_weight: float,
        face_detector: Any = None,
        clip: Any = None,
        clip_vision: Any = None,
        mask: torch.Tensor | None = None,
        before: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        if len(original) != 1:
            raise IdentityEditError(f"original holds {len(original)} images; connect the one that was edited.")
        if before is not None and len(before) != len(edits):
            raise IdentityEditError(
                f"before holds {len(before)} images and edits {len(edits)}; connect one before Keep the Rest for each."
            )
        colors, first, cut = matched_images(edits, original, ("edits", "original"))
        masks = None if mask is None else masks_for(mask, "mask", colors.shape[1], colors.shape[2], len(colors))
        has_faces = face_detector is not None and recognizer != NONE
        has_clip = clip is not None and clip_vision is not None and bool(prompt.strip())
        scores = score_edits(
            first[0],
            colors,
            masks,
            prompt=prompt,
            clip=SocketClip(clip, clip_vision) if has_clip else None,
            faces=(face_detector, load_recognizer(recognizer)) if has_faces else None,
            before=None if before is None else as_color(before, "before"),
            weights=(identity_weight, prompt_weight, rest_weight),
        )
        best = max(range(len(scores)), key=lambda number: scores[number].total)
        lines = [table_line(number, each) for number, each in enumerate(scores, start=1)]
        if not has_faces:
            lines.append(
                f"Identity was not checked; connect Load Face Detector and choose a recognizer in models/insightface: "
                f"{NEEDED}."
            )
        if prompt.strip() and not has_clip:
            lines.append("The prompt was not checked; connect clip and clip_vision.")
        lines += [cut] if cut else []
        text = show_text(cls, f"Best: edit {best + 1}.\n" + "\n".join(lines))
        return io.NodeOutput(edits[best : best + 1], best + 1, text, ui=ui.PreviewText(text))


def table_line(number: int, scores: EditScores) -> str:
    figures = [
        ("identity", scores.identity, ".2f"),
        ("prompt", scores.prompt, ".3f"),
        ("rest SSIM", scores.rest, ".4f"),
    ]
    known = [f"{name} {value:{form}}" for name, value, form in figures if not math.isnan(value)]
    drifted = [str(face) for face in scores.faces if face.drifted]
    text = f"Edit {number}: {', '.join(known)}; total {scores.total:.2f}."
    text = f"{text} Drifted: {'; '.join(drifted)}." if drifted else text
    pairs = zip(scores.faces_before, scores.faces, strict=False)
    faces = [f"{earlier.figure} before and {face.figure} after for face {face.number}" for earlier, face in pairs]
    return f"{text} Identity {', '.join(faces)}." if faces else text


NODES: list[type[io.ComfyNode]] = [SelectEdit]
