"""What does attention control do to edits on a flow model? `python -m benchmarks flow_attention`.

The edits of `flow_editing` from the same fixed-point inversions: mutual self-attention in different blocks with joint
attention, with the background's keys and values alone (KV-Edit; with the true masks of the subject before and after)
beside the mask blend alone, and Prompt-to-Prompt with and without the local blend on the subject's word.
Writes benchmarks/results/flow_attention.json, .md and .jpg (the first pairs, as they came).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from identity_edit_pack.attention.joint import joint_sites
from identity_edit_pack.demo_world.attributes import caption
from identity_edit_pack.pipelines.attention_control.mutual_self_attention import (
    AUTOMATIC,
    BACKGROUND,
    mutual_self_attention,
)
from identity_edit_pack.pipelines.attention_control.prompt_to_prompt import REFINE, prompt_to_prompt
from identity_edit_pack.pipelines.inversion import inversion as inversions
from identity_edit_pack.pipelines.inversion import methods
from identity_edit_pack.pipelines.lipe.identity_mask_blend import identity_mask_blend

from . import flow_editing
from .harness import ROOT, Options
from .orders import shared_options

OPTIONS: Options = {
    **flow_editing.OPTIONS,
    **shared_options(1, "flow_attention"),
    "pairs": (51, "(image, edit) pairs for each seed, a third of each kind (51)"),
    "checkpoint": (
        ROOT / "demo_world/weights/identity-edit-demo-flow.safetensors", "of the demo world with a flow model"
    ),
}  # fmt: skip


class AttentionEditor(flow_editing.Editor):
    def methods(self) -> dict[str, Callable[[], torch.Tensor]]:
        sites = joint_sites(self.model.get_model_object("diffusion_model"))
        doubles = sum(site.key[0] == "double" for site in sites)
        ranges = {
            "the last third of the blocks": (AUTOMATIC, AUTOMATIC),
            "double blocks": (0, doubles - 1),
            "single blocks": (doubles, AUTOMATIC),
            "all blocks": (0, AUTOMATIC),
        }
        return {
            "inversion by fixed point": lambda: self.sampled(self.inverted(methods.FIXED_POINT)),
            **{f"mutual self-attention, {name}": partial(self.attending, *of) for name, of in ranges.items()},
            "mask blend, true masks": lambda: self.each(AttentionEditor.blended_by_masks),
            "mask blend and kept background, true masks": lambda: self.each(AttentionEditor.background_kept),
            "Prompt-to-Prompt": lambda: self.each(AttentionEditor.controlled),
            "Prompt-to-Prompt, local blend": lambda: self.each(AttentionEditor.locally_blended),
        }

    def attending(self, start_layer: int, end_layer: int) -> torch.Tensor:
        pivot = self.inverted(methods.FIXED_POINT)
        model = mutual_self_attention(
            self.model, pivot, self.source, self.empty, start_layer=start_layer, end_layer=end_layer
        )
        return inversions.sample_inversion(model, pivot, self.target, self.empty, self.scale)

    @property
    def mask(self) -> torch.Tensor:
        """[1, 128, 128], the subject before or after the edit of the only image."""
        return (self.pairs[0].mask_before | self.pairs[0].mask_after).float()[None]

    def blended_by_masks(self, model: Any = None) -> torch.Tensor:
        return identity_mask_blend(
            model or self.model, self.inverted(methods.FIXED_POINT), self.source, self.target, None, self.empty,
            guidance_scale=self.scale, source_mask=self.mask, target_mask=self.mask,
        ).latent  # fmt: skip

    def background_kept(self) -> torch.Tensor:
        pivot = self.inverted(methods.FIXED_POINT)
        return self.blended_by_masks(
            mutual_self_attention(
                self.model, pivot, self.source, self.empty, 0.0, 0, target_mask=self.mask, exchange=BACKGROUND
            )
        )

    def locally_blended(self) -> torch.Tensor:
        pivot, pair = self.inverted(methods.FIXED_POINT), self.pairs[0]
        model, target = prompt_to_prompt(
            self.model, self.clip, caption(pair.source), caption(pair.target), REFINE,
            blend_words=pair.source.species, inversion=pivot,
        )  # fmt: skip
        return inversions.sample_inversion(model, pivot, target, self.empty, self.scale)


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    return flow_editing.measure(arguments, AttentionEditor)


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    _, *rest = flow_editing.table(figures, arguments)
    return ["Attention control on a flow model", *rest]
