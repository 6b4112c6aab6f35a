"""The node that makes more training images of a few by crops and homographies."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ...pipelines.shared.images import as_color
from ...pipelines.shared.masks import masks_for
from ...pipelines.subjects import augmentation
from ..sockets import checked, mask_input, schema, seed_input, show_text


class AugmentImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditAugmentImages",
            display_name="Augment Images",
            category="subject",
            search_aliases=["data augmentation", "random crop", "homography", "perspective", "sticker pack"],
            description=(
                "Makes more training images from a few, by random crops and changes of perspective (homographies), as "
                "for the DreamBooth of a sticker pack in Chen et al. 2024 (section 4)."
            ),
            inputs=[
                io.Image.Input("images", tooltip="Images of one person or subject; a single photo is enough."),
                io.Int.Input(
                    "count",
                    default=8,
                    min=1,
                    max=1000,
                    tooltip="Number of images made from each one; the first is the unchanged image. Chen et al. 2024 "
                    "do not report theirs.",
                ),
                io.Float.Input(
                    "smallest_crop",
                    default=augmentation.SMALLEST_CROP,
                    min=0.05,
                    max=1.0,
                    step=0.01,
                    tooltip="Smallest side of a crop as a share of the image's; 1 does not crop. Chen et al. 2024 do "
                    "not report theirs.",
                ),
                io.Float.Input(
                    "perspective",
                    default=augmentation.PERSPECTIVE,
                    min=0.0,
                    max=augmentation.MOST_PERSPECTIVE,
                    step=0.01,
                    tooltip="Largest shift of a crop's corner, as a share of its sides; 0 only crops. Chen et al. 2024 "
                    "do not report theirs.",
                ),
                seed_input("Seed of the crops and homographies."),
                mask_input("mask", "Masks of the subject, one per image or one for all, of any size.", optional=True),
            ],
            outputs=[
                io.Image.Output(
                    "augmented",
                    display_name="images",
                    tooltip="All images made from the first photo, then those from the second, and so on.",
                ),
                io.Mask.Output(
                    "augmented_mask",
                    display_name="mask",
                    tooltip="Masks, warped like the images; 1 everywhere if mask is not connected.",
                ),
                io.String.Output("report", tooltip="Number of images."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        images: torch.Tensor,
        count: int,
        smallest_crop: float,
        perspective: float,
        seed: int,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        colors = as_color(images)
        height, width = colors.shape[1:3]
        masks = None if mask is None else masks_for(mask, "mask", height, width, len(colors))
        made, warped = augmentation.augmented(
            colors, count, smallest_crop=smallest_crop, perspective=perspective, seed=seed, masks=masks
        )
        warped = torch.ones(made.shape[:3]) if warped is None else warped
        return io.NodeOutput(made, warped, show_text(cls, f"{len(made)} images of {len(colors)}."))


NODES: list[type[io.ComfyNode]] = [AugmentImages]
