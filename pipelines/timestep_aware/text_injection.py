"""Timestep-aware text injection: the source prompt in the first steps, then the edit (Jung et al. 2024, section 4).

Jung et al. 2024 is "Latent Inversion with Timestep-aware Sampling for Training-free Non-rigid Editing" (eq. 5).

A diffusion model determines the layout of an image in its first steps and the details later. The image is therefore
sampled from its inversion with the source prompt's embedding in the first steps, which preserves its structure, and
with the edit's embedding e afterwards:

    C_t = C_src    in the first `ratio` of the steps
    C_t = e        afterwards, e = eta * e_tgt + (1 - eta) * e_opt (eq. 3)

Available in three forms: a CONDITIONING with timestep ranges for any sampler, per-step embeddings on a MODEL for any
sampler and guider, and a sampling function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from .. import engine
from ..inversion.inversion import Inversion, check_deterministic, check_inversion, negative_side, sampling_step
from ..shared.comfy_types import Model
from ..shared.conditioning import Conditioning, single_embedding, with_embedding
from ..shared.errors import IdentityEditError, check_conditioning
from ..shared.input_checks import check_choice, check_number
from ..text.step_embeddings import StepEmbeddings, apply_step_embeddings

RATIO = 0.2
"""Fraction of the steps with the source prompt; 10 to 40% in Jung et al. 2024 (section 5.4, appendix E.1)."""

ETA = 0.7
"""Interpolation weight of eq. 3: the middle of Imagic's range of 0.6 to 0.8 (Kawar et al. 2023, section 4.2)."""

SAMPLERS = ("ddim", "heun")

_BOUNDARY = 0.05
"""Position of the switch between the noise levels of the last source step (1) and the first edit step (0), in log
sigma. Close to the latter, because higher-order samplers evaluate levels in between, which belong to the source."""


@dataclass(frozen=True)
class TimestepAwareEdit:
    """The result of timestep-aware sampling.

    Attributes:
        latent: [B, C, H, W] float32, the edited z_0 in the scale of LATENT sockets.
        source_steps: number of steps with the source prompt.
        evaluations: model calls.
        warning: a sentence if the guidance scale differs from that of the inversion's per-step embeddings, else None.
    """

    latent: torch.Tensor
    source_steps: int
    evaluations: int
    warning: str | None = None


def source_steps(steps: int, ratio: float) -> int:
    """Number of steps that use the source prompt: ratio * steps, rounded to the nearest integer, halves up.

    As in the paper's appendix E.1, "injection ratio 10 % means injecting the source embedding for the first five steps"
    of 50. Robust to floating-point error: 0.29 of 50 steps is 14.5, hence 15.

    Args:
        steps: number of sampling steps.
        ratio: 0 (never the source prompt) to 1 (always).
    """
    check_number(ratio, "ratio", 0.0, 1.0)
    return min(steps, math.floor(ratio * steps + 0.5 + 1e-9))


def edit_conditioning(target: Conditioning, optimized: Conditioning | None, eta: float = ETA) -> Conditioning:
    """e = eta * e_tgt + (1 - eta) * e_opt (Jung et al. 2024, eq. 3) as CONDITIONING, with all options of `target`.

    Args:
        target: the target prompt's CONDITIONING.
        optimized: its embedding after text optimization, or None to return `target`.
        eta: 0 is the optimized embedding (the image), 1 the target prompt's (the edit); other values extrapolate.

    Raises:
        IdentityEditError: when the two embeddings do not match.
    """
    check_conditioning(target, "The target prompt")
    if optimized is None:
        return target
    e_opt, _ = single_embedding(optimized, "The optimized embedding")
    e_tgt, _ = single_embedding(target, "The target prompt")
    if e_tgt.shape[1:] != e_opt.shape[1:]:
        raise IdentityEditError(
            f"The target embedding {tuple(e_tgt.shape)} and the optimized one {tuple(e_opt.shape)} differ in tokens or "
            f"channels; optimize this target prompt with this model."
        )
    return with_embedding(target, eta * e_tgt + (1.0 - eta) * e_opt.to(e_tgt))


def switch_percent(model: Model, sigmas: torch.Tensor, first_edit_step: int) -> float:
    """The percent at which CONDITIONING ranges switch just before step `first_edit_step`.

    ComfyUI maps percents to noise levels and uses an entry at levels within its range, including both ends. To avoid
    steps with two entries or none, the boundary lies strictly between the noise levels of two steps.

    Args:
        model: MODEL, for its `percent_to_sigma`.
        sigmas: [N + 1] descending noise levels of the run.
        first_edit_step: k with 1 <= k <= N - 1; the result is between sigmas[k] and sigmas[k - 1].

    Returns:
        a number between 0 and 1, exclusive.

    Raises:
        IdentityEditError: when the model's noise schedule has no level between the two steps.
    """
    sampling = engine.require(model).sampling
    above, below = float(sigmas[first_edit_step - 1]), float(sigmas[first_edit_step])
    # Percents cover only the levels of the model's schedule; a run may start above or end below them.
    highest, lowest = min(above, float(sampling.sigmas[-1])), max(below, float(sampling.sigmas[0]))
    if lowest < highest:
        boundary = lowest * (highest / lowest) ** _BOUNDARY
        percent = _percent_of_sigma(sampling, boundary)
        if below < float(sampling.percent_to_sigma(percent)) < above:
            return percent
    raise IdentityEditError(
        f"No CONDITIONING range can switch between the sigmas {above:.5g} and {below:.5g} of this model; use "
        f"Timestep-Aware Text Injection (Model), or sigmas within the model's own range."
    )


def injected_conditioning(
    model: Model, sigmas: torch.Tensor, source: Conditioning, edit: Conditioning, ratio: float = RATIO
) -> Conditioning:
    """Eq. 5 as a CONDITIONING with timestep ranges, for any sampler and guider, at no cost.

    Existing ranges of the entries are intersected with the new ones.

    Args:
        model: MODEL used for sampling.
        sigmas: [N + 1] descending noise levels of the run.
        source: the source prompt's CONDITIONING.
        edit: CONDITIONING of e, from `edit_conditioning`.
        ratio: share of the steps with `source`, see `source_steps`.
    """
    check_conditioning(source, "The source prompt")
    check_conditioning(edit, "The target prompt")
    steps = _count_steps(sigmas)
    first_edit_step = source_steps(steps, ratio)
    if first_edit_step == 0:
        return edit
    if first_edit_step == steps:
        return source
    percent = switch_percent(model, sigmas, first_edit_step)
    return _within(source, 0.0, percent) + _within(edit, percent, 1.0)


def injection_table(
    sigmas: torch.Tensor, source: Conditioning, edit: Conditioning, ratio: float = RATIO, repeats_texts: bool = True
) -> StepEmbeddings:
    """Eq. 5 as per-step embeddings, for `apply_step_embeddings(model, table, "positive")`.

    Args:
        sigmas: [N + 1] descending noise levels of the run.
        source: the source prompt's CONDITIONING, one entry.
        edit: CONDITIONING of e, one entry.
        ratio: share of the steps with `source`, see `source_steps`.
        repeats_texts: whether prompts of different lengths are repeated to a common length, as in ComfyUI. This does
            not change a cross-attention; in joint attention each prompt keeps its length.
    """
    steps = _count_steps(sigmas)
    count = source_steps(steps, ratio)
    source_embedding, source_pooled = single_embedding(source, "The source prompt")
    edit_embedding, edit_pooled = single_embedding(edit, "The target prompt")
    batch = max(source_embedding.shape[0], edit_embedding.shape[0])
    lengths = (source_embedding.shape[1], edit_embedding.shape[1])
    tokens = math.lcm(*lengths) if repeats_texts else max(lengths)

    def row(embedding: torch.Tensor) -> torch.Tensor:
        if embedding.shape[0] not in (1, batch):
            raise IdentityEditError(
                f"The source prompt has {source_embedding.shape[0]} embeddings and the target prompt "
                f"{edit_embedding.shape[0]}; give one for all latents, or one for each."
            )
        repeated = embedding.repeat(1, tokens // embedding.shape[1], 1)
        return pad(repeated, (0, 0, 0, tokens - repeated.shape[1])).expand(batch, -1, -1)

    rows = [row(source_embedding)] * count + [row(edit_embedding)] * (steps - count)
    pooled = None
    if source_pooled is not None and edit_pooled is not None:
        sides = [source_pooled.expand(batch, -1)] * count + [edit_pooled.expand(batch, -1)] * (steps - count)
        pooled = torch.stack(sides)
    levels = sigmas.detach().to(device="cpu", dtype=torch.float32).clone()
    return StepEmbeddings(
        sigmas=levels,
        embeddings=torch.stack(rows),
        pooled=pooled,
        lengths=None if repeats_texts else (lengths[0],) * count + (lengths[1],) * (steps - count),
    )


def timestep_aware_sampling(
    model: Model,
    inversion: Inversion,
    source: Conditioning,
    edit: Conditioning,
    negative: Conditioning | None = None,
    ratio: float = RATIO,
    guidance_scale: float = 7.5,
    sampler: str = "ddim",
    callback: engine.Callback | None = None,
) -> TimestepAwareEdit:
    """Sample an inverted image with eq. 5 (Jung et al. 2024, section 4, stage C), on the inversion's schedule.

    Stock samplers with the inversion's latent and sigmas and no added noise give the same result up to the scale
    sqrt(1 + sigma^2) at the last sigma, 1.0004 if the schedule ends at timestep 0 (they return x; this returns z_0).

    Args:
        model: MODEL, the one that made the inversion.
        inversion: inversion of the image; its per-step embeddings, if any, are the negative side.
        source: the source prompt's CONDITIONING.
        edit: CONDITIONING of e, from `edit_conditioning`.
        negative: CONDITIONING of the negative side; not needed with guidance scale 1 or with per-step embeddings.
        ratio: fraction of the steps with the source prompt, 0.1 to 0.4 in the paper.
        guidance_scale: the paper uses 7.5 with null-text inversion and 1 with plain DDIM inversion.
        sampler: "ddim" (Song et al. 2021, eq. 12, eta 0) or "heun" (Karras et al. 2022, algorithm 1), which evaluates
            the network twice a step and chooses the embedding of each evaluation by its noise level.
        callback: progress with preview.
    """
    check_inversion(inversion, model)
    check_deterministic(inversion, "connect one from Noise Inversion or Null-Text Optimization")
    check_choice(sampler, "sampler", SAMPLERS)
    table, steps = inversion.embeddings, inversion.steps
    positive = injected_conditioning(model, inversion.sigmas, source, edit, ratio)
    negative = negative_side(inversion, edit, negative, guidance_scale)
    if table is not None:
        model = apply_step_embeddings(model, table, "negative")

    def loop(evaluator: engine.NetworkEvaluator, x: torch.Tensor) -> TimestepAwareEdit:
        sigmas, path = inversion.sigmas.to(evaluator.device), inversion.noise_path
        for i in range(steps):
            # Eq. 5: the positive side is C_src in the first steps, then e, by its timestep ranges.
            denoised = evaluator.guided(x, sigmas[i], guidance_scale)
            x_next = sampling_step(inversion, i, x, denoised)
            if sampler == "heun" and sigmas[i + 1] > 0:
                # The mean of the slopes at both ends of the step.
                denoised_next = evaluator.guided(x_next, sigmas[i + 1], guidance_scale)
                slope = path.slope(x, denoised, sigmas[i])
                slope_next = path.slope(x_next, denoised_next, sigmas[i + 1])
                x_next = x + (sigmas[i + 1] - sigmas[i]) * (slope + slope_next) / 2
            x = x_next
            evaluator.report(i, denoised, x, steps)
        return TimestepAwareEdit(
            latent=engine.to_socket_scale(model, (x / path.image_scale(sigmas[-1])).cpu()),
            source_steps=source_steps(steps, ratio),
            evaluations=evaluator.evaluations,
            warning=None if table is None else table.guidance_warning(guidance_scale),
        )

    # x_T with the rounding of a LATENT, as for stock samplers. A flow model's inversion leaves as noise.
    is_flow = inversion.noise_path is engine.FLOW
    x_start = inversion.trajectory[0] if is_flow else engine.to_model_scale(model, inversion.start_latent(model))
    return engine.run_loop(model, positive, negative, x_start, inversion.sigmas, loop, callback=callback)


def _count_steps(sigmas: torch.Tensor) -> int:
    if sigmas.ndim != 1 or sigmas.shape[0] < 2:
        raise IdentityEditError(
            "The sigmas contain no step; connect those of Noise Inversion, or a scheduler with at least one step."
        )
    if not bool((sigmas[:-1] > sigmas[1:]).all()):
        raise IdentityEditError("The sigmas do not descend; connect a scheduler's output directly (no FlipSigmas).")
    return int(sigmas.shape[0]) - 1


def _percent_of_sigma(sampling: Any, sigma: float) -> float:
    """The percent that ComfyUI maps to `sigma`, by bisection of `percent_to_sigma`, which decreases."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if float(sampling.percent_to_sigma(middle)) > sigma:
            low = middle
        else:
            high = middle
    return high


def _within(conditioning: Conditioning, start: float, end: float) -> Conditioning:
    """The entries restricted to a range of percents, without entries outside it."""
    result: Conditioning = []
    for embedding, options in conditioning:
        own_start = max(start, float(options.get("start_percent", 0.0)))
        own_end = min(end, float(options.get("end_percent", 1.0)))
        if own_start < own_end:
            result.append([embedding, {**options, "start_percent": own_start, "end_percent": own_end}])
    return result
