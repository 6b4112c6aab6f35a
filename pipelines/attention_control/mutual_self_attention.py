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
from ..shared.comfy_types import Model
from ..shared.conditioning import Conditioning, single_embedding
from ..shared.errors import IdentityEditError, check_batch_matches
from ..shared.input_checks import check_number
from ..shared.masks import as_masks, cut_to

START_STEP = 0.08
"""4 of 50 steps in the reference implementation, as a fraction."""

_KEY = "identity_edit_mutual_self_attention"
_SOURCE_SIDES: tuple[str, ...] = ("positive", "middle")


def mutual_self_attention(
    model: Model,
    inversion: Inversion,
    source: Conditioning,
    negative: Conditioning | None = None,
    start_step: float = START_STEP,
    start_layer: int = AUTOMATIC,
    source_mask: torch.Tensor | None = None,
    target_mask: torch.Tensor | None = None,
) -> Model:
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

    Raises:
        IdentityEditError: when an input cannot be used; while sampling, for another size, batch or noise level.
    """
    width = engine.require(model, engine.Capability.CROSS_ATTENTION).text_width
    check_inversion(inversion, model)
    check_number(start_step, "start_step", 0.0, 1.0)
    embeddings = _source_embeddings(source, negative, width, inversion.batch)
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
        guider.conds = _source_conditionings(guider.inner_model, conds, embeddings, x.device)
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
        guiding = None if masks is None else _mutual_masks(*masks, x, conds)
        patches: dict[str, Any] = {}
        if guiding is not None:
            patches["attn1_output_patch"] = guiding.output_patch()
        patches["attn1_patch"] = features.injecting_patch(guiding)
        return executor(x, timestep, with_patches(model_options, **patches), seed)

    return engine.with_wrappers(model, _KEY, attend_to_source)


def _source_embeddings(
    source: Conditioning, negative: Conditioning | None, width: int, batch: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Embedding and pooled output of the source by the guider's sides, checked against the model and the inversion."""
    prompts = {"The source prompt": (source, _SOURCE_SIDES)}
    if negative is not None:
        prompts["The negative prompt"] = negative, ("negative",)
    embeddings: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for name, (conditioning, sides) in prompts.items():
        embedding, pooled = single_embedding(conditioning, name)
        check_batch_matches(embedding.shape[0], batch, name)
        if embedding.shape[-1] != width:
            raise IdentityEditError(
                f"A prompt has {embedding.shape[-1]} channels but the model takes {width}; encode it with this "
                f"checkpoint's CLIP."
            )
        embeddings |= dict.fromkeys(sides, (embedding, pooled))
    return embeddings


def _mutual_masks(source: torch.Tensor, target: torch.Tensor, x: torch.Tensor, conds: dict[str, Any]) -> MutualMasks:
    check_batch_matches(source.shape[0], x.shape[0], "source_mask")
    check_batch_matches(target.shape[0], x.shape[0], "target_mask")
    entries = {entry["uuid"]: entry for side in conds.values() for entry in side or ()}
    height, width = x.shape[-2:]
    return MutualMasks(cut_to(source, height, width), cut_to(target, height, width), entries, height, width)


def _source_conditionings(
    base: Any,
    conds: dict[str, Any],
    embeddings: dict[str, tuple[torch.Tensor, torch.Tensor | None]],
    device: torch.device,
) -> dict[str, Any]:
    """The guider's conditionings with the source's prompts; uuids are kept to match them with the target's."""
    result = {}
    for side, conditionings in conds.items():
        if conditionings is not None and side in embeddings:
            embedding, pooled = embeddings[side]
            conditionings = engine.conditionings_with_embedding(
                base, conditionings, embedding.to(device), pooled, keep=True
            )
        # Masks affect only the prediction, which is not used for the source.
        result[side] = None if conditionings is None else engine.conditionings_of_the_prompt(conditionings)
    return result
