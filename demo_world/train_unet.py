"""Training of the demo world's UNet and text encoder: noise prediction on SD 1.x's noise schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .latents import load_training_set
from .networks import TextEncoder, make_unet
from .training import train

# Share of captions replaced by the empty one, for classifier-free guidance.
CAPTION_DROPOUT = 0.1
# Min-SNR loss weight min(SNR, gamma) / SNR (Hang et al. 2023), so that low noise levels do not dominate.
SNR_GAMMA = 5.0


def attention_by_matrices(function: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
    """ComfyUI's basic attention, whose gradient takes two thirds of the fused attention's time on a CPU in bfloat16."""
    from comfy.ldm.modules.attention import attention_basic

    return attention_basic(*arguments, **keywords)


MATRIX_ATTENTION = {"optimized_attention_override": attention_by_matrices}


def sd1_alphas_cumprod() -> torch.Tensor:
    """SD 1.x's schedule [1000]: betas linear in their square roots from 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def add_noise(
    clean: torch.Tensor, alphas_cumprod: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add noise to latents [B, C, h, w] at stratified timesteps: (noisy latents, noise, timesteps [B])."""
    count = len(clean)
    strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (strata * 1000).long().clamp(max=999)
    alpha = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noise = torch.randn(clean.shape, generator=generator)
    noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).to(memory_format=torch.channels_last)
    return noisy, noise, timesteps


def min_snr_loss(predicted: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Mean squared error of predicted noise [B, C, h, w], weighted by the signal's share ``alpha`` [B]."""
    error = ((predicted.float() - noise) ** 2).mean((1, 2, 3))
    snr = alpha / (1 - alpha)
    return (error * snr.clamp(max=SNR_GAMMA) / snr).mean()


def train_unet(folder: Path, steps: int, batch_size: int, learning_rate: float) -> None:
    """Train on ``folder/latents.safetensors`` and write ``folder/unet.pt`` (the EMA of the weights).

    An interrupted run resumes from ``folder/unet_state.pt``. A new one starts from ``folder/unet.pt`` if it exists
    (``python -m demo_world unpack`` writes it), else from random weights.
    """
    torch.manual_seed(1)
    latents, tokens, empty = load_training_set(folder)
    # The text encoder's table has only the tokens of the captions; convert token ids to its row numbers.
    token_ids, rows = torch.unique(torch.cat([tokens.flatten(), empty]), return_inverse=True)
    empty, rows = rows[-len(empty) :], rows[: -len(empty)].view(tokens.shape).to(torch.int16)
    unet = make_unet().to(memory_format=torch.channels_last)
    text_encoder = TextEncoder(token_ids.tolist())
    start_from = folder / "unet.pt"
    if start_from.exists():
        trained = torch.load(start_from, weights_only=True)
        if not torch.equal(trained["token_ids"], token_ids):
            raise ValueError(f"{start_from} was trained with other tokens; remove it to start from random weights")
        unet.load_state_dict(trained["unet"])
        text_encoder.load_state_dict(trained["text_encoder"])
    alphas_cumprod = sd1_alphas_cumprod()

    def loss_of(step: int) -> torch.Tensor:
        # Seeded by the step, so that a resumed run equals an uninterrupted one.
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(0, len(latents), (batch_size,), generator=generator)
        template = torch.randint(0, rows.shape[1], (batch_size,), generator=generator)
        text = rows[chosen, template].long()
        text[torch.rand(batch_size, generator=generator) < CAPTION_DROPOUT] = empty
        noisy, noise, timesteps = add_noise(latents[chosen].float(), alphas_cumprod, generator)
        predicted = unet(noisy, timesteps.float(), context=text_encoder(text), transformer_options=MATRIX_ATTENTION)
        return min_snr_loss(predicted, noise, alphas_cumprod[timesteps])

    def save() -> str:
        state = {"unet": unet.state_dict(), "text_encoder": text_encoder.state_dict(), "token_ids": token_ids}
        torch.save(state, folder / "unet.pt")
        return "saved"

    train(
        {"unet": unet, "text_encoder": text_encoder},
        loss_of,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=0.01,
        checkpoint=folder / "unet_state.pt",
        on_checkpoint=save,
    )
    save()
