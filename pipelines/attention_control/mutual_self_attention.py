"""MasaCtrl (Cao et al. 2023): training-free editing in which self-attention uses keys and values of the inverted image.

At each noise level the source is evaluated alongside the target, on the inversion's latent of that level, so the target
attends to the image's exact trajectory. This happens inside ComfyUI's guider and works with any sampler.
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
"""4 of 50 steps in the reference implementation, as a fraction."""

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

    Works with any guider, and with any sampler that evaluates the network at the inversion's noise levels. From
    `start_step` on, a step costs twice the model calls. The last one applied to a model is used. Apply it after nodes
    that change the prompt step by step (Timestep-Aware Text Injection (Model)).

    Args:
        model: MODEL; not modified.
        inversion: inversion of the source image, one for all sampled latents or one for each. The sampled latents must
            have its size, and the sampler must use its sigmas (or the later part of them).
        source: the source prompt's CONDITIONING, one entry; only its text embedding and pooled output are used.
        negative: the source's negative CONDITIONING, one entry; None for that of the sampler.
        start_step: fraction of the inversion's steps sampled without it, 0 to 1, in which the target forms its layout
            (4 of 50 in the reference implementation).
        start_layer: see `mutual_layers`.
        source_mask, target_mask: MASK [1 or B, H, W] of the subject in the source and of its intended place in the
            target; subject then attends to subject and background to background. Both or neither.

    Returns:
        the clone.

    Raises:
        IdentityEditError: when an input cannot be used; while sampling, for another size, batch or noise level.
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
            "Only one of source_mask and target_mask is connected; connect both, or neither for edits without masks."
        )
    masks = None
    if source_mask is not None and target_mask is not None:
        masks = as_masks(source_mask, "source_mask"), as_masks(target_mask, "target_mask")
    layers = mutual_layers(model.get_model_object("diffusion_model"), start_layer)
    first_step = round(start_step * inversion.steps)

    def attend_to_source(
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
        conds = guider.conds
        # Evaluate the source at the same noise level, only to record its activations.
        features = SourceFeatures(layers)
        guider.conds = _source_conditionings(conds, embeddings, x.device)
        try:
            with torch.no_grad():
                executor(
                    inversion.trajectory[row].to(x),
                    timestep[: inversion.batch],
                    with_patches(without_guidance_functions(model_options), attn1_patch=features.recording_patch()),
                    seed,
                )
        finally:
            guider.conds = conds
        if features.missing():
            raise IdentityEditError(
                f"Mutual self-attention could not record the layers {features.missing()}; remove the node that skips "
                f"them (such as DeepCache), or choose a later start_layer."
            )
        guiding = None
        patches: dict[str, Any] = {}
        if masks is not None:
            for mask, name in zip(masks, ("source_mask", "target_mask"), strict=True):
                check_batch_matches(mask.shape[0], x.shape[0], name)
            entries = {entry["uuid"]: entry for side in conds.values() for entry in side or ()}
            height, width = x.shape[-2:]
            source_cut, target_cut = (cut_to(mask, height, width) for mask in masks)
            guiding = MutualMasks(source_cut, target_cut, entries, height, width)
            patches["attn1_output_patch"] = guiding.output_patch()
        patches["attn1_patch"] = features.injecting_patch(guiding)
        return executor(x, timestep, with_patches(model_options, **patches), seed)

    return engine.with_wrappers(model, _KEY, attend_to_source)


def _source_conditionings(
    conds: dict[str, Any], embeddings: dict[str, tuple[torch.Tensor, torch.Tensor | None]], device: torch.device
) -> dict[str, Any]:
    """The guider's conditionings with the source's prompts; uuids are kept to match them with the target's."""
    result = {}
    for side, conditionings in conds.items():
        if conditionings is not None and side in embeddings:
            embedding, pooled = embeddings[side]
            conditionings = engine.conditionings_with_embedding(
                conditionings, embedding.to(device), None if pooled is None else pooled.to(device), keep=True
            )
        # Masks affect only the prediction, which is not used for the source.
        result[side] = None if conditionings is None else engine.conditionings_of_the_prompt(conditionings)
    return result
