"""An inversion as NOISE, from which every stock sampler starts exactly where the inversion is.

ComfyUI starts a run at `model_sampling.noise_scaling(sigma, noise, image)`. Flow models start at sigma 1, where that is
the noise alone, so that a LATENT without noise cannot carry their inversion.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .. import engine
from ..shared.comfy_types import Model
from ..shared.errors import IdentityEditError
from .inversion import Inversion, check_skip


@dataclass(frozen=True)
class InvertedNoise:
    """ComfyUI's NOISE for step `skip` of an inversion.

    Attributes:
        model: MODEL, for its scale and its noise levels.
        inversion: the inversion.
        skip: number of skipped first steps; the sampler's sigmas must begin with inversion.sigmas[skip].
        seed: read by ComfyUI's sampling nodes.
    """

    model: Model
    inversion: Inversion
    skip: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_skip(self.skip, self.inversion.steps)

    def generate_noise(self, input_latent: dict[str, Any]) -> torch.Tensor:
        """The noise [B, C, H, W] with which a run on this LATENT starts at the inversion's latent; that of one image
        serves every latent of a batch.

        Called by ComfyUI's sampling nodes.

        Raises:
            IdentityEditError: when the LATENT has another size or batch.
        """
        x, sigma = self.inversion.trajectory[self.skip], self.inversion.sigmas[self.skip]
        latent = input_latent["samples"].to(device="cpu", dtype=torch.float32)
        if engine.has_frames(self.model) and latent.ndim == 4:
            latent = latent.unsqueeze(2)
        if len(x) == 1:  # one image for every latent of a batch
            x = x.expand(len(latent), *x.shape[1:])
        if latent.shape != x.shape:
            raise IdentityEditError(
                f"The latent is {tuple(latent.shape)} but the inversion {tuple(x.shape)}; connect the latent of the "
                f"inverted image to latent_image."
            )
        start = partial(engine.start_of_run, self.model.get_model_object("model_sampling"), sigma)
        # The start is linear in the noise: without noise it is the image's part, and one unit of noise weighs `weight`.
        zero = torch.zeros_like(x)
        weight = start(torch.ones_like(x), zero)
        return (x - start(zero.clone(), engine.image_of_run(self.model, latent))) / weight
