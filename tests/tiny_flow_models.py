"""Flow models with joint attention at a size that a test runs in milliseconds, with random weights: ComfyUI's own
classes in float32 on the CPU. Flux has double and single blocks and rotary embeddings; Stable Diffusion 3.5 medium has
an attention of the image alone beside its first joint attention; Qwen-Image's latents have frames; Lumina 2 and Z-Image
refine the text first; AuraFlow has register tokens; HiDream reads several texts. OmniGen 2 has reference images before
the image, JoyImage the text behind both; Mage-Flow's, Ideogram 4's and Flux.2's image positions are latent pixels. Wan
has cross-attention instead, and is a video model."""

from __future__ import annotations

import dataclasses
from typing import Any

import comfy.ldm.chroma.model
import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import torch
from tiny_models import CONTEXT, POOLED, _draw_weights

CHANNELS = 16
_FLUX = {
    "in_channels": CHANNELS, "out_channels": CHANNELS, "context_in_dim": CONTEXT, "hidden_size": 64, "mlp_ratio": 4.0,
    "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2,
    "qkv_bias": True,
}  # fmt: skip
_LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": CHANNELS, "n_layers": 2, "n_refiner_layers": 1,
    "multiple_of": 32, "qk_norm": True, "cap_feat_dim": CONTEXT, "axes_dims": [8, 12, 12], "axes_lens": [300, 512, 512],
}  # fmt: skip


def flux(
    seed: int = 0, output_gain: float = 1.0, guidance_embed: bool = True, base: Any = comfy.model_base.Flux
) -> comfy.model_patcher.ModelPatcher:
    network = {**_FLUX, "image_model": "flux", "vec_in_dim": POOLED, "guidance_embed": guidance_embed}
    network |= _newer_than_0_3_75(comfy.ldm.flux.model.FluxParams, txt_ids_dims=[])
    return _patcher(comfy.supported_models.Flux, base, network, seed, output_gain)


def flux2(seed: int = 0, output_gain: float = 1.0) -> comfy.model_patcher.ModelPatcher:
    """As Flux.2 Klein: one modulation for all blocks, no pooled vector, four axes, and texts of at least 512 tokens."""
    network = {
        **_FLUX, "image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1, "vec_in_dim": None,
        "mlp_ratio": 3.0, "axes_dim": [8, 8, 8, 8], "theta": 2000, "qkv_bias": False, "guidance_embed": False,
        "global_modulation": True, "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index",
        "ref_index_scale": 10.0,
    }  # fmt: skip
    network |= _newer_than_0_3_75(comfy.ldm.flux.model.FluxParams, txt_ids_dims=[3])
    return _patcher(comfy.supported_models.Flux2, comfy.model_base.Flux2, network, seed, output_gain)


def wan(seed: int = 0, output_gain: float = 1.0) -> comfy.model_patcher.ModelPatcher:
    """A video model, for one frame: cross-attention to the text."""
    network = {
        "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "in_dim": CHANNELS, "out_dim": CHANNELS,
        "dim": 64, "ffn_dim": 128, "num_heads": 2, "num_layers": 2, "text_dim": CONTEXT, "freq_dim": 32,
    }  # fmt: skip
    return _patcher(comfy.supported_models.WAN21_T2V, comfy.model_base.WAN21, network, seed, output_gain)


def chroma(seed: int = 0, output_gain: float = 1.0) -> comfy.model_patcher.ModelPatcher:
    network = {**_FLUX, "image_model": "chroma", "in_dim": 64, "out_dim": 64, "hidden_dim": 32, "n_layers": 1}
    network |= {"in_channels": 4 * CHANNELS, "out_channels": 4 * CHANNELS}
    network |= _newer_than_0_3_75(comfy.ldm.chroma.model.ChromaParams, txt_ids_dims=[], vec_in_dim=None)
    return _patcher(comfy.supported_models.Chroma, comfy.model_base.Chroma, network, seed, output_gain)


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


def qwen_image(seed: int = 0, output_gain: float = 1.0) -> comfy.model_patcher.ModelPatcher:
    network = {
        "image_model": "qwen_image", "patch_size": 2, "in_channels": 4 * CHANNELS, "out_channels": CHANNELS,
        "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": CONTEXT,
        "axes_dims_rope": (8, 12, 12),
    }  # fmt: skip
    return _patcher(comfy.supported_models.QwenImage, comfy.model_base.QwenImage, network, seed, output_gain)


def lumina2(seed: int = 0, output_gain: float = 1.0) -> comfy.model_patcher.ModelPatcher:
    network = {**_LUMINA, "dim": 64, "n_heads": 2, "n_kv_heads": 1}
    return _patcher(comfy.supported_models.Lumina2, comfy.model_base.Lumina2, network, seed, output_gain)


def z_image(seed: int = 0, output_gain: float = 1.0, **changes: Any) -> comfy.model_patcher.ModelPatcher:
    network = {**_LUMINA, "dim": 256, "n_heads": 8, "n_kv_heads": 8, "z_image_modulation": True}
    network |= {"pad_tokens_multiple": 32, "time_scale": 1000.0, **changes}
    return _patcher(comfy.supported_models.ZImage, comfy.model_base.Lumina2, network, seed, output_gain)


def aura_flow(seed: int = 0, output_gain: float = 1.0) -> comfy.model_patcher.ModelPatcher:
    network = {
        "in_channels": 4, "out_channels": 4, "patch_size": 2, "dim": 64, "n_layers": 2,
        "n_double_layers": 1, "n_heads": 2, "global_conddim": 64, "cond_seq_dim": CONTEXT, "max_seq": 64,
    }  # fmt: skip
    return _patcher(comfy.supported_models.AuraFlow, comfy.model_base.AuraFlow, network, seed, output_gain)


def hidream(seed: int = 0, output_gain: float = 1.0) -> comfy.model_patcher.ModelPatcher:
    """Takes a text of a language model with three layers beside the embedding."""
    network = {
        "image_model": "hidream", "patch_size": 2, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 1,
        "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
        "caption_channels": [CONTEXT, CONTEXT], "text_emb_dim": POOLED, "num_routed_experts": 2,
        "num_activated_experts": 1, "axes_dims_rope": (8, 12, 12), "max_resolution": (32, 32),
        "llama_layers": [0, 1, 2],
    }  # fmt: skip
    return _patcher(comfy.supported_models.HiDream, comfy.model_base.HiDream, network, seed, output_gain)


def omnigen2(seed: int = 0, output_gain: float = 1.0) -> comfy.model_patcher.ModelPatcher:
    class WithAMask(comfy.model_base.Omnigen2):
        """The text encoder returns a mask, without which the model does not run."""

        def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
            ones = torch.ones(kwargs["cross_attn"].shape[:2], dtype=torch.int64)
            return super().extra_conds(**{"attention_mask": ones[:1], **kwargs})

    network = {
        "image_model": "omnigen2", "patch_size": 2, "in_channels": CHANNELS, "hidden_size": 128, "num_layers": 2,
        "num_refiner_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 32,
        "axes_dim_rope": (8, 12, 12), "text_feat_dim": CONTEXT,
    }  # fmt: skip
    return _patcher(comfy.supported_models.Omnigen2, WithAMask, network, seed, output_gain)


def mage_flow(seed: int = 0, output_gain: float = 1.0) -> comfy.model_patcher.ModelPatcher:
    network = {
        "image_model": "mage_flow", "in_channels": 128, "out_channels": 128, "num_layers": 2, "attention_head_dim": 32,
        "num_attention_heads": 2, "joint_attention_dim": CONTEXT, "axes_dims_rope": (8, 12, 12),
    }  # fmt: skip
    return _patcher(comfy.supported_models.MageFlow, comfy.model_base.MageFlow, network, seed, output_gain)


def krea2(seed: int = 0, output_gain: float = 1.0, **changes: Any) -> comfy.model_patcher.ModelPatcher:
    network = {
        "image_model": "krea2", "features": 64, "tdim": 32, "txtdim": CONTEXT // 2, "txtlayers": 2, "heads": 2,
        "kvheads": 1, "multiplier": 2, "layers": 2, "patch": 2, "channels": CHANNELS, "txtheads": 2, "txtkvheads": 2,
        **changes,
    }  # fmt: skip
    return _patcher(comfy.supported_models.Krea2, comfy.model_base.Krea2, network, seed, output_gain)


def joyimage(seed: int = 0, output_gain: float = 1.0) -> comfy.model_patcher.ModelPatcher:
    network = {
        "image_model": "joyimage", "in_channels": CHANNELS, "hidden_size": 64, "num_attention_heads": 2,
        "text_dim": CONTEXT, "num_layers": 2, "rope_dim_list": [8, 12, 12],
    }  # fmt: skip
    return _patcher(comfy.supported_models.JoyImage, comfy.model_base.JoyImage, network, seed, output_gain)


def ideogram4(seed: int = 0, output_gain: float = 1.0) -> comfy.model_patcher.ModelPatcher:
    network = {
        "image_model": "ideogram4", "in_channels": 128, "num_layers": 2, "num_attention_heads": 2,
        "attention_head_dim": 32, "intermediate_size": 64, "adaln_dim": 32, "llm_features_dim": CONTEXT,
        "mrope_section": [6, 5, 5],
    }  # fmt: skip
    return _patcher(comfy.supported_models.Ideogram4, comfy.model_base.Ideogram4, network, seed, output_gain)


NEWER: dict[str, Any] = {
    name: make
    for name, make, base in (
        ("mage_flow", mage_flow, "MageFlow"), ("krea2", krea2, "Krea2"), ("joyimage", joyimage, "JoyImage"),
        ("ideogram4", ideogram4, "Ideogram4"),
    )
    if hasattr(comfy.model_base, base)
}  # fmt: skip
"""Families that an engine need not have."""
FAMILIES: dict[str, Any] = {"flux": flux, "sd3": sd3}
"""Two families with all that tests of a technique need to meet."""
ALL: dict[str, Any] = {
    **FAMILIES, "chroma": chroma, "qwen_image": qwen_image, "lumina2": lumina2, "z_image": z_image,
    "aura_flow": aura_flow, "flux2": flux2, "wan": wan,
}  # fmt: skip
JOINT: dict[str, Any] = {name: make for name, make in ALL.items() if name != "wan"}


def latent(seed: int, batch: int = 1, height: int = 8, width: int = 8, channels: int = CHANNELS) -> torch.Tensor:
    """An image's latent in the scale of LATENT sockets."""
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def latent_for(model: Any, seed: int, batch: int = 1) -> torch.Tensor:
    """An image's latent with the model's channels and frames."""
    latent_format = model.get_model_object("latent_format")
    made = latent(seed, batch, channels=latent_format.latent_channels)
    return made.unsqueeze(2) if latent_format.latent_dimensions == 3 else made


def _newer_than_0_3_75(parameters: Any, **fields: Any) -> dict[str, Any]:
    """The fields that this engine's class has."""
    known = {field.name for field in dataclasses.fields(parameters)}
    return {name: value for name, value in fields.items() if name in known}


def _patcher(
    supported: Any, base: Any, network: dict[str, Any], seed: int, output_gain: float
) -> comfy.model_patcher.ModelPatcher:
    config = supported(network)
    config.unet_config.update(network)  # in place of the family's own sizes
    config.set_inference_dtype(torch.float32, None)
    model = base(config, device=torch.device("cpu"))
    _draw_weights(model, seed)
    with torch.no_grad():
        for name, parameter in model.diffusion_model.named_parameters():
            if any(norm in name for norm in ("query_norm", "key_norm", "ln_q", "ln_k", "q_norm", "k_norm")):
                parameter.fill_(2.0)  # so that attention is not even
        for name, buffer in model.diffusion_model.named_buffers():
            if name == "pos_embed":
                buffer.normal_(generator=torch.Generator().manual_seed(seed))
        for parameter in _last_layer(model.diffusion_model).parameters():
            parameter.mul_(output_gain)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)


def _last_layer(network: Any) -> torch.nn.Module:
    for name in ("final_layer.linear", "proj_out", "final_linear", "last.linear", "norm_out.linear_2", "head.head"):
        try:
            return network.get_submodule(name)
        except AttributeError:
            continue
    raise LookupError(f"the last layer of {type(network).__name__} is unknown")
