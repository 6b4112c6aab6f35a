"""One tiny network of each of ComfyUI's classes with joint attention, with random weights in float32 on the CPU, and
where text and image stand in its sequence for 8 tokens and a latent of 7x12, found by hand."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import comfy.ldm.chroma.model
import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import torch
from tiny_models import CONTEXT, POOLED, TOKENS, _draw_weights

HEIGHT, WIDTH = 7, 12
CELLS = 4 * 6
_QUERY_AND_KEY_NORMS = ("query_norm", "key_norm", "ln_q", "ln_k", "norm_q", "norm_k", "q_norm", "k_norm", "q_rms_norm",
                        "k_rms_norm", "norm_added")  # fmt: skip


@dataclass(frozen=True)
class Network:
    """
    Attributes:
        blocks: keys of its blocks in order.
        text, image: first position of text and image in the sequence.
        length: of the sequence.
        channels: of its latents.
        frames: whether latents are [B, C, 1, H, W].
        references: whether reference images follow the image.
    """

    supported: Any
    base: Any
    config: dict[str, Any]
    blocks: tuple[tuple[str, int, int], ...]
    text: int = 0
    image: int = TOKENS
    length: int = TOKENS + CELLS
    channels: int = 16
    frames: bool = False
    references: bool = False

    def model(self, seed: int = 0) -> comfy.model_patcher.ModelPatcher:
        config = self.supported(dict(self.config))
        config.set_inference_dtype(torch.float32, None)
        model = self.base(config, device=torch.device("cpu"))
        _draw_weights(model, seed)
        with torch.no_grad():
            for name, parameter in model.diffusion_model.named_parameters():
                if any(norm in name for norm in _QUERY_AND_KEY_NORMS):
                    parameter.fill_(2.0)  # so that attention is not even
            for name, buffer in model.diffusion_model.named_buffers():
                if name == "pos_embed":
                    buffer.normal_(generator=torch.Generator().manual_seed(seed))
        cpu = torch.device("cpu")
        return comfy.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)

    def latent(self, seed: int, batch: int = 1, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
        drawn = torch.randn(batch, self.channels, height, width, generator=torch.Generator().manual_seed(seed))
        return drawn.unsqueeze(2) if self.frames else drawn


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


def _fields(parameters: Any, **values: Any) -> dict[str, Any]:
    """Those of the values that a version of ComfyUI takes."""
    names = {field.name for field in dataclasses.fields(parameters)}
    return {name: value for name, value in values.items() if name in names}


def _keys(**counts: int) -> tuple[tuple[str, int, int], ...]:
    return tuple((kind, number, 0) for kind, count in counts.items() for number in range(count))


_LIKE_FLUX: dict[str, Any] = {
    "context_in_dim": CONTEXT, "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2,
    "depth_single_blocks": 2, "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2, "qkv_bias": True,
}  # fmt: skip
_LIKE_LUMINA: dict[str, Any] = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "n_layers": 2, "n_refiner_layers": 1,
    "multiple_of": 32, "qk_norm": True, "cap_feat_dim": CONTEXT, "axes_dims": [8, 12, 12], "axes_lens": [64, 64, 64],
}  # fmt: skip
_PADDED = 32

NETWORKS = {
    "flux": Network(
        comfy.supported_models.Flux,
        comfy.model_base.Flux,
        {"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED, "guidance_embed": True,
         **_LIKE_FLUX, **_fields(comfy.ldm.flux.model.FluxParams, txt_ids_dims=[])},
        _keys(double=2, single=2),
        references=True,
    ),
    "chroma": Network(
        comfy.supported_models.Chroma,
        comfy.model_base.Chroma,
        {"image_model": "chroma", "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 64, "hidden_dim": 32,
         "n_layers": 1, **_LIKE_FLUX, **_fields(comfy.ldm.chroma.model.ChromaParams, txt_ids_dims=[], vec_in_dim=None)},
        _keys(double=2, single=2),
    ),
    "sd3": Network(
        comfy.supported_models.SD3,
        comfy.model_base.SD3,
        {"input_size": None, "patch_size": 2, "in_channels": 16, "depth": 2, "num_patches": 256,
         "pos_embed_max_size": 16, "adm_in_channels": POOLED, "qk_norm": "rms", "x_block_self_attn_layers": [0],
         "context_embedder_config": {"target": "torch.nn.Linear",
                                     "params": {"in_features": CONTEXT, "out_features": 128}}},
        _keys(double=2),
    ),
    "qwen": Network(
        comfy.supported_models.QwenImage,
        comfy.model_base.QwenImage,
        {"image_model": "qwen_image", "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 3,
         "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": CONTEXT,
         "axes_dims_rope": (8, 12, 12)},
        _keys(double=3),
        frames=True,
        references=True,
    ),
    "lumina": Network(
        comfy.supported_models.Lumina2,
        comfy.model_base.Lumina2,
        {**_LIKE_LUMINA, "dim": 64, "n_heads": 2, "n_kv_heads": 1},
        _keys(double=2),
    ),
    "z_image": Network(
        comfy.supported_models.ZImage,
        comfy.model_base.Lumina2,
        {**_LIKE_LUMINA, "dim": 256, "n_heads": 8, "n_kv_heads": 8, "z_image_modulation": True,
         "pad_tokens_multiple": _PADDED, "time_scale": 1000.0},
        _keys(double=2),
        image=_PADDED,
        length=2 * _PADDED,
    ),
    "auraflow": Network(
        comfy.supported_models.AuraFlow,
        comfy.model_base.AuraFlow,
        {"in_channels": 4, "out_channels": 4, "patch_size": 2, "dim": 64, "n_layers": 3, "n_double_layers": 1,
         "n_heads": 2, "global_conddim": 64, "cond_seq_dim": CONTEXT, "max_seq": 64},
        _keys(double=1, single=2),
        text=8,
        image=8 + TOKENS,
        length=8 + TOKENS + CELLS,
        channels=4,
    ),
    "hidream": Network(
        comfy.supported_models.HiDream,
        comfy.model_base.HiDream,
        {"image_model": "hidream", "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 1,
         "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
         "caption_channels": [CONTEXT, CONTEXT], "text_emb_dim": POOLED, "num_routed_experts": 2,
         "num_activated_experts": 1, "axes_dims_rope": (8, 12, 12), "max_resolution": (32, 32),
         "llama_layers": [0, 1, 2]},
        _keys(double=1, single=2),
        text=CELLS,
        image=0,
        length=CELLS + TOKENS + 2 * 5,
    ),
}  # fmt: skip
