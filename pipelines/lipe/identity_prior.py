"""The personalized identity prior of LIPE (Liu et al. 2024, section 2.1 and appendix E.2.5).

The attention layers of the UNet and the text encoders (or all their weights, as in DreamBooth) are fine-tuned on a few
images of one subject, whose captions name it by a rare token V* and its class word ("sks dog") and describe what it
does, together with general images of the class, which preserve the model's prior (prior preservation, Ruiz et al.
2023). The result is a weight difference: a patch for stock MODEL and CLIP, and a file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .. import engine
from ..engine.weights import weight_shapes
from ..shared.comfy_types import Clip, Model
from ..shared.errors import IdentityEditError
from ..shared.files import checked_record, parsing_file, read_tensors, write_tensors
from ..shared.input_checks import check_number
from ..training.weights import ATTENTION, clip_keys, model_keys

KIND = "identity prior"
_IN_LORA_FILES = re.compile(r".+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
"""Layers of text encoders that LoRA files call `lora_te...`."""
MODEL_PREFIX, CLIP_PREFIX = "model.", "clip."
_OVERSAMPLING = 16
"""Dimensions of the random projection beside those that are kept."""


@dataclass(frozen=True)
class IdentityPrior:
    """A learned weight difference.

    Attributes:
        model_change: CPU tensors by key of the MODEL's state dictionary, with the weights' shapes.
        clip_change: likewise for the CLIP.
        token, class_word: the subject's name in prompts.
        model: tag of the model it was trained on.
        training: training metadata: steps, learning rate, settings, the pack's version.
    """

    model_change: dict[str, torch.Tensor]
    clip_change: dict[str, torch.Tensor]
    token: str
    class_word: str
    model: engine.ModelTag
    training: dict[str, Any]

    @property
    def identity_prompt(self) -> str:
        """The token and the class word: P^e in Liu et al. 2024."""
        return f"{self.token} {self.class_word}"


def attention_keys(model: Model, clip: Clip, weights: str = ATTENTION) -> tuple[list[str], list[str]]:
    """Keys of the trained weights: all attention projections of the UNet and the text encoders, including biases, or
    another choice of `training.weights`.

    Raises:
        IdentityEditError: when the CLIP has no such layers.
    """
    of_model, of_clip = model_keys(model, weights), clip_keys(clip, weights)
    if not of_model or not of_clip:
        raise IdentityEditError(
            "The CLIP has no CLIP text encoder to train; use the CLIP of a Stable Diffusion 1.x, 2.x or XL checkpoint."
        )
    return of_model, of_clip


def apply_identity_prior(
    model: Model, clip: Clip, prior: IdentityPrior, strength_model: float = 1.0, strength_clip: float = 1.0
) -> tuple[Model, Clip]:
    """Clones of MODEL and CLIP with the prior as stock weight patches; strength 1 as trained."""
    check_identity_prior(model, clip, prior)
    patched_model, patched_clip = model.clone(), clip.clone()
    if strength_model != 0.0:
        patched_model.add_patches(_patches(prior.model_change), strength_model)
    if strength_clip != 0.0:
        patched_clip.add_patches(_patches(prior.clip_change), strength_clip)
    return patched_model, patched_clip


def check_identity_prior(model: Model, clip: Clip, prior: IdentityPrior) -> str | None:
    """Check that a prior can be applied to a model.

    Returns:
        a warning for another checkpoint of the same family, or None.

    Raises:
        IdentityEditError: for another family, with a different architecture, prediction type or shapes.
    """
    tag = engine.model_tag(model)
    # Another checkpoint of the same family differs only in its weights.
    difference = dataclasses.replace(tag, weights=prior.model.weights).difference(prior.model)
    parts = (
        (weight_shapes(model.model), prior.model_change, "MODEL"),
        (weight_shapes(clip.patcher.model), prior.clip_change, "CLIP"),
    )
    for shapes, change, socket in parts:
        for key, tensor in change.items():
            if difference is None and shapes.get(key) != tensor.shape:
                difference = f"the {socket} has no weight {key} of the shape {tuple(tensor.shape)}"
    if difference is not None:
        raise IdentityEditError(
            f"The identity prior '{prior.identity_prompt}' was trained on another model family ({difference}); load a "
            f"checkpoint of the family it was trained on."
        )
    if tag.difference(prior.model) is not None:
        return "The prior was trained on another checkpoint of this family; the subject may look less like itself."
    return None


def save_identity_prior(prior: IdentityPrior, path: str) -> None:
    """Write a prior as safetensors atomically."""
    tensors = {MODEL_PREFIX + key: tensor for key, tensor in prior.model_change.items()}
    tensors |= {CLIP_PREFIX + key: tensor for key, tensor in prior.clip_change.items()}
    description = {
        "kind": KIND,
        "token": prior.token,
        "class_word": prior.class_word,
        "model": dataclasses.asdict(prior.model),
        "training": prior.training,
    }
    write_tensors(path, tensors, description)


def load_identity_prior(path: str) -> IdentityPrior:
    """Read a prior written by `save_identity_prior`; raises as `files.read_tensors`."""
    tensors, description = read_tensors(path, KIND)
    with parsing_file(path, "The identity prior"):
        return IdentityPrior(
            model_change=_below(tensors, MODEL_PREFIX),
            clip_change=_below(tensors, CLIP_PREFIX),
            token=str(description["token"]),
            class_word=str(description["class_word"]),
            model=engine.ModelTag.from_description(description["model"]),
            training=checked_record(
                description["training"], ("steps", "learning_rate", "identity_images", "regularization_images")
            ),
        )


def as_lora(
    prior: IdentityPrior, rank: int, progress: Callable[[int, int], None] | None = None
) -> tuple[dict[str, torch.Tensor], float]:
    """Convert the prior to a LoRA for stock loaders: the best low-rank approximation of each weight difference.

    Each matrix or kernel is truncated to the `rank` largest singular values (Eckart and Young 1936), which are found by
    a random projection where they are few among many (Halko et al. 2011); biases and the weights of norms are kept
    exactly.

    Args:
        prior: the prior to approximate.
        rank: maximum rank; smaller matrices get their full rank, which is exact.
        progress: called with (converted weights, total weights).

    Returns:
        float16 or wider tensors by the keys of a LoRA file (`lora_unet_...`, `lora_te_...`; for SDXL `lora_te1_...`
        and `lora_te2_...`; `text_encoders....` for norms and embeddings), and the relative error
        |change - approximation| / |change| in the Frobenius norm over all weights, rounding included.
    """
    check_number(rank, "rank", 1, None)
    both_encoders = any(key.startswith("clip_g.") for key in prior.clip_change) and any(
        key.startswith("clip_l.") for key in prior.clip_change
    )
    named = {
        _lora_key(key, both_encoders): change for key, change in {**prior.model_change, **prior.clip_change}.items()
    }
    tensors: dict[str, torch.Tensor] = {}
    error, size = 0.0, 0.0
    for done, (key, change) in enumerate(named.items(), start=1):
        if progress is not None:
            progress(done, len(named))
        name, _, part = key.rpartition(".")
        if change.ndim == 1:
            tensors[f"{name}.diff_b" if part == "bias" else f"{name}.diff"] = change
            continue
        exact = change.float().flatten(1)
        u, s, v = _largest_singular_values(exact, min(rank, *exact.shape))
        kept, root = s.shape[0], s.sqrt()
        up, down = (u * root).to(change.dtype), (root[:, None] * v).to(change.dtype)
        kernel = change.shape[2:]  # of a convolution
        tensors[f"{name}.lora_up.weight"] = up.reshape(*up.shape, *(1 for _ in kernel))
        tensors[f"{name}.lora_down.weight"] = down.reshape(kept, -1, *kernel)
        tensors[f"{name}.alpha"] = torch.tensor(float(kept))
        error += float((exact - up.float() @ down.float()).square().sum())
        size += float(exact.square().sum())
    return tensors, (error / size) ** 0.5 if size else 0.0


def _largest_singular_values(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [m, count], S [count] and V [count, n] of the largest singular values of a matrix [m, n]."""
    if 4 * (count + _OVERSAMPLING) > min(matrix.shape):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :count], s[:count], v[:count]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=count + _OVERSAMPLING, niter=4)
    return u[:, :count], s[:count], v[:, :count].T


def save_lora(prior: IdentityPrior, tensors: dict[str, torch.Tensor], rank: int, error: float, path: str) -> None:
    """Write a LoRA from `as_lora`, with its rank and relative error in the file's header."""
    description = {
        "kind": "lora",
        "token": prior.token,
        "class_word": prior.class_word,
        "rank": rank,
        "relative_error": error,
        "training": prior.training,
    }
    write_tensors(path, tensors, description)


def _lora_key(key: str, both_encoders: bool) -> str:
    name, _, part = key.rpartition(".")
    if name.startswith("diffusion_model."):
        return f"lora_unet_{name.removeprefix('diffusion_model.').replace('.', '_')}.{part}"
    if not _IN_LORA_FILES.fullmatch(name):  # ComfyUI's form for any other weight
        return f"text_encoders.{key}"
    encoder, _, layer = name.partition(".transformer.")
    number = {"clip_l": "1", "clip_g": "2"}.get(encoder, "") if both_encoders else ""
    return f"lora_te{number}_{layer.replace('.', '_')}.{part}"


def _patches(change: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {key: ("diff", (tensor,)) for key, tensor in change.items()}


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
