"""DDIM from any noisy latent along the noise levels of an inversion, to compare with what samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.inversion.inversion import Inversion, sample_inversion


def sample_from(
    model: Any, of: Inversion, start: torch.Tensor, positive: Any, negative: Any = None, guidance_scale: float = 1.0
) -> torch.Tensor:
    """z_0 [B, C, H, W] in the scale of LATENT sockets, as `start` at the inversion's first noise level is."""
    x = engine.to_model_scale(model, start)
    run = replace(of, trajectory=x.expand(of.steps + 1, *x.shape), embeddings=None)
    return sample_inversion(model, run, positive, negative, guidance_scale)
