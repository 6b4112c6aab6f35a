"""Where text and image stand in the joint sequence of the networks of `tiny_flow_models`, for 8 tokens and a latent of
7x12, found by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import tiny_flow_models
import torch
from tiny_models import CONTEXT, POOLED, TOKENS

HEIGHT, WIDTH = 7, 12
CELLS = 4 * 6
_QUERY_AND_KEY_NORMS = ("query_norm", "key_norm", "ln_q", "ln_k", "norm_q", "norm_k", "q_norm", "k_norm", "q_rms_norm",
                        "k_rms_norm", "norm_added")  # fmt: skip


@dataclass(frozen=True)
class Network:
    """
    Attributes:
        make: its model, from a seed.
        blocks: keys of its blocks in order.
        text, image: first position of text and image in the sequence.
        length: of the sequence.
        references: whether reference images follow the image.
    """

    make: Callable[..., comfy.model_patcher.ModelPatcher]
    blocks: tuple[tuple[str, int, int], ...]
    text: int = 0
    image: int = TOKENS
    length: int = TOKENS + CELLS
    references: bool = False

    def model(self) -> comfy.model_patcher.ModelPatcher:
        model = self.make()
        with torch.no_grad():
            for name, parameter in model.model.diffusion_model.named_parameters():
                if any(norm in name for norm in _QUERY_AND_KEY_NORMS):
                    parameter.fill_(2.0)  # so that attention is not even
        return model

    def latent(self, seed: int, batch: int = 1, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
        shape = tiny_flow_models.latent_for(self.make(), 1).shape[1:-2]
        return torch.randn(batch, *shape, height, width, generator=torch.Generator().manual_seed(seed))


def conditioning(seed: int, batch: int = 1, tokens: int = TOKENS) -> list[Any]:
    """A CONDITIONING with all that any of the networks takes."""
    generator = torch.Generator().manual_seed(seed)
    return [[
        torch.randn(batch, tokens, CONTEXT, generator=generator),
        {
            "pooled_output": torch.randn(batch, POOLED, generator=generator),
            "conditioning_llama3": torch.randn(batch, 3, 5, CONTEXT, generator=generator),
        },
    ]]  # fmt: skip


def _keys(**counts: int) -> tuple[tuple[str, int, int], ...]:
    return tuple((kind, number, 0) for kind, count in counts.items() for number in range(count))


_MULTIPLE, _REGISTERS, _LLAMA = 32, 8, 5

NETWORKS = {
    "flux": Network(tiny_flow_models.flux, _keys(double=2, single=2), references=True),
    "chroma": Network(tiny_flow_models.chroma, _keys(double=2, single=2)),
    "sd3": Network(tiny_flow_models.sd3, _keys(double=2)),
    "qwen": Network(tiny_flow_models.qwen_image, _keys(double=2), references=True),
    "lumina": Network(tiny_flow_models.lumina2, _keys(double=2)),
    "z_image": Network(tiny_flow_models.z_image, _keys(double=2), image=_MULTIPLE, length=2 * _MULTIPLE),
    "auraflow": Network(
        tiny_flow_models.aura_flow,
        _keys(double=1, single=1),
        text=_REGISTERS,
        image=_REGISTERS + TOKENS,
        length=_REGISTERS + TOKENS + CELLS,
    ),
    "hidream": Network(
        tiny_flow_models.hidream,
        _keys(double=1, single=2),
        text=CELLS,
        image=0,
        length=CELLS + TOKENS + 2 * _LLAMA,
    ),
}
