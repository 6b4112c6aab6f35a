"""The node that gives a subject's mask, by the checkpoint's own attention or by Segment Anything."""

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
from ...pipelines.shared.images import PIXELS_OF_A_CELL, as_color, encoded
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
            description=(
                "Finds the subject in images: by the loaded checkpoint's own attention to a word, which needs no "
                "further model, or by Segment Anything with points, a box or the subject's name."
            ),
            inputs=[
                io.Image.Input("images", tooltip="One or more images; each gets its mask."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=ATTENTION,
                    tooltip="Attention asks model, clip and vae where they see the subject. Segment Anything goes by "
                    "points and box, or without them takes everything and chooses. Grounding DINO finds the subject by "
                    "its name first, as in Wang et al. 2023. Any other MASK, such as one painted in the mask editor, "
                    "can be used in the place of this node.",
                ),
                io.String.Input(
                    "subject",
                    default="",
                    tooltip="What to look for: a class word such as dog, with the rare token before it where the model "
                    "has learned one (sks dog). Not used by Segment Anything alone.",
                ),
                io.String.Input(
                    "caption",
                    default="",
                    tooltip="Attention: what the image shows, if you know it; empty uses the subject alone, which "
                    "did as well in the demo world (benchmarks/results/segment_subject.md).",
                ),
                io.String.Input(
                    "timesteps",
                    default=", ".join(map(str, attention_segmentation.TIMESTEPS)),
                    tooltip="Attention: how noisy the image is when the model looks at it, 0 to 999; one model "
                    "call each. Low ones overlapped the best with the true masks of the demo world "
                    "(benchmarks/results/segment_subject.md).",
                ),
                io.Float.Input(
                    "threshold",
                    default=attention_segmentation.THRESHOLD,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Attention: share of the normalized map above which a place belongs to the subject; lower "
                    "makes the mask larger. Measured like the timesteps.",
                ),
                io.Int.Input(
                    "self_attention_power",
                    default=attention_segmentation.POWER,
                    min=0,
                    max=16,
                    tooltip="Attention: lambda of Liu et al. 2024, eq. 2, how often the map is spread along the "
                    "self-attention. 0 uses the cross-attention alone. Measured like the timesteps.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYER_CHOICES),
                    default=AUTOMATIC,
                    tooltip="Attention: which layers are read, by how many times smaller than the latent their grid "
                    "is; see Identity Attention.",
                ),
                io.Int.Input(
                    "longest_side",
                    default=768,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Attention: larger images are shown to the model scaled down to this side in pixels; the "
                    "mask has the image's own size. Near the size that the checkpoint was trained for.",
                ),
                seed_input("Attention: of the noise. The same seed gives the same mask."),
                io.Combo.Input(
                    "sam",
                    options=_options(pipeline.SAM_FOLDER, pipeline.CHECKPOINT_ENDINGS),
                    tooltip=f"A Segment Anything in models/{pipeline.SAM_FOLDER}: a checkpoint file, for the package "
                    "segment-anything, or a folder in the form of transformers. Nothing is downloaded.",
                ),
                io.Combo.Input(
                    "grounding_dino",
                    options=_options(dino.FOLDER),
                    tooltip=f"A Grounding DINO in models/{dino.FOLDER}: a folder in the form of "
                    "transformers. Nothing is downloaded.",
                ),
                io.String.Input(
                    "points",
                    default="",
                    multiline=True,
                    tooltip="Segment Anything: one point a line, 'x, y' on the subject, 'x, y, 0' beside it; pixels "
                    "from the upper left corner. The same for every image.",
                ),
                io.String.Input(
                    "box",
                    default="",
                    tooltip="Segment Anything: 'left, top, right, bottom' in pixels around the subject. Without points "
                    "and box everything in the image is segmented.",
                ),
                io.Combo.Input(
                    "choice",
                    options=list(pipeline.CHOICES),
                    default=pipeline.LARGEST,
                    tooltip="Segment Anything without points and box, and Grounding DINO: which of several parts or "
                    "subjects is the mask. Parts that hold most of the image's border are background and left out.",
                ),
                io.Float.Input(
                    "box_threshold",
                    default=dino.BOX_THRESHOLD,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Grounding DINO: how sure it must be of a subject. 0.25 is its own default.",
                ),
                io.Combo.Input(
                    "parts",
                    options=list(alignment.PARTS),
                    default=alignment.ALL_PARTS,
                    tooltip="Largest part keeps the largest connected part of the mask alone, without specks and "
                    "second subjects.",
                ),
                io.Model.Input("model", optional=True, tooltip="Attention: a Stable Diffusion 1.x, 2.x or XL model."),
                io.Clip.Input("clip", optional=True, tooltip="Attention: the text encoders of the same checkpoint."),
                io.Vae.Input("vae", optional=True, tooltip="Attention: the VAE of the same checkpoint."),
            ],
            outputs=[
                io.Mask.Output("mask", display_name="mask", tooltip="1 on the subject, of the images' size."),
                io.Image.Output(
                    "overlay", display_name="overlay", tooltip="The images with the outline of the mask on them."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="How much of each image the mask covers, and a warning."
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
                f"The mask holds nothing or everything of image {', '.join(nothing)}; check the subject, the "
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
    """Masks [B, H, W] by the checkpoint's attention, of the images' own size."""
    if model is None or clip is None or vae is None:
        raise IdentityEditError(
            f"The method '{ATTENTION}' needs model, clip and vae; connect a checkpoint's, or choose another method."
        )
    identity = encode_identity_prompt(clip, subject, name="subject")
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(caption.strip() or subject))
    height, width = images.shape[1:3]
    # The VAE takes whole cells; the image is scaled to them, so that the mask fits to a fraction of a pixel.
    factor = min(1.0, longest_side / max(height, width))
    cells = (max(1, round(side * factor / PIXELS_OF_A_CELL)) for side in (height, width))
    whole = tuple(count * PIXELS_OF_A_CELL for count in cells)
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
