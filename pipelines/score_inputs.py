"""The pictures, masks and prompts that are scored, checked and brought to one form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .errors import IdentityEditError
from .pictures import as_colour
from .score_definitions import INSIDE


@dataclass(frozen=True)
class ScoredPictures:
    """Checked inputs: pictures [B, H, W, 3] and masks [B, H, W] of one size and number."""

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
    ) -> ScoredPictures:
        edited = as_colour(edited, "edited")
        count, height, width = edited.shape[:3]
        sources = 0 if source is None else len(source)
        if source is not None:
            source = as_colour(source, "source")
            if source.shape[1:3] != edited.shape[1:3]:
                raise IdentityEditError(
                    f"edited has {width}x{height} pixels and source {source.shape[2]}x{source.shape[1]}; scale both to "
                    f"one size."
                )
            source = _for_each(source, count, "source")
        if mask is not None:
            mask = mask.detach().float().cpu()
            if mask.ndim != 3 or mask.shape[1:] != edited.shape[1:3]:
                raise IdentityEditError(
                    f"mask has the shape {tuple(mask.shape)} for pictures of {width}x{height} pixels; use a mask of "
                    f"the pictures' size."
                )
            if not bool(torch.isfinite(mask).all()):
                raise IdentityEditError("mask contains NaN or infinite values; make it again.")
            mask = _for_each(mask.clamp(0.0, 1.0), count, "mask")
        known = [as_colour(picture[None], "references")[0] for picture in references or []]
        return cls(edited, source, mask, known, sources)

    def weights(self, part: str, number: int) -> torch.Tensor | None:
        """[1, H, W] of a part of one picture; None for the whole."""
        if not part:
            return None
        assert self.mask is not None
        inside = self.mask[number : number + 1]
        return inside if part == INSIDE else 1.0 - inside


def _for_each(batch: torch.Tensor, count: int, name: str) -> torch.Tensor:
    if len(batch) not in (1, count):
        raise IdentityEditError(
            f"{name} holds {len(batch)} entries for {count} edited pictures; give one for all, or one for each."
        )
    return batch.expand(count, *batch.shape[1:])


def prompt_for_each(prompt: str | list[str], case: ScoredPictures, name: str) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    count = len(case.edited)
    if len(prompts) not in (1, count):
        raise IdentityEditError(
            f"{name} holds {len(prompts)} prompts for {count} edited pictures; give one for all, or one for each."
        )
    prompts = [text.strip() for text in prompts]
    if any(prompts) and not all(prompts):
        raise IdentityEditError(f"{name} is empty for some of the pictures; write one for each, or none.")
    return prompts * count if len(prompts) == 1 else prompts
