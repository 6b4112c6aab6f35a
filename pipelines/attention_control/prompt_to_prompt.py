"""Prompt-to-prompt (Hertz et al. 2023): edit an image by editing its prompt, with the attention of the source.

A wrapper around ComfyUI's guider evaluates source and target together at every noise level, so it works with any stock
sampler and guider:

- Generated images: each latent is sampled twice from the same noise, with the source prompt and with the target prompt.
  The source is bit-identical to the image sampled without control.
- Real images: the source follows its inversion's trajectory, with the inversion's per-step null-text embeddings as the
  negative side (Mokady et al. 2023). Only the source's positive side is needed, so a controlled step costs three model
  calls instead of two. For equal prompts and an exact inversion the target equals the source up to rounding, which
  depends on the batch size.

Transformers with joint attention have no cross-attention whose weights could be mapped. There the target takes the
source's queries and keys of image positions in the first steps (Shin et al. 2025, who call this q_i k_i and use it in a
fifth of the steps), whatever the difference between the prompts.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...attention.joint import joint_sites
from ...attention.joint_exchange import JointControl
from ...attention.prompt_to_prompt import SOURCE, TARGET, AttentionControl, LocalBlend, TokenMap, automatic_factor
from ...attention.sites import AUTOMATIC, MIDDLE, LayerKey, choose_blocks
from ...attention.unet import AttentionLayer, attention_layers, without_guidance_functions
from .. import engine
from ..engine.families.schedule import step_at
from ..inversion.inversion import Inversion, check_inversion, check_sampled_latent
from ..shared.comfy_types import Clip, Model
from ..shared.conditioning import Conditioning, single_embedding
from ..shared.errors import IdentityEditError
from ..shared.input_checks import check_choice, check_number
from ..shared.parsing import split_parts, split_words
from ..text.prompt_tokens import (
    Pair,
    Positions,
    aligned_tokens,
    occurrences,
    paired_words,
    positions_in_either,
    positions_of,
    prompt_tokens,
    token_mapper,
)
from ..text.step_embeddings import apply_step_embeddings

REPLACE, REFINE = "replace", "refine"
EDITS = (REPLACE, REFINE)

CROSS_REPLACE_STEPS = 0.8
SELF_REPLACE_STEPS = 0.4
"""Fractions of the steps, from the first, for word swaps in the reference implementation's notebook."""
BLEND_THRESHOLD = 0.3
BLEND_START = 0.2
"""Defaults of the reference implementation's LocalBlend."""
FACTORS = (AUTOMATIC, "1", "2", "4", "8")

_KEY = "identity_edit_prompt_to_prompt"

_Control = AttentionControl | JointControl
_WORD_AND_FACTOR = re.compile(r"(?P<word>\S.*?)\s*:\s*(?P<factor>[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?)(?=\s|$)", re.I)


@dataclass(frozen=True)
class ControlSettings:
    """When and where attention is controlled.

    Attributes:
        cross_replace_steps: fraction of the steps, from the first, with the source's cross-attention, 0 to 1.
        self_replace_steps: likewise for self-attention.
        self_attention_grid: minimum downsampling factor of layers with controlled self-attention: "1", "2", "4", "8" or
            "automatic", see `attention.prompt_to_prompt.automatic_factor`.
        blend_threshold: fraction of the words' largest attention above which the latent may change, 0 to 1.
        blend_start: fraction of the steps, from the first, without local blend, 0 to 1.
    """

    cross_replace_steps: float = CROSS_REPLACE_STEPS
    self_replace_steps: float = SELF_REPLACE_STEPS
    self_attention_grid: str = AUTOMATIC
    blend_threshold: float = BLEND_THRESHOLD
    blend_start: float = BLEND_START

    def __post_init__(self) -> None:
        for name in ("cross_replace_steps", "self_replace_steps", "blend_threshold", "blend_start"):
            check_number(getattr(self, name), name, 0.0, 1.0)
        check_choice(self.self_attention_grid, "self_attention_grid", FACTORS)


def prompt_to_prompt(
    model: Model,
    clip: Clip,
    source_prompt: str,
    target_prompt: str,
    edit: str = REPLACE,
    reweight: Mapping[str, float] | None = None,
    blend_words: str = "",
    settings: ControlSettings | None = None,
    inversion: Inversion | None = None,
) -> tuple[Model, Conditioning]:
    """A MODEL that samples the target prompt with the attention of the source prompt, and the target's CONDITIONING.

    Args:
        model: MODEL of Stable Diffusion 1.x, 2.x or XL, or with joint attention; not modified.
        clip: CLIP of the same checkpoint.
        source_prompt: prompt of the source image.
        target_prompt: the source prompt with words exchanged, added or removed.
        edit: "replace" pairs the words of both prompts one by one; a new word gets the attention of its counterpart.
            "refine" keeps the attention of tokens that both prompts share and leaves new ones free.
        reweight: attention factors of words in the target prompt; below 1 weakens, below 0 inverts.
        blend_words: words of either prompt, separated by spaces or commas: the latent may change only where these are.
            Empty for everywhere.
        settings: when and where attention is controlled.
        inversion: inversion of a real image with the source prompt; None samples the source alongside the target.

    Returns:
        the clone and the target prompt's CONDITIONING, for the positive side of any sampler. Without an inversion the
        sampler returns twice as many latents: first the sources, then the targets; use a sampler that adds no noise
        between steps (euler, ddim, dpmpp_2m), because the two would get different noise. With an inversion it returns
        only the targets, and must use the inversion's noise levels.

    Raises:
        IdentityEditError: when an input cannot be used; while sampling, for another size, batch or noise level.
    """
    check_choice(edit, "edit", EDITS)
    settings = settings or ControlSettings()
    if engine.is_joint(model):
        if reweight:
            raise IdentityEditError(
                "reweight is not possible with a flow model, whose text and image share one attention; leave it empty, "
                "and weight the word in the target prompt, such as (fluffy:1.3)."
            )
        return _with_joint_control(model, clip, source_prompt, target_prompt, blend_words, settings, inversion)
    source, target = prompt_tokens(clip, source_prompt), prompt_tokens(clip, target_prompt)
    pairs = paired_words(source, target) if edit == REPLACE else aligned_tokens(source, target)
    mapper = token_mapper(source, target, pairs)
    factors = torch.ones(target.count)
    for word, factor in (reweight or {}).items():
        factors[list(positions_of(clip, target, word, "The target prompt"))] = float(factor)
    tokens = TokenMap(mapper, mapper.sum(dim=0) > 0, factors)
    words = [positions_in_either(clip, source, target, word) for word in split_words(blend_words)]
    blend: Pair | None = None
    if words:
        blend = tuple(p for first, _ in words for p in first), tuple(p for _, second in words for p in second)
    controlled = with_attention_control(model, tokens, encode(clip, source_prompt), settings, blend, inversion)
    return controlled, encode(clip, target_prompt)


def _with_joint_control(
    model: Model,
    clip: Clip,
    source_prompt: str,
    target_prompt: str,
    blend_words: str,
    settings: ControlSettings,
    inversion: Inversion | None,
) -> tuple[Model, Conditioning]:
    """`prompt_to_prompt` with joint attention."""
    source, target = encode(clip, source_prompt), encode(clip, target_prompt)
    for name, conditioning in (("The source prompt", source), ("The target prompt", target)):
        single_embedding(conditioning, name)
        engine.check_prompt(model, conditioning, name)
    counts = {SOURCE: source[0][0].shape[1], TARGET: target[0][0].shape[1]}
    columns: dict[str, list[int]] = {SOURCE: [], TARGET: []}
    for word in split_words(blend_words):
        found = {of: occurrences(clip, prompt, counts[of], word)
                 for of, prompt in ((SOURCE, source_prompt), (TARGET, target_prompt))}  # fmt: skip
        if not any(found.values()):
            raise IdentityEditError(
                f"Neither the source prompt nor the target prompt contains the word {word!r}; write it exactly as in "
                f"one of them."
            )
        for of, positions in found.items():
            columns[of] += positions
    blend = (tuple(columns[SOURCE]), tuple(columns[TARGET])) if split_words(blend_words) else None
    if inversion is not None:
        check_inversion(inversion, model)
        if inversion.embeddings is not None:
            model = apply_step_embeddings(model, inversion.embeddings, "negative")
    network = model.get_model_object("diffusion_model")
    both = _OnJoint(network, source, counts, settings=settings, blend=blend, inversion=inversion)
    return engine.with_wrappers(model, _KEY, both.evaluate, outer_sample=both.begin), target


def parse_reweight(text: str) -> dict[str, float]:
    """Words and factors from "fluffy: 2, red hat: 0.5" (separated by commas, spaces or new lines).

    Raises:
        IdentityEditError: when a part is not a word, colon and number.
    """
    factors: dict[str, float] = {}
    for part in split_parts(text.replace("\n", ",").replace("\uff1a", ":")):
        rest = part
        while rest:
            pair = _WORD_AND_FACTOR.match(rest)
            if pair is None:
                raise IdentityEditError(
                    f"reweight has {part!r}; write each word with its factor, such as: fluffy: 2, hat: 0.5."
                )
            factors[pair["word"].strip()] = float(pair["factor"])
            rest = rest[pair.end() :].strip()
    return factors


def encode(clip: Clip, prompt: str) -> Conditioning:
    """Encode a prompt like the stock CLIP Text Encode."""
    with torch.no_grad():
        return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def with_attention_control(
    model: Model,
    tokens: TokenMap,
    source: Conditioning,
    settings: ControlSettings,
    blend: Pair | None = None,
    inversion: Inversion | None = None,
) -> Model:
    """A clone of `model` whose target takes the attention of a source; see `prompt_to_prompt`.

    The sampler's positive conditioning is the target's. Apply it after nodes that change the prompt step by step. The
    last one applied to a model is used.

    Local blend works like ComfyUI's masked sampling: outside the mask the network's input is the source's x_t, and the
    estimate of z_0 is the source's. The sampler's latent converges to it: the difference when a latent pixel leaves the
    mask shrinks by sigma_end / sigma (for Euler steps), so the final latent equals the source up to rounding if the
    schedule ends at 0, and nearly so if it ends at timestep 0.

    Args:
        model: MODEL; not modified.
        tokens: mapping of cross-attention from source to target tokens.
        source: the source prompt's CONDITIONING, one entry.
        settings: when and where attention is controlled.
        blend: tokens of the blend words in the source and the target prompt, or None.
        inversion: inversion of the source, or None to sample it alongside the target.

    """
    width = engine.require(model, engine.Capability.CROSS_ATTENTION).text_width
    embedding, pooled = single_embedding(source, "The source prompt")
    if embedding.shape[-1] != width or embedding.shape[1] != tokens.mapper.shape[0]:
        raise IdentityEditError(
            f"The source prompt has an embedding {tuple(embedding.shape)} but the model takes {width} channels; "
            f"connect the CLIP of the same checkpoint."
        )
    if inversion is not None:
        check_inversion(inversion, model)
        if inversion.embeddings is not None:
            model = apply_step_embeddings(model, inversion.embeddings, "negative")
    layers = attention_layers(model.get_model_object("diffusion_model"))
    both = _OnUNet(tokens, embedding, pooled, layers, settings=settings, blend=blend, inversion=inversion)
    return engine.with_wrappers(model, _KEY, both.evaluate, outer_sample=both.begin)


@dataclass
class _Run:
    """One sampling run.

    Attributes:
        batch: number of sampled targets.
        sigmas: noise levels of the run [N + 1], on the CPU.
        blend: attention of the blend words so far.
        mask: where the latent may change [B, 1, H, W], set by the first blended step.
    """

    batch: int
    sigmas: torch.Tensor
    blend: LocalBlend | None
    mask: torch.Tensor | None = None


@dataclass(kw_only=True)
class _SourceAndTarget(ABC):
    """Source and target sampled together, by wrappers around a run and around each of its model calls."""

    settings: ControlSettings
    blend: Pair | None
    inversion: Inversion | None
    run: _Run | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _SourceAndTarget:
        return self  # shared by all clones of a model

    @abstractmethod
    def local_blend(self, source: Positions, target: Positions) -> LocalBlend:
        """The empty local blend of a run."""

    @abstractmethod
    def control(self, own: dict[str, Any], step: int, steps: int, x: torch.Tensor) -> _Control | None:
        """The control of a model call of the target with the conditionings `own`, or None if there is none."""

    @abstractmethod
    def source_positive(self, base: Any, own: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
        """The positive conditionings with the source prompt; uuids are kept to match them with the target's."""

    def begin(
        self,
        executor: Any,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        sampler: Any,
        sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        engine.stop_step_caches(executor.class_obj)
        words = None if self.blend is None else self.local_blend(*self.blend)
        self.run = _Run(noise.shape[0], sigmas.detach().to(device="cpu", dtype=torch.float32), words)
        if self.inversion is None:  # duplicate the latents and the noise: first the sources, then the targets
            # Versions newer than 0.3.75 pass one mask per latent.
            if denoise_mask is not None and denoise_mask.shape[0] == noise.shape[0]:
                denoise_mask = torch.cat([denoise_mask, denoise_mask])
            noise, latent_image = torch.cat([noise, noise]), torch.cat([latent_image, latent_image])
            if kwargs.get("latent_shapes") is not None:
                kwargs["latent_shapes"] = [latent_image.shape]
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)

    def evaluate(
        self,
        executor: Any,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any] | None = None,
        seed: Any = None,
    ) -> torch.Tensor:
        run, inversion, settings = self.run, self.inversion, self.settings
        assert run is not None
        step, steps, x_source, x_target = self._at(run, x, float(timestep.max()))
        source_sigmas, target_sigmas = timestep[: x_source.shape[0]], timestep[: x_target.shape[0]]
        guider = executor.class_obj
        original = guider.conds
        own = engine.with_own_uuids(original)
        control = self.control(own, step, steps, x)
        if control is None:
            return executor(x, timestep, model_options, seed)
        if run.mask is not None:
            x_target = torch.where(_as_latent(run.mask, x), x_target, x_source)
        try:
            guider.conds = self._source_conditionings(guider.inner_model, own, x.device)
            options = model_options if inversion is None else without_guidance_functions(model_options)
            with torch.no_grad():
                source_denoised = executor(x_source, source_sigmas, control.recording(options), seed)
            guider.conds = own
            target_denoised = executor(x_target, target_sigmas, control.injecting(model_options), seed)
            if run.blend is not None and step >= round(settings.blend_start * steps):
                run.mask = run.blend.mask(x.shape[-2], x.shape[-1])
                if inversion is not None:
                    source_denoised = inversion.image.to(x)
                target_denoised = torch.where(_as_latent(run.mask, x), target_denoised, source_denoised)
        finally:
            guider.conds = original
        return target_denoised if inversion is not None else torch.cat([source_denoised, target_denoised])

    def _at(self, run: _Run, x: torch.Tensor, sigma: float) -> tuple[int, int, torch.Tensor, torch.Tensor]:
        """The step at a noise level, the number of steps, and the latents of source and target."""
        if self.inversion is not None:
            check_sampled_latent(self.inversion, x)
            row = self.inversion.row(sigma)
            return row, self.inversion.steps, self.inversion.trajectory[row].to(x), x
        if x.shape[0] != 2 * run.batch:
            raise IdentityEditError(
                "Prompt-to-Prompt must sample the source alongside the target, which this sampler does not support; "
                "connect the inversion to Prompt-to-Prompt, or use a stock sampler."
            )
        x_source, x_target = x.chunk(2)
        return step_at(run.sigmas, sigma), run.sigmas.shape[0] - 1, x_source, x_target

    def _source_conditionings(self, base: Any, own: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """The guider's conditionings with the source prompt. For an inverted source only the positive side's attention
        is needed, without the target's ControlNets and masks."""
        positive = self.source_positive(base, own, device)
        if self.inversion is None:
            return {**own, "positive": positive}
        return {**dict.fromkeys(own), "positive": engine.conditionings_of_the_prompt(positive)}


@dataclass
class _OnUNet(_SourceAndTarget):
    tokens: TokenMap
    embedding: torch.Tensor
    pooled: torch.Tensor | None
    layers: list[AttentionLayer]

    def local_blend(self, source: Positions, target: Positions) -> LocalBlend:
        return LocalBlend(source, target, self.settings.blend_threshold)

    def control(self, own: dict[str, Any], step: int, steps: int, x: torch.Tensor) -> AttentionControl | None:
        assert self.run is not None
        controls_cross = step < round(self.settings.cross_replace_steps * steps)
        controls_self = step < round(self.settings.self_replace_steps * steps)
        if self.inversion is not None and not (controls_cross or controls_self or self.run.blend):
            return None
        height, width = x.shape[-2:]
        cross, with_self, blended = _chosen_layers(self.layers, self.settings, height, width)
        return AttentionControl(
            tokens=self.tokens,
            cross_layers=cross if controls_cross else {},
            self_layers=with_self if controls_self else {},
            entries={entry["uuid"]: entry for entry in own["positive"]},
            height=height,
            width=width,
            blend=self.run.blend,
            blend_layers=blended if self.run.blend else {},
        )

    def source_positive(self, base: Any, own: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
        embedding = self.embedding.to(device)
        return engine.conditionings_with_embedding(base, own["positive"], embedding, self.pooled, keep=True)


@dataclass
class _OnJoint(_SourceAndTarget):
    network: Any
    source: Conditioning
    counts: Mapping[str, int]

    def begin(self, executor: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with engine.side_prompts(executor.class_obj, {_KEY: self.source}):
            return super().begin(executor, noise, *args, **kwargs)

    def local_blend(self, source: Positions, target: Positions) -> LocalBlend:
        return LocalBlend(source, target, self.settings.blend_threshold, smoothed=True)

    def control(self, own: dict[str, Any], step: int, steps: int, x: torch.Tensor) -> JointControl | None:
        assert self.run is not None
        exchanges = step < round(self.settings.self_replace_steps * steps)
        if self.inversion is not None and not (exchanges or self.run.blend):
            return None
        sites = joint_sites(self.network)
        return JointControl(
            network=self.network,
            sites={site.key: site for site in sites} if exchanges else {},
            entries={entry["uuid"]: entry for entry in own["positive"]},
            height=x.shape[-2],
            width=x.shape[-1],
            blend=self.run.blend,
            blend_sites={site.key: site for site in choose_blocks(sites, MIDDLE)} if self.run.blend else {},
            counts=self.counts,
        )

    def source_positive(self, base: Any, own: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
        return engine.conditionings_with_text(own["positive"], own[_KEY])


def _as_latent(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A mask [B, 1, H, W] for latents with or without a dimension of frames."""
    return mask.view(mask.shape[0], *[1] * (x.ndim - 3), *mask.shape[-2:])


def _chosen_layers(
    layers: list[AttentionLayer], settings: ControlSettings, height: int, width: int
) -> tuple[dict[LayerKey, AttentionLayer], dict[LayerKey, AttentionLayer], dict[LayerKey, AttentionLayer]]:
    """The layers of controlled cross-attention, of controlled self-attention, and of the local blend."""
    automatic = automatic_factor(layers, height, width)
    grid = settings.self_attention_grid
    smallest = automatic if grid == AUTOMATIC else int(grid)
    cross = {layer.key: layer for layer in layers if layer.attends_to_text}
    with_self = {layer.key: layer for layer in layers if layer.attends_to_itself and layer.downsampling >= smallest}
    return cross, with_self, {key: layer for key, layer in cross.items() if layer.downsampling == automatic}
