"""Nodes that select the reference among a subject's images and warp it onto the generated image."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ...pipelines.hifi_tuner import reference_alignment as alignment
from ...pipelines.hifi_tuner import reference_selection
from ...pipelines.networks import image_encoders
from ...pipelines.networks.model_folders import list_models, missing_model, model_path
from ...pipelines.shared.errors import IdentityEditError
from ...pipelines.shared.images import as_color
from ...pipelines.shared.masks import masks_for
from ...pipelines.subjects.images import SubjectImages as SubjectImagesData
from ..sockets import SubjectImages, blocked, checked, mask_input, schema, show_text

MODEL_FOLDER = "image_encoders"
BUILT_IN, CLIP_VISION = "colors and edges (no model)", "CLIP_VISION input"


class SelectReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditSelectReference",
            display_name="Select Reference",
            category="subject",
            search_aliases=["DINO similarity", "image similarity", "HiFi Tuner", "choose image", "nearest image"],
            description=(
                "Selects the image of a subject that is most similar to a generated one, as the "
                "reference for Reference-Guided Null-Text Optimizer (Wang et al. 2023, section 3.3)."
            ),
            inputs=[
                io.Image.Input(
                    "generated",
                    tooltip="Image of the first pass. For a batch, the image most similar to all of them is selected.",
                ),
                io.Combo.Input(
                    "encoder",
                    options=[BUILT_IN, CLIP_VISION, *list_models(MODEL_FOLDER)],
                    default=BUILT_IN,
                    tooltip="Encoder that compares the images. Wang et al. 2023 use DINO ViT-S/16: put its folder "
                    f"(transformers or timm, safetensors) into models/{MODEL_FOLDER}. Colors and edges need no file "
                    "and are enough for drawn images.",
                ),
                io.Boolean.Input(
                    "subject_only",
                    default=True,
                    tooltip="Comparison of subjects. On: compares only the subject in images that have a mask. Off: "
                    "compares whole images, as in Wang et al. 2023, including their backgrounds.",
                ),
                SubjectImages.Input(
                    "subject",
                    optional=True,
                    tooltip="The subject's images with captions and masks, from Load Subject Images.",
                ),
                io.Image.Input("images", optional=True, tooltip="The subject's images as a batch, instead of subject."),
                mask_input(
                    "masks",
                    "Masks of the subject in images (1 on the subject), as from Segment Subject: one per "
                    "image or one for all, of any size.",
                    optional=True,
                ),
                mask_input(
                    "generated_mask",
                    "Mask of the subject in the generated image, as from Segment Subject, for "
                    "subject_only; of any size.",
                    optional=True,
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Model from Load CLIP Vision, for the encoder 'CLIP_VISION input'.",
                ),
            ],
            outputs=[
                io.Image.Output("reference", tooltip="Selected image, at its own size."),
                io.Mask.Output(
                    "reference_mask",
                    tooltip="Mask of the selected image. If it has none, nodes connected to this output do not run.",
                ),
                io.String.Output(
                    "caption",
                    tooltip="Caption of the selected image, for the inversion. Empty if it has none; Caption "
                    "Images writes it.",
                ),
                io.Int.Output("index", tooltip="Index of the selected image, counted from 0."),
                io.String.Output(
                    "scores", tooltip="Cosine similarity of each image, one per line, with the selected one marked."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, encoder: str | None) -> bool | str:
        if encoder in (None, BUILT_IN, CLIP_VISION) or encoder in list_models(MODEL_FOLDER):
            return True
        return missing_model(MODEL_FOLDER, encoder, image_encoders.NEEDED)

    @classmethod
    @checked
    def execute(
        cls,
        generated: torch.Tensor,
        encoder: str,
        subject_only: bool,
        subject: SubjectImagesData | None = None,
        images: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        generated_mask: torch.Tensor | None = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        images = None if images is None else as_color(images, "images")
        candidates, candidate_masks, captions, names = _sources(subject, images, masks)
        drawn = list(as_color(generated, "generated"))
        drawn_masks = _masks_of(drawn, generated_mask, "generated_mask")
        choice = reference_selection.select_reference(
            drawn,
            candidates,
            _encoder(encoder, clip_vision),
            generated_masks=drawn_masks if subject_only else None,
            source_masks=candidate_masks if subject_only else None,
        )
        chosen = choice.index
        lines = [
            f"{'>' if i == chosen else ' '} {similarity:.4f}  {i}  {name}"
            for i, (name, similarity) in enumerate(zip(names, choice.similarities.tolist(), strict=True))
        ]
        warning = None
        if subject_only and (generated_mask is None) != all(mask is None for mask in candidate_masks):
            warning = (
                "Only one side has masks, so a subject on gray is compared with whole images; connect masks for both "
                "sides or for neither."
            )
        return io.NodeOutput(
            candidates[chosen][..., :3].unsqueeze(0),
            _mask_output(candidate_masks[chosen], names[chosen]),
            captions[chosen],
            chosen,
            show_text(cls, "\n".join(lines), warning),
        )


class AlignReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditAlignReference",
            display_name="Align Reference",
            category="subject",
            search_aliases=["similarity transform", "registration", "HiFi Tuner", "match position", "scale and rotate"],
            advanced=["symmetric", "optimizer", "scale_limit", "rotation_limit", "parts"],
            description=(
                "Scales, rotates and moves a reference image so that its subject covers the generated "
                "one, for Reference-Guided Null-Text Optimizer (Wang et al. 2023, algorithm 4)."
            ),
            inputs=[
                io.Image.Input("reference", tooltip="The reference image, from Select Reference."),
                mask_input("reference_mask", "Mask of the subject in the reference, of any size."),
                mask_input(
                    "generated_mask",
                    "Mask of the subject in the generated image, as from Segment Subject. The result has "
                    "the size of generated, or of this mask if generated is not connected.",
                ),
                io.Combo.Input(
                    "surroundings",
                    options=list(alignment.SURROUNDINGS),
                    default=alignment.REFLECT,
                    tooltip="Fill outside the warped reference. The model inverts the result, so it should look "
                    "like an image: reflect mirrors the reference, edge stretches its border into streaks, gray is "
                    "flat. Generated image puts only the subject into the generated image, whose background the "
                    "reference's caption does not describe.",
                ),
                io.Boolean.Input(
                    "symmetric",
                    default=True,
                    tooltip="Distances that are minimized. On: from either mask to the other. Off: only from the "
                    "reference, as in Wang et al. 2023; these are small wherever the reference lies inside "
                    "(benchmarks/results/align_reference.md).",
                ),
                io.Combo.Input(
                    "optimizer",
                    options=list(alignment.OPTIMIZERS),
                    default=alignment.LEAST_SQUARES,
                    tooltip="Optimizer of the alignment. Gradient descent is the method of Wang et al. 2023; least "
                    "squares (Gauss-Newton) finds the place more often and in less time with symmetric on, and less "
                    "often with it off (benchmarks/results/align_reference.md).",
                ),
                io.Float.Input(
                    "scale_limit",
                    default=alignment.SCALE_LIMIT,
                    min=1.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Maximum factor, up or down, by which the scale may differ from the size ratio of the two "
                    "subjects. 1 fixes it. Not in the paper, whose objective is smallest for a vanishing reference.",
                ),
                io.Float.Input(
                    "rotation_limit",
                    default=alignment.ROTATION_LIMIT,
                    min=0.0,
                    max=180.0,
                    step=0.5,
                    tooltip="Maximum rotation in degrees, in either direction. 0 keeps the reference upright.",
                ),
                io.Combo.Input(
                    "parts",
                    options=list(alignment.PARTS),
                    default=alignment.LARGEST_PART,
                    tooltip="Parts that count in a mask with several separate parts. Largest part: ignores specks "
                    "and second subjects. All parts: for a subject that is occluded in the middle.",
                ),
                io.Image.Input(
                    "generated", optional=True, tooltip="Generated image, for the surroundings 'generated image'."
                ),
            ],
            outputs=[
                io.Image.Output("aligned", display_name="aligned reference", tooltip="Warped reference image."),
                io.Mask.Output("aligned_mask", tooltip="Mask of the subject in the warped reference."),
                io.Float.Output("scale", tooltip="Scale factor of the reference."),
                io.Float.Output("rotation", tooltip="Rotation about the reference's center in degrees, clockwise."),
                io.Float.Output(
                    "translation_x",
                    tooltip="Shift to the right in pixels of the reference, before scaling and rotation (Wang et "
                    "al. 2023, eq. 8).",
                ),
                io.Float.Output(
                    "translation_y",
                    tooltip="Shift down in pixels of the reference, before scaling and rotation (Wang et al. 2023, "
                    "eq. 8).",
                ),
                io.String.Output(
                    "report",
                    tooltip="Scale, rotation and translation of each image, overlap of the masks, and warnings.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        reference: torch.Tensor,
        reference_mask: torch.Tensor,
        generated_mask: torch.Tensor,
        surroundings: str,
        symmetric: bool,
        optimizer: str,
        scale_limit: float,
        rotation_limit: float,
        parts: str,
        generated: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        reference = as_color(reference, "reference")
        generated = None if generated is None else as_color(generated, "generated")
        count = max(len(reference), len(generated_mask))
        given = {
            "reference": reference,
            "reference_mask": reference_mask,
            "generated_mask": generated_mask,
            "generated": generated,
        }
        for name, batch in given.items():
            if batch is not None and len(batch) not in (1, count):
                raise IdentityEditError(
                    f"{name} has {len(batch)} entries for {count} alignments; connect one for all or one for each."
                )

        def entry(batch: torch.Tensor, number: int) -> torch.Tensor:
            return batch[number if len(batch) > 1 else 0]

        results = [
            alignment.align_reference(
                entry(reference, i),
                entry(reference_mask, i),
                entry(generated_mask, i),
                None if generated is None else entry(generated, i),
                symmetric=symmetric,
                optimizer=optimizer,
                scale_limit=scale_limit,
                rotation_limit=rotation_limit,
                parts=parts,
                surroundings=surroundings,
            )
            for i in range(count)
        ]
        lines = [
            f"scale {found.scale:.3f}, rotation {found.rotation:.1f} degrees, translation "
            f"{found.translation_x:.1f}, {found.translation_y:.1f} pixels; the masks overlap by {result.overlap:.0%}."
            for result in results
            for found in [result.similarity]
        ]
        warnings = list(dict.fromkeys(result.warning for result in results if result.warning))
        first = results[0].similarity
        return io.NodeOutput(
            torch.stack([result.image for result in results]),
            torch.stack([result.mask for result in results]),
            first.scale,
            first.rotation,
            first.translation_x,
            first.translation_y,
            show_text(cls, "\n".join(lines), " ".join(warnings) or None),
        )


def _sources(
    subject: SubjectImagesData | None, images: torch.Tensor | None, masks: torch.Tensor | None
) -> tuple[list[torch.Tensor], list[torch.Tensor | None], list[str], list[str]]:
    """Images, masks, captions and names of the candidates."""
    if (subject is None) == (images is None):
        raise IdentityEditError(
            "subject and images are both connected or both missing; connect exactly one of subject or images."
        )
    if subject is not None:
        if masks is not None:
            raise IdentityEditError("masks belongs to images, but subject has its own masks; disconnect masks.")
        return list(subject.images), list(subject.masks), list(subject.captions), list(subject.names)
    assert images is not None
    candidates = list(images)
    count = len(candidates)
    return candidates, _masks_of(candidates, masks, "masks"), [""] * count, [f"image {i + 1}" for i in range(count)]


def _masks_of(images: list[torch.Tensor], masks: torch.Tensor | None, name: str) -> list[torch.Tensor | None]:
    if masks is None:
        return [None] * len(images)
    height, width = images[0].shape[:2]  # of a batch: all have one size
    return list(masks_for(masks, name, height, width, len(images)))


def _encoder(name: str, clip_vision: Any) -> image_encoders.Encoder:
    if name == BUILT_IN:
        return reference_selection.histogram_features
    if name == CLIP_VISION:
        if clip_vision is None:
            raise IdentityEditError(
                f"The encoder '{CLIP_VISION}' needs clip_vision; connect Load CLIP Vision, or choose '{BUILT_IN}'."
            )
        return image_encoders.encoder_of_clip_vision(clip_vision)
    return image_encoders.encoder_of_folder(model_path(MODEL_FOLDER, name, image_encoders.NEEDED))


def _mask_output(mask: torch.Tensor | None, name: str) -> Any:
    if mask is not None:
        return mask.unsqueeze(0)
    return blocked(f"The selected reference, {name}, has no mask; connect Segment Subject instead.")


NODES: list[type[io.ComfyNode]] = [SelectReference, AlignReference]
