"""Training of the demo world's autoencoder (TAESD layout, 8x downsampling, 4 latent channels)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import DataLoader

from .images import TrainingImages, evaluation_set, rendered
from .networks import LATENT_SCALE, make_autoencoder
from .training import train

# Noise added to the latent in training, so that small errors of a diffusion model change the decoded image little.
LATENT_NOISE = 0.06


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio [B] in dB of images [B, 3, H, W] in [-1, 1]."""
    return -10 * torch.log10(((a - b) ** 2).mean((1, 2, 3)) / 4)


def reconstruction_loss(decoded: torch.Tensor, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """L1 + L2 + L1 of the gradients; the subject has weight 2, because its face is only a few latent pixels."""
    weight = 1 + masks
    error = decoded - images
    loss = (weight * (error.abs() + error**2)).mean()
    for axis in (2, 3):
        loss = loss + 0.5 * (weight.narrow(axis, 1, weight.shape[axis] - 1) * error.diff(dim=axis).abs()).mean()
    return loss


def train_autoencoder(folder: Path, steps: int, batch_size: int, learning_rate: float, decoder_only: bool) -> None:
    """Train, or resume, and write ``folder/autoencoder.pt``.

    Args:
        folder: folder of the checkpoints.
        steps: total optimizer steps.
        decoder_only: freeze the encoder of ``folder/autoencoder.pt``, so that its latents stay valid.
    """
    torch.manual_seed(0)
    autoencoder = make_autoencoder()
    if decoder_only:
        autoencoder.load_state_dict(torch.load(folder / "autoencoder.pt", weights_only=True))
        autoencoder.taesd_encoder.requires_grad_(False)
    autoencoder.to(memory_format=torch.channels_last)
    batches = iter(DataLoader(TrainingImages(seed=2 if decoder_only else 1), batch_size=batch_size, num_workers=1))
    held_out = rendered(evaluation_set(48))

    def loss_of(step: int) -> torch.Tensor:
        images, masks, _ = next(batches)
        images = images.to(memory_format=torch.channels_last)
        latents = autoencoder.taesd_encoder(images * 0.5 + 0.5).float()
        decoded = autoencoder.taesd_decoder(latents + LATENT_NOISE * torch.randn_like(latents)) * 2 - 1
        spread = latents.mean((0, 2, 3)) ** 2 + (latents.std((0, 2, 3)) - 1) ** 2
        return reconstruction_loss(decoded.float(), images, masks) + 0.01 * spread.sum()

    @torch.no_grad()
    def evaluate() -> str:
        parts = held_out.split(16)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = torch.cat([autoencoder.decode(autoencoder.encode(part)) for part in parts]).clamp(-1, 1).float()
        latents = torch.cat([autoencoder.encode(part) for part in parts]) * LATENT_SCALE
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
