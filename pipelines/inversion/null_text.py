"""Null-text inversion for editing real images (Mokady et al. 2023).

DDIM inversion with guidance scale 1 is nearly exact, but sampling it back with the guidance that editing needs drifts
away. Null-text inversion keeps the inversion's trajectory as pivot and optimizes, step by step, the embedding of the
empty prompt so that guided sampling stays on it. Defaults are those of the authors' reference implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import engine
from ..shared.conditioning import Conditioning, single_embedding
from ..shared.errors import IdentityEditError, check_batch_matches
from ..text.step_embeddings import StepEmbeddings, constant_embedding
from .inversion import DDIM, Inversion, check_inversion, check_method
from .unconditional_embedding import GuidedStep, OptimizedStep, check_range, optimize

GUIDANCE_SCALE = 7.5
INNER_STEPS = 10
ADAPTIVE_INNER_STEPS = 4
LEARNING_RATE = 1e-2
EARLY_STOP = 1e-5
EARLY_STOP_PER_STEP = 2e-5
PAPER, ADAPTIVE = "paper", "adaptive"
METHODS = (PAPER, ADAPTIVE)
DEFAULT_INNER_STEPS = {PAPER: INNER_STEPS, ADAPTIVE: ADAPTIVE_INNER_STEPS}


@dataclass(frozen=True)
class NullText:
    """What null-text optimization found.

    Attributes:
        embeddings: one unconditional embedding a step, phi_t.
        losses: for each step, for each inner step, the loss of each latent before that update; NaN where the latent had
            already stopped. In the papers' scale (z, not x), so that values compare across schedules.
        inner_steps: [N, B] int64, updates made.
        final_losses: [N, B] float32, distance of the sampled latent from the pivot after each step.
        converged: [N, B] bool, whether a loss fell below the step's threshold.
        reconstruction: [B, C, H, W] float32, z_0 of guided sampling with them, in the scale of LATENT sockets.
        evaluations: model calls without their backward passes.
        warning: one sentence where some steps did not converge, else None.
    """

    embeddings: StepEmbeddings
    losses: list[torch.Tensor]
    inner_steps: torch.Tensor
    final_losses: torch.Tensor
    converged: torch.Tensor
    reconstruction: torch.Tensor
    evaluations: int
    warning: str | None


def null_text_optimization(
    model: Any,
    inversion: Inversion,
    positive: Conditioning,
    negative: Conditioning,
    guidance_scale: float = GUIDANCE_SCALE,
    inner_steps: int | None = None,
    learning_rate: float = LEARNING_RATE,
    early_stop: float = EARLY_STOP,
    method: str = PAPER,
    checkpointing: bool = False,
    callback: engine.Callback | None = None,
) -> NullText:
    """Optimize the unconditional embedding of every step (Mokady et al. 2023, algorithm 1).

    Latents of a batch are independent: each has its own embedding and stops by itself, as if it were alone.

    Args:
        model: MODEL, the one that made the inversion.
        inversion: the pivot, from `inversion.ddim_inversion` with guidance scale 1.
        positive: CONDITIONING of the source prompt, as in the inversion; one entry for all latents or one for each.
        negative: CONDITIONING of the empty prompt; where the embedding starts. One entry.
        guidance_scale: w > 1, that of editing. 7.5 in the paper.
        inner_steps: updates a step at most (N in the paper); None is 10 for the paper's method as there, and 4 for the
            adaptive one (see benchmarks/null_text_speed.py). 0 samples with the embedding as it is.
        learning_rate: Adam's at the first step; it falls linearly, by 1/100 of it each step. 0.01 in the reference.
        early_stop: a latent's step ends with the update whose loss was below early_stop + i * 2e-5. 1e-5 in the
            reference.
        method: "paper" repeats the reference implementation update by update. "adaptive" does without what it can: a
            latent stops before another update, not after it, and the length of the updates adapts, see
            `unconditional_embedding.optimize`.
        checkpointing: spend time to save memory, see `engine.gradient_context`.
        callback: progress with preview.

    Returns:
        embeddings, losses and the reconstruction, see `NullText`.

    Raises:
        IdentityEditError: when an input cannot be used or the optimization leaves the range of numbers.
    """
    check_inversion(inversion, model)
    check_method(inversion, DDIM, "connect one from DDIM Inversion")
    if method not in METHODS:
        raise IdentityEditError(f"The method {method!r} does not exist; choose one of {', '.join(METHODS)}.")
    if inner_steps is None:
        inner_steps = DEFAULT_INNER_STEPS[method]
    if guidance_scale <= 1.0:
        raise IdentityEditError(
            f"The guidance scale is {guidance_scale:g}, with which the unconditional embedding has no effect; choose a "
            f"value above 1 (7.5), or sample without null-text optimization."
        )
    if inner_steps < 0 or learning_rate <= 0.0:
        raise IdentityEditError(
            f"inner_steps is {inner_steps} and learning_rate {learning_rate:g}; choose 0 or more and a value above 0."
        )
    null_embedding, pooled = single_embedding(negative, "The negative conditioning")
    batch, steps = inversion.batch, inversion.steps
    check_batch_matches(null_embedding.shape[0], batch, "The negative conditioning")

    def loop(evaluator: engine.NetworkEvaluator, x: torch.Tensor) -> NullText:
        pivot = inversion.trajectory.clone().to(evaluator.device)
        sigmas = inversion.sigmas.clone().to(evaluator.device)
        phi = null_embedding.clone().to(evaluator.device).expand(batch, -1, -1)
        lengths = torch.ones(batch) if method == ADAPTIVE else None  # of updates, relative to the paper's
        found: list[OptimizedStep] = []

        # Algorithm 1. The paper counts t = T, ..., 1; here i = 0, ..., N - 1, pivot[i] is its z*_t, and z_bar_T = z*_T.
        for i in range(steps):
            with torch.no_grad():  # once a step: it does not depend on phi
                conditional = evaluator.denoised(x, sigmas[i], "positive")
            step = GuidedStep(
                evaluator, inversion.noise, x, sigmas[i], sigmas[i + 1], pivot[i + 1], conditional, guidance_scale,
                loss=lambda residual: residual.flatten(1).square().mean(dim=1),
                progress=i * (inner_steps + 1), progress_total=steps * (inner_steps + 1),
            )  # fmt: skip
            # Eq. 3: minimize | z*_{t-1} - z_{t-1}(z_bar_t, phi, C) |^2, where phi_t begins as phi_{t+1}.
            taken, optimized = optimize(
                step,
                phi,
                inner_steps,
                learning_rate_at(i, learning_rate),
                stop_below=early_stop + i * EARLY_STOP_PER_STEP,
                stop_after_update=method == PAPER,
                lengths=lengths,
            )
            check_range(optimized.final_loss, i, "Null-text optimization")
            x = taken.x_next  # z_bar_{t-1} = z_{t-1}(z_bar_t, phi_t, C)
            phi = optimized.phi.to(evaluator.device)
            found.append(optimized)
            step.report(inner_steps, taken.denoised)

        final_losses = torch.stack([each.final_loss for each in found])
        converged = torch.stack([each.converged for each in found])
        return NullText(
            embeddings=StepEmbeddings(
                sigmas=inversion.sigmas.clone(),
                embeddings=torch.stack([each.phi for each in found]),
                pooled=None if pooled is None else pooled.expand(batch, -1).unsqueeze(0),
                guidance_scale=float(guidance_scale),
            ),
            losses=[each.losses for each in found],
            inner_steps=torch.stack([(~each.losses.isnan()).sum(dim=0) for each in found]),
            final_losses=final_losses,
            converged=converged,
            reconstruction=engine.to_socket_scale(model, (x / inversion.noise.scale(sigmas[-1])).cpu()),
            evaluations=evaluator.evaluations,
            warning=_convergence_warning(converged, final_losses),
        )

    return engine.run_loop(
        model,
        positive,
        negative,
        inversion.trajectory[0],
        inversion.sigmas,
        loop,
        gradients=True,
        checkpointing=checkpointing,
        callback=callback,
    )


def learning_rate_at(i: int, first: float) -> float:
    """The reference's learning rate at step i, first * (1 - i / 100), which would turn negative after 100 steps and
    therefore stays at a hundredth of the first."""
    return first * max(1.0 - i / 100.0, 0.01)


def negative_prompt_inversion(inversion: Inversion, positive: Conditioning) -> StepEmbeddings:
    """Negative-prompt inversion (Miyake et al. 2023): the source prompt itself as the unconditional embedding.

    No optimization: with phi = C both sides of the guidance agree, so sampling with the source prompt stays on the
    inversion's trajectory as far as DDIM does, at any guidance scale.

    Args:
        inversion: gives the noise levels.
        positive: CONDITIONING of the source prompt, one entry.
    """
    embedding, pooled = single_embedding(positive, "The source prompt")
    check_batch_matches(embedding.shape[0], inversion.batch, "The source prompt")
    return constant_embedding(inversion.sigmas, embedding, pooled)


def _convergence_warning(converged: torch.Tensor, final_losses: torch.Tensor) -> str | None:
    missed = int((~converged).any(dim=1).sum())
    if missed == 0:
        return None
    worst = int(final_losses.amax(dim=1).argmax())
    return (
        f"Null-text optimization did not converge at {missed} of {converged.shape[0]} steps (largest loss "
        f"{float(final_losses[worst].max()):.1e} at step {worst + 1}); look at the reconstruction, and raise "
        f"inner_steps or lower the guidance scale where it differs from the image."
    )
