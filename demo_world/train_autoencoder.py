"""Trains the demo world's autoencoder (TAESD layout, 8x down, 4 latent channels)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from .images import TrainingImages, evaluation_set, to_tensor
from .networks import LATENT_SCALE, make_autoencoder
from .renderer import render
from .training import train

# Noise on the latent while training: neighboring latents decode alike, which a diffusion model's small errors need.
LATENT_NOISE = 0.06


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio [B] in dB of images [B, 3, H, W] in [-1, 1]."""
    return -10 * torch.log10(((a - b) ** 2).mean((1, 2, 3)) / 4)


def reconstruction_loss(decoded: torch.Tensor, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """L1 + L2 + L1 of the gradients, the subject counting twice (its face is a few latent cells)."""
    weight = 1 + masks
    error = decoded - images
    loss = (weight * (error.abs() + error**2)).mean()
    for axis in (2, 3):
        loss = loss + 0.5 * (weight.narrow(axis, 1, weight.shape[axis] - 1) * error.diff(dim=axis).abs()).mean()
    return loss


def evaluation_images(count: int) -> torch.Tensor:
    return torch.stack([to_tensor(render(attributes, seed)[0]) for attributes, seed in evaluation_set(count)])


@torch.no_grad()
def reconstruct(autoencoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([autoencoder.decode(autoencoder.encode(p)) for p in images.split(16)]).clamp(-1, 1)


def train_autoencoder(folder: Path, steps: int, batch_size: int, learning_rate: float, decoder_only: bool) -> None:
    """Train, or go on training, and write ``folder/autoencoder.pt``.

    Args:
        folder: of the checkpoints.
        steps: optimizer steps in all.
        decoder_only: keep the encoder of ``folder/autoencoder.pt`` as it is, so that latents made with it stay valid.
    """
    torch.manual_seed(0)
    autoencoder = make_autoencoder()
    if decoder_only:
        autoencoder.load_state_dict(torch.load(folder / "autoencoder.pt", weights_only=True))
        autoencoder.taesd_encoder.requires_grad_(False)
    autoencoder.to(memory_format=torch.channels_last)
    batches = iter(DataLoader(TrainingImages(seed=2 if decoder_only else 1), batch_size=batch_size, num_workers=1))
    held_out = evaluation_images(48)

    def loss_of(step: int) -> torch.Tensor:
        images, masks, _ = next(batches)
        images = images.to(memory_format=torch.channels_last)
        latents = autoencoder.taesd_encoder(images * 0.5 + 0.5).float()
        decoded = autoencoder.taesd_decoder(latents + LATENT_NOISE * torch.randn_like(latents)) * 2 - 1
        spread = latents.mean((0, 2, 3)) ** 2 + (latents.std((0, 2, 3)) - 1) ** 2
        return reconstruction_loss(decoded.float(), images, masks) + 0.01 * spread.sum()

    def evaluate() -> str:
        with torch.autocast("cpu", torch.bfloat16):
            decoded = reconstruct(autoencoder, held_out).float()
        latents = torch.cat([autoencoder.encode(p) for p in held_out.split(16)]).detach() * LATENT_SCALE
        return f"PSNR {psnr(decoded, held_out).mean():.2f} dB, latent std {latents.std((0, 2, 3)).tolist()}"

    name = "autoencoder_decoder_state.pt" if decoder_only else "autoencoder_state.pt"
    train(
        {"autoencoder": autoencoder},
        loss_of,
        steps=steps,
        learning_rate=learning_rate,
        checkpoint=folder / name,
        on_checkpoint=evaluate,
    )
    torch.save(autoencoder.state_dict(), folder / "autoencoder.pt")
    print(evaluate())
