"""Checked and normalized inputs of the scores: images, masks and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..shared.errors import IdentityEditError
from ..shared.images import as_color, matched_images
from ..shared.masks import masks_for
from .definitions import INSIDE


@dataclass(frozen=True)
class ScoredImages:
    """Checked inputs: images [B, H, W, 3] and masks [B, H, W] of one size and number."""

    edited: torch.Tensor
    source: torch.Tensor | None
    mask: torch.Tensor | None
    references: list[torch.Tensor]
    sources: int  # how many were given: one may stand for all

    @classmethod
    def of(
        cls,
        edited: torch.Tensor,
        source: torch.Tensor | None,
        mask: torch.Tensor | None,
        references: Sequence[torch.Tensor] | None,
    ) -> ScoredImages:
        edited = as_color(edited, "edited")
        count, sources = len(edited), 0
        if source is not None:
            sources = len(source)
            edited, source, _ = matched_images(edited, source, ("edited", "source"))
            if len(edited) > count:
                raise IdentityEditError(
                    f"source holds {sources} images for one edited image; give one for all, or one for each."
                )
        if mask is not None:
            mask = masks_for(mask, "mask", edited.shape[1], edited.shape[2], count)
        known = [as_color(image[None], "references")[0] for image in references or []]
        return cls(edited, source, mask, known, sources)

    def weights(self, part: str, number: int) -> torch.Tensor | None:
        """[1, H, W] of a region of one image; None for the whole image."""
        if not part:
            return None
        assert self.mask is not None
        inside = self.mask[number : number + 1]
        return inside if part == INSIDE else 1.0 - inside


def prompt_for_each(prompt: str | list[str], case: ScoredImages, name: str) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    count = len(case.edited)
    if len(prompts) not in (1, count):
        raise IdentityEditError(
            f"{name} holds {len(prompts)} prompts for {count} edited images; give one for all, or one for each."
        )
    prompts = [text.strip() for text in prompts]
    if any(prompts) and not all(prompts):
        raise IdentityEditError(f"{name} is empty for some of the images; write one for each, or none.")
    return prompts * count if len(prompts) == 1 else prompts
