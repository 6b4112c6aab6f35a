"""Reference-guided generation of HiFi Tuner (Wang et al. 2023, section 3.3, algorithm 2).

A first pass generates an image from noise x_T. A reference image of the subject is aligned with the subject in it and
inverted with DDIM. The second pass starts from the same x_T, and in its middle steps the subject's region of the latent
follows the reference's trajectory: it is replaced once, then kept close by optimizing the unconditional embedding
there, while the rest is sampled normally and adapts.

A model without an unconditional side (distilled guidance) has no such embedding. There, and on other flow models
without updates, the variable of eq. 10 is the estimate of z_0 itself: F is affine in it, so the minimum is the estimate
whose step leads to the reference's next latent, and a share of it is blended into the model's. In ComfyUI's scale of
flow models, x = (1 - s) z_0 + s eps, this moves x_{t-1}[M] the same share of the way to x*_{t-1}[M].

This cannot be a SAMPLER: ComfyUI loads the model (perhaps partially) and encodes the conditionings in inference mode
before calling a sampler, so gradients are unavailable, and a sampler gets only the guider's combined estimate, whereas
this algorithm combines one conditional estimate with several unconditional ones. Stock samplers are used for the first
pass only: `first_pass_latent` is their initial latent for the same seed, so without guidance both passes give the same
image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .. import engine
from ..engine.host import stock_noise
from ..inversion.inversion import Inversion, check_deterministic, check_inversion, check_sampled_latent, sampling_step
from ..inversion.unconditional_embedding import GuidedStep, OptimizedStep, check_optimization, check_range, optimize
from ..shared.comfy_types import Model
from ..shared.conditioning import Conditioning, single_embedding
from ..shared.errors import IN_FLOAT32, IdentityEditError, check_batch_matches, check_finite, check_latent
from ..shared.input_checks import check_number
from ..shared.masks import masks_for

GUIDANCE_SCALE = 7.5
START_PERCENT = 0.2
END_PERCENT = 0.8
"""t_s = 40 and t_e = 10 remaining steps of 50 (Wang et al. 2023, section 4)."""
INNER_STEPS = 10
LEARNING_RATE = 1e-2
LONGEST_UPDATE = 0.1
"""Largest adapted learning rate, relative to the RMS of phi. Flow models normalize the text, so that the optimal step
grows with the embedding and would grow without limit where the reference cannot be reached."""
BLENDING = 0.5
"""Our choice: each guided step halves the distance to the reference. In the demo world less brings fewer subjects back,
and more hardly any (benchmarks/results/reference_blending.md)."""


@dataclass(frozen=True)
class ReferenceGuidance:
    """The result of reference-guided sampling.

    Attributes:
        latent: [B, C, H, W] float32 CPU, z_0 in the scale of LATENT sockets.
        mask: [B, H, W] float32 CPU, 0 or 1: M_r* at the latent's size.
        steps: indices of the guided steps, from 0 in sampling order.
        embeddings: [G, B, T, C] float32 CPU, phi_h after each of the G guided steps. G is 0 without optimization, here
            and in the losses.
        losses: for each guided step [J', B] float32, the loss of each latent before each update; NaN after the latent
            has stopped. Eq. 10 as a mean over the mask, in the papers' scale (z, not x).
        final_losses: [G, B] float32, the loss with the final embeddings of the step.
        unguided_losses: [G, B] float32, the loss with phi.
        evaluations: model calls, not counting backward passes.
        warning: sentences about likely problems, else None.
    """

    latent: torch.Tensor
    mask: torch.Tensor
    steps: range
    embeddings: torch.Tensor
    losses: list[torch.Tensor]
    final_losses: torch.Tensor
    unguided_losses: torch.Tensor
    evaluations: int
    warning: str | None


def reference_guided_sampling(
    model: Model,
    start: torch.Tensor,
    inversion: Inversion,
    mask: torch.Tensor,
    positive: Conditioning,
    negative: Conditioning,
    guidance_scale: float = GUIDANCE_SCALE,
    start_percent: float = START_PERCENT,
    end_percent: float = END_PERCENT,
    inner_steps: int = INNER_STEPS,
    learning_rate: float = LEARNING_RATE,
    early_stop: float = 0.0,
    checkpointing: bool = False,
    callback: engine.Callback | None = None,
    *,
    blending: float = BLENDING,
) -> ReferenceGuidance:
    """Sample with the subject guided by a reference (Wang et al. 2023, algorithm 2).

    A guided step costs 3 + J model calls (one conditional, one with phi, J with phi_h and a backward pass, one with the
    final phi_h), any other step 2. Latents of a batch are independent. On flow models, whose text encoders need other
    learning rates, the step size adapts, see `unconditional_embedding.optimize`. Where `optimizes` is False, the
    reference is blended into the estimate instead, and a guided step costs as much as any other.

    Args:
        model: MODEL. Per-step embeddings on its positive side are [c, c_s^t] of eq. 7.
        start: x_T [B, C, H, W] at inversion.sigmas[0] in the scale of LATENT sockets, see `first_pass_latent`.
        inversion: [x*_0, ..., x*_T] of the aligned reference from `inversion.invert_image` with guidance scale 1, for
            one image, or one for each latent. Its noise levels are used for sampling.
        mask: M_r* [1 or B, h, w] in [0, 1] of the aligned reference's subject, of any size. A latent pixel belongs to
            the subject if at least half of it is covered.
        positive: CONDITIONING of the prompt.
        negative: CONDITIONING of the empty prompt, phi; one entry.
        guidance_scale: w, that of the first pass; above 1 with optimization. Our default is 7.5; not given in the
            paper.
        start_percent, end_percent: fractions of the steps, 0 to 1, after which guidance starts and ends, see
            `guided_steps`. 0.2 and 0.8 are the paper's t_s = 40 and t_e = 10.
        inner_steps: J, updates per guided step; more for a closer resemblance. 0 only replaces the latent at t_s, and
            blends on flow models.
        learning_rate: Adam's constant learning rate. 0.01 in the paper. Adam is restarted at each step, as in null-text
            optimization.
        early_stop: a latent stops when its loss is below this; 0, as in the paper, makes all J updates.
        checkpointing: trade time for memory, see `engine.gradient_context`.
        callback: progress with preview.
        blending: share of the way to the reference in each guided step without optimization, 0 to 1. 0 only replaces
            the latent at t_s, 1 follows the reference exactly.

    Raises:
        IdentityEditError: when an input cannot be used or the optimization diverges (NaN/Inf).
    """
    optimized = optimizes(model, guidance_scale, inner_steps)
    check_inversion(inversion, model)
    check_deterministic(inversion, "connect one from Noise Inversion")
    x_t = engine.model_latent(model, start)
    check_number(blending, "blending", 0.0, 1.0)
    if optimized:
        check_optimization(guidance_scale, inner_steps, learning_rate)
        check_number(early_stop, "early_stop", 0.0, None)
    check_sampled_latent(
        inversion, x_t, "align the reference with the first pass's image before inverting it", "the latent"
    )
    batch, steps = start.shape[0], inversion.steps
    m_r = latent_mask(mask, batch, start.shape[-2], start.shape[-1])
    guided = guided_steps(steps, start_percent, end_percent)
    if optimized:
        null_embedding, _ = single_embedding(negative, "The negative conditioning")
        check_batch_matches(null_embedding.shape[0], batch, "The negative conditioning")
        phi, blending = null_embedding.expand(batch, -1, -1), 0.0
    else:
        phi, inner_steps = torch.empty(batch, 0, 0), 0
    algorithm = _Algorithm2(
        inversion, m_r, phi, guided, guidance_scale, inner_steps, learning_rate, early_stop, blending
    )

    def loop(evaluator: engine.NetworkEvaluator, x: torch.Tensor) -> ReferenceGuidance:
        z_0, each_step, unguided = algorithm.sample(evaluator, x)
        check_finite(z_0, "The sampled latent", f"{IN_FLOAT32}, or lower learning_rate" if optimized else IN_FLOAT32)
        embeddings = torch.stack([each.phi for each in each_step]) if each_step else phi[None][:0]
        losses = [each.losses for each in each_step]
        final_losses = torch.stack([each.final_loss for each in each_step]) if each_step else torch.empty(0, batch)
        unguided_losses = torch.stack(unguided) if each_step else torch.empty(0, batch)
        warnings = (
            _warning_of_inputs(inversion, guided),
            _warning_of_losses(losses, final_losses, unguided_losses),
        )
        return ReferenceGuidance(
            engine.to_socket_scale(model, z_0), m_r, guided, embeddings, losses, final_losses, unguided_losses,
            evaluator.evaluations, " ".join(filter(None, warnings)) or None,
        )  # fmt: skip

    return engine.run_loop(
        model,
        positive,
        negative,
        x_t,
        inversion.sigmas,
        loop,
        gradients=bool(guided) and inner_steps > 0,
        checkpointing=checkpointing,
        callback=callback,
    )


@dataclass(frozen=True)
class _Algorithm2:
    """Algorithm 2 with its inputs: [x*_0, ..., x*_T], M_r* [B, H, W], phi [B, T, C], the steps from t_s to t_e, w, J,
    the learning rate, the limit of the loss, and the share of the reference in the estimate if J is 0."""

    inversion: Inversion
    mask: torch.Tensor
    phi: torch.Tensor
    guided: range
    guidance_scale: float
    inner_steps: int
    learning_rate: float
    early_stop: float
    blending: float

    def sample(
        self, evaluator: engine.NetworkEvaluator, x: torch.Tensor
    ) -> tuple[torch.Tensor, list[OptimizedStep], list[torch.Tensor]]:
        """z_0 on the CPU from x_T, the optimized steps, and their losses with phi.

        The paper counts t = T, ..., 1; here i = 0, ..., N - 1, and x_star[i] is its x*_t.
        """
        device, steps = evaluator.device, self.inversion.steps
        sigmas = self.inversion.sigmas.clone().to(device)
        x_star = self.inversion.trajectory.clone().to(device)
        inside = self.mask.clone().to(device).reshape(len(x), *[1] * (x.ndim - 3), *x.shape[-2:]) > 0.5
        elements = inside.flatten(1).sum(dim=1) * x.shape[1]
        phi = phi_h = self.phi.clone().to(device)
        optimized_steps: list[OptimizedStep] = []
        unguided_losses: list[torch.Tensor] = []
        lengths, longest = None, math.inf
        if self.inversion.noise_path is engine.FLOW:
            lengths = torch.ones(len(x))
            longest = LONGEST_UPDATE * float(phi.square().mean().sqrt()) / self.learning_rate
        done, total = 0, progress_total(steps, self.guided, self.inner_steps)
        for i in range(steps):
            if self.guided and i == self.guided.start:  # t == t_s
                phi_h = phi
                x = torch.where(inside, x_star[i], x)  # x_t[M] = x*_t[M]
            if i not in self.guided or self.inner_steps == 0:
                with torch.no_grad():
                    denoised = evaluator.guided(x, sigmas[i], self.guidance_scale)
                    if i in self.guided and self.blending > 0.0:  # eq. 10, minimized by the estimate
                        reference = self.inversion.noise_path.estimate_between(x, x_star[i + 1], *sigmas[i : i + 2])
                        denoised = torch.where(inside, torch.lerp(denoised, reference, self.blending), denoised)
                    x = sampling_step(self.inversion, i, x, denoised)  # x_{t-1} = F(x_t, [c, c_s^t], phi)
                evaluator.report(done, denoised, x, total)
                done += 1
                continue
            with torch.no_grad():
                conditional = evaluator.denoised(x, sigmas[i], "positive")  # used by all evaluations of the step
                step = GuidedStep(
                    evaluator, self.inversion, i, x, x_star[i + 1], conditional, self.guidance_scale,
                    loss=lambda residual: residual.square().sum(dim=tuple(range(1, residual.ndim))) / elements,
                    progress=done, progress_total=total, mask=inside,
                )  # fmt: skip
                # F(x_t, [c, c_s^t], phi), with the model's negative side; at t_s it differs from the first evaluation
                # of phi_h if another node has applied per-step embeddings to that side.
                outside = step.evaluate(None)
            # Eq. 10: minimize | x*_{t-1}[M] - F(x_t, [c, c_s^t], phi_h)[M] |^2
            evaluation, optimized = optimize(
                step, phi_h, self.inner_steps, self.learning_rate, self.early_stop, lengths=lengths, longest=longest
            )
            check_range(optimized.final_loss, i, "Reference guidance")
            # x_{t-1}[M] = F(x_t, [c, c_s^t], phi_h)[M]
            x = torch.where(inside, evaluation.x_next, outside.x_next)
            phi_h = optimized.phi.to(device)
            optimized_steps.append(optimized)
            unguided_losses.append(outside.loss.cpu())
            step.report(self.inner_steps, torch.where(inside, evaluation.denoised, outside.denoised))
            done += self.inner_steps + 1
        return (x / self.inversion.noise_path.image_scale(sigmas[-1])).cpu(), optimized_steps, unguided_losses


def first_pass_latent(
    model: Model,
    latent: torch.Tensor,
    sigmas: torch.Tensor,
    seed: int,
    batch_index: Iterable[int] | None = None,
) -> torch.Tensor:
    """x_T: the initial latent of KSampler and SamplerCustom (with RandomNoise) for a seed.

    The noise is ComfyUI's (`comfy.sample.prepare_noise`), scaled like in its samplers: by sigma, or by
    sqrt(1 + sigma^2) at the model's highest noise level. KSampler's scheduler ddim_uniform starts at the same noise
    level as Noise Inversion for step counts that divide 1000; on flow models simple does for every step count.

    Args:
        model: MODEL.
        latent: [B, C, H, W] in the scale of LATENT sockets, the first pass's input: an empty latent.
        sigmas: [N + 1] noise levels of the run.
        seed: seed of the first pass.
        batch_index: `batch_index` of the LATENT, or None.

    Returns:
        [B, C, H, W] float32 CPU at sigmas[0], in the scale of LATENT sockets; [B, C, 1, H, W] if the model's latents
        have frames.
    """
    sampling = engine.require(model).sampling
    check_latent(latent, "The latent", engine.latent_channels(model), engine.has_frames(model))
    latent = latent.detach().to(device="cpu", dtype=torch.float32)
    if engine.has_frames(model) and latent.ndim == 4:
        latent = latent.unsqueeze(2)
    noise = stock_noise(latent, seed, batch_index)
    x = engine.start_of_run(sampling, sigmas[0].detach().cpu(), noise, engine.image_of_run(model, latent))
    return engine.to_socket_scale(model, x)


def optimizes(model: Model, guidance_scale: float, inner_steps: int = INNER_STEPS) -> bool:
    """Whether reference guidance optimizes the unconditional embedding, else it blends the estimate: on flow models
    with distilled guidance or sampled at guidance scale 1, which have no unconditional side, on those whose text cannot
    be learned, and on all without updates."""
    capabilities = engine.require(model).capabilities
    if engine.Capability.VELOCITY in capabilities and (guidance_scale == 1.0 or inner_steps == 0):
        return False
    needed = {engine.Capability.GRADIENTS, engine.Capability.TRUE_GUIDANCE, engine.Capability.ONE_TEXT}
    return needed <= capabilities


def guided_steps(steps: int, start_percent: float, end_percent: float) -> range:
    """Indices of the guided steps, from 0 in sampling order; empty if the end is before the start.

    The paper counts down: guidance is from t_s to t_e, both inclusive. With N steps t_s is N - round(N * start_percent)
    and t_e is N - round(N * end_percent), so 0.2 and 0.8 of 50 steps are t_s = 40 and t_e = 10: the 31 steps from the
    11th to the 41st. A start of 1 gives none.
    """
    check_number(start_percent, "start_percent", 0.0, 1.0)
    check_number(end_percent, "end_percent", 0.0, 1.0)
    # Robust to floating-point error, rounding halves up, as in timestep-aware injection.
    first, last = (math.floor(round(steps * share, 6) + 0.5) for share in (start_percent, end_percent))
    if first > last or first >= steps:
        return range(0)
    return range(first, min(last + 1, steps))


def progress_total(steps: int, guided: range, inner_steps: int) -> int:
    """Total progress count: one for each step and each update."""
    return steps + len(guided) * inner_steps


def latent_mask(mask: torch.Tensor, batch: int, height: int, width: int) -> torch.Tensor:
    """A mask [1 or B, h, w] of any size at the latent's size [B, H, W], 1 where at least half a pixel is covered.

    Raises:
        IdentityEditError: for another batch size, or a mask that is empty at the latent's size.
    """
    resized = (masks_for(mask, "mask", height, width, batch) >= 0.5).float()
    if bool((resized.sum(dim=(1, 2)) == 0).any()):
        raise IdentityEditError(
            "The mask is empty at the latent's resolution, so nothing would be guided; connect the mask of the aligned "
            "reference's subject, or grow it (GrowMask)."
        )
    return resized


def _warning_of_inputs(inversion: Inversion, guided: range) -> str | None:
    if not guided:
        return "No step is guided, so the result is that of the first pass; choose a start_percent below end_percent."
    if abs(inversion.guidance_scale - 1.0) > 1e-6:
        return (
            f"The reference was inverted with guidance scale {inversion.guidance_scale:g}, so its trajectory is less "
            f"exact; set it to 1 in Noise Inversion."
        )
    return None


def _warning_of_losses(
    losses: list[torch.Tensor], final_losses: torch.Tensor, unguided_losses: torch.Tensor
) -> str | None:
    """A warning if phi_h is no closer to the reference than phi in more than half of a latent's guided steps."""
    if not losses:
        return None
    updated = torch.stack([(~rows.isnan()).sum(dim=0) for rows in losses]).cumsum(dim=0) > 0
    worse = int((updated & ~(final_losses < unguided_losses)).sum(dim=0).max())
    if worse * 2 <= len(losses):
        return None
    return (
        f"Guidance did not reduce the loss inside the mask at {worse} of {len(losses)} guided steps; lower the "
        f"learning rate, and check that the reference is aligned with the first pass's image."
    )
