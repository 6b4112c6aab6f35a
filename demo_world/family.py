"""Registration of the demo world's Stable Diffusion 1.x, InstructPix2Pix and Flux with ComfyUI's stock loader.

The loader searches the list ``comfy.supported_models.models`` in order for a checkpoint's family. The demo world's
entries require a context width of 128, which no published model has, so they do not affect other checkpoints. The entry
with eight input channels comes before its base, which accepts any number, and all come before Flux Schnell, which
accepts any width. With the stock loader, workflows start with the node that users know, in which they select their own
checkpoint.

The file contains the 63 trained rows of CLIP's token table. The other rows, which would add a fifth to its size, are
generated from a seed while loading.
"""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import torch

from .networks import CONTEXT_DIM, FLOW_CONFIG, FLOW_TOKENS, TEXT_CONFIG, UNET_CONFIG

TOKEN_TABLE = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
TOKEN_IDS, TOKEN_MEAN, TOKEN_DEVIATION = (f"demo_world.token_{name}" for name in ("ids", "mean", "deviation"))
"""Keys of the checkpoint: token ids of the trained rows, and mean and deviation of the other rows by channel."""


def whole_token_table(
    rows: torch.Tensor, token_ids: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor
) -> torch.Tensor:
    """CLIP's token table [49408, C] from the trained rows [T, C] of ``token_ids`` [T].

    The other rows are random, with mean ``mean`` [C] and standard deviation 0.3 ``deviation`` [C]; they are the same at
    every call.
    """
    noise = torch.randn(TEXT_CONFIG["vocab_size"], CONTEXT_DIM, generator=torch.Generator().manual_seed(0))
    table = (mean + noise * deviation * 0.3).to(rows.dtype)
    table[token_ids.long()] = rows
    return table


class DemoWorldSDTokenizer(comfy.sd1_clip.SDTokenizer):
    """CLIP's tokenizer with another width of textual inversion embeddings."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict | None = None) -> None:
        super().__init__(
            embedding_directory=embedding_directory, embedding_size=CONTEXT_DIM, tokenizer_data=tokenizer_data or {}
        )


class DemoWorldTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict | None = None) -> None:
        super().__init__(
            embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {}, tokenizer=DemoWorldSDTokenizer
        )


class DemoWorldSDClipModel(comfy.sd1_clip.SDClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=dict(TEXT_CONFIG),
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class DemoWorldClipModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=DemoWorldSDClipModel)


class DemoWorldFlowClipModel(DemoWorldClipModel):
    """With the tokens that the flow transformer was trained on: as many as the prompt has, at least ``FLOW_TOKENS``."""

    def encode_token_weights(self, token_weight_pairs: dict[str, list]) -> tuple:
        embeddings, *rest = super().encode_token_weights(token_weight_pairs)
        chunks = token_weight_pairs[self.clip_name]
        if len(chunks) == 1:
            is_end = [isinstance(token, int) and token == TEXT_CONFIG["eos_token_id"] for token, *_ in chunks[0]]
            embeddings = embeddings[:, : max(FLOW_TOKENS, is_end.index(True) + 1)]
        return embeddings, *rest


class DemoWorld(comfy.supported_models.SD15):
    """SD 1.x (epsilon prediction, its noise schedule and latent format) with a narrower UNet and text encoder."""

    unet_config = {
        "context_dim": CONTEXT_DIM,
        "model_channels": UNET_CONFIG["model_channels"],
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
    }
    unet_extra_config = {"num_heads": UNET_CONFIG["num_heads"], "num_head_channels": -1}

    def process_clip_state_dict(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if TOKEN_IDS in state_dict:  # not in checkpoints saved by ComfyUI, which contain the whole table
            kept = [state_dict.pop(key) for key in (TOKEN_IDS, TOKEN_MEAN, TOKEN_DEVIATION)]
            state_dict[TOKEN_TABLE] = whole_token_table(state_dict[TOKEN_TABLE], *kept)
        return super().process_clip_state_dict(state_dict)

    def clip_target(self, state_dict: dict | None = None) -> comfy.supported_models_base.ClipTarget:
        return comfy.supported_models_base.ClipTarget(DemoWorldTokenizer, DemoWorldClipModel)


class DemoWorldInstructPix2Pix(DemoWorld):
    """With the latent of a source image as additional input, like ComfyUI's SD15_instructpix2pix."""

    unet_config = {**DemoWorld.unet_config, "in_channels": 8}

    def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> comfy.model_base.BaseModel:
        return comfy.model_base.SD15_instructpix2pix(self, device=device)


class DemoWorldFlow(DemoWorld, comfy.supported_models.FluxSchnell):
    """Flux without guidance embedding, narrower, with Stable Diffusion's text encoder, latents and key prefixes."""

    unet_config = {key: FLOW_CONFIG[key] for key in ("image_model", "guidance_embed", "context_in_dim", "hidden_size")}
    unet_extra_config = {
        key: FLOW_CONFIG[key] for key in ("in_channels", "out_channels", "patch_size", "num_heads", "axes_dim")
    }
    vae_key_prefix = DemoWorld.vae_key_prefix
    text_encoder_key_prefix = DemoWorld.text_encoder_key_prefix
    supported_inference_dtypes = DemoWorld.supported_inference_dtypes

    def clip_target(self, state_dict: dict | None = None) -> comfy.supported_models_base.ClipTarget:
        return comfy.supported_models_base.ClipTarget(DemoWorldTokenizer, DemoWorldFlowClipModel)


def register() -> None:
    """Insert the families once, even if the pack is imported under several names."""
    families = comfy.supported_models.models
    for family in (DemoWorldInstructPix2Pix, DemoWorld, DemoWorldFlow):
        if not any(other.__name__ == family.__name__ for other in families):
            families.insert(families.index(comfy.supported_models.FluxSchnell), family)
