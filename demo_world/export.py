"""Puts the trained parts into one checkpoint that ComfyUI's stock loader reads."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from .networks import TextEncoder

CHECKPOINT_NAME = "identity-edit-demo.safetensors"
WEIGHTS_FOLDER = Path(__file__).parent / "weights"


def export_checkpoint(folder: Path, destination: Path = WEIGHTS_FOLDER / CHECKPOINT_NAME) -> Path:
    """Write ``destination`` (fp16) from ``folder/autoencoder.pt`` and ``folder/unet.pt``, whole or not at all."""
    autoencoder = torch.load(folder / "autoencoder.pt", weights_only=True)
    trained = torch.load(folder / "unet.pt", weights_only=True)
    text_encoder = TextEncoder(trained["token_ids"].tolist())
    text_encoder.load_state_dict(trained["text_encoder"])
    state = {f"model.diffusion_model.{name}": value for name, value in trained["unet"].items()}
    state |= {f"cond_stage_model.transformer.{name}": v for name, v in text_encoder.full_state_dict().items()}
    state |= {f"first_stage_model.{name}": value for name, value in autoencoder.items()}
    half = {n: v.to(torch.float16).contiguous() for n, v in state.items() if "text_projection" not in n}
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_suffix(".tmp")
    metadata = {"format": "pt", "modelspec.title": "ComfyUI-IdentityEdit demo world", "modelspec.license": "Apache-2.0"}
    save_file(half, temporary, metadata=metadata)
    os.replace(temporary, destination)
    return destination
