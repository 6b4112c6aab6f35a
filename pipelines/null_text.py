"""Null-text inversion for editing real images (Mokady et al. 2023).

DDIM inversion with guidance scale 1 is nearly exact, but sampling it back with the guidance that editing needs drifts
away. Null-text inversion keeps the inversion's trajectory as pivot and optimises, step by step, the embedding of the
empty prompt so that guided sampling stays on it. Defaults are those of the authors' reference implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import engine
from .conditioning import Conditioning, single_embedding
from .errors import IdentityEditError, check_batch_matches
from .gradients import gradients_by_sample
from .inversion import DDIM, Inversion, check_inversion, check_method
from .step_embeddings import StepEmbeddings, constant_embedding

GUIDANCE_SCALE = 7.5
INNER_STEPS = 10
ADAPTIVE_INNER_STEPS = 4
LEARNING_RATE = 1e-2
EARLY_STOP = 1e-5
EARLY_STOP_PER_STEP = 2e-5
PAPER, ADAPTIVE = "paper", "adaptive"
METHODS = (PAPER, ADAPTIVE)
DEFAULT_INNER_STEPS = {PAPER: INNER_STEPS, ADAPTIVE: ADAPTIVE_INNER_STEPS}
_LARGEST_CHANGE_OF_LENGTH = 4.0


@dataclass(frozen=True)
class NullText:
    """What null-text optimisation found.

    Attributes:
        embeddings: one unconditional embedding a step, phi_t.
        losses: for each step, for each inner step, the loss of each latent before that update; NaN where the latent had
            already stopped. In the papers' scale (z, not x), so that values compare across schedules.
        inner_steps: [N, B] int64, updates made.
        final_losses: [N, B] float32, distance of the sampled latent from the pivot after each step.
        converged: [N, B] bool, whether a loss fell below the step's threshold.
        reconstruction: [B, C, H, W] float32, z_0 of guided sampling with them, in the scale of LATENT sockets.
        evaluations: network evaluations without their backward passes.
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
    """Optimise the unconditional embedding of every step (Mokady et al. 2023, algorithm 1).

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
        method: "paper" repeats the reference implementation update by update. "adaptive" does without what it can:
            see `_optimise_adaptively`.
        checkpointing: spend time to save memory, see `engine.gradient_context`.
        callback: progress with preview.

    Returns:
        embeddings, losses and the reconstruction, see `NullText`.

    Raises:
        IdentityEditError: when an input cannot be used or the optimisation leaves the range of numbers.
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
            f"value above 1 (7.5), or sample without null-text optimisation."
        )
    if inner_steps < 0 or learning_rate <= 0.0:
        raise IdentityEditError(
            f"inner_steps is {inner_steps} and learning_rate {learning_rate:g}; choose 0 or more and a value above 0."
        )
    null_embedding, pooled = single_embedding(negative, "The negative conditioning")
    batch, steps = inversion.batch, inversion.steps
    check_batch_matches(null_embedding.shape[0], batch, "The negative conditioning")
    progress_total = steps * (inner_steps + 1)

    def loop(evaluator: engine.NetworkEvaluator, x: torch.Tensor) -> NullText:
        pivot = inversion.trajectory.clone().to(evaluator.device)
        sigmas = inversion.sigmas.clone().to(evaluator.device)
        phi = list(null_embedding.clone().to(evaluator.device).expand(batch, -1, -1).split(1))
        lengths = torch.ones(batch)  # of the adaptive method's updates, relative to the paper's
        record = _Record(batch)

        # Algorithm 1. The paper counts t = T, ..., 1; here i = 0, ..., N - 1, pivot[i] is its z*_t, and z_bar_T = z*_T.
        for i in range(steps):
            threshold = early_stop + i * EARLY_STOP_PER_STEP
            record.begin_step(threshold)
            phi = [p.detach().clone().requires_grad_(True) for p in phi]  # phi_t begins as phi_{t+1}
            optimizer = torch.optim.Adam([{"params": [p]} for p in phi], lr=learning_rate_at(i, learning_rate))
            with torch.no_grad():  # once a step: it does not depend on phi
                conditional = evaluator.denoised(x, sigmas[i], "positive")
            step = _Step(
                evaluator, inversion.noise, x, sigmas[i], sigmas[i + 1], pivot[i + 1], conditional, guidance_scale,
                progress=i * (inner_steps + 1), progress_total=progress_total,
            )  # fmt: skip

            # Eq. 3: minimise | z*_{t-1} - z_{t-1}(z_bar_t, phi, C) |^2
            if method == ADAPTIVE:
                taken = _optimise_adaptively(step, phi, optimizer, lengths, record, inner_steps)
            else:
                taken = _optimise_as_in_the_paper(step, phi, optimizer, record, inner_steps)

            x = taken.x_next.detach()  # z_bar_{t-1} = z_{t-1}(z_bar_t, phi_t, C)
            record.end_step(taken.loss, phi)
            step.report(inner_steps, taken)
        table = record.table(inversion.sigmas, pooled, guidance_scale)
        z_0 = engine.to_socket_scale(model, (x / inversion.noise.scale(sigmas[-1])).cpu())
        return record.result(table, z_0, evaluator.evaluations)

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

    No optimisation: with phi = C both sides of the guidance agree, so sampling with the source prompt stays on the
    inversion's trajectory as far as DDIM does, at any guidance scale.

    Args:
        inversion: gives the noise levels.
        positive: CONDITIONING of the source prompt, one entry.
    """
    embedding, pooled = single_embedding(positive, "The source prompt")
    check_batch_matches(embedding.shape[0], inversion.batch, "The source prompt")
    return constant_embedding(inversion.sigmas, embedding, pooled)


@dataclass(frozen=True)
class _Evaluation:
    """A guided DDIM step with some embeddings.

    Attributes:
        unconditional: the network's estimate of z_0 with them [B, C, H, W].
        denoised: the guided estimate of z_0 [B, C, H, W].
        x_next: the latent after the step [B, C, H, W].
        residual: how far it is from the pivot, in the papers' scale [B, C * H * W].
    """

    unconditional: torch.Tensor
    denoised: torch.Tensor
    x_next: torch.Tensor
    residual: torch.Tensor

    @property
    def loss(self) -> torch.Tensor:
        """[B], eq. 3 for each latent, as a mean over its elements."""
        return self.residual.square().mean(dim=1)


@dataclass(frozen=True)
class _Step:
    """A guided DDIM step, all but the embeddings: from x at sigma towards the pivot at sigma_next."""

    evaluator: engine.NetworkEvaluator
    noise: engine.NoisePath
    x: torch.Tensor
    sigma: torch.Tensor
    sigma_next: torch.Tensor
    pivot_next: torch.Tensor
    conditional: torch.Tensor
    guidance_scale: float
    progress: int
    progress_total: int

    def report(self, j: int, evaluation: _Evaluation) -> None:
        """Show that inner step j is done."""
        self.evaluator.report(self.progress + j, evaluation.denoised, self.x, self.progress_total)

    def evaluate(self, phi: list[torch.Tensor]) -> _Evaluation:
        """One network evaluation, with the embeddings of the B latents."""
        unconditional = self.evaluator.denoised(self.x, self.sigma, "negative", torch.cat(phi))
        denoised = self.evaluator.combine(self.conditional, unconditional, self.x, self.sigma, self.guidance_scale)
        x_next = self.noise.step(self.x, denoised, self.sigma, self.sigma_next)
        residual = (x_next - self.pivot_next) / self.noise.scale(self.sigma_next)
        return _Evaluation(unconditional, denoised, x_next, residual.flatten(1))


def _optimise_as_in_the_paper(
    step: _Step, phi: list[torch.Tensor], optimizer: torch.optim.Optimizer, record: _Record, inner_steps: int
) -> _Evaluation:
    """The inner loop of algorithm 1, update by update that of the reference implementation; changes `phi` in place.

    A latent stops with the update whose loss was already below the threshold.
    """
    for j in range(inner_steps):
        evaluation = step.evaluate(phi)
        _update(phi, optimizer, evaluation, record)
        step.report(j, evaluation)
        record.stop_below_threshold(evaluation.loss)
        if not bool(record.running.any()):
            break
    with torch.no_grad():
        return step.evaluate(phi)


def _optimise_adaptively(
    step: _Step,
    phi: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    lengths: torch.Tensor,
    record: _Record,
    inner_steps: int,
) -> _Evaluation:
    """The inner loop of algorithm 1 with fewer evaluations and better steps; changes `phi` and `lengths` in place.

    1. A latent stops when its loss is below the threshold, before another update and not after it. The evaluation that
       showed this is also the step that is taken.
    2. The length of the updates adapts. The residual r is nearly linear in phi: after an update from r_0 to r_1, the
       best length along it would have been <r_0, r_0 - r_1> / |r_0 - r_1|^2 times its own (the secant step of a line
       search, at no evaluation of its own). The next updates, also those of the following steps, take that length.

    Args:
        step: the step that is to meet the pivot.
        phi: B embeddings [1, T, C] that require gradients.
        optimizer: over `phi`, one parameter group for each.
        lengths: [B], lengths of the updates relative to the optimiser's own.
        record: what `NullText` reports.
        inner_steps: updates at most.
    """
    own_rates = [group["lr"] for group in optimizer.param_groups]
    before: torch.Tensor | None = None
    for j in range(inner_steps + 1):
        with torch.set_grad_enabled(j < inner_steps):
            evaluation = step.evaluate(phi)
        residual = evaluation.residual.detach()
        if before is not None:
            change = before - residual
            best = (before * change).sum(dim=1) / change.square().sum(dim=1)
            best = best.clamp(1 / _LARGEST_CHANGE_OF_LENGTH, _LARGEST_CHANGE_OF_LENGTH).cpu()
            lengths.copy_(torch.where(record.running & best.isfinite(), lengths * best, lengths))
        record.stop_below_threshold(evaluation.loss)
        if j == inner_steps or not bool(record.running.any()):
            break
        for group, rate, length in zip(optimizer.param_groups, own_rates, lengths.tolist(), strict=True):
            group["lr"] = rate * length
        _update(phi, optimizer, evaluation, record)
        step.report(j, evaluation)
        before = residual
    return evaluation


def _update(
    phi: list[torch.Tensor], optimizer: torch.optim.Optimizer, evaluation: _Evaluation, record: _Record
) -> None:
    """One update of the embeddings of the latents that have not stopped; an optimiser skips what has no gradient."""
    loss = (evaluation.loss * record.running.to(evaluation.loss)).sum()
    gradients = gradients_by_sample(loss, evaluation.unconditional, phi)
    for p, gradient, runs in zip(phi, gradients, record.running.tolist(), strict=True):
        p.grad = gradient if runs else None
    optimizer.step()
    record.update(evaluation.loss)


class _Record:
    """Keeps what `NullText` reports while the algorithm runs."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self.running = torch.ones(batch, dtype=torch.bool)
        self._threshold = 0.0
        self._losses: list[list[torch.Tensor]] = []
        self._converged: list[torch.Tensor] = []
        self._final_losses: list[torch.Tensor] = []
        self._phi: list[torch.Tensor] = []

    def begin_step(self, threshold: float) -> None:
        self.running = torch.ones(self._batch, dtype=torch.bool)
        self._threshold = threshold
        self._losses.append([])
        self._converged.append(torch.zeros(self._batch, dtype=torch.bool))

    def update(self, loss: torch.Tensor) -> None:
        """The latents that run have been updated; `loss` [B] was that before it."""
        self._losses[-1].append(torch.where(self.running, loss.detach().cpu(), torch.nan))

    def stop_below_threshold(self, loss: torch.Tensor) -> None:
        below = loss.detach().cpu() < self._threshold
        self._converged[-1] |= self.running & below
        self.running = self.running & ~below

    def end_step(self, loss: torch.Tensor, phi: list[torch.Tensor]) -> None:
        loss = loss.detach().cpu()
        if not bool(torch.isfinite(loss).all()):
            raise IdentityEditError(
                f"Null-text optimisation left the range of numbers at step {len(self._losses)}; lower the guidance "
                f"scale or the learning rate, or start ComfyUI with --bf16-unet or --fp32-unet."
            )
        self._converged[-1] |= loss < self._threshold
        self._final_losses.append(loss)
        self._phi.append(torch.cat(phi).detach().to(device="cpu", copy=True))

    def table(self, sigmas: torch.Tensor, pooled: torch.Tensor | None, guidance_scale: float) -> StepEmbeddings:
        return StepEmbeddings(
            sigmas=sigmas.clone(),
            embeddings=torch.stack(self._phi),
            pooled=None if pooled is None else pooled.expand(self._batch, -1).unsqueeze(0),
            guidance_scale=float(guidance_scale),
        )

    def result(self, table: StepEmbeddings, z_0: torch.Tensor, evaluations: int) -> NullText:
        losses = [torch.stack(rows) if rows else torch.empty(0, self._batch) for rows in self._losses]
        converged, final_losses = torch.stack(self._converged), torch.stack(self._final_losses)
        return NullText(
            embeddings=table,
            losses=losses,
            inner_steps=torch.stack([(~rows.isnan()).sum(dim=0) for rows in losses]),
            final_losses=final_losses,
            converged=converged,
            reconstruction=z_0,
            evaluations=evaluations,
            warning=_convergence_warning(converged, final_losses),
        )


def _convergence_warning(converged: torch.Tensor, final_losses: torch.Tensor) -> str | None:
    missed = int((~converged).any(dim=1).sum())
    if missed == 0:
        return None
    worst = int(final_losses.amax(dim=1).argmax())
    return (
        f"Null-text optimisation did not converge at {missed} of {converged.shape[0]} steps (largest loss "
        f"{float(final_losses[worst].max()):.1e} at step {worst + 1}); look at the reconstruction, and raise "
        f"inner_steps or lower the guidance scale where it differs from the picture."
    )
