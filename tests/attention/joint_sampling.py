"""A stock sampling run on a tiny network with joint attention, and what its blocks hand to their attention function."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import comfy.ldm.aura.mmdit
import comfy.ldm.flux.math
import comfy.ldm.hidream.model
import comfy.ldm.lumina.model
import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.ldm.omnigen.omnigen2
import comfy.ldm.qwen_image.model
import comfy.samplers
import pytest
import tiny_joint_networks
import torch

SIGMAS = torch.tensor([1.0, 0.6, 0.0])
POSITIVE, NEGATIVE = tiny_joint_networks.conditioning(1), tiny_joint_networks.conditioning(2)
_ATTENTION = (
    (comfy.ldm.flux.math, "optimized_attention"),
    (comfy.ldm.modules.diffusionmodules.mmdit, "optimized_attention"),
    (comfy.ldm.qwen_image.model, "optimized_attention_masked"),
    (comfy.ldm.lumina.model, "optimized_attention_masked"),
    (comfy.ldm.aura.mmdit, "optimized_attention"),
    (comfy.ldm.hidream.model, "optimized_attention"),
    (comfy.ldm.omnigen.omnigen2, "optimized_attention_masked"),
    *(
        (sys.modules[module], name)
        for module, name in (
            ("comfy.ldm.krea2.model", "optimized_attention_masked"),
            ("comfy.ldm.joyimage.model", "optimized_attention"),
            ("comfy.ldm.ideogram4.model", "optimized_attention_masked"),
        )
        if module in sys.modules  # newer engines import them
    ),
)


@dataclass
class Call:
    """Queries, keys and values [B, heads, N, d], mask and output [B, N, channels] of an attention, in float64."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    output: torch.Tensor

    def probabilities(self) -> torch.Tensor:
        """[B, N, N], mean over heads."""
        logits = self.q @ self.k.transpose(-1, -2) / self.q.shape[-1] ** 0.5
        return (logits if self.mask is None else logits + self.mask).softmax(-1).mean(1)


def calls_noted_by(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """A list to which every call of the attention function by a block is appended."""
    calls: list[Call] = []

    def noting(function: Any) -> Any:
        def attention(q: Any, k: Any, v: Any, heads: int, mask: Any = None, **kwargs: Any) -> Any:
            output = function(q, k, v, heads, mask=mask, **kwargs)
            apart = [each if kwargs.get("skip_reshape") else each.flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
                     for each in (q, k, v)]  # fmt: skip
            apart = [each.repeat_interleave(apart[0].shape[1] // each.shape[1], dim=1) for each in apart]
            calls.append(Call(*(each.detach().double() for each in apart), mask, output.detach().double()))
            return output

        return attention

    for module, name in _ATTENTION:
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    return calls


def noise_of(latent: torch.Tensor) -> torch.Tensor:
    return torch.randn(latent.shape, generator=torch.Generator().manual_seed(7))


def sample(
    model: Any,
    latent: torch.Tensor,
    positive: Any = POSITIVE,
    cfg: float = 3.0,
    noise: torch.Tensor | None = None,
    sigmas: torch.Tensor = SIGMAS,
    guider_class: Any = comfy.samplers.CFGGuider,
) -> torch.Tensor:
    """KSampler's way from noise."""
    guider = guider_class(model)
    guider.set_conds(positive, NEGATIVE)
    guider.set_cfg(cfg)
    noise = noise_of(latent) if noise is None else noise
    return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=7)
