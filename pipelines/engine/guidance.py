"""Custom guidance formulas as ComfyUI GUIDERs, and ComfyUI's own rule as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch

from ..shared.comfy_types import Model
from ..shared.conditioning import Conditioning
from ..shared.errors import check_areas

Combine = Callable[["CombiningGuider", "dict[str, torch.Tensor]", torch.Tensor], torch.Tensor]
"""(guider, estimates of z_0 by name, x) -> the combined estimate of z_0, all [B, C, H, W] float32."""


class CombiningGuider(comfy.samplers.CFGGuider):
    """A GUIDER that combines the estimates of any number of conditionings.

    They are evaluated together, in as few network calls as memory allows. "positive" and "negative" should be among
    the names, because ComfyUI and other packs' wrappers look for these two.

    Attributes:
        evaluations: model calls since the guider was created; one call is one conditioning of the whole batch at one
            noise level, however ComfyUI batches them.
    """

    def __init__(self, model_patcher: Model, conditionings: dict[str, Conditioning], combine: Combine) -> None:
        super().__init__(model_patcher)
        self.inner_set_conds(conditionings)
        self._combine = combine
        self._now: tuple[torch.Tensor, dict[str, Any]] | None = None
        self.evaluations = 0

    def sample(self, noise: torch.Tensor, latent_image: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        """Called by ComfyUI's sampling nodes."""
        for name, conditioning in self.original_conds.items():
            check_areas(conditioning, latent_image, f"The {name} conditioning")
        return super().sample(noise, latent_image, *arguments, **named)

    def predict_noise(
        self, x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any] | None = None, seed: Any = None
    ) -> torch.Tensor:
        """Called by ComfyUI inside the PREDICT_NOISE wrappers; x and result [B, C, H, W], timestep [B] sigmas."""
        options = model_options or {}
        # ComfyUI numbers the conditionings; attention patches rely on 0 for the prompt and 1 for the negative prompt.
        own = [name for name in self.original_conds if name != "negative"]  # not those of techniques around the run
        prompts = sorted(own, key=lambda name: name != "positive")
        names = [prompts[0], "negative", *prompts[1:]]
        conditionings: list[Any] = [self.conds.get(name) for name in names]
        results = estimates_of(self.inner_model, conditionings, x, timestep, options)
        estimates = {n: e for n, e, c in zip(names, results, conditionings, strict=True) if c is not None}
        self.evaluations += len(estimates)
        self._now = timestep, options
        try:
            return self._combine(self, estimates, x)
        finally:
            self._now = None

    def guided(self, estimates: dict[str, torch.Tensor], name: str, x: torch.Tensor, scale: float) -> torch.Tensor:
        """Classifier-free guidance of one conditioning against "negative" by ComfyUI's rule, with the model's patches.

        Call it inside `combine`. Without a negative estimate (guidance scale 1) it returns the conditional one.
        """
        if self._now is None:
            raise RuntimeError("guided() can only be called inside combine")
        timestep, options = self._now
        sides = [self.conds[name], self.conds.get("negative")]
        unconditional = estimates.get("negative")
        if unconditional is None:
            unconditional = torch.zeros_like(x)
        return guided_estimate(self.inner_model, sides, [estimates[name], unconditional], x, timestep, scale, options)

    def after_guidance(
        self, combined: torch.Tensor, estimates: dict[str, torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        """Apply the model's post-CFG patches to a combined estimate; for formulas that do not use `guided`.

        Call it at the end of `combine`.
        """
        if self._now is None:
            raise RuntimeError("after_guidance() can only be called inside combine")
        timestep, options = self._now
        for function in options.get("sampler_post_cfg_function", []):
            combined = function(
                {
                    "denoised": combined,
                    "cond": self.conds.get("positive"),
                    "uncond": self.conds.get("negative"),
                    "cond_scale": 1.0,
                    "model": self.inner_model,
                    "cond_denoised": estimates.get("positive", combined),
                    "uncond_denoised": estimates.get("negative", combined),
                    "sigma": timestep,
                    "model_options": options,
                    "input": x,
                }
            )
        return combined


def estimates_of(
    inner_model: Any, conditionings: list[Any], x: torch.Tensor, sigma: torch.Tensor, options: dict[str, Any]
) -> list[torch.Tensor]:
    """The estimates of z_0 for several conditionings, by ComfyUI's function or by another node's in its place."""
    if "sampler_calc_cond_batch_function" not in options:
        return comfy.samplers.calc_cond_batch(inner_model, conditionings, x, sigma, options)
    return options["sampler_calc_cond_batch_function"](
        {"conds": conditionings, "input": x, "sigma": sigma, "model": inner_model, "model_options": options}
    )


def guided_estimate(
    inner_model: Any,
    sides: list[Any],
    estimates: list[torch.Tensor],
    x: torch.Tensor,
    sigma: torch.Tensor,
    guidance_scale: float,
    options: dict[str, Any],
) -> torch.Tensor:
    """The end of ComfyUI's `sampling_function`: pre-CFG patches, the CFG rule, post-CFG patches.

    Args:
        inner_model: the guider's inner model, while sampling.
        sides: conditionings of the conditional and the unconditional side.
        estimates: estimates of z_0 [B, C, H, W] of these two sides.
        x: the latent [B, C, H, W] at the noise levels `sigma` [B].
        guidance_scale: s of unconditional + s * (conditional - unconditional).
        options: the model options of this call.
    """
    for function in options.get("sampler_pre_cfg_function", []):
        estimates = function(
            {
                "conds": sides,
                "conds_out": estimates,
                "cond_scale": guidance_scale,
                "timestep": sigma,
                "input": x,
                "sigma": sigma,
                "model": inner_model,
                "model_options": options,
            }
        )
    return comfy.samplers.cfg_function(
        inner_model,
        estimates[0],
        estimates[1],
        guidance_scale,
        x,
        sigma,
        model_options=options,
        cond=sides[0],
        uncond=sides[1],
    )
