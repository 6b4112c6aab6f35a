"""Edit masks (DiffEdit, Couairon et al. 2023, section 3.2; Chen et al. 2024, section 3.4).

The mask is where the network's predictions for the source prompt and the edit prompt differ. It is more precise with an
MCDM, which is trained to reconstruct with the source prompt; with an ordinary checkpoint it is DiffEdit's mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...attention.masks import blurred, normalized
from .. import engine
from ..shared.conditioning import Conditioning
from ..shared.errors import IdentityEditError, check_steps

STEPS, NOISE_STEPS, SEEDS, KERNEL = 20, 10, 10, 5
THRESHOLD = 0.35
"""lambda of Chen et al. 2024 for expressions; 0.2 for costumes. DiffEdit's is 0.5."""


@dataclass(frozen=True)
class EditMask:
    """A computed edit mask.

    Attributes:
        mask: M [B, h, w] at the latent's size, 0 or 1.
        contrast: N(|z_{t-1} - z'_{t-1}|) [B, h, w], 0 to 1, before thresholding.
        evaluations: model calls.
        warning: a sentence if a mask is empty or covers the whole image, else None.
    """

    mask: torch.Tensor
    contrast: torch.Tensor
    evaluations: int
    warning: str | None


@dataclass(frozen=True)
class EditMaskSettings:
    """Edit mask settings; the defaults are those of Chen et al. 2024 (supplement 1.3).

    Attributes:
        steps, noise_steps: the noise level after `noise_steps` of `steps` steps; of a flow model their ratio.
        seeds: number of noise samples over which the difference is averaged.
        outliers: differences above this multiple of their mean are clipped before normalization; 0 disables it. 3 in
            diffusers' implementation of DiffEdit.
        kernel: size of the Gaussian kernel in latent pixels, odd; 1 does not blur. The standard deviation is derived
            from the size as in OpenCV and torchvision.
        threshold: lambda, threshold of the normalized difference.
    """

    steps: int = STEPS
    noise_steps: int = NOISE_STEPS
    seeds: int = SEEDS
    outliers: float = 0.0
    kernel: int = KERNEL
    threshold: float = THRESHOLD

    def __post_init__(self) -> None:
        check_steps(self.steps, 1000)
        for name, least, most in (("noise_steps", 1, self.steps), ("seeds", 1, 1000), ("kernel", 1, 101)):
            if not least <= getattr(self, name) <= most:
                raise IdentityEditError(f"{name} is {getattr(self, name)}; choose a number from {least} to {most}.")
        if self.kernel % 2 == 0:
            raise IdentityEditError(f"kernel is {self.kernel}; choose an odd size such as {self.kernel + 1}.")
        if self.outliers < 0.0 or not 0.0 <= self.threshold <= 1.0:
            raise IdentityEditError(
                f"outliers is {self.outliers:g} and threshold {self.threshold:g}; choose 0 or more, and 0 to 1."
            )


def edit_mask(
    model: Any,
    target: Conditioning,
    source: Conditioning,
    latent: torch.Tensor,
    settings: EditMaskSettings | None = None,
    *,
    seed: int = 0,
    callback: engine.Callback | None = None,
) -> EditMask:
    """Compute the mask of an edit.

    The paper uses the difference of z_{t-1} after one step with p_b and with p_a. The first step of UniPC (as of DDIM)
    is linear in the predicted noise, and z_t is the same, so this is the difference of the predictions up to a factor,
    which normalization removes; so is the effect of guidance, whose other terms are equal. Two model calls per noise
    sample are therefore sufficient.

    Args:
        model: MODEL, an MCDM or any other supported model.
        target: CONDITIONING of p_b, the edited image (for an MCDM including the source image).
        source: CONDITIONING of p_a, the source image; DiffEdit also uses the empty prompt.
        latent: the image [B, C, h, w] in the scale of LATENT sockets.
        settings: see `EditMaskSettings`.
        seed: seed of the first noise sample; the others use the following seeds.
        callback: progress with preview.

    Raises:
        IdentityEditError: when an input cannot be used.
    """
    settings = settings or EditMaskSettings()
    family = engine.require(model)
    sigma = _noise_level(family, settings.noise_steps / settings.steps)

    def find(evaluator: engine.NetworkEvaluator, z_0: torch.Tensor) -> EditMask:
        level = sigma.to(evaluator.device)
        total = torch.zeros_like(z_0.mean(dim=1))
        for i in range(settings.seeds):
            noise = family.noise_scale * torch.randn(z_0.shape, generator=torch.Generator().manual_seed(seed + i))
            x = family.noise_path.noised(z_0, noise.to(z_0), level)
            with_target, with_source = evaluator.both(x, level)
            total += (with_target - with_source).abs().mean(dim=1)  # over the channels
            evaluator.report(i, with_target, x, settings.seeds)
        difference = (total / settings.seeds).cpu().reshape(-1, *z_0.shape[-2:])  # a single frame, if it has frames
        if settings.outliers > 0.0:
            mean = difference.mean(dim=(1, 2), keepdim=True)
            difference = torch.minimum(difference, settings.outliers * mean)
        contrast = _blurred(normalized(difference), settings.kernel)
        mask = (contrast > settings.threshold).float()
        shares = mask.mean(dim=(1, 2))
        warning = None
        if bool(((shares == 0) | (shares == 1)).any()):
            warning = (
                "The edit mask is empty or covers the whole image; check the threshold, and that both prompts differ "
                "in the edit."
            )
        return EditMask(mask, contrast, evaluator.evaluations, warning)

    z_image = engine.model_latent(model, latent)
    levels = torch.stack([sigma, torch.zeros(())])
    return engine.run_loop(model, target, source, z_image, levels, find, callback=callback)


def _noise_level(family: engine.Family, share: float) -> torch.Tensor:
    """The noise level after a share of the steps: of the timesteps, or of the noise levels of a flow model, whatever
    shift its schedule has."""
    if engine.Capability.DISCRETE_TIMESTEPS not in family.capabilities:
        return torch.tensor(share)
    table = family.sampling.sigmas.detach().float().cpu()
    return table[round((table.shape[0] - 1) * share)]


def _blurred(contrast: torch.Tensor, kernel: int) -> torch.Tensor:
    """Blur a map [B, h, w] with a Gaussian; the border is reflected, as in OpenCV."""
    if kernel == 1:
        return contrast
    if min(contrast.shape[1:]) <= kernel // 2:
        raise IdentityEditError(
            f"The latent {contrast.shape[2]}x{contrast.shape[1]} is smaller than kernel {kernel}; choose a smaller one."
        )
    deviation = 0.3 * ((kernel - 1) * 0.5 - 1.0) + 0.8
    return blurred(contrast, deviation, kernel // 2, "reflect")
