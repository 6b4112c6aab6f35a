"""Combining the trained parts into one checkpoint for ComfyUI's stock loader, and splitting it again."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .family import TOKEN_DEVIATION, TOKEN_IDS, TOKEN_MEAN, TOKEN_TABLE
from .networks import CONTEXT_DIM

CHECKPOINT_NAME, FLOW_NAME = "identity-edit-demo.safetensors", "identity-edit-demo-flow.safetensors"
NETWORK, TEXT, AUTOENCODER = "model.diffusion_model.", "cond_stage_model.transformer.", "first_stage_model."
WEIGHTS_FOLDER = Path(__file__).parent / "weights"


def write_weights(
    path: Path,
    state: dict[str, torch.Tensor],
    title: str,
    metadata: dict[str, str] | None = None,
    exact: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write weights atomically in fp16, those of ``exact`` unchanged, with title and license in the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    header = {"format": "pt", "modelspec.title": f"ComfyUI-IdentityEdit {title}", "modelspec.license": "Apache-2.0"}
    half = {name: value.to(torch.float16).contiguous() for name, value in state.items()}
    save_file(half | (exact or {}), temporary, metadata=header | (metadata or {}))
    os.replace(temporary, path)


def export_checkpoint(folder: Path, network: str = "unet", destination: Path | None = None) -> Path:
    """Write one fp16 checkpoint from ``folder``: autoencoder, text encoder and the UNet or the flow transformer.

    Args:
        folder: folder with ``autoencoder.pt``, ``unet.pt`` (which has the text encoder) and, for the flow, ``flow.pt``.
        network: ``"unet"`` or ``"flow"``.
        destination: the file; ``CHECKPOINT_NAME`` or ``FLOW_NAME`` in the weights folder by default.
    """
    autoencoder = torch.load(folder / "autoencoder.pt", weights_only=True)
    trained = torch.load(folder / "unet.pt", weights_only=True)
    rows = trained["text_encoder"]["clip." + TOKEN_TABLE.removeprefix(TEXT)].float()
    if network == "flow":
        flow = torch.load(folder / "flow.pt", weights_only=True)
        # Newer engines call the norms' scales weights; all of them read the older name.
        denoiser = {name.replace("_norm.weight", "_norm.scale"): value for name, value in flow.items()}
    else:
        denoiser = trained["unet"]
    state = {NETWORK + name: value for name, value in denoiser.items()}
    state |= {TEXT + name.removeprefix("clip."): value for name, value in trained["text_encoder"].items()}
    state |= {AUTOENCODER + name: value for name, value in autoencoder.items()}
    state = {name: value for name, value in state.items() if "text_projection" not in name}
    table = {TOKEN_IDS: trained["token_ids"].int(), TOKEN_MEAN: rows.mean(0), TOKEN_DEVIATION: rows.std(0)}
    destination = destination or WEIGHTS_FOLDER / (FLOW_NAME if network == "flow" else CHECKPOINT_NAME)
    write_weights(destination, state, "demo world flow" if network == "flow" else "demo world", exact=table)
    return destination


def unpack_checkpoint(folder: Path, source: Path = WEIGHTS_FOLDER / CHECKPOINT_NAME) -> None:
    """The inverse of ``export_checkpoint``: write ``folder/autoencoder.pt`` and ``folder/unet.pt``."""
    with safe_open(source, framework="pt") as file:
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        token_ids = file.get_tensor(TOKEN_IDS)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    text = part(TEXT)
    text_encoder = {f"clip.{name}": value for name, value in text.items()}
    text_encoder["clip.text_projection.weight"] = torch.eye(CONTEXT_DIM)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(part(AUTOENCODER), folder / "autoencoder.pt")
    torch.save({"unet": part(NETWORK), "text_encoder": text_encoder, "token_ids": token_ids}, folder / "unet.pt")
