"""Null-text inversion for editing real images (Mokady et al. 2023).

DDIM inversion with guidance scale 1 is nearly exact, but sampling from it with the guidance needed for editing drifts
away from the image. Null-text inversion uses the trajectory as a pivot and optimizes the embedding of the empty prompt
at each step so that guided sampling stays on it. Defaults are those of the authors' reference implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import engine
from ..shared.comfy_types import Model
from ..shared.conditioning import Conditioning, single_embedding
from ..shared.errors import check_batch_matches
from ..shared.input_checks import check_choice
from ..text.step_embeddings import StepEmbeddings, constant_embedding
from .inversion import Inversion, check_deterministic, check_inversion
from .unconditional_embedding import GuidedStep, OptimizedStep, check_optimization, check_range, optimize

GUIDANCE_SCALE = 7.5
INNER_STEPS = 10
ADAPTIVE_INNER_STEPS = 4
LEARNING_RATE = 1e-2
EARLY_STOP = 1e-5
EARLY_STOP_PER_STEP = 2e-5
AUTOMATIC, PAPER, ADAPTIVE = "automatic", "paper", "adaptive"
METHODS = (PAPER, ADAPTIVE)
DEFAULT_INNER_STEPS = {PAPER: INNER_STEPS, ADAPTIVE: ADAPTIVE_INNER_STEPS}


@dataclass(frozen=True)
class NullText:
    """The result of null-text optimization.

    Attributes:
        embeddings: one unconditional embedding phi_t per step.
        losses: for each step [J', B], the loss of each latent before each update; NaN after the latent has stopped. In
            the papers' scale (z, not x), so that values are comparable across schedules.
        inner_steps: [N, B] int64, number of updates.
        final_losses: [N, B] float32, loss of the sampled latent against the pivot after each step.
        converged: [N, B] bool, whether a loss fell below the step's threshold.
        reconstruction: [B, C, H, W] float32, z_0 of guided sampling with them, in the scale of LATENT sockets.
        evaluations: model calls, not counting backward passes.
        warning: a sentence if some steps did not converge, else None.
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
    model: Model,
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

    Latents of a batch are independent: each has its own embedding and stopping condition.

    Args:
        model: MODEL, the one that made the inversion.
        inversion: the pivot, from `inversion.invert_image` with guidance scale 1.
        positive: CONDITIONING of the source prompt, as in the inversion; one entry for all latents or one for each.
        negative: CONDITIONING of the empty prompt, the initial embedding. One entry.
        guidance_scale: w > 1, the guidance scale for editing. 7.5 in the paper.
        inner_steps: maximum updates per step (N in the paper). None uses the method's default: 10 for "paper", 4 for
            "adaptive" (see benchmarks/null_text_speed.py). 0 samples with the initial embedding.
        learning_rate: Adam's learning rate at the first step; it decays by 1% of its initial value per step. 0.01 in
            the reference.
        early_stop: a latent stops after the update whose loss was below early_stop + i * 2e-5. 1e-5 in the reference.
        method: "paper" reproduces the reference implementation exactly. "adaptive" needs fewer updates: a latent stops
            before the next update, not after it, and the step size adapts, see `unconditional_embedding.optimize`.
        checkpointing: trade time for memory, see `engine.gradient_context`.
        callback: progress with preview.

    Raises:
        IdentityEditError: when an input cannot be used or the optimization diverges (NaN/Inf).
    """
    needed = engine.Capability.GRADIENTS, engine.Capability.TRUE_GUIDANCE, engine.Capability.ONE_TEXT
    engine.require(model, *needed)
    check_inversion(inversion, model)
    check_deterministic(inversion, "connect one from Noise Inversion")
    check_choice(method, "method", METHODS)
    if inner_steps is None:
        inner_steps = DEFAULT_INNER_STEPS[method]
    check_optimization(guidance_scale, inner_steps, learning_rate, ", or sample without null-text optimization")
    null_embedding, pooled = single_embedding(negative, "The negative conditioning")
    batch, steps = inversion.batch, inversion.steps
    check_batch_matches(null_embedding.shape[0], batch, "The negative conditioning")

    def loop(evaluator: engine.NetworkEvaluator, x: torch.Tensor) -> NullText:
        pivot = inversion.trajectory.clone().to(evaluator.device)
        sigmas = inversion.sigmas.clone().to(evaluator.device)
        phi = null_embedding.clone().to(evaluator.device).expand(batch, -1, -1)
        lengths = torch.ones(batch) if method == ADAPTIVE else None  # of updates, relative to the paper's
        optimized_steps: list[OptimizedStep] = []

        # Algorithm 1. The paper counts t = T, ..., 1; here i = 0, ..., N - 1, pivot[i] is its z*_t, and z_bar_T = z*_T.
        for i in range(steps):
            with torch.no_grad():  # once a step: it does not depend on phi
                conditional = evaluator.denoised(x, sigmas[i], "positive")
            step = GuidedStep(
                evaluator, inversion, i, x, pivot[i + 1], conditional, guidance_scale,
                loss=lambda residual: residual.flatten(1).square().mean(dim=1),
                progress=i * (inner_steps + 1), progress_total=steps * (inner_steps + 1),
            )  # fmt: skip
            # Eq. 3: minimize | z*_{t-1} - z_{t-1}(z_bar_t, phi, C) |^2, where phi_t begins as phi_{t+1}.
            evaluation, optimized = optimize(
                step,
                phi,
                inner_steps,
                learning_rate_at(i, learning_rate),
                stop_below=early_stop + i * EARLY_STOP_PER_STEP,
                stop_after_update=method == PAPER,
                lengths=lengths,
            )
            check_range(optimized.final_loss, i, "Null-text optimization")
            x = evaluation.x_next  # z_bar_{t-1} = z_{t-1}(z_bar_t, phi_t, C)
            phi = optimized.phi.to(evaluator.device)
            optimized_steps.append(optimized)
            step.report(inner_steps, evaluation.denoised)

        embeddings = StepEmbeddings(
            sigmas=inversion.sigmas.clone(),
            embeddings=torch.stack([each.phi for each in optimized_steps]),
            pooled=None if pooled is None else pooled.expand(batch, -1).unsqueeze(0),
            guidance_scale=float(guidance_scale),
        )
        z_0 = engine.to_socket_scale(model, (x / inversion.noise_path.image_scale(sigmas[-1])).cpu())
        return _result(embeddings, optimized_steps, z_0, evaluator.evaluations)

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


def method_for(model: Model, method: str) -> str:
    """PAPER or ADAPTIVE where `method` is AUTOMATIC, else `method`.

    On flow models the reference's learning rate moves the embeddings too little; the adaptive step size needs no value
    of its own.
    """
    if method != AUTOMATIC:
        return method
    return ADAPTIVE if engine.Capability.VELOCITY in engine.require(model).capabilities else PAPER


def learning_rate_at(i: int, first: float) -> float:
    """The reference's learning rate at step i, first * (1 - i / 100), with a minimum of first / 100 because it would
    become negative after 100 steps."""
    return first * max(1.0 - i / 100.0, 0.01)


def negative_prompt_inversion(inversion: Inversion, positive: Conditioning) -> StepEmbeddings:
    """Negative-prompt inversion (Miyake et al. 2023): the source prompt itself as the unconditional embedding.

    No optimization is needed: with phi = C both sides of the guidance are equal, so sampling with the source prompt
    follows the inversion's trajectory as closely as DDIM does, at any guidance scale.

    Args:
        inversion: inversion with the noise levels to use.
        positive: CONDITIONING of the source prompt, one entry.
    """
    embedding, pooled = single_embedding(positive, "The source prompt")
    check_batch_matches(embedding.shape[0], inversion.batch, "The source prompt")
    return constant_embedding(inversion.sigmas, embedding, pooled)


def _result(
    embeddings: StepEmbeddings, optimized_steps: list[OptimizedStep], z_0: torch.Tensor, evaluations: int
) -> NullText:
    losses = [each.losses for each in optimized_steps]
    final_losses = torch.stack([each.final_loss for each in optimized_steps])
    converged = torch.stack([each.converged for each in optimized_steps])
    inner_steps = torch.stack([(~rows.isnan()).sum(dim=0) for rows in losses])
    warning = None
    if missed := int((~converged).any(dim=1).sum()):
        worst = int(final_losses.amax(dim=1).argmax())
        warning = (
            f"Null-text optimization did not converge at {missed} of {converged.shape[0]} steps (largest loss "
            f"{float(final_losses[worst].max()):.1e} at step {worst + 1}); if the "
            f"reconstruction differs from the image, raise inner_steps or lower the guidance scale."
        )
    return NullText(embeddings, losses, inner_steps, final_losses, converged, z_0, evaluations, warning)
