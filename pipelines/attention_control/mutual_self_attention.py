"""MasaCtrl (Cao et al. 2023): training-free editing in which self-attention uses keys and values of the inverted image.

At each noise level the source is evaluated alongside the target, on the inversion's latent of that level, so the target
attends to the image's exact trajectory. This happens inside ComfyUI's guider and works with any sampler.
"""

from __future__ import annotations

from typing import Any

import torch

from ...attention.joint import joint_sites
from ...attention.joint_exchange import JointMutualAttention
from ...attention.mutual_self_attention import AUTOMATIC, MutualMasks, SourceFeatures, check_layers, mutual_layers
from ...attention.sites import LAST, LayerKey, Site, choose_blocks
from ...attention.unet import without_guidance_functions
from .. import engine
from ..inversion.inversion import Inversion, check_inversion, check_sampled_latent
from ..shared.comfy_types import Model
from ..shared.conditioning import Conditioning, single_embedding
from ..shared.errors import IdentityEditError, check_batch_matches
from ..shared.input_checks import check_choice, check_number
from ..shared.masks import as_masks, cut_to

START_STEP = 0.08
"""4 of 50 steps in the reference implementation, as a fraction."""

IMAGE, BACKGROUND = "image", "background"
EXCHANGES = (IMAGE, BACKGROUND)

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
    exchange: str = IMAGE,
    end_layer: int = AUTOMATIC,
) -> Model:
    """A clone of `model` whose self-attention takes its keys and values from an inverted image.

    With joint attention, the keys and values of image positions are the source's, those of text the target's own.

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
        start_layer: see `mutual_layers`; with joint attention `mutual_blocks`.
        source_mask, target_mask: MASK [1 or B, H, W] of the subject in the source and of its intended place in the
            target; subject then attends to subject and background to background. Both or neither.
        end_layer: the last layer or block, counted like `start_layer`; `AUTOMATIC` is the last of all.
        exchange: IMAGE, or with joint attention BACKGROUND, which takes keys and values outside `target_mask` alone
            from the source (KV-Edit, Zhu et al. 2025). KV-Edit does so in all blocks and steps, and resets the latent
            there in each step, as Identity-Aware Mask Blend does.

    Raises:
        IdentityEditError: when an input cannot be used; while sampling, for another size, batch or noise level.
    """
    engine.require(model, engine.Capability.TEXT_ATTENTION)
    check_inversion(inversion, model)
    check_number(start_step, "start_step", 0.0, 1.0)
    prompts = _source_prompts(model, source, negative, inversion.batch)
    check_choice(exchange, "exchange", EXCHANGES)
    keeps_background, is_joint = exchange == BACKGROUND, engine.is_joint(model)
    if keeps_background and not is_joint:
        raise IdentityEditError(
            "exchange is background, which needs a model with joint attention (such as Flux); choose image, or load "
            "another checkpoint."
        )
    if keeps_background and target_mask is None:
        raise IdentityEditError("exchange is background but there is no target_mask; connect one, or choose image.")
    if keeps_background:
        source_mask = target_mask
    if (source_mask is None) != (target_mask is None):
        raise IdentityEditError(
            "Only one of source_mask and target_mask is connected; connect both, or neither for edits without masks."
        )
    masks = None
    if source_mask is not None and target_mask is not None:
        masks = as_masks(source_mask, "source_mask"), as_masks(target_mask, "target_mask")
    network = model.get_model_object("diffusion_model")
    layers = {} if is_joint else mutual_layers(network, start_layer, end_layer)
    blocks = mutual_blocks(network, start_layer, end_layer) if is_joint else {}
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
        original = guider.conds
        conds = engine.with_own_uuids(original)
        masks_now = None if masks is None else _mutual_masks(*masks, x, conds)
        features: SourceFeatures | JointMutualAttention = (
            JointMutualAttention(network, blocks, masks_now, keeps_background)
            if is_joint
            else SourceFeatures(layers, masks_now)
        )
        # Evaluate the source at the same noise level, only to record its activations.
        base = guider.inner_model
        guider.conds = _source_conditionings(base, conds, prompts, x.device, is_joint)
        try:
            with torch.no_grad():
                executor(
                    inversion.trajectory[row].to(x),
                    timestep[: inversion.batch],
                    features.recording(without_guidance_functions(model_options)),
                    seed,
                )
            if features.missing():
                raise IdentityEditError(
                    f"Mutual self-attention could not record the layers {features.missing()}; remove the node that "
                    f"skips them (such as DeepCache), or choose a later start_layer."
                )
            guider.conds = conds
            return executor(x, timestep, features.injecting(model_options), seed)
        finally:
            guider.conds = original

    side_prompts = {_KEY + side: prompt for side, prompt in prompts.items()} if is_joint else {}

    def begin(executor: Any, *args: Any, **kwargs: Any) -> Any:
        engine.stop_step_caches(executor.class_obj)
        with engine.side_prompts(executor.class_obj, side_prompts):
            return executor(*args, **kwargs)

    return engine.with_wrappers(model, _KEY, attend_to_source, outer_sample=begin)


def mutual_blocks(network: Any, start_layer: int = AUTOMATIC, end_layer: int = AUTOMATIC) -> dict[LayerKey, Site]:
    """The blocks with joint attention in which the target takes keys and values from the source.

    Args:
        network: the transformer.
        start_layer: index of the first one, from 0 in execution order. `AUTOMATIC` is the last third: in a small model
            of the demo world, earlier blocks kept less of the identity in edits of pose and expression.
        end_layer: index of the last one; `AUTOMATIC` is the network's last.

    Raises:
        IdentityEditError: when the network has no such block.
    """
    sites = joint_sites(network)
    check_layers(start_layer, end_layer, len(sites), "blocks with joint attention")
    until = sites if end_layer == AUTOMATIC else sites[: end_layer + 1]
    first = sites.index(choose_blocks(sites, LAST)[0]) if start_layer == AUTOMATIC else start_layer
    if not until[first:]:
        raise IdentityEditError(
            f"end_layer is {end_layer}, before the automatic start_layer {first}; choose a larger end_layer, or set "
            f"start_layer."
        )
    return {site.key: site for site in until[first:]}


def _source_prompts(
    model: Model, source: Conditioning, negative: Conditioning | None, batch: int
) -> dict[str, Conditioning]:
    """The source's prompts by the guider's sides, checked against the model and the inversion."""
    given = {"The source prompt": (source, _SOURCE_SIDES)}
    if negative is not None:
        given["The negative prompt"] = negative, ("negative",)
    prompts: dict[str, Conditioning] = {}
    for name, (conditioning, sides) in given.items():
        embedding, _ = single_embedding(conditioning, name)
        check_batch_matches(embedding.shape[0], batch, name)
        width = engine.require(model).text_width
        if width and embedding.shape[-1] != width:
            raise IdentityEditError(
                f"A prompt has {embedding.shape[-1]} channels but the model takes {width}; encode it with this "
                f"checkpoint's CLIP."
            )
        prompts |= dict.fromkeys(sides, conditioning)
    return prompts


def _mutual_masks(source: torch.Tensor, target: torch.Tensor, x: torch.Tensor, conds: dict[str, Any]) -> MutualMasks:
    check_batch_matches(source.shape[0], x.shape[0], "source_mask")
    check_batch_matches(target.shape[0], x.shape[0], "target_mask")
    entries = {entry["uuid"]: entry for side in conds.values() for entry in side or ()}
    height, width = x.shape[-2:]
    return MutualMasks(cut_to(source, height, width), cut_to(target, height, width), entries, height, width)


def _source_conditionings(
    base: Any, conds: dict[str, Any], prompts: dict[str, Conditioning], device: torch.device, is_joint: bool
) -> dict[str, Any]:
    """The guider's conditionings with the source's prompts; uuids are kept to match them with the target's."""
    result = {}
    for side, conditionings in conds.items():
        if conditionings is not None and side in prompts:
            if is_joint:
                conditionings = engine.conditionings_with_text(conditionings, conds[_KEY + side], with_guidance=True)
            else:
                embedding, pooled = single_embedding(prompts[side], "The source prompt")
                conditionings = engine.conditionings_with_embedding(
                    base, conditionings, embedding.to(device), pooled, keep=True
                )
        # Masks affect only the prediction, which is not used for the source.
        result[side] = None if conditionings is None else engine.conditionings_of_the_prompt(conditionings)
    return result
