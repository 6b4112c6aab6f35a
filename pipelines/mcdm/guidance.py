"""Classifier-free guidance of the MCDM over its three conditions (Chen et al. 2024, eq. 1), and with a mask (eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import engine
from ..engine.edit_model import require_edit_model
from ..shared.conditioning import Conditioning
from ..shared.errors import IdentityEditError, check_batch_matches
from ..shared.masks import as_masks, of_size
from .model import without_images

POSITIVE, NEGATIVE, IMAGE, UNCONDITIONAL, SOURCE = "positive", "negative", "image", "unconditional", "source"


@dataclass(frozen=True)
class GuidanceScales:
    """s_1, s_2 and s_3 of the three conditions in their order; 3, 3 and 5 in Chen et al. 2024 (supplement 1.3)."""

    image: float = 3.0
    spatial: float = 3.0
    text: float = 5.0

    def coefficients(self) -> dict[str, float]:
        """The coefficient of each estimate in the guided estimate.

        Eq. 1 for three conditions, in the order c_im, c_s, c_p:

            e~ = e(0, 0, 0) + s_1 (e(c_im, 0, 0)     - e(0, 0, 0))
                            + s_2 (e(c_im, c_s, 0)   - e(c_im, 0, 0))
                            + s_3 (e(c_im, c_s, c_p) - e(c_im, c_s, 0))

        The coefficient of e(c_im, 0, 0) is s_1 - s_2: 0 with the paper's scales, so it need not be evaluated.
        """
        return {
            POSITIVE: self.text,
            NEGATIVE: self.spatial - self.text,
            IMAGE: self.image - self.spatial,
            UNCONDITIONAL: 1.0 - self.image,
        }

    def evaluations(self, *, masked: bool) -> int:
        """Model calls per step."""
        return sum(1 for coefficient in self.coefficients().values() if coefficient != 0.0) + int(
            masked and self.text != 0.0
        )


def mcdm_estimate(
    estimates: dict[str, torch.Tensor], scales: GuidanceScales, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """e~ of eq. 1, or with a mask that of eq. 3.

    The terms of eq. 3, e~(p_b) M + e~(p_a) (1 - M), differ only in e(c_im, c_s, p), so a mask costs one more
    model call. The rule is the same for estimates of the noise and of z_0, since its coefficients sum to one.

    Args:
        estimates: [B, C, H, W] by name: e(c_im, c_s, p_b) is POSITIVE, with p_a SOURCE, with the null text NEGATIVE;
            e(c_im, 0, 0) IMAGE; e(0, 0, 0) UNCONDITIONAL. Those with coefficient 0 may be missing.
        scales: s_1, s_2, s_3.
        mask: M [B or 1, H, W], 0 to 1, or None.
    """
    coefficients = scales.coefficients()
    result = torch.zeros_like(next(iter(estimates.values())))
    for name, coefficient in coefficients.items():
        if coefficient != 0.0:
            estimate = estimates[name]
            if name == POSITIVE and mask is not None:
                m = mask[:, None].to(estimate)
                estimate = m * estimates[POSITIVE] + (1.0 - m) * estimates[SOURCE]
            result = result + coefficient * estimate
    return result


def mcdm_guider(
    model: Any,
    positive: Conditioning,
    negative: Conditioning,
    scales: GuidanceScales,
    source: Conditioning | None = None,
    mask: torch.Tensor | None = None,
) -> engine.CombiningGuider:
    """A guider for a trained MCDM.

    Other nodes' post-CFG functions are applied; those that replace the CFG rule (such as RescaleCFG) are not,
    since this guider has its own rule.

    Args:
        model: MODEL of the InstructPix2Pix family.
        positive: p_b, c_s and c_im, from `model.with_images`.
        negative: the null text with the same c_s and c_im; estimates with fewer conditions are derived from it.
        scales: s_1, s_2, s_3.
        source: p_a with the same c_s and c_im; required with a mask.
        mask: M [B or 1, h, w] of any size, 1 where the image may change; None for eq. 1.

    Raises:
        IdentityEditError: when the model or a conditioning has no source image, or a mask is used without source.
    """
    require_edit_model(model)
    for conditioning, name in ((positive, "positive"), (negative, "negative"), (source, "source")):
        if conditioning is not None:
            without_images(conditioning, spatial=False, image=False, name=name)  # raises if there is none
    if mask is not None:
        if source is None:
            raise IdentityEditError("A mask needs source, the prompt for the unedited image; connect it, too.")
        mask = as_masks(mask, "mask")
    candidates: dict[str, Conditioning | None] = {
        POSITIVE: positive,
        NEGATIVE: negative,
        IMAGE: without_images(negative, spatial=True, image=False, name="negative"),
        UNCONDITIONAL: without_images(negative, spatial=True, image=True, name="negative"),
        SOURCE: source if mask is not None and scales.text != 0.0 else None,
    }
    coefficients = scales.coefficients()
    conditionings: dict[str, Conditioning] = {}
    for name, conditioning in candidates.items():
        if conditioning is not None and coefficients.get(name) != 0.0:
            # ComfyUI has two prompt types; all but the edit's are negative, as in DualCFGGuider.
            kind = {} if name == POSITIVE else {"prompt_type": NEGATIVE}
            conditionings[name] = [[embedding, {**options, **kind}] for embedding, options in conditioning]

    def combine(guider: engine.CombiningGuider, estimates: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        latent_mask = None
        if mask is not None:
            check_batch_matches(mask.shape[0], x.shape[0], "The mask")
            latent_mask = of_size(mask, x.shape[2], x.shape[3]).to(x.device)
        return guider.after_guidance(mcdm_estimate(estimates, scales, latent_mask), estimates, x)

    return engine.CombiningGuider(model, conditionings, combine)
