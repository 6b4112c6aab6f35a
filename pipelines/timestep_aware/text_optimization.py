"""Text optimization of Imagic (Kawar et al. 2023, section 3.2), as used by Jung et al. 2024 (section 4, eq. 2 and 3).

The target prompt's embedding is optimized until the frozen network denoises the image well with it. Interpolating
between the two embeddings leads from the image to the edit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import engine
from ..shared.comfy_types import Model
from ..shared.conditioning import Conditioning, single_embedding
from ..shared.errors import check_batch_matches
from ..shared.gradients import gradients_by_sample
from ..shared.input_checks import check_above_zero, check_number

STEPS = 200
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class TextOptimization:
    """The result of text optimization.

    Attributes:
        embedding: e_opt [B, T, C] float32 CPU.
        losses: [steps, B] float32, eq. 2 before each update. Noisy, because each is at a random timestep.
        evaluations: model calls, not counting backward passes.
    """

    embedding: torch.Tensor
    losses: torch.Tensor
    evaluations: int


def optimize_text_embedding(
    model: Model,
    latent: torch.Tensor,
    target: Conditioning,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    checkpointing: bool = False,
    callback: engine.Callback | None = None,
) -> TextOptimization:
    """Optimize the target prompt's embedding to fit an image (Jung et al. 2024, eq. 2; Kawar et al. 2023, eq. 2).

    Every step draws a uniform timestep and noise, and takes one Adam step on |eps - eps_theta(z_t, t, e)|^2 without
    guidance. The draws depend only on the seed and are shared by all latents of a batch, so each result is independent
    of the others. For SDXL the embeddings of both text encoders are optimized; the pooled output is kept.

    Args:
        model: MODEL of any family.
        latent: the image [B, C, H, W] in the scale of LATENT sockets.
        target: CONDITIONING of the target prompt, one entry.
        steps: 200 in Jung et al. 2024, 500 in Imagic.
        learning_rate: Adam's learning rate. 0.001 in both.
        seed: seed of timesteps and noise.
        checkpointing: trade time for memory, see `engine.gradient_context`.
        callback: progress with preview.

    Raises:
        IdentityEditError: when an input cannot be used or the optimization diverges (NaN/Inf).
    """
    family = engine.require(model, engine.Capability.GRADIENTS, engine.Capability.ONE_TEXT)
    z_image = engine.model_latent(model, latent)
    check_number(steps, "steps", 1, None)
    check_above_zero(learning_rate, "learning_rate")
    target_embedding, _ = single_embedding(target, "The target prompt")
    batch = latent.shape[0]
    check_batch_matches(target_embedding.shape[0], batch, "The target prompt")

    path = family.noise_path

    def loop(evaluator: engine.NetworkEvaluator, z_0: torch.Tensor) -> TextOptimization:
        sigmas = family.sampling.sigmas.detach().float().clone().to(evaluator.device)
        generator = torch.Generator(device="cpu").manual_seed(seed)
        start = target_embedding.clone().to(evaluator.device).expand(batch, -1, -1)
        e = [row.clone().requires_grad_(True) for row in start.split(1)]  # begins as e_tgt
        optimizer = torch.optim.Adam(e, lr=learning_rate)
        losses = []
        for step in range(steps):
            # Eq. 2: e_opt = argmin_e E_{t, eps} | eps - eps_theta(z_t, t, e) |^2
            t = int(torch.randint(sigmas.shape[0], (1,), generator=generator))
            eps = family.noise_scale * torch.randn(z_0[:1].shape, generator=generator).to(evaluator.device)
            x = path.noised(z_0, eps, sigmas[t])
            denoised = evaluator.denoised(x, sigmas[t], "positive", torch.cat(e))
            # The predicted noise minus eps; on a flow model the velocity minus eps - z_0.
            error = path.slope_error(x, denoised, sigmas[t], z_0, eps)
            loss = error.square().flatten(1).mean(dim=1)
            for variable, gradient in zip(e, gradients_by_sample(loss.sum(), denoised, e), strict=True):
                variable.grad = gradient
            optimizer.step()
            losses.append(loss.detach().cpu())
            evaluator.report(step, denoised, x, steps)
        return TextOptimization(
            embedding=torch.cat(e).detach().cpu(), losses=torch.stack(losses), evaluations=evaluator.evaluations
        )

    return engine.run_loop(
        model,
        target,
        None,
        z_image,
        family.schedule(50).sigmas,
        loop,
        gradients=True,
        checkpointing=checkpointing,
        callback=callback,
        seed=seed,
    )
