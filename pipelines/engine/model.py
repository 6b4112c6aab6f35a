"""Latents, prompts and fingerprints of a model, wrappers, and conditionings inside a guider."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.patcher_extension
import torch

from ..shared.comfy_types import Model
from ..shared.errors import IdentityEditError, check_conditioning, check_latent, for_console
from .families.noise import PATH_OF, NoisePath
from .families.registry import require
from .weights import samples_of_weights

_QUANTIZED_ROUNDING = 0.2
"""Largest relative error of 4-bit weights, with a margin; 8-bit weights are within 0.02."""
_PIXELS_PER_LATENT_PIXEL = {
    "Flux2": 16, "Wan22": 16, "HunyuanImage21": 32, "HunyuanVideo15": 16, "LTXV": 32, "ChromaRadiance": 1,
}  # fmt: skip
"""By latent format, for a ComfyUI whose latent formats do not say it (0.3.75)."""
_IMAGE_SPECIFIC = ("control", "gligen", "mask")
"""Conditioning options that apply to one particular image."""


def latent_channels(model: Model) -> int:
    """Channels of the model's latents (4 for Stable Diffusion), without inpainting channels."""
    return int(model.get_model_object("latent_format").latent_channels)


def check_prompt(model: Model, conditioning: Any, name: str) -> None:
    """Raise `IdentityEditError` unless a CONDITIONING is valid and fits the model; SDXL also needs pooled outputs."""
    check_conditioning(conditioning, name)
    for embedding, options, *_ in conditioning:
        check_text_width(model, embedding, options.get("pooled_output"), name)


def check_text_width(model: Model, embedding: torch.Tensor, pooled: torch.Tensor | None, name: str) -> None:
    """Raise `IdentityEditError` unless an embedding [B, T, C] and a pooled output [B, P] have a model's widths."""
    family = require(model)
    width, pooled_width = family.text_width, family.pooled_width
    if width and embedding.shape[2] != width:
        raise IdentityEditError(
            f"{name} has {embedding.shape[2]} channels but the model takes {width}; encode the prompt with this "
            f"checkpoint's CLIP."
        )
    if pooled_width is not None and (pooled is None or pooled.shape[1] != pooled_width):
        has = "no pooled output" if pooled is None else f"a pooled output of {pooled.shape[1]} channels"
        raise IdentityEditError(
            f"{name} has {has} but the model takes one of {pooled_width}; encode the prompt with this checkpoint's "
            f"CLIP."
        )


def to_socket_scale(model: Model, latent: torch.Tensor) -> torch.Tensor:
    """Convert a latent from the model's scale to that of LATENT sockets (ComfyUI's `process_out`)."""
    return model.get_model_object("latent_format").process_out(latent)


def pixels_per_latent_pixel(model: Model) -> int:
    """Image pixels per latent pixel along each side: 8, and 16 of Flux.2."""
    latent_format = model.get_model_object("latent_format")
    said = getattr(latent_format, "spacial_downscale_ratio", None)
    if said is not None:
        return int(said)
    for name, pixels in _PIXELS_PER_LATENT_PIXEL.items():
        if isinstance(latent_format, getattr(comfy.latent_formats, name, ())):
            return pixels
    return 8


def has_frames(model: Model) -> bool:
    """Whether the model's latents are [B, C, frames, H, W], as of Qwen-Image and video models."""
    return int(model.get_model_object("latent_format").latent_dimensions) == 3


def model_latent(model: Model, latent: torch.Tensor) -> torch.Tensor:
    """The samples of a LATENT [B, C, H, W], checked, in the model's scale in float32; [B, C, 1, H, W] if the model's
    latents have frames."""
    check_latent(latent, "The latent", latent_channels(model), has_frames(model))
    if has_frames(model) and latent.ndim == 4:
        latent = latent.unsqueeze(2)
    return to_model_scale(model, latent.to(torch.float32))


def to_model_scale(model: Model, latent: torch.Tensor) -> torch.Tensor:
    """Convert a latent from the scale of LATENT sockets to the model's (ComfyUI's `process_in`)."""
    return model.get_model_object("latent_format").process_in(latent)


def image_of_run(model: Model, latent: torch.Tensor) -> torch.Tensor:
    """A LATENT's samples as ComfyUI's samplers use them: in the model's scale, except that an empty latent is not
    scaled."""
    return to_model_scale(model, latent) if bool(torch.count_nonzero(latent)) else latent


def start_of_run(sampling: Any, sigma: torch.Tensor, noise: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """x at the first noise level of a run, as every stock sampler starts.

    Args:
        sampling: the model's `model_sampling`.
        sigma: the noise level, a scalar tensor.
        noise: [B, C, H, W]; may be changed in place.
        image: [B, C, H, W] in the model's scale, see `image_of_run`.
    """
    highest, level = float(sampling.sigma_max), float(sigma)
    # As in comfy.samplers.Sampler.max_denoise.
    max_denoise = math.isclose(highest, level, rel_tol=1e-5) or level > highest
    return sampling.noise_scaling(sigma, noise, image, max_denoise)


@dataclass(frozen=True)
class ModelTag:
    """Fingerprint of a model, stored in files made with it so that other models can be rejected.

    Attributes:
        architecture: class, channels and width of the text embeddings.
        prediction: "eps", "v" or "flow", see `families.noise`.
        latent_format: name of the latent's scaling.
        sigma_max: highest noise level of the model's schedule.
        dtype: data type of the loaded weights.
        weights: a few hundred of the model's weights, without LoRAs or other patches; NaN where only the layer can read
            them (GGUF).
        quantized: whether any of them are quantized.
    """

    architecture: str
    prediction: str
    latent_format: str
    sigma_max: float
    dtype: str
    weights: tuple[float, ...]
    quantized: bool = False

    @property
    def noise_path(self) -> NoisePath:
        """The model's noise path."""
        return PATH_OF[self.prediction]

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> ModelTag:
        """Parse a tag from a file's description.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: when it is invalid; see `files.parsing_file`.
        """
        texts = [description[name] for name in ("architecture", "prediction", "latent_format", "dtype")]
        if not isinstance(description["weights"], list) or not all(isinstance(text, str) for text in texts):
            raise TypeError("the model's tag is invalid")
        torch.finfo(getattr(torch, description["dtype"]))
        weights = tuple(float(weight) for weight in description["weights"])
        quantized = bool(description.get("quantized", False))
        sigma_max = float(description["sigma_max"])
        return cls(**{**description, "sigma_max": sigma_max, "weights": weights, "quantized": quantized})

    def difference(self, other: ModelTag) -> str | None:
        """A description of the difference between two models, or None if they are the same.

        Weights are compared within the rounding of the coarser data type, so that a checkpoint matches itself in
        float32, float16, bfloat16, float8 and quantized form. Unreadable weights are skipped.
        """
        for name in ("architecture", "prediction", "latent_format"):
            if getattr(self, name) != getattr(other, name):
                return f"{name.replace('_', ' ')} {getattr(self, name)} instead of {getattr(other, name)}"
        if not math.isclose(self.sigma_max, other.sigma_max, rel_tol=1e-3):
            return f"a noise schedule up to {self.sigma_max:.2f} instead of {other.sigma_max:.2f}"
        mine, its = torch.tensor(self.weights), torch.tensor(other.weights)
        if mine.shape != its.shape:
            return "different weights"
        known = torch.isfinite(mine) & torch.isfinite(its)
        rounding = max(torch.finfo(getattr(torch, tag.dtype)).eps for tag in (self, other))
        if self.quantized or other.quantized:
            rounding = max(rounding, _QUANTIZED_ROUNDING)
        if float((mine - its)[known].norm()) > max(rounding, 1e-5) * float(its[known].norm()):
            return "different weights"
        return None


def model_tag(model: Model) -> ModelTag:
    """The `ModelTag` of a model."""
    family = require(model)
    samples: list[float] = []
    any_quantized = False
    for prefix in family.tag_weights:
        numbers, quantized = samples_of_weights(model, prefix)
        samples += numbers
        any_quantized |= quantized
    return ModelTag(
        architecture=family.architecture,
        prediction=family.prediction,
        latent_format=type(model.get_model_object("latent_format")).__name__,
        sigma_max=float(family.sampling.sigmas[-1]),
        dtype=str(model.model_dtype()).removeprefix("torch."),
        weights=tuple(samples),
        quantized=any_quantized,
    )


def drop_step_caches(clone: Model) -> None:
    """Remove caches that reuse earlier model calls (EasyCache, LazyCache and similar) from a clone, with a log message.

    They assume a sampler that takes small steps in one direction, and change the result of an inversion or of a
    repeated evaluation at the same noise level. Caches are recognized by "cache" in their name; TeaCache and First
    Block Cache are a function around the model.
    """
    options = clone.model_options["transformer_options"]
    option_wrappers = options.get("wrappers", {})
    dropped = {key for key in options if _is_cache(key)}
    for key in dropped:
        del options[key]
    for kind, by_key in list(clone.wrappers.items()):
        for key in [key for key in by_key if _is_cache(key)]:
            clone.remove_wrappers_with_key(kind, key)
            dropped.add(key)
    for by_key in option_wrappers.values():
        for key in [key for key in by_key if _is_cache(key)]:
            del by_key[key]
            dropped.add(key)
    if name := _cache_around(clone.model_options):
        del clone.model_options["model_function_wrapper"]
        dropped.add(name)
    if dropped:
        logging.warning(
            "IdentityEdit: the model's %s is disabled here because it would change the result; sampling still uses it.",
            for_console(" and ".join(sorted(dropped))),
        )


def stop_step_caches(guider: Any) -> None:
    """Disable the caches of `drop_step_caches` in one run, wherever their node was connected. For an OUTER_SAMPLE
    wrapper of a technique that evaluates another latent or prompt beside the sampled one, which they cannot tell apart.

    Their wrappers around the whole run stay, because they read the cache's options at its end.
    """
    transformer = guider.model_options.get("transformer_options", {})
    runs = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    wrappers = transformer.get("wrappers", {})
    stopped = {key for kind, by_key in wrappers.items() for key in by_key if kind != runs and _is_cache(key)}
    options = dict(guider.model_options)
    if name := _cache_around(options):
        del options["model_function_wrapper"]
        stopped.add(name)
    if not stopped:
        return
    logging.warning(
        "IdentityEdit: the model's %s is disabled in this run, which evaluates other latents or prompts in between.",
        for_console(" and ".join(sorted(stopped))),
    )
    wrappers = {
        kind: {key: each for key, each in by_key.items() if kind == runs or key not in stopped}
        for kind, by_key in wrappers.items()
    }
    guider.model_options = {**options, "transformer_options": {**transformer, "wrappers": wrappers}}


def _is_cache(key: Any) -> bool:
    return isinstance(key, str) and "cache" in key.lower()


def _cache_around(model_options: dict[str, Any]) -> str:
    """The name of a cache that is a function around the model, or ""."""
    function = model_options.get("model_function_wrapper")
    name = getattr(function, "__qualname__", type(function).__qualname__).partition(".<locals>")[0]
    return name if _is_cache(f"{getattr(function, '__module__', '')}.{name}") else ""


def with_wrappers(
    model: Model,
    key: str,
    predict_noise: Callable[..., Any],
    outer_sample: Callable[..., Any] | None = None,
    *,
    replace: bool = True,
) -> Model:
    """A clone of `model` with wrappers around guider calls and around whole sampling runs.

    Args:
        model: MODEL; not modified.
        key: name of the wrappers.
        predict_noise: `(executor, x, timestep, model_options, seed)`, wraps every call of the guider, which is
            `executor.class_obj`.
        outer_sample: wraps every sampling run.
        replace: replace existing wrappers with this key, or add to them.
    """
    clone = model.clone()
    kinds = comfy.patcher_extension.WrappersMP
    for kind, wrapper in ((kinds.PREDICT_NOISE, predict_noise), (kinds.OUTER_SAMPLE, outer_sample)):
        if wrapper is not None:
            if replace:
                clone.remove_wrappers_with_key(kind, key)
            clone.add_wrapper_with_key(kind, key, wrapper)
    return clone


KEEPS_EMBEDDING = "identity_edit_keeps_embedding"
"""Marks a conditioning whose text embedding per-step embeddings must not replace."""


def conditionings_with_embedding(
    base: Any,
    conditionings: list[dict[str, Any]],
    embedding: torch.Tensor,
    pooled: torch.Tensor | None = None,
    keep: bool = False,
) -> list[dict[str, Any]]:
    """A copy of a guider's conditionings of one side with a different text embedding.

    Args:
        base: the guider's `inner_model` (BaseModel) while sampling.
        conditionings: a value of `guider.conds` while sampling.
        embedding: [B, T, C].
        pooled: [B, P] on any device, or None; in SDXL it precedes the size conditioning.
        keep: protect the embedding from another node's per-step embeddings, whichever node was connected first. For
            source prompts that are evaluated alongside an edit.
    """
    result = []
    for conditioning in conditionings:
        model_conds = dict(conditioning["model_conds"])
        if isinstance(model_conds.get("c_crossattn"), comfy.conds.CONDCrossAttn) or "c_crossattn" not in model_conds:
            model_conds["c_crossattn"] = comfy.conds.CONDCrossAttn(embedding)
            if pooled is not None and "y" in model_conds:
                vector = model_conds["y"].cond
                count = max(vector.shape[0], pooled.shape[0])
                sizes = vector[:, pooled.shape[1] :].expand(count, -1)
                pooled_rows = pooled.to(vector).expand(count, -1)
                model_conds["y"] = comfy.conds.CONDRegular(torch.cat([pooled_rows, sizes], dim=1))
        else:
            model_conds = _with_joint_text(base, model_conds, embedding, pooled)
        marked = {KEEPS_EMBEDDING: True} if keep else {}
        result.append({**conditioning, "cross_attn": embedding, "model_conds": model_conds, **marked})
    return result


def _with_joint_text(
    base: Any, model_conds: dict[str, Any], embedding: torch.Tensor, pooled: torch.Tensor | None
) -> dict[str, Any]:
    """The inputs of a network with joint attention for another text, padded and counted by the model itself.

    A text is never repeated here: in joint attention repeated tokens count twice.
    """
    shape = (1, base.latent_format.latent_channels, *[1] * (base.latent_format.latent_dimensions - 2), 8, 8)
    noise = torch.zeros(shape, device=embedding.device)
    if pooled is not None:
        pooled = pooled.to(embedding)
    every_token = torch.ones((1, embedding.shape[1]), dtype=torch.int64)  # without it OmniGen 2 counts none
    made = base.extra_conds(
        cross_attn=embedding, pooled_output=pooled, attention_mask=every_token, noise=noise, device=embedding.device
    )
    changed = {name: made[name] for name in ("c_crossattn", "num_tokens", "y", "clip_text_pooled") if name in made}
    if made["c_crossattn"].cond.shape[1] != model_conds["c_crossattn"].cond.shape[1]:
        model_conds.pop("attention_mask", None)
    elif "attention_mask" in model_conds:
        changed.pop("num_tokens", None)  # counts the unmasked tokens
    return {**model_conds, **changed}


def conditionings_of_the_prompt(conditionings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy of a guider's conditionings of one side without ControlNets, GLIGEN and masks, which apply to the sampled
    image only, not to a source image evaluated alongside it."""
    return [
        {name: value for name, value in conditioning.items() if name not in _IMAGE_SPECIFIC}
        for conditioning in conditionings
    ]
