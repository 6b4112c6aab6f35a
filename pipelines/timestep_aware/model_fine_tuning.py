"""Model fine-tuning of Imagic (Kawar et al. 2023, section 3.2), a baseline of Jung et al. 2024 and Liu et al. 2024.

Text optimization (`text_optimization`) does not reach the image exactly. With its result e_opt frozen, the network's
weights are optimized by the same loss. The fine-tuned model then samples the interpolation of both embeddings, eta *
e_tgt + (1 - eta) * e_opt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import engine
from ..engine.trainable import trainable_networks
from ..shared.comfy_types import Model
from ..shared.conditioning import Conditioning, single_embedding
from ..shared.errors import IdentityEditError
from ..shared.input_checks import check_choice
from ..training.images import TrainingImages, denoising_losses, draw_batch
from ..training.loop import BFLOAT16, Progress, TrainingRun, TrainingSettings, train
from ..training.weights import ALL, LOW_RANK, RANK, WEIGHTS, model_keys


@dataclass(frozen=True, kw_only=True)
class FineTuningSettings(TrainingSettings):
    """Training settings; the defaults are those of diffusers' community pipeline of Imagic, which Liu et al. 2024 use
    with 500 steps at 5e-4 (appendix E.2.2).

    Attributes:
        weights: one of `training.weights.WEIGHTS`; ALL of the UNet in Imagic.
        rank: r of the changes for LOW_RANK.
    """

    steps: int = 1000
    learning_rate: float = 2e-6
    optimizer: str = "Adam"
    gradient_clip: float = 0.0
    precision: str = BFLOAT16
    weights: str = ALL
    rank: int = RANK

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.weights, "weights", WEIGHTS)


def fine_tune_model(
    model: Model,
    latent: torch.Tensor,
    optimized: Conditioning,
    settings: FineTuningSettings,
    progress: Progress | None = None,
) -> tuple[Model, TrainingRun]:
    """Fine-tune a model until it denoises an image well with its optimized embedding.

    Args:
        model: MODEL that predicts noise or v, including its LoRAs.
        latent: the image [1, C, H, W] in the scale of LATENT sockets.
        optimized: CONDITIONING of e_opt, one entry.
        settings: see `FineTuningSettings`.
        progress: see `training.train`.

    Returns:
        a clone of the model with the change as stock weight patches, and the record of the training.

    Raises:
        IdentityEditError: when an input cannot be used, or as in `training.train`.
    """
    engine.model_latent(model, latent)
    engine.check_prompt(model, optimized, "The optimized embedding")
    e_opt, pooled = single_embedding(optimized, "The optimized embedding")
    if latent.shape[0] != 1 or e_opt.shape[0] != 1:
        raise IdentityEditError(
            f"The latent has {latent.shape[0]} images and the optimized embedding {e_opt.shape[0]}, but a model is "
            f"fine-tuned to one; choose one with Latent From Batch and optimize its embedding."
        )
    image = TrainingImages([latent[0].float().cpu()], [""], [None], fingerprint="")
    with trainable_networks(
        model,
        None,
        model_keys(model, settings.weights),
        dtype=settings.dtype,
        latent_shape=[settings.batch_size, *latent.shape[1:]],
        checkpointing=settings.checkpointing,
        rank=settings.rank if settings.weights == LOW_RANK else 0,
        seed=settings.seed,
    ) as networks:
        # Copies that autograd can use, unlike tensors created in ComfyUI's inference mode.
        text = e_opt.clone().to(networks.device), None if pooled is None else pooled.clone().to(networks.device)

        def losses(index: int) -> list[torch.Tensor]:
            # min_theta E_{t, eps} | eps - eps_theta(z_t, t, e_opt) |^2
            batch = draw_batch(networks, image, settings, index, "image", masked=False)
            return [denoising_losses(networks, batch, text).mean()]

        run = train(dict(networks.model_variables), losses, settings, progress=progress)
        change, _ = networks.changes(torch.float16)
    patched = model.clone()
    patched.add_patches({key: ("diff", (tensor,)) for key, tensor in change.items()}, 1.0)
    return patched, run
