"""The memory table of Train Identity Prior's help page, recomputed from networks of full width without memory."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_base
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import pytest
import torch
from identity_edit_pack.pipelines.engine.weights import weight_shapes
from identity_edit_pack.pipelines.training import weights

PAGE = Path(__file__).resolve().parents[2] / "web" / "docs" / "IdentityEditTrainIdentityPrior.md"
COMMON = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "transformer_depth_middle": 1,
    "use_temporal_attention": False, "use_spatial_transformer": True, "legacy": False, "adm_in_channels": None,
}  # fmt: skip
UNETS: dict[str, dict[str, Any]] = {
    "SD 1.5": {
        **COMMON, "num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth": [1] * 6 + [0] * 2,
        "transformer_depth_output": [1] * 9 + [0] * 3, "context_dim": 768, "use_linear_in_transformer": False,
    },
    "SDXL": {
        **COMMON, "num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10,
        "context_dim": 2048, "use_linear_in_transformer": True, "adm_in_channels": 2816, "num_classes": "sequential",
    },
}  # fmt: skip


@pytest.mark.parametrize("family", UNETS)
def test_the_memory_table_is_true(family: str) -> None:
    meta = torch.device("meta")
    supported = comfy.supported_models.SDXL if family == "SDXL" else comfy.supported_models.SD15
    config = supported(dict(UNETS[family]))
    config.unet_config.update(config.unet_extra_config)
    config.set_inference_dtype(torch.float16, None)
    model: Any = (
        comfy.model_base.SDXL(config, device=meta)
        if family == "SDXL"
        else comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.EPS, device=meta)
    )
    encoder = comfy.sdxl_clip.SDXLClipModel if family == "SDXL" else comfy.sd1_clip.SD1ClipModel
    with meta:
        text = encoder(device=meta, dtype=torch.float16)
    networks = 2 * sum(parameter.numel() for each in (model, text) for parameter in each.parameters()) / 1e9
    shapes = weight_shapes(model) | weight_shapes(text)
    rows = re.findall(
        rf"\| {family}, ([^|]+?) \| (\d+) million \| ([\d.]+) GB \| ([\d.]+) GB \| (yes|no) \|", PAGE.read_text()
    )
    assert [name for name, *_ in rows] == ["low rank (16)", "attention layers", "all weights"]
    for name, millions, states, together, fits in rows:
        choice = name.removesuffix(" (16)")
        keys = weights.model_keys(SimpleNamespace(model=model), choice)  # type: ignore[arg-type]
        keys += weights.clip_keys(SimpleNamespace(patcher=SimpleNamespace(model=text)), choice)  # type: ignore[arg-type]
        count = sum(16 * sum(shapes[key]) if choice == weights.LOW_RANK else math.prod(shapes[key]) for key in keys)
        assert int(millions) == round(count / 1e6)
        assert float(states) == pytest.approx(16 * count / 1e9, abs=0.06)
        assert float(together) == pytest.approx(16 * count / 1e9 + networks, abs=0.06)
        assert (fits == "yes") == (16 * count / 1e9 + networks < 22)  # 2 GB for activations, with checkpointing
