"""The one module of the pipelines that speaks to ComfyUI.

It answers three questions: which models the techniques work on, how to run a loop of one's own inside ComfyUI's
sampling machinery (so that loading, latent scaling, areas, hooks, control networks, inpainting channels, pooled outputs
and cleaning up remain ComfyUI's), and how to obtain gradients there. Everything works on a clone of the model; nothing
global is touched, and what is changed for the time of a loop is put back.

Read on ComfyUI 0.3.75: comfy/samplers.py, comfy/sampler_helpers.py, comfy/model_patcher.py, execution.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import comfy.conds
import comfy.model_management
import comfy.model_sampling
import comfy.patcher_extension
import comfy.samplers
import torch
from comfy.ldm.modules.attention import SpatialTransformer, get_attention_function
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel

from .conditioning import Conditioning, copy_outside_inference_mode
from .errors import IdentityEditError, check_conditioning, check_latent
from .gradients import checkpointed_blocks, differentiable_attention, modules_in, plain_frozen_tensors

_KEY = "identity_edit"
_ATTENTION_WITHOUT_GRADIENT = ("attention_sage", "attention_flash")

Result = TypeVar("Result")


class Callback(Protocol):
    """Progress with a preview, the signature of ComfyUI's `latent_preview.prepare_callback`."""

    def __call__(self, step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None: ...


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def require_noise_prediction_model(model: Any) -> Any:
    """Check that `model` is a UNet that predicts noise (eps) or velocity (v) at discrete timesteps.

    That is Stable Diffusion 1.x, 2.x and XL with everything trained from them, zero-terminal-SNR models included.

    Args:
        model: MODEL (a ModelPatcher).

    Returns:
        the model's sampling object, with `sigmas` [T] ascending and `timestep(sigma)`.

    Raises:
        IdentityEditError: for any other model, with its name.
    """
    sampling = model.get_model_object("model_sampling")
    network = model.get_model_object("diffusion_model")
    predicts_noise = isinstance(sampling, comfy.model_sampling.EPS) and not isinstance(sampling, comfy.model_sampling.X0)
    discrete = isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete)
    if predicts_noise and discrete and isinstance(network, UNetModel):
        return sampling
    raise IdentityEditError(
        f"The model {type(model.model).__name__} is not a noise-predicting UNet with discrete timesteps; load a "
        f"Stable Diffusion 1.x, 2.x or XL checkpoint (flow and EDM models cannot be inverted by this node)."
    )


def latent_channels(model: Any) -> int:
    """Number of channels of the model's latents (4 for Stable Diffusion), without inpainting channels."""
    return int(model.get_model_object("latent_format").latent_channels)


def context_channels(model: Any) -> int:
    """Width of the cross-attention embeddings that the model takes (768 for SD1.x, 1024 for SD2.x, 2048 for SDXL)."""
    for module in model.get_model_object("diffusion_model").modules():
        if isinstance(module, SpatialTransformer):
            return int(module.transformer_blocks[0].attn2.to_k.in_features)
    raise IdentityEditError("The model has no cross-attention; load a text-to-image checkpoint.")


def to_socket_scale(model: Any, latent: torch.Tensor) -> torch.Tensor:
    """Bring a latent from the model's scale to that of LATENT sockets (ComfyUI's `process_out`)."""
    return model.get_model_object("latent_format").process_out(latent)


def to_model_scale(model: Any, latent: torch.Tensor) -> torch.Tensor:
    """Bring a latent from the scale of LATENT sockets to the model's (ComfyUI's `process_in`)."""
    return model.get_model_object("latent_format").process_in(latent)


@dataclass(frozen=True)
class ModelTag:
    """What a file made with one model keeps of it, so that another model can be refused.

    Attributes:
        architecture: class, channels and width of text embeddings.
        prediction: "eps" or "v".
        latent_format: name of the latent's scaling.
        sigma_max: highest noise level of the model's schedule.
        dtype: in which the weights were loaded.
        weights: a few hundred of the model's own weights, without LoRAs or other patches on it.
    """

    architecture: str
    prediction: str
    latent_format: str
    sigma_max: float
    dtype: str
    weights: tuple[float, ...]

    def difference(self, other: ModelTag) -> str | None:
        """What tells the two models apart, in words, or None when they are the same model.

        Weights are compared within the rounding of the coarser of both dtypes, so that a checkpoint matches itself in
        float32, float16, bfloat16 and float8.
        """
        for name in ("architecture", "prediction", "latent_format"):
            if getattr(self, name) != getattr(other, name):
                return f"{name.replace('_', ' ')} {getattr(self, name)} instead of {getattr(other, name)}"
        if not math.isclose(self.sigma_max, other.sigma_max, rel_tol=1e-3):
            return f"a noise schedule up to {self.sigma_max:.2f} instead of {other.sigma_max:.2f}"
        mine, its = torch.tensor(self.weights), torch.tensor(other.weights)
        rounding = max(torch.finfo(getattr(torch, tag.dtype)).eps for tag in (self, other))
        if mine.shape != its.shape or float((mine - its).norm()) > max(rounding, 1e-5) * float(its.norm()):
            return "different weights"
        return None


def model_tag(model: Any) -> ModelTag:
    """The tag of a model; see `ModelTag`."""
    sampling = require_noise_prediction_model(model)
    network = model.get_model_object("diffusion_model")
    samples: list[float] = []
    for prefix in ("diffusion_model.time_embed.", "diffusion_model.input_blocks.0.", "diffusion_model.out."):
        for key, patches in sorted(model.get_key_patches(prefix).items()):
            weight = patches[0][0]  # the weight as the checkpoint holds it, before LoRAs
            if key.endswith("weight") and weight.ndim > 1:
                flat = weight.detach().reshape(-1)
                chosen = flat[:: max(1, flat.shape[0] // 64)][:64]
                samples += chosen.to(device="cpu", dtype=torch.float32).tolist()
    in_channels = network.input_blocks[0][0].in_channels
    return ModelTag(
        architecture=f"{type(model.model).__name__}-{network.model_channels}-{in_channels}-{context_channels(model)}",
        prediction="v" if isinstance(sampling, comfy.model_sampling.V_PREDICTION) else "eps",
        latent_format=type(model.get_model_object("latent_format")).__name__,
        sigma_max=float(sampling.sigmas[-1]),
        dtype=str(model.model_dtype()).removeprefix("torch."),
        weights=tuple(samples),
    )


def with_predict_noise_wrapper(model: Any, key: str, wrapper: Callable[..., Any]) -> Any:
    """A clone of `model` with a PREDICT_NOISE wrapper under `key`, replacing one of the same key.

    `wrapper(executor, x, timestep, model_options, seed)` surrounds every evaluation by a guider, which it finds as
    `executor.class_obj`.
    """
    clone = model.clone()
    kind = comfy.patcher_extension.WrappersMP.PREDICT_NOISE
    clone.remove_wrappers_with_key(kind, key)
    clone.add_wrapper_with_key(kind, key, wrapper)
    return clone


def conditionings_with_embedding(
    conditionings: list[dict[str, Any]], embedding: torch.Tensor, pooled: torch.Tensor | None = None
) -> list[dict[str, Any]]:
    """A guider's conditionings of one side with another text embedding; the given ones are not changed.

    Args:
        conditionings: a value of `guider.conds` while sampling.
        embedding: [B, T, C].
        pooled: [B, P] or None; SDXL keeps it in front of the size conditioning.
    """
    result = []
    for conditioning in conditionings:
        model_conds = dict(conditioning["model_conds"])
        model_conds["c_crossattn"] = comfy.conds.CONDCrossAttn(embedding)
        if pooled is not None and "y" in model_conds:
            vector = model_conds["y"].cond
            count = max(vector.shape[0], pooled.shape[0])
            sizes = vector[:, pooled.shape[1] :].expand(count, -1)
            pooled_rows = pooled.to(vector).expand(count, -1)
            model_conds["y"] = comfy.conds.CONDRegular(torch.cat([pooled_rows, sizes], dim=1))
        result.append({**conditioning, "model_conds": model_conds})
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Loops of one's own inside ComfyUI's sampling
# ---------------------------------------------------------------------------------------------------------------------


class NetworkEvaluator:
    """Evaluates the network for a loop that `run_loop` runs.

    Every evaluation goes through ComfyUI's guider, so wrappers and patches that other nodes have put on the model take
    part, and stops with ComfyUI's InterruptProcessingException when the user has pressed cancel.

    Attributes:
        evaluations: network evaluations so far; one evaluation is one conditioning of the whole batch, so a step with
            guidance costs two however ComfyUI arranges them.
        device: where the latents of the loop live.
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
            sigma: scalar tensor, or [B] for a level of its own for each latent.
            side: "positive" or "negative".
            embedding: [B or 1, T, C] float32 in place of the side's cross-attention embedding. It may require a
                gradient, which then flows through the network to it.

        Returns:
            [B, C, H, W] float32. The predicted noise is (x - denoised) / sigma.
        """
        with self._guider.one_side(side, embedding):
            return self._evaluate(x, sigma)

    def guided(self, x: torch.Tensor, sigma: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """ComfyUI's own guided estimate of z_0 [B, C, H, W] for both sides; scale 1 evaluates the positive side only."""
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
        """Classifier-free guidance of two estimates of z_0 by ComfyUI's own rule, with the model's CFG patches.

        Without such patches: unconditional + guidance_scale * (conditional - unconditional).
        """
        return self._guider.combine(
            conditional, unconditional, x, _per_latent(sigma, x), guidance_scale, self._extra_args["model_options"]
        )

    def report(self, step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
        """Show progress: step `step` of `total` (from 0) is done, with a preview of `denoised`."""
        if self._callback is not None:
            with torch.no_grad():  # a preview may decode with a network of its own
                self._callback(step, denoised.detach(), x.detach(), total)

    def _evaluate(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self._guider(x, _per_latent(sigma, x), **self._extra_args)


def run_loop(
    model: Any,
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
    """Run `loop(evaluator, latent)` where a sampler would run, and return what it returns.

    Args:
        model: MODEL; a clone is used.
        positive, negative: CONDITIONING of both sides; negative may be None where the loop does not need it.
        latent: [B, C, H, W] in the scale of LATENT sockets; the loop receives it in the model's scale, float32, on the
            model's device.
        sigmas: [N + 1] descending noise levels of the run, for patches that look at `sample_sigmas`.
        loop: the algorithm.
        gradients: True runs the loop in `gradient_context`: what the network returns can be differentiated with
            respect to an embedding that requires a gradient. False runs it without gradients.
        checkpointing: with gradients, recompute blocks in the backward pass instead of keeping their activations.
        callback: progress with preview.
        seed: passed on to conditionings that draw noise of their own.

    Raises:
        IdentityEditError: when the model, a conditioning or the latent cannot be used.
    """
    require_noise_prediction_model(model)
    check_latent(latent, "The latent", latent_channels(model))
    check_conditioning(positive, "The positive conditioning")
    if negative is not None:
        check_conditioning(negative, "The negative conditioning")
    guider = _LoopGuider(model.clone())
    patcher = guider.model_patcher
    sampler = _LoopSampler(loop, callback, gradients, checkpointing)
    kinds = comfy.patcher_extension.WrappersMP
    patcher.add_wrapper_with_key(kinds.APPLY_MODEL, _KEY, sampler.count_evaluations)
    with contextlib.ExitStack() as stack:
        if gradients:
            stack.enter_context(torch.inference_mode(False))
            positive, negative, latent, sigmas = copy_outside_inference_mode((positive, negative, latent, sigmas))
            patcher.add_wrapper_with_key(kinds.PREPARE_SAMPLING, _KEY, sampler.load_completely)
            _use_differentiable_attention(patcher)
        stack.enter_context(torch.no_grad())  # the loop itself turns gradients on again, after loading and encoding
        conditionings = {"positive": positive}
        if negative is not None:
            conditionings["negative"] = negative
        guider.inner_set_conds(conditionings)
        latent = latent.to(torch.float32)
        guider.sample(torch.zeros_like(latent), latent, sampler, sigmas, disable_pbar=True, seed=seed)
    return sampler.result


class _LoopGuider(comfy.samplers.CFGGuider):
    """ComfyUI's guider, which can also evaluate one side alone, with another embedding."""

    def __init__(self, model_patcher: Any) -> None:
        super().__init__(model_patcher)
        self._side: str | None = None
        self._embedding: torch.Tensor | None = None

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
        if self._side is None:
            return super().predict_noise(x, timestep, options, seed)
        conditionings = self.conds[self._side]
        if self._embedding is not None:
            conditionings = conditionings_with_embedding(conditionings, self._embedding)
        # ComfyUI numbers the sides: 0 is the conditional one, 1 the unconditional. Attention patches rely on it.
        index = 1 if self._side == "negative" else 0
        pair: list[Any] = [None, None]
        pair[index] = conditionings
        if "sampler_calc_cond_batch_function" in options:
            arguments = {
                "conds": pair,
                "input": x,
                "sigma": timestep,
                "model": self.inner_model,
                "model_options": options,
            }
            return options["sampler_calc_cond_batch_function"](arguments)[index]
        return comfy.samplers.calc_cond_batch(self.inner_model, pair, x, timestep, options)[index]

    def combine(
        self,
        conditional: torch.Tensor,
        unconditional: torch.Tensor,
        x: torch.Tensor,
        sigma: torch.Tensor,
        guidance_scale: float,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """The end of ComfyUI's `sampling_function`: pre-CFG patches, the CFG rule, post-CFG patches."""
        sides = [self.conds["positive"], self.conds["negative"]]
        estimates = [conditional, unconditional]
        for function in options.get("sampler_pre_cfg_function", []):
            estimates = function(
                {
                    "conds": sides,
                    "conds_out": estimates,
                    "cond_scale": guidance_scale,
                    "timestep": sigma,
                    "input": x,
                    "sigma": sigma,
                    "model": self.inner_model,
                    "model_options": options,
                }
            )
        return comfy.samplers.cfg_function(
            self.inner_model,
            estimates[0],
            estimates[1],
            guidance_scale,
            x,
            sigma,
            model_options=options,
            cond=sides[0],
            uncond=sides[1],
        )


class _LoopSampler(comfy.samplers.Sampler):
    """A ComfyUI sampler that runs a loop and keeps what it returns."""

    def __init__(
        self,
        loop: Callable[[NetworkEvaluator, torch.Tensor], Any],
        callback: Callback | None,
        gradients: bool,
        checkpointing: bool,
    ) -> None:
        self._loop = loop
        self._callback = callback
        self._gradients = gradients
        self._checkpointing = checkpointing
        self._evaluator: NetworkEvaluator | None = None
        self.result: Any = None

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
        """Called by ComfyUI between loading and cleaning up; `latent_image` [B, C, H, W] is in the model's scale."""
        self._evaluator = NetworkEvaluator(model_wrap, extra_args, self._callback)
        if self._gradients:
            patcher = model_wrap.model_patcher
            patchers = [patcher, *model_wrap.loaded_models, *patcher.model_patches_models()]
            with gradient_context(patchers, load=False, checkpointing=self._checkpointing):
                self.result = self._loop(self._evaluator, latent_image)
        else:
            self.result = self._loop(self._evaluator, latent_image)
        return latent_image

    def count_evaluations(self, executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """APPLY_MODEL wrapper: a batch of several conditionings counts as so many evaluations."""
        options = next((value for value in (*args, *kwargs.values()) if _is_transformer_options(value)), {})
        if self._evaluator is not None:
            self._evaluator.evaluations += len(options.get("cond_or_uncond", (0,)))
        return executor(x, *args, **kwargs)

    def load_completely(self, executor: Any, model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
        """PREPARE_SAMPLING wrapper: no weight may be moved away between the forward and the backward pass."""
        prepared = executor(model, noise_shape, *args, **kwargs)
        memory = gradient_memory(model, list(noise_shape), self._checkpointing)
        comfy.model_management.load_models_gpu([model, *prepared[2]], memory_required=memory, force_full_load=True)
        return prepared


def _is_transformer_options(value: Any) -> bool:
    return isinstance(value, dict) and "cond_or_uncond" in value


def _per_latent(sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return sigma.to(device=x.device, dtype=torch.float32).reshape(-1).expand(x.shape[0])


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def gradient_context(
    patchers: Iterable[Any], *, load: bool = True, memory_required: float = 0, checkpointing: bool = False
) -> Iterator[None]:
    """Make gradients with respect to inputs of frozen models possible inside a ComfyUI node.

    ComfyUI runs every prompt in `torch.inference_mode`, and parameters made there can never be saved for a backward
    pass, not even after the mode is left. Inside this context gradients are on, every such parameter and buffer is
    replaced by an ordinary tensor over the same memory (nothing is copied), and no parameter requires a gradient. All
    of that is undone at the end. Tensors that come from elsewhere must be copied inside the context
    (`copy_outside_inference_mode`).

    Args:
        patchers: the ModelPatchers that the gradient passes through: of a MODEL, or `clip.patcher` of a CLIP.
        load: load them completely first (ComfyUI's `load_models_gpu`).
        memory_required: bytes that the computation needs beside the weights.
        checkpointing: recompute each transformer and residual block in the backward pass instead of keeping its
            activations: about a third more time for a fraction of the memory, the same gradients.
    """
    patchers = list(patchers)
    with torch.inference_mode(False), torch.enable_grad():
        if load:
            comfy.model_management.load_models_gpu(patchers, memory_required=memory_required, force_full_load=True)
        modules: list[torch.nn.Module] = []
        for patcher in patchers:
            modules.append(patcher.model)
            modules += modules_in(getattr(patcher, "model_options", None))
        with contextlib.ExitStack() as stack:
            stack.enter_context(plain_frozen_tensors(modules))
            if checkpointing:
                stack.enter_context(checkpointed_blocks(modules, (SpatialTransformer, ResBlock)))
            yield


def _use_differentiable_attention(patcher: Any) -> None:
    """Exchange attention functions without a backward pass on a clone, only where there can be any."""
    options = patcher.model_options["transformer_options"]
    previous = options.get("optimized_attention_override")
    backend = getattr(get_attention_function("optimized"), "__name__", "")
    if previous is not None or backend in _ATTENTION_WITHOUT_GRADIENT:
        options["optimized_attention_override"] = differentiable_attention(
            get_attention_function("pytorch"), _ATTENTION_WITHOUT_GRADIENT, previous
        )


def gradient_memory(model: Any, latent_shape: list[int], checkpointing: bool) -> float:
    """Bytes that a forward and backward pass needs beside the weights, an estimate for ComfyUI's memory management.

    Measured by counting what autograd saves: for each position of the latent 89 thousand elements in SD1.5's UNet and
    155 thousand in SDXL's (320 model channels), a twentieth to a tenth of it with checkpointing and one block's own
    activations beside them. Attention that keeps its matrix adds 35 elements for each pair of positions.

    Args:
        model: MODEL.
        latent_shape: [B, C, H, W].
        checkpointing: whether blocks are recomputed in the backward pass.
    """
    dtype = model.get_model_object("manual_cast_dtype") or model.model_dtype()
    positions = math.prod(latent_shape[2:])
    elements = model.get_model_object("diffusion_model").model_channels * (100 if checkpointing else 500)
    backend = getattr(get_attention_function("optimized"), "__name__", "")
    if backend not in ("attention_pytorch", "attention_xformers", *_ATTENTION_WITHOUT_GRADIENT) and not checkpointing:
        elements += 35 * positions
    return float(latent_shape[0] * positions * elements * dtype.itemsize)
