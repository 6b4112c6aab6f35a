"""Flow models with joint attention at a size that a test runs in milliseconds, with random weights: ComfyUI's own
classes in float32 on the CPU, like Flux (double and single blocks, rotary embeddings) and like Stable Diffusion 3.5
medium (joint blocks, the first with attention of the image alone beside it)."""

from __future__ import annotations

import dataclasses
from typing import Any

import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import torch
from tiny_models import CONTEXT, POOLED, _draw_weights

CHANNELS = 16


def flux(seed: int = 0, output_gain: float = 1.0) -> comfy.model_patcher.ModelPatcher:
    network = {
        "image_model": "flux", "in_channels": CHANNELS, "out_channels": CHANNELS, "vec_in_dim": POOLED,
        "context_in_dim": CONTEXT, "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2,
        "depth_single_blocks": 2, "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2, "qkv_bias": True,
        "guidance_embed": True,
    }  # fmt: skip
    if any(field.name == "txt_ids_dims" for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)):
        network["txt_ids_dims"] = []  # newer than 0.3.75
    return _patcher(comfy.supported_models.Flux, comfy.model_base.Flux, network, seed, output_gain)


def sd3(seed: int = 0, output_gain: float = 1.0) -> comfy.model_patcher.ModelPatcher:
    network = {
        "input_size": None, "patch_size": 2, "in_channels": CHANNELS, "depth": 2, "num_patches": 256,
        "pos_embed_max_size": 16, "adm_in_channels": POOLED, "qk_norm": "rms", "x_block_self_attn_layers": [0],
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": CONTEXT, "out_features": 128},
        },
    }  # fmt: skip
    return _patcher(comfy.supported_models.SD3, comfy.model_base.SD3, network, seed, output_gain)


FAMILIES: dict[str, Any] = {"flux": flux, "sd3": sd3}


def latent(seed: int, batch: int = 1, height: int = 8, width: int = 8) -> torch.Tensor:
    """An image's latent in the scale of LATENT sockets."""
    return torch.randn(batch, CHANNELS, height, width, generator=torch.Generator().manual_seed(seed))


def _patcher(
    supported: Any, base: Any, network: dict[str, Any], seed: int, output_gain: float
) -> comfy.model_patcher.ModelPatcher:
    config = supported(network)
    config.set_inference_dtype(torch.float32, None)
    model = base(config, device=torch.device("cpu"))
    _draw_weights(model, seed)
    with torch.no_grad():
        for name, parameter in model.diffusion_model.named_parameters():
            if any(norm in name for norm in ("query_norm", "key_norm", "ln_q", "ln_k")):
                parameter.fill_(2.0)  # so that attention is not even
        for name, buffer in model.diffusion_model.named_buffers():
            if name == "pos_embed":
                buffer.normal_(generator=torch.Generator().manual_seed(seed))
        for parameter in model.diffusion_model.final_layer.linear.parameters():
            parameter.mul_(output_gain)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)
