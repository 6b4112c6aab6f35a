"""Custom sampling loops inside ComfyUI's sampler, which keeps handling model loading, latent scaling, areas, hooks,
ControlNets, inpainting channels, pooled outputs and cleanup."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import torch

from ...attention.sites import on_one_gpu
from ..shared.comfy_types import Model
from ..shared.conditioning import Conditioning, copy_outside_inference_mode, coverage_warning
from ..shared.errors import check_areas
from ..shared.gradients import autograd_safe_options
from .families.base import Capability
from .families.registry import require
from .gradient_context import (
    gradient_context,
    gradient_memory,
    load_completely,
    readable_errors,
    use_differentiable_attention,
)
from .guidance import estimates_of, guided_estimate
from .model import check_prompt, conditionings_with_embedding, drop_step_caches, to_socket_scale

_KEY = "identity_edit"

Result = TypeVar("Result")


class Callback(Protocol):
    """Progress with a preview; the signature of ComfyUI's `latent_preview.prepare_callback`."""

    def __call__(self, step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None: ...


class NetworkEvaluator:
    """Evaluates the network for a loop run by `run_loop`.

    Every evaluation goes through ComfyUI's guider, so other nodes' wrappers and patches apply. It raises ComfyUI's
    InterruptProcessingException if the user has pressed Cancel.

    Attributes:
        evaluations: model calls so far; one call is one conditioning of the whole batch, so a step with guidance counts
            as two, however ComfyUI batches them.
        device: device of the loop's latents.
    """

    def __init__(self, guider: _LoopGuider, extra_args: dict[str, Any], callback: Callback | None) -> None:
        self._guider = guider
        self._extra_args = extra_args
        self._callback = callback
        self.evaluations = 0
        self.device: torch.device = guider.model_patcher.load_device

    def denoised(
        self, x: torch.Tensor, sigma: torch.Tensor, side: str = "positive", embedding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The network's estimate of z_0 for one side's conditioning.

        Args:
            x: latents [B, C, H, W] float32 in the model's scale, at noise level `sigma`.
            sigma: scalar tensor, or [B] with one level per latent.
            side: "positive" or "negative".
            embedding: [B or 1, T, C] float32, replaces the side's cross-attention embedding. It may require a gradient.

        Returns:
            [B, C, H, W] float32. The predicted noise is (x - denoised) / sigma.
        """
        with self._guider.one_side(side, embedding):
            return self._evaluate(x, sigma)

    def both(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The estimates of z_0 for the positive and the negative side, in one network call if memory allows."""
        with self._guider.both_sides() as estimates:
            self._evaluate(x, sigma)
        return estimates[0], estimates[1]

    def guided(self, x: torch.Tensor, sigma: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """ComfyUI's guided estimate of z_0 [B, C, H, W]; guidance scale 1 evaluates only the positive side."""
        self._guider.set_cfg(guidance_scale)
        return self._evaluate(x, sigma)

    def combine(
        self,
        conditional: torch.Tensor,
        unconditional: torch.Tensor,
        x: torch.Tensor,
        sigma: torch.Tensor,
        guidance_scale: float,
    ) -> torch.Tensor:
        """Classifier-free guidance of two estimates of z_0 by ComfyUI's rule, with the model's CFG patches.

        Without such patches: unconditional + guidance_scale * (conditional - unconditional).
        """
        guider, options = self._guider, self._extra_args["model_options"]
        sides = [guider.conds["positive"], guider.conds["negative"]]
        estimates = [conditional, unconditional]
        return guided_estimate(guider.inner_model, sides, estimates, x, _per_latent(sigma, x), guidance_scale, options)

    def report(self, step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
        """Report that step `step` (from 0) of `total` is done, with a preview of `denoised`."""
        if self._callback is not None:
            with torch.no_grad():  # a preview may run a decoder network
                self._callback(step, denoised.detach(), x.detach(), total)

    def _evaluate(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self._guider(x, _per_latent(sigma, x), **self._extra_args)


def run_loop(
    model: Model,
    positive: Conditioning,
    negative: Conditioning | None,
    latent: torch.Tensor,
    sigmas: torch.Tensor,
    loop: Callable[[NetworkEvaluator, torch.Tensor], Result],
    *,
    gradients: bool = False,
    checkpointing: bool = False,
    callback: Callback | None = None,
    seed: int = 0,
) -> Result:
    """Run `loop(evaluator, latent)` in place of a sampler and return its result.

    The loop returns the finished result: latents on the CPU, in the scale of LATENT sockets if a node outputs them
    (`to_socket_scale`), and the number of model calls.

    Args:
        model: MODEL; a clone is used.
        positive, negative: CONDITIONING of both sides; negative may be None if the loop does not need it.
        latent: [B, C, H, W] float32 in the model's scale (from `model_latent` or an inversion's trajectory); the loop
            receives it on the model's device.
        sigmas: [N + 1] descending noise levels of the run, for patches that read `sample_sigmas`.
        loop: the algorithm.
        gradients: True runs the loop in `gradient_context`, so that the network's output can be differentiated with
            respect to an embedding. False runs it without gradients.
        checkpointing: with gradients, recompute blocks in the backward pass instead of storing their activations.
        callback: progress with preview.
        seed: passed to conditionings that draw noise.
    """
    require(model, *([Capability.GRADIENTS] if gradients else []))
    for name, side in (("The positive conditioning", positive), ("The negative conditioning", negative)):
        if side is not None:
            check_prompt(model, side, name)
            check_areas((options for _, options in side), latent, name)
    warning = coverage_warning(positive, latent)
    if warning is not None:
        logging.warning("IdentityEdit: %s", warning)
    guider = _LoopGuider(model.clone())
    patcher = guider.model_patcher
    drop_step_caches(patcher)
    sampler = _LoopSampler(loop, latent, callback, gradients, checkpointing)
    kinds = comfy.patcher_extension.WrappersMP
    patcher.add_wrapper_with_key(kinds.APPLY_MODEL, _KEY, sampler.count_evaluations)
    with contextlib.ExitStack() as stack:
        if gradients:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(readable_errors())
            positive, negative, latent, sigmas = copy_outside_inference_mode((positive, negative, latent, sigmas))
            patcher.add_wrapper_with_key(kinds.PREPARE_SAMPLING, _KEY, sampler.load_completely)
            use_differentiable_attention(patcher)
            if any(options.get("control") is not None for side in (positive, negative or []) for _, options in side):
                # ComfyUI adds a ControlNet's output to the skip connections in place, which would corrupt the input
                # that the next block saved for its backward pass.
                patcher.set_model_patch(_copy_hidden_state, "input_block_patch_after_skip")
        stack.enter_context(torch.no_grad())  # gradient_context re-enables gradients after loading and encoding
        conditionings = {"positive": positive}
        if negative is not None:
            conditionings["negative"] = negative
        elif patcher.model_options.get("disable_cfg1_optimization"):
            # Some guidance patches (such as Self-Attention Guidance) need both sides even at scale 1 and fail with one.
            conditionings["negative"] = positive
        guider.inner_set_conds(conditionings)
        # Additional conditioning (inpainting channels) may be derived from the latent in the scale of LATENT sockets.
        image = to_socket_scale(model, latent)
        guider.sample(torch.zeros_like(latent), image, sampler, sigmas, disable_pbar=True, seed=seed)
    return sampler.result


class _LoopGuider(comfy.samplers.CFGGuider):
    """ComfyUI's guider, extended to evaluate a single side, optionally with a different embedding."""

    def __init__(self, model_patcher: Model) -> None:
        super().__init__(model_patcher)
        self._side: str | None = None
        self._embedding: torch.Tensor | None = None
        self._estimates: list[torch.Tensor] | None = None

    @contextlib.contextmanager
    def both_sides(self) -> Iterator[list[torch.Tensor]]:
        """Collect the estimates of both sides before guidance in the yielded list."""
        self._estimates = []
        try:
            yield self._estimates
        finally:
            self._estimates = None

    @contextlib.contextmanager
    def one_side(self, side: str, embedding: torch.Tensor | None) -> Iterator[None]:
        self._side, self._embedding = side, embedding
        try:
            yield
        finally:
            self._side, self._embedding = None, None

    def predict_noise(
        self, x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any] | None = None, seed: Any = None
    ) -> torch.Tensor:
        """Called by ComfyUI inside the PREDICT_NOISE wrappers; x and result [B, C, H, W], timestep [B] sigmas."""
        options = model_options or {}
        if self._estimates is not None:
            sides = [self.conds["positive"], self.conds["negative"]]
            self._estimates += comfy.samplers.calc_cond_batch(self.inner_model, sides, x, timestep, options)
            return self._estimates[0]
        if self._side is None:
            return super().predict_noise(x, timestep, options, seed)
        conditionings = self.conds[self._side]
        if self._embedding is not None:
            conditionings = conditionings_with_embedding(self.inner_model, conditionings, self._embedding)
        # ComfyUI numbers the sides: 0 is the conditional one, 1 the unconditional. Attention patches rely on it.
        index = 1 if self._side == "negative" else 0
        pair: list[Any] = [None, None]
        pair[index] = conditionings
        return estimates_of(self.inner_model, pair, x, timestep, options)[index]


@dataclass(eq=False)
class _LoopSampler(comfy.samplers.Sampler):
    """A ComfyUI sampler that runs a loop and stores its result."""

    _loop: Callable[[NetworkEvaluator, torch.Tensor], Any]
    _latent: torch.Tensor
    _callback: Callback | None
    _gradients: bool
    _checkpointing: bool
    _inference_mode: bool = field(default_factory=torch.is_inference_mode_enabled)  # of the caller
    _evaluator: NetworkEvaluator | None = None
    result: Any = None

    def sample(
        self,
        model_wrap: _LoopGuider,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        """Called by ComfyUI between loading and cleanup."""
        if self._gradients:
            options = on_one_gpu(extra_args["model_options"])  # those on other GPUs run without gradients
            extra_args = {**extra_args, "model_options": autograd_safe_options(options)}
        self._evaluator = NetworkEvaluator(model_wrap, extra_args, self._callback)
        # A copy, because autograd cannot use tensors created in inference mode.
        latent = self._latent.detach().to(self._evaluator.device, torch.float32, copy=True)
        try:
            if self._gradients:
                patcher = model_wrap.model_patcher
                patchers = [patcher, *model_wrap.loaded_models, *patcher.model_patches_models()]
                with gradient_context(patchers, load=False, checkpointing=self._checkpointing):
                    self.result = self._loop(self._evaluator, latent)
            else:
                self.result = self._loop(self._evaluator, latent)
        finally:
            # Break the cycle of evaluator, guider, model wrappers and sampler, which would keep the model alive.
            self._evaluator = None
        return latent_image

    def count_evaluations(self, executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """APPLY_MODEL wrapper: counts one model call per conditioning in the batch."""
        candidates = (*args, *kwargs.values())
        options: dict[str, Any] = next((value for value in candidates if _is_transformer_options(value)), {})
        if self._evaluator is not None:
            self._evaluator.evaluations += len(options.get("cond_or_uncond", (0,)))
        return executor(x, *args, **kwargs)

    def load_completely(self, executor: Any, model: Model, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
        """PREPARE_SAMPLING wrapper: no weight may be offloaded between the forward and the backward pass."""
        with torch.inference_mode(self._inference_mode):
            prepared = executor(model, noise_shape, *args, **kwargs)
            load_completely([model, *prepared[2]], gradient_memory(model, list(noise_shape), self._checkpointing))
        return prepared


def _copy_hidden_state(h: torch.Tensor, transformer_options: dict[str, Any]) -> torch.Tensor:
    return h.clone()


def _is_transformer_options(value: Any) -> bool:
    return isinstance(value, dict) and "cond_or_uncond" in value


def _per_latent(sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return sigma.to(device=x.device, dtype=torch.float32).reshape(-1).expand(x.shape[0])
