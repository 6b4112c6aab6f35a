"""W+ codes and style attentions of random weights, as small as the models of `tiny_models`."""

from __future__ import annotations

from typing import Any

import torch
from identity_edit_pack.attention.style_cross_attention import SEQUENTIAL, layer_sizes, text_layers
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.pidiff.style_attention import StyleAttention, StyleNetwork, parse_row_groups
from identity_edit_pack.pipelines.pidiff.w_plus import WPlus

ROWS, WIDTH = 7, 6
GROUPS = "1-2, 3, 4-5, 6-7"
ENCODER = "tiny encoder"


def w_plus(seed: int = 0, images: int = 1, rows: int = ROWS, width: int = WIDTH) -> WPlus:
    generator = torch.Generator().manual_seed(seed)
    average = torch.randn(rows, width, generator=torch.Generator().manual_seed(99))
    return WPlus(average + torch.randn(images, rows, width, generator=generator), average, ENCODER)


def style_attention(model: Any, kind: str = SEQUENTIAL, seed: int = 0) -> StyleAttention:
    """Of random weights for a model; made where nodes make theirs, outside of inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        sizes = layer_sizes(text_layers(model.get_model_object("diffusion_model")))
        text_width = engine.require(model).text_width
        network = StyleNetwork(parse_row_groups(GROUPS, ROWS), WIDTH, text_width, sizes)
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 1.0 + 0.1 * drawn)
        return StyleAttention(
            network=network.eval().requires_grad_(False),
            kind=kind,
            style_rows=ROWS,
            style_width=WIDTH,
            text_width=text_width,
            encoder=ENCODER,
            pseudo_word="sks",
            model=engine.model_tag(model),
            training={"steps": 1, "images": 1, "learning_rate": 1e-4},
        )
