"""Subject masks from Segment Anything (Kirillov et al. 2023): from points and a box, automatic, or from the boxes of
`grounding_dino` ("Grounded SAM"), as in Wang et al. 2023."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ..shared.errors import IdentityEditError, first_line
from ..shared.images import as_bytes, to_pillow
from ..shared.input_checks import check_choice
from ..shared.parsing import lines_of_numbers, numbers
from .model_folders import loaded, opened_folder, read_checkpoint

SAM_FOLDER = "sams"
CHECKPOINT_ENDINGS = (".pth", ".pt", ".safetensors")
SAM_NEEDED = (
    "a checkpoint file of Segment Anything, such as sam_vit_b_01ec64.pth, for the package segment-anything; or a "
    "folder in transformers format with config.json, model.safetensors and preprocessor_config.json"
)
LARGEST, UNION, MOST_CERTAIN = CHOICES = ("largest", "union", "most certain")
POINTS_PER_SIDE = 32
"""Points per side of the grid for automatic segmentation (Kirillov et al. 2023)."""
_BACKGROUND_BORDER = 0.5
"""[choice] A mask that covers more than this fraction of the image's border counts as background."""


@dataclass(frozen=True)
class Prompt:
    """A prompt for Segment Anything: points, a box, both, or neither (automatic segmentation).

    Attributes:
        points: (x, y) in pixels from the image's upper left corner.
        labels: for each point True on the subject, False on the background.
        box: (left, top, right, bottom) in pixels, or None.
    """

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[bool, ...] = ()
    box: tuple[float, float, float, float] | None = None

    @property
    def is_automatic(self) -> bool:
        return not self.points and self.box is None


@dataclass(frozen=True)
class Segment:
    """A segment of an image.

    Attributes:
        mask: [height, width] bool.
        score: the network's confidence, about 0 to 1.
    """

    mask: torch.Tensor
    score: float


class Segmenter(Protocol):
    """A loaded Segment Anything."""

    def by_prompt(self, image: torch.Tensor, prompt: Prompt) -> Segment:
        """The mask [h, w] with the highest score for points and box in an image [h, w, 3]."""

    def everything(self, image: torch.Tensor) -> list[Segment]:
        """All segments, without a prompt."""


# --- Segment Anything ------------------------------------------------------------------------------------------------


def segment_anything(segmenter: Segmenter, image: torch.Tensor, prompt: Prompt, choice: str = LARGEST) -> torch.Tensor:
    """The subject's mask from points and a box, or from automatic segmentation.

    Args:
        segmenter: from `load_segmenter`.
        image: [height, width, 3], 0 to 1.
        prompt: points and box. Without them everything is segmented, and segments that cover most of the image's border
            are removed as background.
        choice: which of several segments to use: LARGEST, UNION or MOST_CERTAIN.

    Returns:
        [height, width] float32, 0 or 1; all 0 if nothing is found.

    Raises:
        IdentityEditError: when a point or the box lies outside the image.
    """
    check_prompt(prompt, image)
    if not prompt.is_automatic:
        return segmenter.by_prompt(image, prompt).mask.float()
    return _chosen([part for part in segmenter.everything(image) if not _is_background(part.mask)], choice, image)


def segment_by_name(
    segmenter: Segmenter, image: torch.Tensor, boxes: Sequence[tuple[float, tuple[float, ...]]], choice: str
) -> torch.Tensor:
    """The subject's mask from a detector's boxes (Grounded SAM): one mask per box, then `choice`.

    Args:
        segmenter: from `load_segmenter`.
        image: [height, width, 3].
        boxes: (score, (left, top, right, bottom)), from `detect`.
        choice: LARGEST, UNION or MOST_CERTAIN (the detector's score).

    Returns:
        [height, width] float32, 0 or 1; all 0 without boxes.
    """
    height, width = image.shape[:2]
    parts = []
    for score, (left, top, right, bottom) in boxes:
        box = (max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom))
        parts.append(Segment(segmenter.by_prompt(image, Prompt(box=box)).mask, score))
    return _chosen(parts, choice, image)


@contextmanager
def load_segmenter(path: str) -> Iterator[Segmenter]:
    """Segment Anything from a checkpoint file (package segment-anything) or a folder (transformers).

    Raises:
        IdentityEditError: when files or the package are missing, or for another network.
    """

    if os.path.isfile(path):
        with loaded(path, lambda: (_package_model(path), None)) as (network, _, _device):
            yield _PackageSegmenter(network)
        return
    otherwise = ", not 'sam'; choose a Segment Anything in transformers format"
    with opened_folder(path, SAM_NEEDED, ("sam",), otherwise, "SamModel", "SamProcessor") as opened:
        yield _TransformersSegmenter(*opened, path)


class _PackageSegmenter:
    """Segment Anything of the package segment-anything."""

    def __init__(self, network: Any) -> None:
        self._network = network

    def by_prompt(self, image: torch.Tensor, prompt: Prompt) -> Segment:
        from segment_anything import SamPredictor

        predictor = SamPredictor(self._network)
        predictor.set_image(as_bytes(image))
        masks, scores, _ = predictor.predict(
            point_coords=np.array(prompt.points, dtype=np.float32) if prompt.points else None,
            point_labels=np.array(prompt.labels, dtype=np.int32) if prompt.points else None,
            box=np.array(prompt.box, dtype=np.float32) if prompt.box else None,
            multimask_output=_is_ambiguous(prompt),
        )
        best = int(np.argmax(scores))
        return Segment(torch.from_numpy(np.asarray(masks[best], dtype=bool)), float(scores[best]))

    def everything(self, image: torch.Tensor) -> list[Segment]:
        from segment_anything import SamAutomaticMaskGenerator

        segments = SamAutomaticMaskGenerator(self._network, points_per_side=POINTS_PER_SIDE).generate(as_bytes(image))
        return [Segment(torch.from_numpy(each["segmentation"]), float(each["predicted_iou"])) for each in segments]


class _TransformersSegmenter:
    """Segment Anything of transformers (SamModel)."""

    def __init__(self, network: Any, processor: Any, device: torch.device, path: str) -> None:
        self._network, self._processor, self._device, self._path = network, processor, device, path

    def by_prompt(self, image: torch.Tensor, prompt: Prompt) -> Segment:
        prompts: dict[str, Any] = {}
        if prompt.points:
            prompts["input_points"] = [[[list(point) for point in prompt.points]]]
            prompts["input_labels"] = [[[int(label) for label in prompt.labels]]]
        if prompt.box:
            prompts["input_boxes"] = [[list(prompt.box)]]
        inputs = self._processor(to_pillow(image), return_tensors="pt", **prompts)
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        # Coordinates are float64, which some devices do not support.
        tensors = {
            name: value.to(self._device, torch.float32 if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
            if name not in ("original_sizes", "reshaped_input_sizes")
        }
        output = self._network(**tensors, multimask_output=_is_ambiguous(prompt))
        masks = self._processor.image_processor.post_process_masks(output.pred_masks.cpu(), *sizes)[0][0]
        scores = output.iou_scores[0, 0]
        best = int(scores.argmax())
        return Segment(masks[best].bool(), float(scores[best]))

    def everything(self, image: torch.Tensor) -> list[Segment]:
        from transformers import pipeline

        generator = pipeline(
            "mask-generation",
            model=self._network,
            image_processor=self._processor.image_processor,
            device=self._device,
        )
        try:
            # The pipeline needs batches that divide the number of points, here two rows of the grid.
            segments = generator(
                to_pillow(image), points_per_batch=2 * POINTS_PER_SIDE, points_per_crop=POINTS_PER_SIDE
            )
        except (RuntimeError, NotImplementedError, IndexError) as error:
            raise IdentityEditError(
                f"The model in {self._path} cannot segment automatically ({first_line(error)}); set points or a box."
            ) from error
        return [
            Segment(torch.from_numpy(np.asarray(mask, dtype=bool)), float(score))
            for mask, score in zip(segments["masks"], segments["scores"], strict=True)
        ]


def _package_model(path: str) -> Any:
    """The package's network with the weights of a file.

    Its builders would unpickle the file and could execute code in it, so the weights are loaded separately as plain
    tensors.
    """
    try:
        from segment_anything import sam_model_registry
    except ImportError as error:
        raise IdentityEditError(
            f"{path} needs the package segment-anything, which is not installed; run `pip install segment-anything`, "
            f"or choose a Segment Anything in transformers format."
        ) from error
    weights = read_checkpoint(path)
    position = weights.get("image_encoder.pos_embed")
    kinds = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
    kind = kinds.get(position.shape[-1]) if position is not None else None
    if kind is None or kind not in sam_model_registry:
        raise IdentityEditError(
            f"The checkpoint {path} is not a Segment Anything ViT-B, ViT-L or ViT-H; choose one, such as "
            f"sam_vit_b_01ec64.pth."
        )
    network = sam_model_registry[kind]()
    network.load_state_dict(weights)
    return network


# --- Prompts and parts -----------------------------------------------------------------------------------------------


def parse_prompt(points: str, box: str) -> Prompt:
    """Parse a prompt from text widgets.

    Args:
        points: one per line or separated by semicolons: "x, y" on the subject, "x, y, 0" on the background; in pixels.
        box: "left, top, right, bottom" in pixels, or empty.

    Raises:
        IdentityEditError: when the text is invalid.
    """
    coordinates: list[tuple[float, float]] = []
    labels: list[bool] = []
    for line, values in lines_of_numbers(points):
        if values is None or len(values) not in (2, 3) or (len(values) == 3 and values[2] not in (0, 1)):
            raise IdentityEditError(
                f"points has the line '{line}'; write 'x, y' for a point on the subject and 'x, y, 0' for one on the "
                f"background, in pixels."
            )
        coordinates.append((values[0], values[1]))
        labels.append(len(values) == 2 or values[2] == 1)
    if coordinates and not any(labels) and not box.strip():
        raise IdentityEditError("points has none on the subject; add a point 'x, y' on it, or a box.")
    corners = None
    if box.strip():
        values = numbers(box)
        if values is None or len(values) != 4 or values[0] >= values[2] or values[1] >= values[3]:
            raise IdentityEditError(
                f"box is '{box.strip()}'; write 'left, top, right, bottom' in pixels, such as '20, 30, 400, 500'."
            )
        corners = (values[0], values[1], values[2], values[3])
    return Prompt(tuple(coordinates), tuple(labels), corners)


def check_prompt(prompt: Prompt, image: torch.Tensor) -> None:
    """Raise `IdentityEditError` if a point or the whole box lies outside the image [height, width, 3]."""
    height, width = image.shape[:2]
    for x, y in prompt.points:
        if not (0 <= x <= width and 0 <= y <= height):
            raise IdentityEditError(
                f"The point ({x:g}, {y:g}) lies outside the image of {width}x{height} pixels; choose one inside."
            )
    if prompt.box is not None:
        left, top, right, bottom = prompt.box
        if left >= width or top >= height or right <= 0 or bottom <= 0:
            raise IdentityEditError(
                f"The box ({left:g}, {top:g}, {right:g}, {bottom:g}) lies outside the image of {width}x{height} "
                f"pixels; choose one inside."
            )


def _is_ambiguous(prompt: Prompt) -> bool:
    """A single point may mean a part, an object or a group; the network then returns three masks (Kirillov et al.
    2023)."""
    return len(prompt.points) == 1 and prompt.box is None


def _is_background(mask: torch.Tensor) -> bool:
    border = torch.cat([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    return float(border.float().mean()) > _BACKGROUND_BORDER


def _chosen(parts: Sequence[Segment], choice: str, image: torch.Tensor) -> torch.Tensor:
    check_choice(choice, "choice", CHOICES)
    if not parts:
        return torch.zeros(image.shape[:2])
    if choice == UNION:
        return torch.stack([part.mask for part in parts]).any(dim=0).float()
    if choice == LARGEST:
        return max(parts, key=lambda part: int(part.mask.sum())).mask.float()
    return max(parts, key=lambda part: part.score).mask.float()
