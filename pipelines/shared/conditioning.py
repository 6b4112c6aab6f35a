"""Reading and rebuilding ComfyUI CONDITIONING lists.

A CONDITIONING is a list of `[embedding, options]`: the cross-attention embedding [B, T, C] and a dictionary that holds
`pooled_output`, ranges, areas, ControlNets and so on. No function here modifies its input.
"""

from __future__ import annotations

from typing import Any

import torch

from ...attention.regions import flat_area
from .errors import IdentityEditError, check_conditioning

Conditioning = list[list[Any]]


def single_embedding(conditioning: Conditioning, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The cross-attention embedding and the pooled output of a CONDITIONING with exactly one entry.

    Args:
        conditioning: the CONDITIONING to read.
        name: the input's name as the user sees it.

    Returns:
        embedding [B, T, C] in float32 (for SDXL both encoders' embeddings, concatenated along C), and the pooled
        output [B, P] in float32, or None where the model has none. Both are copies.

    Raises:
        IdentityEditError: for no entry or several, a missing embedding, or a value that is not finite.
    """
    check_conditioning(conditioning, name)
    if len(conditioning) != 1:
        raise IdentityEditError(
            f"{name} has {len(conditioning)} entries but must have exactly one; use a single CLIP Text Encode without "
            f"Conditioning (Combine)."
        )
    embedding, options = conditioning[0]
    if embedding is None:
        raise IdentityEditError(f"{name} holds no text embedding; connect a CLIP Text Encode node.")
    if not bool(torch.isfinite(embedding).all()):
        raise IdentityEditError(f"{name} contains NaN or infinite values; encode the prompt again.")
    pooled = options.get("pooled_output")
    return ordinary_copy(embedding), None if pooled is None else ordinary_copy(pooled)


def with_embedding(
    conditioning: Conditioning, embedding: torch.Tensor, pooled: torch.Tensor | None = None
) -> Conditioning:
    """A copy of a CONDITIONING with the embedding (and the pooled output, if given) of every entry replaced."""
    result: Conditioning = []
    for _, options in conditioning:
        options = dict(options)
        if pooled is not None:
            options["pooled_output"] = pooled
        result.append([embedding, options])
    return result


def coverage_warning(conditioning: Conditioning, latent: torch.Tensor) -> str | None:
    """A warning if a CONDITIONING leaves part of the image or some of the steps without a prompt.

    ComfyUI fills uncovered places with zeros, so inversion and optimization lose the image there.

    Args:
        conditioning: entries with "area", "mask", "start_percent" and "end_percent" as ComfyUI's nodes set them.
        latent: [B, C, H, W].

    Returns:
        one sentence with the remedy, or None if everything is covered.
    """
    times = {0.0, 1.0}
    for _, options in conditioning:
        times |= {min(max(float(options.get(name, 0.0)), 0.0), 1.0) for name in ("start_percent", "end_percent")}
    between = sorted(times)
    for start, end in zip(between[:-1], between[1:], strict=True):
        covered = torch.zeros(latent.shape[-2:], dtype=torch.bool)
        for _, options in conditioning:
            if options.get("start_percent", 0.0) <= (start + end) / 2 <= options.get("end_percent", 1.0):
                covered |= _covered(options, latent)
        if not bool(covered.all()):
            return (
                "The positive conditioning covers only part of the image or of the steps, and the rest is lost; "
                "combine it with a prompt for the rest (Conditioning Combine), or remove its area, mask or timestep "
                "range."
            )
    return None


def area_in_pixels(area: Any, height: int, width: int) -> tuple[int, int, int, int]:
    """Height, width, top and left in latent pixels of an `area` of a CONDITIONING, in latent pixels or percentages."""
    if area[0] != "percentage":
        h, w, y, x = flat_area(area)
        return int(h), int(w), int(y), int(x)
    h, w, y, x = flat_area(area[1:])
    return round(h * height), round(w * width), round(y * height), round(x * width)


def _covered(options: dict[str, Any], latent: torch.Tensor) -> torch.Tensor:
    """Bool mask [H, W] of the latent pixels that an entry of a CONDITIONING applies to."""
    height, width = latent.shape[-2:]
    covered = torch.ones((height, width), dtype=torch.bool)
    if options.get("area") is not None:
        covered[:] = False
        h, w, y, x = area_in_pixels(options["area"], height, width)
        covered[y : y + h, x : x + w] = True
    if options.get("mask") is not None:
        mask = options["mask"].detach().float().cpu()
        mask = torch.nn.functional.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]), (height, width), mode="bilinear")
        covered &= (mask > 0.0).flatten(0, 1).any(dim=0)
    return covered


def copy_outside_inference_mode(value: Any) -> Any:
    """Copy every tensor inside nested lists, tuples and dictionaries; other objects are shared.

    ComfyUI executes prompts in `torch.inference_mode`, whose tensors autograd cannot use. Called outside that mode,
    this function returns ordinary copies.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: copy_outside_inference_mode(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copy_outside_inference_mode(item) for item in value)
    return value


def ordinary_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 copy that autograd can use, unlike tensors created in ComfyUI's inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().to(dtype=torch.float32, copy=True)
