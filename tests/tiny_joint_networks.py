"""Where text and image stand in the joint sequence of the networks of `tiny_flow_models`, for 8 tokens and a latent of
7x12, found by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_patcher
import tiny_flow_models
import torch
from tiny_models import CONTEXT, POOLED, TOKENS

HEIGHT, WIDTH = 7, 12
CELLS = 4 * 6
_QUERY_AND_KEY_NORMS = ("query_norm", "key_norm", "ln_q", "ln_k", "norm_q", "norm_k", "q_norm", "k_norm", "q_rms_norm",
                        "k_rms_norm", "norm_added", "qnorm", "knorm")  # fmt: skip


@dataclass(frozen=True)
class Network:
    """
    Attributes:
        make: its model, from a seed.
        blocks: keys of its blocks in order.
        text, image: first position of text and image in the sequence.
        length: of the sequence.
        references: where reference images are in the sequence: behind the image, before it, or None.
        patch: latent pixels per image position and side.
    """

    make: Callable[..., comfy.model_patcher.ModelPatcher]
    blocks: tuple[tuple[str, int, int], ...]
    text: int = 0
    image: int = TOKENS
    length: int = TOKENS + CELLS
    references: str | None = None
    patch: int = 2

    def model(self) -> comfy.model_patcher.ModelPatcher:
        model = self.make()
        with torch.no_grad():
            for name, parameter in model.model.diffusion_model.named_parameters():
                if any(norm in name for norm in _QUERY_AND_KEY_NORMS):
                    parameter.fill_(2.0)  # so that attention is not even
        return model

    def latent(self, seed: int, batch: int = 1, height: int | None = None, width: int | None = None) -> torch.Tensor:
        shape = *tiny_flow_models.latent_for(self.make(), 1).shape[1:-2], height or HEIGHT, width or WIDTH
        if self.patch == 1 and height is None:
            shape = *shape[:-2], 4, 6
        return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


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


BEHIND, BEFORE = "behind", "before"
_MULTIPLE, _REGISTERS, _LLAMA = 32, 8, 5

NETWORKS = {
    "flux": Network(tiny_flow_models.flux, _keys(double=2, single=2), references=BEHIND),
    "chroma": Network(tiny_flow_models.chroma, _keys(double=2, single=2)),
    "sd3": Network(tiny_flow_models.sd3, _keys(double=2)),
    "qwen": Network(tiny_flow_models.qwen_image, _keys(double=2), references=BEHIND),
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
NEWER = {
    "omnigen2": Network(tiny_flow_models.omnigen2, _keys(double=2), references=BEFORE),
    "mage_flow": Network(tiny_flow_models.mage_flow, _keys(double=2), references=BEHIND, patch=1),
    "krea2": Network(partial(tiny_flow_models.krea2, default_ref_method="index"), _keys(single=2), references=BEHIND),
    "joyimage": Network(tiny_flow_models.joyimage, _keys(double=2), text=CELLS, image=0, references=BEHIND),
    "ideogram4": Network(tiny_flow_models.ideogram4, _keys(double=2), patch=1),
}
NEWER = {name: network for name, network in NEWER.items() if name in {"omnigen2", *tiny_flow_models.NEWER}}
"""Those that only the tests of the sequence run on."""
