"""Nodes that choose the reference among a subject's images and lay it on the generated image."""

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
from ..sockets import SubjectImages, checked, mask_input, schema, show_text

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
                "Chooses the image of a subject that looks the most like a generated one, as the reference for "
                "Reference-Guided Null-Text Optimizer (Wang et al. 2023, section 3.3)."
            ),
            inputs=[
                io.Image.Input(
                    "generated",
                    tooltip="The image of the first pass. Of several, the source is chosen that is the most like all "
                    "of them.",
                ),
                io.Combo.Input(
                    "encoder",
                    options=[BUILT_IN, CLIP_VISION, *list_models(MODEL_FOLDER)],
                    default=BUILT_IN,
                    tooltip="What compares the images. Wang et al. 2023 use DINO ViT-S/16: put its folder "
                    f"(transformers or timm, safetensors) into models/{MODEL_FOLDER}. Colors and edges need no file "
                    "and are enough for drawn images.",
                ),
                io.Boolean.Input(
                    "subject_only",
                    default=True,
                    tooltip="On: where an image has a mask, only the subject in it is compared. Off: whole images, "
                    "as in Wang et al. 2023, whose backgrounds count too.",
                ),
                SubjectImages.Input(
                    "subject",
                    optional=True,
                    tooltip="The subject's images with captions and masks, from Load Subject Images.",
                ),
                io.Image.Input(
                    "images", optional=True, tooltip="The subject's images as a batch, in the place of subject."
                ),
                mask_input(
                    "masks",
                    "Masks of the subject in images, 1 on it, as of Segment Subject: one for each or one for all, of "
                    "any size.",
                    optional=True,
                ),
                mask_input(
                    "generated_mask",
                    "Mask of the subject in the generated image, as of Segment Subject, for subject_only; of any size.",
                    optional=True,
                ),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="From Load CLIP Vision, for the encoder 'CLIP_VISION input'."
                ),
            ],
            outputs=[
                io.Image.Output("reference", display_name="reference", tooltip="The chosen image, in its own size."),
                io.Mask.Output(
                    "reference_mask",
                    display_name="reference mask",
                    tooltip="Its mask. Where it has none, what is connected here does not run.",
                ),
                io.String.Output(
                    "caption",
                    display_name="caption",
                    tooltip="Its caption, for the inversion. Empty without one; Caption Images writes it.",
                ),
                io.Int.Output("index", display_name="index", tooltip="Which image it is, counted from 0."),
                io.String.Output(
                    "scores",
                    display_name="scores",
                    tooltip="A line for each image with its cosine similarity, the chosen one marked.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, encoder: str) -> bool | str:
        if encoder in (BUILT_IN, CLIP_VISION) or encoder in list_models(MODEL_FOLDER):
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
                "Only one side has masks, so that a subject on gray is compared with whole images; connect masks of "
                "both, or of none."
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
            description=(
                "Scales, turns and moves a reference image until its subject lies on the generated one, for "
                "Reference-Guided Null-Text Optimizer (Wang et al. 2023, algorithm 4)."
            ),
            inputs=[
                io.Image.Input("reference", tooltip="The reference image, from Select Reference."),
                mask_input(
                    "reference_mask",
                    "Mask of the subject in the reference, of any size.",
                ),
                mask_input(
                    "generated_mask",
                    "Mask of the subject in the generated image, as of Segment Subject. The result has the size of "
                    "generated, or else of this mask.",
                ),
                io.Combo.Input(
                    "surroundings",
                    options=list(alignment.SURROUNDINGS),
                    default=alignment.REFLECT,
                    tooltip="What stands where the transformed reference ends. The result is inverted by the model, so "
                    "it should look like an image: reflect mirrors the reference, edge drags its border into streaks, "
                    "gray is flat. Generated image puts the subject alone into the generated image, whose "
                    "background the reference's caption does not describe.",
                ),
                io.Boolean.Input(
                    "symmetric",
                    default=True,
                    tooltip="On: the distances from either mask to the other count. Off: only those from the "
                    "reference, as in Wang et al. 2023, which are small wherever the reference lies inside; see "
                    "benchmarks/results/align_reference.md.",
                ),
                io.Combo.Input(
                    "optimizer",
                    options=list(alignment.OPTIMIZERS),
                    default=alignment.LEAST_SQUARES,
                    tooltip="Gradient descent is that of Wang et al. 2023; least squares, a Gauss-Newton method, finds "
                    "the same place more often and in less time (benchmarks/results/align_reference.md).",
                ),
                io.Float.Input(
                    "scale_limit",
                    default=alignment.SCALE_LIMIT,
                    min=1.0,
                    max=100.0,
                    step=0.01,
                    tooltip="The greatest factor, up or down, by which the scale may differ from the ratio of the two "
                    "subjects' sizes. 1 fixes it. Not in the paper, whose sum is smallest for a vanishing reference.",
                ),
                io.Float.Input(
                    "rotation_limit",
                    default=alignment.ROTATION_LIMIT,
                    min=0.0,
                    max=180.0,
                    step=0.5,
                    tooltip="The greatest rotation in degrees, to either side. 0 keeps the reference upright.",
                ),
                io.Combo.Input(
                    "parts",
                    options=list(alignment.PARTS),
                    default=alignment.LARGEST_PART,
                    tooltip="What of a mask with several separate parts counts. Largest part: specks and second "
                    "subjects are left out. All parts: a subject that something hides in the middle.",
                ),
                io.Image.Input(
                    "generated",
                    optional=True,
                    tooltip="The generated image, for the surroundings 'generated image'.",
                ),
            ],
            outputs=[
                io.Image.Output("aligned", display_name="aligned reference", tooltip="The transformed reference."),
                io.Mask.Output(
                    "aligned_mask", display_name="aligned mask", tooltip="The subject in it, within the image."
                ),
                io.Float.Output(
                    "scale", display_name="scale", tooltip="How many times larger the reference has become."
                ),
                io.Float.Output(
                    "rotation",
                    display_name="rotation",
                    tooltip="Degrees by which it was turned about its center, clockwise.",
                ),
                io.Float.Output(
                    "translation_x",
                    display_name="translation x",
                    tooltip="Pixels of the reference by which it was moved right, before it was scaled and turned "
                    "(Wang et al. 2023, eq. 8).",
                ),
                io.Float.Output(
                    "translation_y",
                    display_name="translation y",
                    tooltip="Pixels of the reference by which it was moved down, before it was scaled and turned "
                    "(Wang et al. 2023, eq. 8).",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="The four numbers of every image, how well the masks overlap, and a warning.",
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
                    f"{name} holds {len(batch)} entries for {count} alignments; give one for all, or one for each."
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
    """Images, masks, captions and names of what a reference is chosen from."""
    if (subject is None) == (images is None):
        raise IdentityEditError(
            "There is nothing to choose from, or twice; connect the subject's images to either subject or images."
        )
    if subject is not None:
        if masks is not None:
            raise IdentityEditError("masks belongs to images, but subject is connected, which has its own; remove one.")
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
    from comfy_execution.graph_utils import ExecutionBlocker

    return ExecutionBlocker(f"The chosen reference, {name}, has no mask; connect Segment Subject instead.")


NODES: list[type[io.ComfyNode]] = [SelectReference, AlignReference]
