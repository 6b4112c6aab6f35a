"""Imagic (Kawar et al. 2023), a baseline of Liu et al. 2024 and Jung et al. 2024, on a batch of images."""

from __future__ import annotations

from typing import Any

import comfy.sample
import torch
from identity_edit_pack.pipelines.shared.conditioning import Conditioning
from identity_edit_pack.pipelines.timestep_aware.model_fine_tuning import FineTuningSettings, fine_tune_model
from identity_edit_pack.pipelines.timestep_aware.text_injection import edit_conditioning

from .harness import Options

IMAGIC = "Imagic"
IMAGIC_OPTIONS: Options = {
    "imagic_steps": (50, "of Imagic's fine-tuning (the paper's: 1500)"),
    "imagic_learning_rate": (4e-5, "of all weights in it (the paper's: 2e-6)"),
    "imagic_eta": (0.7, "interpolation toward the target prompt (0.7; the paper's: .6 to .8)"),
}


def imagic(
    model: Any, latent: torch.Tensor, optimized: torch.Tensor, target: Conditioning, negative: Conditioning, steps: int,
    arguments: Any,
) -> torch.Tensor:  # fmt: skip
    """Edited latents: the model is fine-tuned to each image with the embedding that was optimized for it, and samples
    fresh noise with the interpolated embedding.

    Args:
        latent: the images [B, 4, H, W].
        optimized: an embedding for each, see `optimize_text_embedding`.
        target: a prompt for each.
        steps: of DDIM.
    """
    edit: torch.Tensor = edit_conditioning(target, [[optimized, {}]], arguments.imagic_eta)[0][0]
    noise = comfy.sample.prepare_noise(latent, arguments.seed)
    settings = FineTuningSettings(
        steps=arguments.imagic_steps, learning_rate=arguments.imagic_learning_rate, precision="float32",
        seed=arguments.seed,
    )  # fmt: skip
    edited = []
    for row in range(len(latent)):
        one = slice(row, row + 1)
        e_opt, e_edit = ([[each[one], {}]] for each in (optimized, edit))
        tuned, _ = fine_tune_model(model, latent[one], e_opt, settings)
        edited.append(
            comfy.sample.sample(
                tuned, noise[one], steps, arguments.guidance_scale, "ddim", "ddim_uniform", e_edit, negative,
                torch.zeros_like(latent[one]), disable_pbar=True, seed=0,
            )
        )  # fmt: skip
    return torch.cat(edited)
