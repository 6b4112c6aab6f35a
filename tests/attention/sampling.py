"""A stock sampling run on a tiny model, and its attention computed in float64 from what the layers get."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import comfy.samplers
import torch
from identity_edit_pack.attention import unet
from identity_edit_pack.tests import tiny_models

SIGMAS = torch.tensor([9.0, 4.0, 1.0, 0.0])
POSITIVE, NEGATIVE, IDENTITY = (tiny_models.conditioning(seed) for seed in (1, 2, 3))
COLUMNS = (1, 2, 5)


def sample(
    model: Any,
    latent: torch.Tensor,
    positive: Any = POSITIVE,
    negative: Any = NEGATIVE,
    cfg: float = 3.0,
    sampler: str = "euler",
) -> torch.Tensor:
    """KSampler's way from noise."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(7))
    return guider.sample(noise, latent, comfy.samplers.sampler_object(sampler), SIGMAS, disable_pbar=True, seed=7)


class Reference:
    """Means of attention maps of a run, from the inputs of the layers and their weights alone, in float64."""

    def __init__(self, model: Any, identity: torch.Tensor, columns: tuple[int, ...]) -> None:
        self.cross: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)
        self.own: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)
        self.model = model.clone()
        self._sides: list[int] = []
        self._identity, self._columns = identity.double(), list(columns)
        self.model.set_model_unet_function_wrapper(self._note_sides)

    def _note_sides(self, apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        self._sides = arguments["cond_or_uncond"]
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    def run(self, latent: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        height, width = latent.shape[-2:]
        hooks = []
        for layer in unet.attention_layers(self.model.get_model_object("diffusion_model")):
            grid = layer.grid(height, width)
            for attention, note in ((layer.block.attn2, self._cross), (layer.block.attn1, self._own)):
                hooks.append(attention.register_forward_pre_hook(self._reader(grid, note)))
        try:
            return sample(self.model, latent, *arguments, **options)
        finally:
            for hook in hooks:
                hook.remove()

    def _reader(self, grid: tuple[int, int], note: Any) -> Any:
        def read(attention: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].double().chunk(len(self._sides))
            for side, n in zip(self._sides, rows, strict=True):
                if side == 0:
                    note(attention, n, grid)

        return read

    def _cross(self, attention: Any, n: torch.Tensor, grid: tuple[int, int]) -> None:
        maps = self._softmax(attention, n, self._identity.expand(n.shape[0], -1, -1))
        self.cross[grid].append(maps[:, :, :, self._columns].sum(-1).mean(1).unflatten(1, grid))

    def _own(self, attention: Any, n: torch.Tensor, grid: tuple[int, int]) -> None:
        self.own[grid].append(self._softmax(attention, n, n).mean(1))

    @staticmethod
    def _softmax(attention: Any, n: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """[B, heads, N, T]."""
        q, k = (
            (x @ linear.weight.double().T).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for x, linear in ((n, attention.to_q), (context, attention.to_k))
        )
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)

    def mean_cross(self, grid: tuple[int, int]) -> torch.Tensor:
        return torch.stack(self.cross[grid]).mean(0)

    def mean_own(self, grid: tuple[int, int]) -> torch.Tensor:
        return torch.stack(self.own[grid]).mean(0)
