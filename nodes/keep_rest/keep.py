"""Nodes that move an edit back onto its original, and restore everything that the edit was not asked to change."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import torch
from comfy_api.latest import io, ui

from ...pipelines.engine.host import stop_if_interrupted
from ...pipelines.keep_rest import keep as pipeline
from ...pipelines.keep_rest import pictures
from ...pipelines.keep_rest import registration as registrations
from ...pipelines.keep_rest.boxes import mask_of_boxes
from ...pipelines.keep_rest.keep import keep_rest
from ...pipelines.keep_rest.structure import at_size
from ...pipelines.keep_rest.transform import moved_back
from ...pipelines.shared.errors import IdentityEditError
from ...pipelines.shared.images import as_color
from ...pipelines.shared.masks import masks_for
from ..sockets import checked, choice_of, mask_input, schema, show_text

EACH, COMMON = BATCHES = ("each edit by itself", "one transform for all")


def pairs(original: torch.Tensor, edited: torch.Tensor, names: tuple[str, str]) -> list[tuple[torch.Tensor, ...]]:
    """An original for every edit, one for all or one for each, on the CPU, where both nodes work."""
    if len(original) not in (1, len(edited)):
        raise IdentityEditError(
            f"{names[0]} holds {len(original)} images and {names[1]} {len(edited)}; connect one {names[0]}, or one for "
            f"each."
        )
    original, edited = original.cpu(), edited.cpu()
    return [(original[min(number, len(original) - 1)], edit) for number, edit in enumerate(edited)]


class RegisterEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditRegisterEdit",
            display_name="Register Edit",
            category="keep the rest",
            search_aliases=["align images", "image registration", "pixel shift", "zoom drift", "Kontext", "Qwen Edit"],
            advanced=["batch", "flow"],
            description="Moves an edited image back onto its original: undoes shift, zoom, stretch, crop and small "
            "rotation, measured in the part that was not edited. The result has the original's size.",
            is_output_node=True,
            inputs=[
                io.Image.Input("original", tooltip="Original image before the edit, one for all or one for each edit."),
                io.Image.Input("edited", tooltip="Edited image of any size and aspect, from any editor; one or more."),
                io.Combo.Input(
                    "batch",
                    options=list(BATCHES),
                    default=EACH,
                    tooltip="Transform of a batch. One transform for all uses the median of the edits, which keeps "
                    "video frames steady.",
                ),
                io.Boolean.Input(
                    "flow",
                    default=False,
                    optional=True,
                    tooltip="Dense flow. Also undoes small smooth movements that differ over the image, up to 1.5 % of "
                    "its sides; not with one transform for all.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "registered",
                    tooltip="Registered edit at the original's size. It shows the original where the edit does not "
                    "reach. An edit that cannot be registered is only scaled to it.",
                ),
                io.Mask.Output("covered", tooltip="Area that the edit covers: 1 inside."),
                io.String.Output("transform", tooltip="JSON with shift, zoom and rotation of every edit."),
                io.Boolean.Output(
                    "trusted", tooltip="Trust in the result: true if every edit of the batch was registered."
                ),
                io.String.Output("report", tooltip="Transforms, and warnings."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, original: torch.Tensor, edited: torch.Tensor, batch: str = EACH, flow: bool = False
    ) -> io.NodeOutput:
        from comfy.utils import ProgressBar

        choice_of(dict.fromkeys(BATCHES), batch, "batch")
        both = pairs(original, edited, ("original", "edited"))
        bar = ProgressBar(len(both))
        found = []
        for first, second in both:
            stop_if_interrupted()
            found.append(registrations.register(first, second, flow and batch == EACH))
            bar.update(1)
        if batch == COMMON:
            found = registrations.common(found)
        lines, warnings, results = [], [], []
        for number, ((first, second), each) in enumerate(zip(both, found, strict=True), start=1):
            name = f"Edit {number}" if len(both) > 1 else "The edit"
            if each.fault is None:
                results.append(moved_back(each.transform, first, second, each.flow))
                lines.append(f"{name}: {each}; {each.support:.0%} of the structure agrees.")
            else:
                size = (first.shape[0], first.shape[1])
                unchanged = as_color(second[None])[0]
                results.append((unchanged if second.shape[:2] == size else at_size(unchanged, size), torch.ones(size)))
                warnings.append(f"{name} was not registered and at most scaled to the original's size. {each.fault}")
        text = show_text(cls, "\n".join(lines), " ".join(warnings) or None)
        entries = [{**asdict(each.transform), "trusted": each.fault is None} for each in found]
        return io.NodeOutput(
            stacked([image for image, _ in results], both),
            stacked([mask[..., None] for _, mask in results], both)[..., 0],
            json.dumps(entries),
            all(each.fault is None for each in found),
            text,
            ui=ui.PreviewText(text),
        )


def stacked(images: list[torch.Tensor], both: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Images as a batch; if their sizes differ, all at the size of the first original."""
    if len({image.shape for image in images}) == 1:
        return torch.stack(images)
    height, width = both[0][0].shape[:2]
    return torch.stack([at_size(image, (height, width)) for image in images])


class KeepTheRest(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditKeepTheRest",
            display_name="Keep the Rest",
            category="keep the rest",
            search_aliases=["difference mask", "paste back", "restore background", "color match", "composite", "merge"],
            advanced=["grow", "feather", "mask_use", "boxes"],
            description="Takes from a registered edit only what changed, and the original everywhere else, bit for "
            "bit. Undoes the color cast, finds the change against the noise of the editor and closes the seams.",
            is_output_node=True,
            inputs=[
                io.Image.Input("original", tooltip="Original image before the edit, one for all or one for each edit."),
                io.Image.Input("registered", tooltip="Edit from Register Edit, at the original's size."),
                io.Float.Input(
                    "balance",
                    default=0.0,
                    min=-2.0,
                    max=2.0,
                    step=0.1,
                    tooltip="Balance of original and edit. Lower values keep more of the original, higher values more "
                    "of the edit. Each unit halves or doubles the difference that counts as a change.",
                ),
                io.Boolean.Input(
                    "undo_cast",
                    default=True,
                    tooltip="Color correction. Undoes the color cast and contrast of the edit, estimated outside of "
                    "the change.",
                ),
                io.Float.Input(
                    "grow",
                    default=pipeline.GROW,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Growth of the mask in percent of the image's longest side.",
                ),
                io.Float.Input(
                    "feather",
                    default=pipeline.FEATHER,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Width of the mask's soft border in percent of the image's longest side.",
                ),
                io.Combo.Input(
                    "mask_use",
                    options=list(pipeline.MASK_USES),
                    default=pipeline.ONLY_INSIDE,
                    tooltip="Use of mask and boxes: the change inside of them, all changes that touch them, or their "
                    "area itself without looking for the change.",
                ),
                io.String.Input(
                    "boxes",
                    default="",
                    multiline=True,
                    tooltip="Boxes where the edit may be, one per line: left, top, right, bottom in pixels of the "
                    "original.",
                ),
                mask_input(
                    "mask",
                    "Mask of where the edit may be, of any size; one for all or one for each edit.",
                    optional=True,
                ),
            ],
            outputs=[
                io.Image.Output("image", tooltip="Original with the change; equal to the original where mask is 0."),
                io.Mask.Output("change", display_name="mask", tooltip="Share of the edit in each pixel, 0 to 1."),
                io.Image.Output(
                    "comparison",
                    tooltip="Original, registered edit, result, and the mask in red over the result, side by side.",
                ),
                io.String.Output(
                    "report", tooltip="Share changed, color cast, and PSNR and SSIM outside of the change."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        original: torch.Tensor,
        registered: torch.Tensor,
        balance: float,
        undo_cast: bool,
        grow: float,
        feather: float,
        mask_use: str,
        boxes: str,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        from comfy.utils import ProgressBar

        both = pairs(original, registered, ("original", "registered"))
        height, width = original.shape[1:3]
        masks = None if mask is None else masks_for(mask, "mask", height, width, len(both))
        if boxes.strip():
            drawn = mask_of_boxes(boxes, height, width)
            masks = drawn.expand(len(both), -1, -1) if masks is None else torch.maximum(masks, drawn)
        bar = ProgressBar(len(both))
        results, lines, warnings = [], [], []
        for number, (first, second) in enumerate(both, start=1):
            stop_if_interrupted()
            result = keep_rest(
                first,
                second,
                mask=None if masks is None else masks[number - 1],
                mask_use=mask_use,
                balance=balance,
                undo_cast=undo_cast,
                grow=grow,
                feather=feather,
            )
            name = f"Edit {number}: " if len(both) > 1 else ""
            lines.append(name + report(result))
            warnings += [name + result.warning] if result.warning else []
            results.append(result)
            bar.update(1)
        sheets = [
            pictures.sheet(first, second, result.image, result.mask)
            for (first, second), result in zip(both, results, strict=True)
        ]
        text = show_text(cls, "\n".join(lines), " ".join(warnings) or None)
        return io.NodeOutput(
            torch.stack([result.image for result in results]),
            torch.stack([result.mask for result in results]),
            torch.stack(sheets),
            text,
            ui=ui.PreviewImage(torch.stack(sheets), cls=cls),
        )


def report(result: pipeline.Kept) -> str:
    """The figures of one edit in a line."""
    if result.changed == 1.0 or math.isnan(result.psnr):
        return "nothing was kept."
    return (
        f"{result.changed:.1%} of the image changed. Color cast {result.cast:.1%}, noise {result.noise:.2%}. Outside "
        f"of the change, PSNR {result.psnr:.1f} dB and SSIM {result.ssim:.4f} before; now equal to the original."
    )


NODES: list[type[io.ComfyNode]] = [RegisterEdit, KeepTheRest]
