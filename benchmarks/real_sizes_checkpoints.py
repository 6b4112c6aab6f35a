"""Checkpoints of full width with random weights, which the stock Load Checkpoint recognizes: SD 1.5, SD 2.1 and SDXL.

UNet, text encoders and VAE are ComfyUI's own classes, made on PyTorch's meta device for the names and shapes of their
weights; the weights are drawn, of a size that keeps signals up, and stored in float16 as published checkpoints are.
Beside them a CLIP vision of ViT-L/14's size, and a ControlNet for SD 1.5.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch

COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_temporal_attention": False,
    "use_spatial_transformer": True,
    "legacy": False,
}
SD1_AND_2 = {
    **COMMON,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "adm_in_channels": None,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {**SD1_AND_2, "use_linear_in_transformer": False, "context_dim": 768},
    "sd21": {**SD1_AND_2, "use_linear_in_transformer": True, "context_dim": 1024},
    "sdxl": {
        **COMMON,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "use_linear_in_transformer": True,
        "context_dim": 2048,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
    },
}
VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
POOL = 2**24
"""Normal numbers that are drawn; a weight is a part of them from a place of its own, which is faster than
drawing each."""
POSITIONS = "position_ids"
TELLS_VELOCITY = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
"""ComfyUI takes an SD2 checkpoint for v-prediction when this weight's standard deviation is above 0.09."""


def write_checkpoint(family: str, path: Path, seed: int = 0) -> None:
    """Draw a checkpoint of a family of UNETS and write it."""
    _write({name: tensor for name, tensor in _checkpoint(family).items() if tensor.numel()}, path, seed)


def write_clip_vision(path: Path, seed: int = 0) -> None:
    """Draw a CLIP vision of ViT-L/14's size, as Load CLIP Vision reads it."""
    import comfy.clip_model
    import comfy.clip_vision
    import comfy.ops

    config = json.loads(Path(comfy.clip_vision.__file__).with_name("clip_vision_config_vitl.json").read_text("utf-8"))
    meta = torch.device("meta")
    made = comfy.clip_model.CLIPVisionModelProjection(config, torch.float16, meta, comfy.ops.manual_cast)
    _write(made.state_dict(), path, seed)


def write_untrained_mcdm(model: Any, clip: Any, vae: Any, vision: Any, path: Path, size: int) -> None:
    """An MCDM that was not trained: a checkpoint's weights, and an image embedding as it begins.

    Args:
        size: pixels of the side of its images.
    """
    from identity_edit_pack.pipelines import engine
    from identity_edit_pack.pipelines.engine.edit_model import as_edit_model
    from identity_edit_pack.pipelines.engine.vision import vision_tag
    from identity_edit_pack.pipelines.mcdm import model as mcdm

    edit_model, shape = as_edit_model(model), (4, size // 8, size // 8)
    embedding = mcdm.new_embedding(edit_model, vision, shape, torch.Generator().manual_seed(3), mcdm.IMAGE_TOKENS)
    begun = mcdm.MCDM(embedding, vision_tag(vision), engine.model_tag(edit_model), shape, {})
    path.parent.mkdir(parents=True, exist_ok=True)
    mcdm.save_mcdm(begun, str(path), edit_model, clip, vae, {}, "float16")


def write_controlnet(path: Path, seed: int = 0) -> None:
    """Draw a ControlNet for SD 1.5, as Load ControlNet Model reads it."""
    import comfy.cldm.cldm
    import comfy.ops

    config = {name: value for name, value in UNETS["sd15"].items() if name != "transformer_depth_output"}
    made = comfy.cldm.cldm.ControlNet(
        **config, hint_channels=3, num_heads=8, dtype=torch.float16, device=torch.device("meta"),
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    _write({f"control_model.{name}": tensor for name, tensor in made.state_dict().items()}, path, seed)


def _checkpoint(family: str) -> dict[str, torch.Tensor]:
    """Names and meta tensors of what a checkpoint holds."""
    import comfy.ldm.models.autoencoder
    import comfy.model_base
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.supported_models
    import comfy.text_encoders.sd2_clip

    meta = torch.device("meta")
    config: Any
    if family == "sdxl":
        config, encoder = comfy.supported_models.SDXL(dict(UNETS[family])), comfy.sdxl_clip.SDXLClipModel
    elif family == "sd21":
        config, encoder = comfy.supported_models.SD20(dict(UNETS[family])), comfy.text_encoders.sd2_clip.SD2ClipModel
    else:
        config, encoder = comfy.supported_models.SD15(dict(UNETS[family])), comfy.sd1_clip.SD1ClipModel
    config.unet_config.update(config.unet_extra_config)
    config.set_inference_dtype(torch.float16, None)
    model: Any
    if family == "sdxl":
        model = comfy.model_base.SDXL(config, device=meta)
    else:
        model = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.EPS, device=meta)
    with meta:
        text = encoder(device=meta, dtype=torch.float16)
        vae = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=VAE, embed_dim=4)
    return dict(model.state_dict_for_saving(text.state_dict(), vae.state_dict()))


def _write(shapes: dict[str, torch.Tensor], path: Path, seed: int) -> None:
    """A safetensors file, weight by weight: the library's own function would hold all of SDXL twice, 14 GB."""
    dtypes = {name: torch.int64 if name.endswith(POSITIONS) else torch.float16 for name in shapes}
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in shapes.items():
        begin, end = end, end + tensor.numel() * dtypes[name].itemsize
        kind = "I64" if dtypes[name] == torch.int64 else "F16"
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(POOL, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in shapes.items():
            file.write(_drawn(name, tensor, pool, generator).to(dtypes[name]).numpy().tobytes())
    os.replace(temporary, path)


def _drawn(name: str, like: torch.Tensor, pool: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if name.endswith(POSITIONS):
        return torch.arange(like.shape[-1]).expand(like.shape)
    if name.endswith("logit_scale"):
        return torch.full(like.shape, 4.6)
    if name.endswith(TELLS_VELOCITY):
        return 0.2 * torch.randn(like.shape, generator=generator)
    if like.ndim > 1:
        count = like.numel()
        numbers = pool if count <= POOL // 2 else pool.repeat(-(-count // POOL) + 1)
        begin = int(torch.randint(numbers.numel() - count, (), generator=generator))
        return (numbers[begin : begin + count] * like[0].numel() ** -0.5).view(like.shape)
    is_gain = name.endswith("weight")  # of a normalization
    return torch.full(like.shape, 1.0 if is_gain else 0.0)
