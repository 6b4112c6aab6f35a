"""MasaCtrl (Cao et al. 2023): sample an edit whose self-attention looks into the inverted image. No training.

The source is evaluated beside the target at the same noise level, on the inversion's own latent of that level, so the
target always looks at the true path of the image. It is done inside ComfyUI's guider, for whatever sampler runs it.
"""

from __future__ import annotations

from typing import Any

import torch

from ...attention.mutual_self_attention import AUTOMATIC, MutualMasks, SourceFeatures, mutual_layers
from ...attention.unet import with_patches, without_guidance_functions
from .. import engine
from ..inversion.inversion import Inversion, check_inversion, check_sampled_latent
from ..shared.conditioning import Conditioning, single_embedding
from ..shared.errors import IdentityEditError, check_batch_matches
from ..shared.masks import as_masks, cut_to

START_STEP = 0.08
"""The reference implementation's 4 of 50 steps, as a share of the steps."""

_KEY = "identity_edit_mutual_self_attention"
_SOURCE_SIDES = ("positive", "middle")


def mutual_self_attention(
    model: Any,
    inversion: Inversion,
    source: Conditioning,
    negative: Conditioning | None = None,
    start_step: float = START_STEP,
    start_layer: int = AUTOMATIC,
    source_mask: torch.Tensor | None = None,
    target_mask: torch.Tensor | None = None,
) -> Any:
    """A clone of `model` whose self-attention takes its keys and values from an inverted image.

    Works with any guider, and with any sampler that evaluates the network at the inversion's own noise levels. Every
    step from `start_step` on costs twice its evaluations. Of two on one model the later counts. Where other nodes
    change the prompt step by step (Timestep-Aware Text Injection (Model)), put this one behind them.

    Args:
        model: MODEL; it is not changed.
        inversion: the source image's, one for all sampled latents or one for each. The latents that are sampled have
            its size, and its sigmas (or the later part of them) are those of the sampler.
        source: the source prompt's CONDITIONING, one entry; only its text embedding and pooled output are used.
        negative: CONDITIONING of the source's negative side, one entry; None takes the sampler's own.
        start_step: share of the inversion's steps that are sampled without it, 0 to 1, so that the target finds its
            layout (4 of 50 in the reference implementation).
        start_layer: see `mutual_layers`.
        source_mask, target_mask: MASK [1 or B, H, W] of the subject in the source and where it will be in the target;
            subject then looks at subject and background at background. Both or none.

    Returns:
        the clone.

    Raises:
        IdentityEditError: when an input cannot be used; at sampling, for another size, batch or noise level.
    """
    width = engine.require(model, engine.Capability.CROSS_ATTENTION).text_width
    check_inversion(inversion, model)
    if not 0.0 <= start_step <= 1.0:
        raise IdentityEditError(f"start_step is {start_step:g}; choose a share of the steps from 0 to 1.")
    source_embedding, source_pooled = single_embedding(source, "The source prompt")
    embeddings = dict.fromkeys(_SOURCE_SIDES, (source_embedding, source_pooled))
    if negative is not None:
        embeddings["negative"] = single_embedding(negative, "The negative prompt")
    for side, (embedding, _) in embeddings.items():
        check_batch_matches(
            embedding.shape[0], inversion.batch, "The negative prompt" if side == "negative" else "The source prompt"
        )
        if embedding.shape[-1] != width:
            raise IdentityEditError(
                f"A prompt has {embedding.shape[-1]} channels but the model takes {width}; encode it with this "
                f"checkpoint's CLIP."
            )
    if (source_mask is None) != (target_mask is None):
        raise IdentityEditError(
            "Only one of source_mask and target_mask is connected; connect both, or none for edits without masks."
        )
    masks = None
    if source_mask is not None and target_mask is not None:
        masks = as_masks(source_mask, "source_mask"), as_masks(target_mask, "target_mask")
    layers = mutual_layers(model.get_model_object("diffusion_model"), start_layer)
    first_step = round(start_step * inversion.steps)

    def look_into_the_source(
        executor: Any,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any] | None = None,
        seed: Any = None,
    ) -> torch.Tensor:
        row = inversion.row(float(timestep.max()))
        if row < first_step:
            return executor(x, timestep, model_options, seed)
        check_sampled_latent(inversion, x)
        guider = executor.class_obj
        own = guider.conds
        # The source at the same noise level; of its prediction nothing is used, of its activations those recorded.
        features = SourceFeatures(layers)
        guider.conds = _source_conditionings(own, embeddings, x.device)
        try:
            with torch.no_grad():
                executor(
                    inversion.trajectory[row].to(x),
                    timestep[: inversion.batch],
                    with_patches(without_guidance_functions(model_options), attn1_patch=features.recording_patch()),
                    seed,
                )
        finally:
            guider.conds = own
        if features.missing():
            raise IdentityEditError(
                f"Mutual self-attention found no activations in the layers {features.missing()}; remove the node that "
                f"skips them (such as a cache of deep features), or choose a later start_layer."
            )
        guiding = None
        patches: dict[str, Any] = {}
        if masks is not None:
            for mask, name in zip(masks, ("source_mask", "target_mask"), strict=True):
                check_batch_matches(mask.shape[0], x.shape[0], name)
            entries = {entry["uuid"]: entry for side in own.values() for entry in side or ()}
            height, width = x.shape[-2:]
            source_cut, target_cut = (cut_to(mask, height, width) for mask in masks)
            guiding = MutualMasks(source_cut, target_cut, entries, height, width)
            patches["attn1_output_patch"] = guiding.output_patch()
        patches["attn1_patch"] = features.injecting_patch(guiding)
        return executor(x, timestep, with_patches(model_options, **patches), seed)

    return engine.with_wrappers(model, _KEY, look_into_the_source)


def _source_conditionings(
    own: dict[str, Any], embeddings: dict[str, tuple[torch.Tensor, torch.Tensor | None]], device: torch.device
) -> dict[str, Any]:
    """The guider's conditionings with the source's prompts, so that each pairs with the target's of the same uuid."""
    result = {}
    for side, conditionings in own.items():
        if conditionings is not None and side in embeddings:
            embedding, pooled = embeddings[side]
            conditionings = engine.conditionings_with_embedding(
                conditionings, embedding.to(device), None if pooled is None else pooled.to(device), keep=True
            )
        # A mask weighs only the prediction, which the source's evaluation does not use.
        result[side] = None if conditionings is None else engine.conditionings_of_the_prompt(conditionings)
    return result
