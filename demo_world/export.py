"""Puts the trained parts into one checkpoint that ComfyUI's stock loader reads, and takes them out again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .networks import TextEncoder

CHECKPOINT_NAME = "identity-edit-demo.safetensors"
UNET, TEXT, AUTOENCODER = "model.diffusion_model.", "cond_stage_model.transformer.", "first_stage_model."
TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"
WEIGHTS_FOLDER = Path(__file__).parent / "weights"


def write_weights(
    path: Path, state: dict[str, torch.Tensor], title: str, metadata: dict[str, str] | None = None
) -> None:
    """Write weights in fp16 with their title and licence in the header, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    header = {"format": "pt", "modelspec.title": f"ComfyUI-IdentityEdit {title}", "modelspec.license": "Apache-2.0"}
    half = {name: value.to(torch.float16).contiguous() for name, value in state.items()}
    save_file(half, temporary, metadata=header | (metadata or {}))
    os.replace(temporary, path)


def export_checkpoint(folder: Path, destination: Path = WEIGHTS_FOLDER / CHECKPOINT_NAME) -> Path:
    """Write ``destination`` (fp16) from ``folder/autoencoder.pt`` and ``folder/unet.pt``, whole or not at all."""
    autoencoder = torch.load(folder / "autoencoder.pt", weights_only=True)
    trained = torch.load(folder / "unet.pt", weights_only=True)
    text_encoder = TextEncoder(trained["token_ids"].tolist())
    text_encoder.load_state_dict(trained["text_encoder"])
    state = {UNET + name: value for name, value in trained["unet"].items()}
    state |= {TEXT + name: v for name, v in text_encoder.full_state_dict().items()}
    state |= {AUTOENCODER + name: value for name, value in autoencoder.items()}
    # The rows of the table that were trained; the others are padding.
    metadata = {"demo_world.token_ids": json.dumps(trained["token_ids"].tolist())}
    state = {name: value for name, value in state.items() if "text_projection" not in name}
    write_weights(destination, state, "demo world", metadata)
    return destination


def unpack_checkpoint(folder: Path, source: Path = WEIGHTS_FOLDER / CHECKPOINT_NAME) -> None:
    """The inverse of ``export_checkpoint``: write ``folder/autoencoder.pt`` and ``folder/unet.pt``, to train on."""
    with safe_open(source, framework="pt") as file:
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        token_ids = torch.tensor(json.loads(file.metadata()["demo_world.token_ids"]), dtype=torch.int32)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    text = part(TEXT)
    text[TOKEN_TABLE] = text[TOKEN_TABLE][token_ids]
    text_encoder = {f"clip.{name}": value for name, value in text.items()}
    text_encoder["clip.text_projection.weight"] = torch.eye(text[TOKEN_TABLE].shape[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(part(AUTOENCODER), folder / "autoencoder.pt")
    torch.save({"unet": part(UNET), "text_encoder": text_encoder, "token_ids": token_ids}, folder / "unet.pt")
