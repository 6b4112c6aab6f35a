"""The unconditional embedding of a guided sampling step, optimized so that the step arrives where it should.

Null-text optimization (Mokady et al. 2023, algorithm 1) and reference guidance (Wang et al. 2023, algorithm 2) do this
at each of their steps. They differ in the loss and in when a latent stops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import engine
from ..shared.errors import IdentityEditError
from ..shared.gradients import gradients_by_sample

_LARGEST_CHANGE_OF_LENGTH = 4.0


@dataclass(frozen=True)
class Evaluation:
    """A guided step with some embeddings.

    Attributes:
        unconditional: the network's estimate of z_0 with them [B, C, H, W].
        denoised: the guided estimate of z_0 [B, C, H, W].
        x_next: the latent after the step [B, C, H, W].
        residual: how far it is from the target, in the papers' scale [B, C, H, W].
        loss: [B].
    """

    unconditional: torch.Tensor
    denoised: torch.Tensor
    x_next: torch.Tensor
    residual: torch.Tensor
    loss: torch.Tensor


@dataclass(frozen=True)
class GuidedStep:
    """A guided DDIM step from x at `sigma` toward `target` at `sigma_next`: all but the unconditional embedding.

    Attributes:
        conditional: the estimate of z_0 with the prompt, which does not depend on that embedding.
        loss: residual [B, C, H, W] -> [B].
        progress, progress_total: what the callback has counted so far, and counts to.
    """

    evaluator: engine.NetworkEvaluator
    noise: engine.NoisePath
    x: torch.Tensor
    sigma: torch.Tensor
    sigma_next: torch.Tensor
    target: torch.Tensor
    conditional: torch.Tensor
    guidance_scale: float
    loss: Callable[[torch.Tensor], torch.Tensor]
    progress: int
    progress_total: int

    def evaluate(self, phi: torch.Tensor | None) -> Evaluation:
        """One model call, with embeddings [B, T, C] or with the negative side's own."""
        unconditional = self.evaluator.denoised(self.x, self.sigma, "negative", phi)
        denoised = self.evaluator.combine(self.conditional, unconditional, self.x, self.sigma, self.guidance_scale)
        x_next = self.noise.step(self.x, denoised, self.sigma, self.sigma_next)
        residual = (x_next - self.target) / self.noise.scale(self.sigma_next)
        return Evaluation(unconditional, denoised, x_next, residual, self.loss(residual))

    def report(self, j: int, denoised: torch.Tensor) -> None:
        """Show that inner step j is done."""
        self.evaluator.report(self.progress + j, denoised, self.x, self.progress_total)


@dataclass(frozen=True)
class OptimizedStep:
    """What was found at a step, on the CPU.

    Attributes:
        phi: the embeddings [B, T, C].
        losses: [J', B] of each latent before each of J' updates; NaN where it had already stopped.
        final_loss: [B] with the embeddings.
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
) -> tuple[Evaluation, OptimizedStep]:
    """Updates of the embeddings by Adam, which begins anew, and the step with what they have become.

    Latents are independent. One stops when its loss is below the limit; where all have stopped, the evaluation that
    showed this is the step that is taken.

    Args:
        step: the step.
        phi: where the embeddings begin [B, T, C].
        updates: at most.
        learning_rate: Adam's.
        stop_below: limit of the loss.
        stop_after_update: a latent's last update is the one whose loss was below the limit, not the one before; the
            step is then evaluated once more.
        lengths: [B], adapts the length of the updates, relative to Adam's own; changed in place, for the next step.
            After an update, the next ones take the length that would have been the best along it, see
            `change_of_length`.

    Returns:
        the step without gradients, and what was found.
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
            taken = step.evaluate(torch.cat(variables))
        loss = taken.loss.detach().cpu()
        below = running & (loss < stop_below)
        if lengths is not None and before is not None:
            lengths.copy_(torch.where(running, lengths * change_of_length(before, taken.residual), lengths))
        if not stop_after_update:
            converged |= below
            running = running & (loss >= stop_below)
        if not with_gradient or not bool(running.any()):
            break
        if lengths is not None:
            for group, length in zip(adam.param_groups, lengths.tolist(), strict=True):
                group["lr"] = learning_rate * length
        gradients = gradients_by_sample((taken.loss * running.to(taken.loss)).sum(), taken.unconditional, variables)
        for variable, gradient, runs in zip(variables, gradients, running.tolist(), strict=True):
            variable.grad = gradient if runs else None  # Adam skips what has no gradient
        adam.step()
        losses.append(torch.where(running, loss, torch.nan))
        step.report(j, taken.denoised)
        before = taken.residual.detach()
        if stop_after_update:
            converged |= below
            running = running & ~below
    found = OptimizedStep(
        phi=torch.cat(variables).detach().to(device="cpu", copy=True),
        losses=torch.stack(losses) if losses else torch.empty(0, len(variables)),
        final_loss=loss,
        converged=converged | (loss < stop_below),
    )
    return Evaluation(**{name: value.detach() for name, value in vars(taken).items()}), found


def change_of_length(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """By what the length of an update should have been multiplied, [B] on the CPU.

    The residual r is nearly linear in phi: after an update from r_0 to r_1, the best length along it would have been
    <r_0, r_0 - r_1> / |r_0 - r_1|^2 times its own (the secant step of a line search, at no evaluation of its own). At
    most a factor of 4, and 1 where nothing has changed.

    Args:
        before, after: r_0 and r_1 [B, C, H, W].
    """
    before, after = before.flatten(1), after.detach().flatten(1)
    change = before - after
    best = (before * change).sum(dim=1) / change.square().sum(dim=1)
    best = best.clamp(1 / _LARGEST_CHANGE_OF_LENGTH, _LARGEST_CHANGE_OF_LENGTH).cpu()
    return torch.where(best.isfinite(), best, torch.ones_like(best))


def check_range(loss: torch.Tensor, step: int, what: str) -> None:
    """Raise `IdentityEditError` where a loss [B] after step `step`, counted from 0, is no number."""
    if not bool(torch.isfinite(loss).all()):
        raise IdentityEditError(
            f"{what} left the range of numbers at step {step + 1}; lower the guidance scale or the learning rate, or "
            f"start ComfyUI with --bf16-unet or --fp32-unet."
        )
