"""The demo world's networks: small versions of ComfyUI's own classes, whose weights its stock loader can read.

- Autoencoder: the TAESD layout, the only small autoencoder that the stock checkpoint loader supports.
- UNet and text encoder: Stable Diffusion 1.x's, narrower; the tokenizer is CLIP's own.
- Flow transformer: Flux's without its guidance embedding, narrower.

Needs ComfyUI on ``sys.path`` (see ``demo_world/__main__.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CONTEXT_DIM = 128
LATENT_CHANNELS = 4
# SD 1.x's latent scale: the autoencoder's output times this has unit variance.
LATENT_SCALE = 0.18215

UNET_CONFIG: dict = {
    "image_size": 16,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "model_channels": 128,
    "channel_mult": [1, 1, 2],
    "num_res_blocks": [1, 1, 1],
    "transformer_depth": [1, 1, 1],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": 4,
    "num_head_channels": -1,
    "context_dim": CONTEXT_DIM,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
}
FLOW_CONFIG: dict = {
    "image_model": "flux",
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "patch_size": 1,  # 16x16 image tokens: as fine as the UNet's attention, since masks are read from it
    "hidden_size": 192,
    "num_heads": 6,
    "axes_dim": [8, 12, 12],
    "depth": 2,
    "depth_single_blocks": 5,
    "context_in_dim": CONTEXT_DIM,
    "vec_in_dim": CONTEXT_DIM,
    "mlp_ratio": 4.0,
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
}
FLOW_TOKENS = 32
"""Least number of text tokens of the flow transformer; every caption of the training set fits in them."""
TEXT_CONFIG: dict = {
    "hidden_size": CONTEXT_DIM,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 512,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
    "vocab_size": 49408,
    "layer_norm_eps": 1e-5,
    "projection_dim": CONTEXT_DIM,
}


def initialize(module: nn.Module) -> nn.Module:
    """Give ComfyUI's uninitialized layers PyTorch's standard initialization and make every parameter trainable."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
    return module.requires_grad_(True)


def make_autoencoder() -> nn.Module:
    """TAESD's layout with SD 1.x's latent scale: ``encode`` of images in [-1, 1], ``decode`` back."""
    from comfy.taesd.taesd import TAESD

    autoencoder = initialize(TAESD(latent_channels=LATENT_CHANNELS))
    # The last convolution of a residual block starts at zero, so that the untrained block is the identity.
    for name, parameter in autoencoder.named_parameters():
        if ".conv.4." in name:
            nn.init.zeros_(parameter)
    autoencoder.vae_scale.data.fill_(LATENT_SCALE)
    autoencoder.vae_scale.requires_grad_(False)
    autoencoder.vae_shift.requires_grad_(False)
    return autoencoder


def make_unet(in_channels: int = LATENT_CHANNELS) -> nn.Module:
    """SD 1.x's UNet at the demo world's size, with the zero initializations of the original."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = dict(UNET_CONFIG, in_channels=in_channels)
    unet = initialize(UNetModel(**config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init))
    for name, parameter in unet.named_parameters():
        if ".out_layers.3." in name or ".proj_out." in name or name.startswith("out.2."):
            nn.init.zeros_(parameter)
    return unet


def make_flow(**changes: Any) -> nn.Module:
    """Flux's transformer at the demo world's size; modulations and output start at zero (Peebles and Xie 2023)."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux, FluxParams

    config = {**FLOW_CONFIG, **changes}
    if "txt_ids_dims" in FluxParams.__annotations__:  # newer engines: axes that count text tokens, none in Flux.1
        config["txt_ids_dims"] = []
    flow = Flux(**config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    for name, parameter in flow.named_parameters():
        if "_norm." in name:
            nn.init.ones_(parameter)
        elif parameter.ndim == 1 or ".lin." in name or name.startswith("final_layer."):
            nn.init.zeros_(parameter)
        elif name.startswith(("time_in.", "vector_in.")):
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.xavier_uniform_(parameter)
    return flow.requires_grad_(True)


def transformer_layers(layers: Any, x: torch.Tensor, heads: int, *, is_causal: bool) -> torch.Tensor:
    """The layers of a CLIP transformer applied to x [B, T, C], differentiable.

    Their own forward pass is for inference: it masks, casts and adds in place.
    """
    batch, length, _ = x.shape
    for layer in layers:
        h = layer.layer_norm1(x)
        attention = layer.self_attn
        q, k, v = (
            project(h).view(batch, length, heads, -1).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        x = x + attention.out_proj(h.transpose(1, 2).reshape(batch, length, -1))
        x = x + layer.mlp(layer.layer_norm2(x))
    return x


class TextEncoder(nn.Module):
    """A small CLIP text transformer of SD 1.x whose token table has only the token ids of the captions.

    Loading the checkpoint expands the table to the whole CLIP vocabulary (``family.whole_token_table``).
    """

    def __init__(self, token_ids: list[int]) -> None:
        super().__init__()
        import comfy.clip_model
        import comfy.ops

        self.token_ids = token_ids
        operations = comfy.ops.disable_weight_init
        self.clip = comfy.clip_model.CLIPTextModel(dict(TEXT_CONFIG), torch.float32, "cpu", operations)
        self.clip.set_input_embeddings(operations.Embedding(len(token_ids), CONTEXT_DIM))
        initialize(self.clip)
        nn.init.normal_(self.clip.text_model.embeddings.token_embedding.weight, std=0.3)
        nn.init.normal_(self.clip.text_model.embeddings.position_embedding.weight, std=0.1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the compact table [B, T] -> embeddings [B, T, CONTEXT_DIM], the context of SD 1.x."""
        model = self.clip.text_model
        x = model.embeddings.token_embedding(rows, out_dtype=torch.float32)
        x = x + model.embeddings.position_embedding.weight[: rows.shape[1]]
        x = transformer_layers(model.encoder.layers, x, TEXT_CONFIG["num_attention_heads"], is_causal=True)
        return model.final_layer_norm(x)
