"""Latents and prompts of a model, what identifies one, wrappers on it, and conditionings inside a guider."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.patcher_extension
import torch

from ..shared.errors import IdentityEditError, check_conditioning, check_latent, for_console
from .families.noise import DIFFUSION, FLOW, VELOCITY, NoisePath
from .families.registry import require
from .weights import samples_of_weights

_QUANTIZED_ROUNDING = 0.2
"""Largest relative error of weights in four bits, with a margin; eight bits are within 0.02."""
_BESIDE_THE_PROMPT = ("control", "gligen", "mask")
"""What a conditioning may carry beside its prompt that speaks of one image."""


def latent_channels(model: Any) -> int:
    """Number of channels of the model's latents (4 for Stable Diffusion), without inpainting channels."""
    return int(model.get_model_object("latent_format").latent_channels)


def context_channels(model: Any) -> int:
    """Width of the text embeddings that the model takes, see `Family.text_width`."""
    return require(model).text_width


def check_prompt(model: Any, conditioning: Any, name: str) -> None:
    """Check that a CONDITIONING is one that the model takes: see `check_conditioning`; SDXL and its refiner need a
    pooled output too.

    Raises:
        IdentityEditError: when it is another model's.
    """
    check_conditioning(conditioning, name)
    for embedding, options, *_ in conditioning:
        check_text_width(model, embedding, options.get("pooled_output"), name)


def check_text_width(model: Any, embedding: torch.Tensor, pooled: torch.Tensor | None, name: str) -> None:
    """Check the widths alone of an embedding [B, T, C] and a pooled output [B, P]; the numbers are not looked at.

    Raises:
        IdentityEditError: when they are another model's.
    """
    family = require(model)
    width, pooled_width = family.text_width, family.pooled_width
    if embedding.shape[2] != width:
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


def to_socket_scale(model: Any, latent: torch.Tensor) -> torch.Tensor:
    """Bring a latent from the model's scale to that of LATENT sockets (ComfyUI's `process_out`)."""
    return model.get_model_object("latent_format").process_out(latent)


def model_latent(model: Any, latent: torch.Tensor, name: str = "The latent") -> torch.Tensor:
    """The samples of a LATENT [B, C, H, W], checked, in the model's scale in float32; `name` as the user sees it.

    Raises:
        IdentityEditError: when they are no latents of this model.
    """
    check_latent(latent, name, latent_channels(model))
    return to_model_scale(model, latent.to(torch.float32))


def to_model_scale(model: Any, latent: torch.Tensor) -> torch.Tensor:
    """Bring a latent from the scale of LATENT sockets to the model's (ComfyUI's `process_in`)."""
    return model.get_model_object("latent_format").process_in(latent)


@dataclass(frozen=True)
class ModelTag:
    """What a file made with one model keeps of it, so that another model can be refused.

    Attributes:
        architecture: class, channels and width of text embeddings.
        prediction: "eps", "v" or "flow", see `families.noise`.
        latent_format: name of the latent's scaling.
        sigma_max: highest noise level of the model's schedule.
        dtype: in which the weights were loaded.
        weights: a few hundred of the model's own weights, without LoRAs or other patches on it; NaN where only their
            layer can read them (GGUF).
        quantized: whether some of them are kept in a quantized form.
    """

    architecture: str
    prediction: str
    latent_format: str
    sigma_max: float
    dtype: str
    weights: tuple[float, ...]
    quantized: bool = False

    @property
    def noise(self) -> NoisePath:
        """The model's path from an image to noise."""
        return FLOW if self.prediction == VELOCITY else DIFFUSION

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> ModelTag:
        """The tag that a file's description holds.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: when it holds something else; see `files.understanding`.
        """
        texts = [description[name] for name in ("architecture", "prediction", "latent_format", "dtype")]
        if not isinstance(description["weights"], list) or not all(isinstance(text, str) for text in texts):
            raise TypeError("the model's tag is of another form")
        torch.finfo(getattr(torch, description["dtype"]))
        weights = tuple(float(weight) for weight in description["weights"])
        quantized = bool(description.get("quantized", False))
        sigma_max = float(description["sigma_max"])
        return cls(**{**description, "sigma_max": sigma_max, "weights": weights, "quantized": quantized})

    def difference(self, other: ModelTag) -> str | None:
        """What tells the two models apart, in words, or None when they are the same model.

        Weights are compared within the rounding of the coarser of both forms, so that a checkpoint matches itself in
        float32, float16, bfloat16, float8 and quantized; those that cannot be read are not compared.
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


def model_tag(model: Any) -> ModelTag:
    """The tag of a model; see `ModelTag`."""
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


def drop_step_caches(clone: Any) -> None:
    """Take from a clone what skips evaluations and repeats an earlier step's (EasyCache, LazyCache and the like).

    They assume the small steps of a sampler that only goes forward; in an inversion, or where the same noise level is
    evaluated twice, they give another trajectory. What is called a cache is taken for one. The log says so.
    """
    options = clone.model_options["transformer_options"]
    of_options = options.get("wrappers", {})
    dropped = {key for key in options if _is_cache(key)}
    for key in dropped:
        del options[key]
    for kind, by_key in list(clone.wrappers.items()):
        for key in [key for key in by_key if _is_cache(key)]:
            clone.remove_wrappers_with_key(kind, key)
            dropped.add(key)
    for by_key in of_options.values():
        for key in [key for key in by_key if _is_cache(key)]:
            del by_key[key]
            dropped.add(key)
    if dropped:
        logging.warning(
            "IdentityEdit: the model's %s is left out here, since it would change the result; sampling keeps it.",
            for_console(" and ".join(sorted(dropped))),
        )


def _is_cache(key: Any) -> bool:
    return isinstance(key, str) and "cache" in key.lower()


def with_wrappers(
    model: Any,
    key: str,
    predict_noise: Callable[..., Any],
    outer_sample: Callable[..., Any] | None = None,
    *,
    replace: bool = True,
) -> Any:
    """A clone of `model` with wrappers around its evaluations and around whole runs.

    Args:
        model: MODEL; it is not changed.
        key: names the wrappers; those of the same key are replaced, or kept beside the new ones without `replace`.
        predict_noise: `(executor, x, timestep, model_options, seed)` around every evaluation by a guider, which is
            `executor.class_obj`.
        outer_sample: around every run.
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
"""Marks a conditioning whose text embedding is never replaced by per-step embeddings."""


def conditionings_with_embedding(
    conditionings: list[dict[str, Any]],
    embedding: torch.Tensor,
    pooled: torch.Tensor | None = None,
    keep: bool = False,
) -> list[dict[str, Any]]:
    """A guider's conditionings of one side with another text embedding; the given ones are not changed.

    Args:
        conditionings: a value of `guider.conds` while sampling.
        embedding: [B, T, C].
        pooled: [B, P] or None; SDXL keeps it in front of the size conditioning.
        keep: mark them, so that per-step embeddings of another node do not replace them
            again: for the source that an edit is evaluated beside, whichever node was connected first.
    """
    result = []
    for conditioning in conditionings:
        model_conds = dict(conditioning["model_conds"])
        # Of the kind that ComfyUI has made for this model: cross-attention repeats a shorter text, others must not.
        kind = type(model_conds.get("c_crossattn", comfy.conds.CONDCrossAttn(embedding)))
        model_conds["c_crossattn"] = kind(embedding)
        if pooled is not None and "y" in model_conds:
            vector = model_conds["y"].cond
            count = max(vector.shape[0], pooled.shape[0])
            sizes = vector[:, pooled.shape[1] :].expand(count, -1)
            pooled_rows = pooled.to(vector).expand(count, -1)
            model_conds["y"] = comfy.conds.CONDRegular(torch.cat([pooled_rows, sizes], dim=1))
        marked = {KEEPS_EMBEDDING: True} if keep else {}
        result.append({**conditioning, "model_conds": model_conds, **marked})
    return result


def conditionings_of_the_prompt(conditionings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A guider's conditionings of one side without ControlNets, GLIGEN and masks, which say where things are in
    the sampled image and nothing about another one evaluated beside it; the given ones are not changed."""
    return [
        {name: value for name, value in conditioning.items() if name not in _BESIDE_THE_PROMPT}
        for conditioning in conditionings
    ]
