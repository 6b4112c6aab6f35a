"""GUIDER and SAMPLER of edits that evaluate a source prompt beside the target prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch

from ...attention.sites import of_source
from ..shared.comfy_types import Model
from ..shared.conditioning import Conditioning
from ..shared.errors import IdentityEditError, check_areas
from .families.noise import NoisePath
from .families.registry import require
from .families.schedule import given_schedule
from .model import start_of_run, stop_step_caches

Estimate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x, sigma) -> the guided estimate of z_0 [B, C, H, W], with sigma a scalar tensor."""


class EditGuider(comfy.samplers.CFGGuider):
    """A GUIDER with a source and a target prompt, each with its guidance scale.

    Samplers other than the pack's see classifier-free guidance of the target prompt.
    """

    def __init__(
        self,
        model_patcher: Model,
        source: Conditioning,
        target: Conditioning,
        negative: Conditioning | None,
        source_scale: float,
        target_scale: float,
    ) -> None:
        super().__init__(model_patcher)
        sides = {"positive": target, "source": source}
        self.inner_set_conds(sides if negative is None else {**sides, "negative": negative})
        self.set_cfg(target_scale)
        self._source_scale = source_scale
        self._at_source = False

    def sample(self, noise: torch.Tensor, latent_image: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        """Called by ComfyUI's sampling nodes."""
        for name, conditioning in self.original_conds.items():
            check_areas(conditioning, latent_image, f"The {name} conditioning")
        return super().sample(noise, latent_image, *arguments, **named)

    def outer_sample(self, *arguments: Any, **named: Any) -> torch.Tensor:
        """Called by `sample` inside the OUTER_SAMPLE wrappers."""
        stop_step_caches(self)
        return super().outer_sample(*arguments, **named)

    @contextlib.contextmanager
    def at_source(self) -> Iterator[None]:
        """Evaluate the source prompt instead of the target prompt."""
        self._at_source = True
        try:
            yield
        finally:
            self._at_source = False

    def predict_noise(
        self, x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any] | None = None, seed: Any = None
    ) -> torch.Tensor:
        """Called by ComfyUI inside the PREDICT_NOISE wrappers; x and result [B, C, H, W], timestep [B] sigmas."""
        side, scale, options = "positive", self.cfg, model_options or {}
        if self._at_source:
            side, scale, options = "source", self._source_scale, of_source(options)
        return comfy.samplers.sampling_function(
            self.inner_model,
            x,
            timestep,
            self.conds.get("negative"),
            self.conds[side],
            scale,
            model_options=options,
            seed=seed,
        )


@dataclass(frozen=True)
class EditRun:
    """What an algorithm of `EditSampler` works with, on the model's device in the model's scale.

    Attributes:
        path: the model's noise path.
        sigmas: [N + 1] descending noise levels.
        image: z_0 [B, C, H, W] of the LATENT.
        noise: the NOISE [B, C, H, W] at the model's noise scale.
        noise_scale: by which the algorithm's own noise is multiplied, see `Family`.
        start: x [B, C, H, W] at sigmas[0], as every stock sampler would start.
        seed: the NOISE's seed.
        target: guided estimate of the target prompt.
        source: guided estimate of the source prompt; raises `IdentityEditError` for a guider without one.
        mask: (noise level) -> [B or 1, 1, H, W], 1 where the image may change (Set Latent Noise Mask, at each level
            by Differential Diffusion), or None.
    """

    path: NoisePath
    sigmas: torch.Tensor
    image: torch.Tensor
    noise: torch.Tensor
    noise_scale: float
    start: torch.Tensor
    seed: int
    target: Estimate
    source: Estimate
    mask: Callable[[torch.Tensor], torch.Tensor] | None

    @property
    def steps(self) -> int:
        """N."""
        return int(self.sigmas.shape[0]) - 1

    def within_mask(self, changed: torch.Tensor, unchanged: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """`changed` where the image may change in the step from `sigma`, `unchanged` elsewhere."""
        return changed if self.mask is None else torch.lerp(unchanged, changed, self.mask(sigma).to(changed))


Algorithm = Callable[[EditRun], Iterator[tuple[torch.Tensor, torch.Tensor]]]
"""Yields the latent and a preview of the image, both [B, C, H, W], after each step. The last latent is the edited
z_0."""


class EditSampler(comfy.samplers.Sampler):
    """A SAMPLER that runs an algorithm."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm

    @torch.no_grad()
    def sample(
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        """Called by ComfyUI between loading and cleanup."""
        from tqdm.auto import tqdm

        if len(sigmas) < 2:  # no step, as after Split Sigmas at the last one
            return latent_image
        family = require(model_wrap.model_patcher)
        given_schedule(family, sigmas)  # raises unless they descend
        sampling = model_wrap.inner_model.model_sampling
        image = latent_image.to(torch.float32)

        def target(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return model_wrap(x, sigma.reshape(-1).expand(x.shape[0]), **extra_args)

        def source(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            if not isinstance(model_wrap, EditGuider):
                raise IdentityEditError(
                    "The guider has no source prompt, which this sampler needs; connect Source and Target Guider."
                )
            with model_wrap.at_source():
                return target(x, sigma)

        at_level = extra_args.get("model_options", {}).get("denoise_mask_function")

        def mask(sigma: torch.Tensor) -> Any:
            if at_level is None:
                return denoise_mask
            levels = sigma.reshape(-1).expand(image.shape[0])
            return at_level(levels, denoise_mask, extra_options={"model": model_wrap, "sigmas": sigmas})

        run = EditRun(
            path=family.noise_path,
            sigmas=sigmas,
            image=image,
            noise=family.noise_scale * noise,
            noise_scale=family.noise_scale,
            start=start_of_run(sampling, sigmas[0], noise.clone(), image),
            seed=int(extra_args.get("seed") or 0),
            target=target,
            source=source,
            mask=None if denoise_mask is None else mask,
        )
        latent = image
        for i, (latent, preview) in enumerate(tqdm(self.algorithm(run), total=run.steps, disable=disable_pbar)):
            if callback is not None:
                callback(min(i, run.steps - 1), preview, latent, run.steps)
        return latent
