"""Nodes that segment a subject: by the checkpoint's attention, and by Segment Anything."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch.nn.functional import interpolate

from ...attention.identity_mask import AUTOMATIC_POWER, AUTOMATIC_THRESHOLD
from ...attention.sites import AUTOMATIC, LAYER_CHOICES
from ...pipelines import engine
from ...pipelines.engine.host import stop_if_interrupted
from ...pipelines.hifi_tuner import reference_alignment as alignment
from ...pipelines.lipe import attention_segmentation, heatmap
from ...pipelines.lipe.identity_prompt import contrast_for, encode_identity_prompt, identity_in_caption
from ...pipelines.networks import grounding_dino as dino
from ...pipelines.networks import segment_anything as pipeline
from ...pipelines.networks.model_folders import list_models, missing_model, model_path
from ...pipelines.shared.errors import IdentityEditError
from ...pipelines.shared.images import as_color, encoded
from ...pipelines.shared.parsing import whole_numbers
from ..sockets import ClipOfAnyFamily, checked, fraction_input, progress, schema, seed_input, show_text

NO_MODEL = "no model"


def _images_input() -> io.Input:
    return io.Image.Input("images", tooltip="One or more images; each gets a mask.")


def _parts_input() -> io.Input:
    return io.Combo.Input(
        "parts",
        options=list(alignment.PARTS),
        default=alignment.ALL_PARTS,
        tooltip="Connected parts of the mask that are kept. Largest part removes specks and second subjects.",
    )


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def _outputs() -> list[Any]:
    return [
        io.Mask.Output("mask", tooltip="Mask of the subject (1 on the subject), at the images' size."),
        io.Image.Output("overlay", tooltip="Images with the outline of the mask."),
        io.String.Output("report", tooltip="Share of each image that the mask covers, and warnings."),
    ]


class SegmentSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        unet, joint = attention_segmentation.CROSS_ATTENTION, attention_segmentation.JOINT_ATTENTION
        return schema(
            node_id="IdentityEditSegmentSubject",
            display_name="Segment Subject",
            category="masks",
            search_aliases=["subject mask", "attention mask", "cut out", "segmentation"],
            advanced=["caption", "timesteps", "self_attention_power", "layers", "longest_side", "seed", "parts"],
            description=(
                "Segments the subject in images by the loaded checkpoint's attention to a word; no further model is "
                "needed. Segment Subject with SAM gives sharper outlines."
            ),
            inputs=[
                _images_input(),
                io.Model.Input("model", tooltip="Model of a checkpoint, of a family that Identity Attention supports."),
                ClipOfAnyFamily("clip", tooltip="The text encoders of the same checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.String.Input(
                    "subject",
                    default="",
                    tooltip="Subject to segment: a class word such as dog, preceded by the rare token if the model "
                    "has learned one (sks dog).",
                ),
                fraction_input(
                    "threshold",
                    AUTOMATIC_THRESHOLD,
                    "Fraction of the normalized map above which a pixel belongs to the subject; lower gives a "
                    f"larger mask. 0 is automatic: {unet.threshold:g}, of flow models {joint.threshold:g}.",
                ),
                io.String.Input(
                    "caption",
                    default="",
                    tooltip="Caption of the image, if known. Empty uses the subject alone, which worked as well in "
                    "the demo world (benchmarks/results/segment_subject.md). Of flow models, the subject's words "
                    "in the caption are read if it contains them, which outlined it better in a small model.",
                ),
                io.String.Input(
                    "timesteps",
                    default="",
                    tooltip="Noise levels at which the model sees the image, 0 to 999, separated by commas; one model "
                    "call each. For flow models, thousandths of the noise. Empty is automatic: "
                    f"{_listed(unet.timesteps)}, of flow models {_listed(joint.timesteps)}, which overlapped well with "
                    "the true masks of the demo world where a caption names the subject; without a caption, flow "
                    "models outline better at 1 (benchmarks/results/segment_subject.md, segment_subject_flow.md).",
                ),
                io.Int.Input(
                    "self_attention_power",
                    default=AUTOMATIC_POWER,
                    min=AUTOMATIC_POWER,
                    max=16,
                    tooltip="Lambda in Liu et al. 2024, eq. 2: how many times the map is propagated along the "
                    f"self-attention. 0 uses the cross-attention alone. -1 is automatic: {unet.power}, of flow models "
                    f"{joint.power}.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYER_CHOICES),
                    default=AUTOMATIC,
                    tooltip="Attention layers that are read, by the downsampling of their grid relative to the "
                    "latent, or for flow models a third of the blocks; see Identity Attention.",
                ),
                io.Int.Input(
                    "longest_side",
                    default=768,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Longest side in pixels at which the model sees an image; larger images are scaled down, "
                    "and the mask has the image's size. Choose about the size that the checkpoint was trained for.",
                ),
                seed_input("Noise seed. The same seed gives the same mask."),
                _parts_input(),
                io.String.Input(
                    "contrast",
                    default="",
                    optional=True,
                    tooltip="Contrast for flow models: the surroundings of the subject, such as grass; their score is "
                    "subtracted from the subject's. Best a word of the caption. Empty: the first token of an empty "
                    "prompt.",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    @checked
    def execute(
        cls,
        images: torch.Tensor,
        model: Any,
        clip: Any,
        vae: Any,
        subject: str,
        threshold: float,
        caption: str,
        timesteps: str,
        self_attention_power: int,
        layers: str,
        longest_side: int,
        seed: int,
        parts: str,
        contrast: str = "",
    ) -> io.NodeOutput:
        images = as_color(images)
        settings = attention_segmentation.default_settings(model)
        steps = whole_numbers(timesteps) if timesteps.strip() else settings.timesteps
        if steps is None:
            raise IdentityEditError(
                f"timesteps is '{timesteps}'; write whole numbers from 0 to 999, separated by commas, such as '1, 101, "
                f"201'."
            )
        against = contrast_for(model, contrast)
        if against is None or not caption.strip():
            identity = encode_identity_prompt(clip, subject, name="subject", contrast=against)
        else:
            identity = identity_in_caption(clip, subject, caption.strip(), against)
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(caption.strip() or subject))
        height, width = images.shape[1:3]
        # The VAE takes multiples of 8 or 16 pixels; scaling the image to them aligns the mask to a fraction of a pixel.
        factor = min(1.0, longest_side / max(height, width))
        pixels = engine.pixels_per_latent_pixel(model)
        whole = tuple(max(1, round(side * factor / pixels)) * pixels for side in (height, width))
        shown = images
        if whole != (height, width):
            shown = interpolate(images.movedim(-1, 1), size=whole, mode="bilinear", antialias=True).movedim(1, -1)
        found = attention_segmentation.attention_masks(
            model,
            encoded(vae, shown, "An image", with_frames=engine.has_frames(model)),
            identity,
            conditioning,
            (height, width),
            settings=attention_segmentation.MaskSettings(
                tuple(steps),
                settings.threshold if threshold == AUTOMATIC_THRESHOLD else threshold,
                settings.power if self_attention_power == AUTOMATIC_POWER else self_attention_power,
            ),
            layers=layers,
            seed=seed,
            callback=progress(model, len(steps)),
        )
        return _result(cls, images, found, parts)


class SegmentSubjectWithSAM(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditSegmentSubjectWithSAM",
            display_name="Segment Subject with SAM",
            category="masks",
            search_aliases=["SAM", "Segment Anything", "Grounding DINO", "Grounded SAM", "subject mask", "cut out"],
            advanced=["box_threshold", "parts"],
            description="Segments the subject in images by Segment Anything: at points, in a box, or by its name with "
            "Grounding DINO, as in Wang et al. 2023.",
            inputs=[
                _images_input(),
                io.Combo.Input(
                    "sam",
                    options=[NO_MODEL, *list_models(pipeline.SAM_FOLDER, pipeline.CHECKPOINT_ENDINGS)],
                    tooltip=f"Segment Anything model in models/{pipeline.SAM_FOLDER}: a checkpoint file, for the "
                    "package segment-anything, or a folder in the transformers format. Nothing is downloaded.",
                ),
                io.Combo.Input(
                    "grounding_dino",
                    options=[NO_MODEL, *list_models(dino.FOLDER)],
                    tooltip=f"Grounding DINO model in models/{dino.FOLDER}, a folder in the transformers format, which "
                    "detects the subject by its name. Nothing is downloaded. No model: points and box are used, or "
                    "without them everything in the image is segmented.",
                ),
                io.String.Input("subject", default="", tooltip="Name of the subject, such as dog, for Grounding DINO."),
                io.String.Input(
                    "points",
                    default="",
                    multiline=True,
                    tooltip="Points, one per line: 'x, y' on the subject, 'x, y, 0' off it, in pixels from the upper "
                    "left corner. The same for every image. Ignored with Grounding DINO.",
                ),
                io.String.Input(
                    "box",
                    default="",
                    tooltip="Box around the subject: 'left, top, right, bottom' in pixels. Ignored with Grounding "
                    "DINO.",
                ),
                io.Combo.Input(
                    "choice",
                    options=list(pipeline.CHOICES),
                    default=pipeline.LARGEST,
                    tooltip="Choice among several segments (without points and box) or several detected subjects. "
                    "Segments along most of the image's border are background and ignored.",
                ),
                fraction_input(
                    "box_threshold",
                    dino.BOX_THRESHOLD,
                    "Minimum confidence of a detection by Grounding DINO. 0.25 is its default.",
                ),
                _parts_input(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def validate_inputs(cls, sam: str | None, grounding_dino: str | None) -> bool | str:
        if sam is not None and sam not in list_models(pipeline.SAM_FOLDER, pipeline.CHECKPOINT_ENDINGS):
            return missing_model(pipeline.SAM_FOLDER, sam, pipeline.SAM_NEEDED)
        if grounding_dino is not None and grounding_dino not in (NO_MODEL, *list_models(dino.FOLDER)):
            return missing_model(dino.FOLDER, grounding_dino, dino.NEEDED)
        return True

    @classmethod
    @checked
    def execute(
        cls,
        images: torch.Tensor,
        sam: str,
        grounding_dino: str,
        subject: str,
        points: str,
        box: str,
        choice: str,
        box_threshold: float,
        parts: str,
    ) -> io.NodeOutput:
        images = as_color(images)
        path = model_path(pipeline.SAM_FOLDER, sam, pipeline.SAM_NEEDED, pipeline.CHECKPOINT_ENDINGS)
        prompt = pipeline.parse_prompt(points, box)
        boxes: list[Any] = []
        if grounding_dino != NO_MODEL:
            detector = model_path(dino.FOLDER, grounding_dino, dino.NEEDED)
            boxes = dino.detect(detector, list(images), subject, box_threshold)
        else:
            for image in images:
                pipeline.check_prompt(prompt, image)
        found = []
        with pipeline.load_segmenter(path) as segmenter:
            for i, image in enumerate(images):
                stop_if_interrupted()
                if boxes:
                    found.append(pipeline.segment_by_name(segmenter, image, boxes[i], choice))
                else:
                    found.append(pipeline.segment_anything(segmenter, image, prompt, choice))
        return _result(cls, images, torch.stack(found), parts)


def _result(node: type[io.ComfyNode], images: torch.Tensor, found: torch.Tensor, parts: str) -> io.NodeOutput:
    """The masks [B, H, W], reduced to their largest part if wanted, with an overlay and a report."""
    notes = []
    for i in range(len(found)):
        if bool(found[i].any()) and parts == alignment.LARGEST_PART:
            inside, note = alignment.subject_part(found[i], f"The mask of image {i + 1}", parts)
            found[i] = inside.float()
            notes += [note] if note else []
    shares = found.mean(dim=(1, 2)).tolist()
    nothing = [str(i + 1) for i, share in enumerate(shares) if share in (0.0, 1.0)]
    if nothing:
        notes.append(
            f"The mask of image {', '.join(nothing)} is empty or covers everything; check the subject, the threshold "
            f"or the prompt."
        )
    text = f"The mask covers {', '.join(f'{share:.0%}' for share in shares)} of the image."
    return io.NodeOutput(found, heatmap.outlined(images, found), show_text(node, text, " ".join(notes) or None))


NODES: list[type[io.ComfyNode]] = [SegmentSubject, SegmentSubjectWithSAM]
