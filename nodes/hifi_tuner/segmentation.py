"""The node that segments a subject, by the checkpoint's attention or by Segment Anything."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch.nn.functional import interpolate

from ...attention.sites import AUTOMATIC, LAYER_CHOICES
from ...pipelines.engine.host import stop_if_interrupted
from ...pipelines.hifi_tuner import reference_alignment as alignment
from ...pipelines.lipe import attention_segmentation, heatmap
from ...pipelines.lipe.identity_prompt import encode_identity_prompt
from ...pipelines.networks import grounding_dino as dino
from ...pipelines.networks import segment_anything as pipeline
from ...pipelines.networks.model_folders import list_models, missing_model, model_path
from ...pipelines.shared.errors import IdentityEditError
from ...pipelines.shared.images import PIXELS_PER_LATENT_PIXEL, as_color, encoded
from ...pipelines.shared.parsing import whole_numbers
from ..sockets import checked, progress, schema, seed_input, show_text

ATTENTION = "attention (no further model)"
SEGMENT_ANYTHING = "Segment Anything"
BY_NAME = "Grounding DINO + Segment Anything"
METHODS = (ATTENTION, SEGMENT_ANYTHING, BY_NAME)
NO_MODEL = "no model"


class SegmentSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditSegmentSubject",
            display_name="Segment Subject",
            category="masks",
            search_aliases=["SAM", "Segment Anything", "Grounding DINO", "Grounded SAM", "subject mask", "cut out"],
            advanced=[
                "caption",
                "timesteps",
                "self_attention_power",
                "layers",
                "longest_side",
                "seed",
                "box_threshold",
                "parts",
            ],
            description=(
                "Segments the subject in images: by the loaded checkpoint's attention to a word, "
                "which needs no further model, or by Segment Anything with points, a box or the subject's "
                "name."
            ),
            inputs=[
                io.Image.Input("images", tooltip="One or more images; each gets a mask."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=ATTENTION,
                    tooltip="Segmentation method. Attention uses model, clip and vae. Segment Anything uses points "
                    "and a box, or without them segments everything and selects by choice. Grounding DINO detects "
                    "the subject by its name first, as in Wang et al. 2023. Any other MASK, such as one painted in "
                    "the mask editor, can replace this node.",
                ),
                io.String.Input(
                    "subject",
                    default="",
                    tooltip="Subject to segment: a class word such as dog, preceded by the rare token if the model "
                    "has learned one (sks dog). Ignored by Segment Anything alone.",
                ),
                io.String.Input(
                    "caption",
                    default="",
                    tooltip="Attention: caption of the image, if known. Empty uses the subject alone, which worked "
                    "as well in the demo world (benchmarks/results/segment_subject.md).",
                ),
                io.String.Input(
                    "timesteps",
                    default=", ".join(map(str, attention_segmentation.TIMESTEPS)),
                    tooltip="Attention: noise levels at which the model sees the image, 0 to 999, separated by "
                    "commas; one model call each. Low ones overlapped best with the true masks of the demo world "
                    "(benchmarks/results/segment_subject.md).",
                ),
                io.Float.Input(
                    "threshold",
                    default=attention_segmentation.THRESHOLD,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Attention: fraction of the normalized map above which a pixel belongs to the subject; "
                    "lower gives a larger mask. Measured like the timesteps.",
                ),
                io.Int.Input(
                    "self_attention_power",
                    default=attention_segmentation.POWER,
                    min=0,
                    max=16,
                    tooltip="Attention: lambda in Liu et al. 2024, eq. 2, how many times the map is propagated "
                    "along the self-attention. 0 uses the cross-attention alone. Measured like the timesteps.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYER_CHOICES),
                    default=AUTOMATIC,
                    tooltip="Attention: layers that are read, by the downsampling of their grid relative to the "
                    "latent; see Identity Attention.",
                ),
                io.Int.Input(
                    "longest_side",
                    default=768,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Attention: longest side in pixels at which the model sees an image; larger images are "
                    "scaled down, and the mask has the image's size. Choose about the size that the checkpoint was "
                    "trained for.",
                ),
                seed_input("Attention: noise seed. The same seed gives the same mask."),
                io.Combo.Input(
                    "sam",
                    options=_options(pipeline.SAM_FOLDER, pipeline.CHECKPOINT_ENDINGS),
                    tooltip=f"Segment Anything model in models/{pipeline.SAM_FOLDER}: a checkpoint file, for the "
                    "package segment-anything, or a folder in the transformers format. Nothing is downloaded.",
                ),
                io.Combo.Input(
                    "grounding_dino",
                    options=_options(dino.FOLDER),
                    tooltip=f"Grounding DINO model in models/{dino.FOLDER}: a folder in the transformers format. "
                    "Nothing is downloaded.",
                ),
                io.String.Input(
                    "points",
                    default="",
                    multiline=True,
                    tooltip="Segment Anything: one point per line, 'x, y' on the subject, 'x, y, 0' off it, in "
                    "pixels from the upper left corner. The same for every image.",
                ),
                io.String.Input(
                    "box",
                    default="",
                    tooltip="Segment Anything: box around the subject, 'left, top, right, bottom' in pixels. "
                    "Without points and box, everything in the image is segmented.",
                ),
                io.Combo.Input(
                    "choice",
                    options=list(pipeline.CHOICES),
                    default=pipeline.LARGEST,
                    tooltip="Segment Anything without points and box, and Grounding DINO: which of several "
                    "segments or subjects becomes the mask. Segments along most of the image's border are "
                    "background and ignored.",
                ),
                io.Float.Input(
                    "box_threshold",
                    default=dino.BOX_THRESHOLD,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Grounding DINO: minimum confidence of a detection. 0.25 is its default.",
                ),
                io.Combo.Input(
                    "parts",
                    options=list(alignment.PARTS),
                    default=alignment.ALL_PARTS,
                    tooltip="Connected parts of the mask that are kept. Largest part removes specks and second "
                    "subjects.",
                ),
                io.Model.Input("model", optional=True, tooltip="Attention: a Stable Diffusion 1.x, 2.x or XL model."),
                io.Clip.Input("clip", optional=True, tooltip="Attention: the text encoders of the same checkpoint."),
                io.Vae.Input("vae", optional=True, tooltip="Attention: the VAE of the same checkpoint."),
            ],
            outputs=[
                io.Mask.Output(
                    "mask", display_name="mask", tooltip="Mask of the subject (1 on the subject), at the images' size."
                ),
                io.Image.Output("overlay", display_name="overlay", tooltip="Images with the outline of the mask."),
                io.String.Output(
                    "report", display_name="report", tooltip="Share of each image that the mask covers, and warnings."
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, method: str = ATTENTION, sam: str = NO_MODEL, grounding_dino: str = NO_MODEL
    ) -> bool | str:
        if method == ATTENTION:
            return True
        found = list_models(pipeline.SAM_FOLDER, pipeline.CHECKPOINT_ENDINGS)
        if sam not in found:
            return missing_model(pipeline.SAM_FOLDER, sam, pipeline.SAM_NEEDED)
        if method == BY_NAME and grounding_dino not in list_models(dino.FOLDER):
            return missing_model(dino.FOLDER, grounding_dino, dino.NEEDED)
        return True

    @classmethod
    @checked
    def execute(
        cls,
        images: torch.Tensor,
        method: str,
        subject: str,
        caption: str,
        timesteps: str,
        threshold: float,
        self_attention_power: int,
        layers: str,
        longest_side: int,
        seed: int,
        sam: str,
        grounding_dino: str,
        points: str,
        box: str,
        choice: str,
        box_threshold: float,
        parts: str,
        model: Any = None,
        clip: Any = None,
        vae: Any = None,
    ) -> io.NodeOutput:
        images = as_color(images)
        if method == ATTENTION:
            steps = _timesteps(timesteps)
            found = _by_attention(
                images,
                subject,
                caption,
                longest_side,
                model,
                clip,
                vae,
                timesteps=steps,
                threshold=threshold,
                power=self_attention_power,
                layers=layers,
                seed=seed,
                callback=None if model is None else progress(model, len(steps)),
            )
        else:
            found = _by_segment_anything(
                images, method, subject, sam, grounding_dino, points, box, choice, box_threshold
            )
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
                f"The mask of image {', '.join(nothing)} is empty or covers everything; check the subject, the "
                f"threshold or the prompt."
            )
        text = f"The mask covers {', '.join(f'{share:.0%}' for share in shares)} of the image."
        return io.NodeOutput(found, heatmap.outlined(images, found), show_text(cls, text, " ".join(notes) or None))


def _by_attention(
    images: torch.Tensor,
    subject: str,
    caption: str,
    longest_side: int,
    model: Any,
    clip: Any,
    vae: Any,
    **options: Any,
) -> torch.Tensor:
    """Masks [B, H, W] by the checkpoint's attention, at the images' size."""
    if model is None or clip is None or vae is None:
        raise IdentityEditError(
            f"The method '{ATTENTION}' needs model, clip and vae; connect those of a checkpoint, or choose another "
            f"method."
        )
    identity = encode_identity_prompt(clip, subject, name="subject")
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(caption.strip() or subject))
    height, width = images.shape[1:3]
    # The VAE takes multiples of 8 pixels; scaling the image to them aligns the mask to a fraction of a pixel.
    factor = min(1.0, longest_side / max(height, width))
    cells = (max(1, round(side * factor / PIXELS_PER_LATENT_PIXEL)) for side in (height, width))
    whole = tuple(count * PIXELS_PER_LATENT_PIXEL for count in cells)
    shown = interpolate(images.movedim(-1, 1), size=whole, mode="bilinear", antialias=True).movedim(1, -1)
    if whole == (height, width):
        shown = images
    latent = encoded(vae, shown, "An image")
    return attention_segmentation.attention_masks(model, latent, identity, conditioning, (height, width), **options)


def _by_segment_anything(
    images: torch.Tensor,
    method: str,
    subject: str,
    sam: str,
    grounding_dino: str,
    points: str,
    box: str,
    choice: str,
    box_threshold: float,
) -> torch.Tensor:
    """Masks [B, H, W] by Segment Anything, with or without Grounding DINO."""
    path = model_path(pipeline.SAM_FOLDER, sam, pipeline.SAM_NEEDED, pipeline.CHECKPOINT_ENDINGS)
    prompt = pipeline.parse_prompt(points, box)
    boxes: list[Any] = []
    if method == BY_NAME:
        detector = model_path(dino.FOLDER, grounding_dino, dino.NEEDED)
        boxes = dino.detect(detector, list(images), subject, box_threshold)
    else:
        for image in images:
            pipeline.check_prompt(prompt, image)
    found = []
    with pipeline.load_segmenter(path) as segmenter:
        for i, image in enumerate(images):
            stop_if_interrupted()
            if method == BY_NAME:
                found.append(pipeline.segment_by_name(segmenter, image, boxes[i], choice))
            else:
                found.append(pipeline.segment_anything(segmenter, image, prompt, choice))
    return torch.stack(found)


def _timesteps(text: str) -> tuple[int, ...]:
    found = whole_numbers(text)
    if found is None:
        raise IdentityEditError(
            f"timesteps is '{text}'; write whole numbers from 0 to 999, separated by commas, such as '1, 101, 201'."
        )
    return tuple(found)


def _options(folder: str, endings: tuple[str, ...] = ()) -> list[str]:
    return [NO_MODEL, *list_models(folder, endings)]


NODES: list[type[io.ComfyNode]] = [SegmentSubject]
