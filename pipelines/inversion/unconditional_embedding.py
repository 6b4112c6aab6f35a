"""Optimization of the unconditional embedding of a guided sampling step toward a target latent.

Null-text optimization (Mokady et al. 2023, algorithm 1) and reference guidance (Wang et al. 2023, algorithm 2) both use
it; they differ in the loss and the stopping condition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import engine
from ..shared.errors import IdentityEditError
from ..shared.gradients import gradients_by_sample
from ..shared.input_checks import check_above_zero, check_number
from .inversion import Inversion, sampling_step

_LARGEST_CHANGE_OF_LENGTH = 4.0


@dataclass(frozen=True)
class Evaluation:
    """A guided step with particular unconditional embeddings.

    Attributes:
        unconditional: the unconditional estimate of z_0 [B, C, H, W].
        denoised: the guided estimate of z_0 [B, C, H, W].
        x_next: the latent after the step [B, C, H, W].
        residual: its difference from the target, in the papers' scale, inside the mask [B, C, H, W].
        loss: [B].
    """

    unconditional: torch.Tensor
    denoised: torch.Tensor
    x_next: torch.Tensor
    residual: torch.Tensor
    loss: torch.Tensor


@dataclass(frozen=True)
class GuidedStep:
    """Step `index` of an inversion's sampling from x toward `target`, except for the unconditional embedding.

    Attributes:
        conditional: the conditional estimate of z_0, which does not depend on that embedding.
        loss: residual [B, C, H, W] -> [B].
        progress, progress_total: progress count at the start of this step, and in total.
        mask: where the step is compared with the target, 1 or True; broadcasts to x.
    """

    evaluator: engine.NetworkEvaluator
    inversion: Inversion
    index: int
    x: torch.Tensor
    target: torch.Tensor
    conditional: torch.Tensor
    guidance_scale: float
    loss: Callable[[torch.Tensor], torch.Tensor]
    progress: int
    progress_total: int
    mask: torch.Tensor | float = 1.0

    def evaluate(self, phi: torch.Tensor | None) -> Evaluation:
        """One model call, with embeddings [B, T, C], or with those of the negative side."""
        sigma, sigma_next = self.inversion.levels(self.index, self.x)
        unconditional = self.evaluator.denoised(self.x, sigma, "negative", phi)
        denoised = self.evaluator.combine(self.conditional, unconditional, self.x, sigma, self.guidance_scale)
        x_next = sampling_step(self.inversion, self.index, self.x, denoised)
        residual = self.mask * ((x_next - self.target) / self.inversion.noise_path.scale(sigma_next))
        return Evaluation(unconditional, denoised, x_next, residual, self.loss(residual))

    def report(self, j: int, denoised: torch.Tensor) -> None:
        """Report inner step j as done."""
        self.evaluator.report(self.progress + j, denoised, self.x, self.progress_total)


@dataclass(frozen=True)
class OptimizedStep:
    """The result of optimizing one step, on the CPU.

    Attributes:
        phi: the embeddings [B, T, C].
        losses: [J', B], loss of each latent before each of J' updates; NaN after it has stopped.
        final_loss: [B], loss with the final embeddings.
        converged: [B] bool, whether a loss was below the limit.
    """

    phi: torch.Tensor
    losses: torch.Tensor
    final_loss: torch.Tensor
    converged: torch.Tensor


def optimize(
    step: GuidedStep,
    phi: torch.Tensor,
    updates: int,
    learning_rate: float,
    stop_below: float,
    *,
    stop_after_update: bool = False,
    lengths: torch.Tensor | None = None,
    longest: float = math.inf,
) -> tuple[Evaluation, OptimizedStep]:
    """Optimize the embeddings with a fresh Adam optimizer, and evaluate the step with the result.

    Latents are independent. A latent stops when its loss is below the limit; once all have stopped, the last evaluation
    is used as the step.

    Args:
        step: the step.
        phi: initial embeddings [B, T, C].
        updates: maximum number of updates.
        learning_rate: Adam's learning rate.
        stop_below: limit of the loss.
        stop_after_update: make one more update after the loss has fallen below the limit; the step is then evaluated
            again.
        lengths: [B], adaptive step sizes relative to Adam's; updated in place for the next step. After each update they
            are set to the step size that would have been optimal, see `change_of_length`.
        longest: their maximum.

    Returns:
        the evaluated step without gradients, and the optimized embeddings.
    """
    variables = [p.detach().clone().requires_grad_(True) for p in phi.split(1)]
    adam = torch.optim.Adam([{"params": [p]} for p in variables], lr=learning_rate)
    running = torch.ones(len(variables), dtype=torch.bool)
    converged = torch.zeros_like(running)
    losses: list[torch.Tensor] = []
    before: torch.Tensor | None = None
    for j in range(updates + 1):
        with_gradient = j < updates and bool(running.any())
        with torch.set_grad_enabled(with_gradient):
            evaluation = step.evaluate(torch.cat(variables))
        loss = evaluation.loss.detach().cpu()
        below = running & (loss < stop_below)
        if lengths is not None and before is not None:
            changed = (lengths * change_of_length(before, evaluation.residual)).clamp(max=longest)
            lengths.copy_(torch.where(running, changed, lengths))
        if not stop_after_update:
            converged |= below
            running = running & (loss >= stop_below)
        if not with_gradient or not bool(running.any()):
            break
        if lengths is not None:
            for group, length in zip(adam.param_groups, lengths.tolist(), strict=True):
                group["lr"] = learning_rate * length
        total = (evaluation.loss * running.to(evaluation.loss)).sum()
        gradients = gradients_by_sample(total, evaluation.unconditional, variables)
        for variable, gradient, runs in zip(variables, gradients, running.tolist(), strict=True):
            variable.grad = gradient if runs else None  # Adam skips parameters without a gradient
        adam.step()
        losses.append(torch.where(running, loss, torch.nan))
        step.report(j, evaluation.denoised)
        before = evaluation.residual.detach()
        if stop_after_update:
            converged |= below
            running = running & ~below
    optimized = OptimizedStep(
        phi=torch.cat(variables).detach().to(device="cpu", copy=True),
        losses=torch.stack(losses) if losses else torch.empty(0, len(variables)),
        final_loss=loss,
        converged=converged | (loss < stop_below),
    )
    return Evaluation(**{name: value.detach() for name, value in vars(evaluation).items()}), optimized


def change_of_length(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The factor by which an update's step size should have been multiplied, [B] on the CPU.

    The residual r is nearly linear in phi: after an update from r_0 to r_1, the optimal step size would have been
    <r_0, r_0 - r_1> / |r_0 - r_1|^2 times as large (the secant step of a line search, without an additional model
    call). Limited to a factor of 4 either way; 1 if nothing has changed.

    Args:
        before, after: r_0 and r_1 [B, C, H, W].
    """
    before, after = before.flatten(1), after.detach().flatten(1)
    change = before - after
    best = (before * change).sum(dim=1) / change.square().sum(dim=1)
    best = best.clamp(1 / _LARGEST_CHANGE_OF_LENGTH, _LARGEST_CHANGE_OF_LENGTH).cpu()
    return torch.where(best.isfinite(), best, torch.ones_like(best))


def check_optimization(guidance_scale: float, inner_steps: int, learning_rate: float, otherwise: str = "") -> None:
    """Raise `IdentityEditError` for unusable settings; `otherwise` ends the remedy for a guidance scale up to 1."""
    if guidance_scale <= 1.0:
        raise IdentityEditError(
            f"The guidance scale is {guidance_scale:g}, at which the unconditional embedding has no effect; choose a "
            f"value above 1 (7.5){otherwise}."
        )
    check_number(inner_steps, "inner_steps", 0, None)
    check_above_zero(learning_rate, "learning_rate")


def check_range(loss: torch.Tensor, step: int, what: str) -> None:
    """Raise `IdentityEditError` if a loss [B] after step `step` (from 0) is NaN or infinite."""
    if not bool(torch.isfinite(loss).all()):
        raise IdentityEditError(
            f"{what} diverged (NaN or infinite values) at step {step + 1}; lower the guidance scale or the learning "
            f"rate, or start ComfyUI with --bf16-unet or --fp32-unet."
        )
