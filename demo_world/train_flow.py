"""Training of the demo world's flow transformer: velocity prediction on the straight path from latents to noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .latents import load_training_set
from .networks import FLOW_TOKENS, TextEncoder, make_flow
from .train_unet import CAPTION_DROPOUT
from .training import train


def fused_attention(function: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
    """PyTorch's attention, which has a gradient on every engine."""
    from comfy.ldm.modules.attention import attention_pytorch

    return attention_pytorch(*arguments, **keywords)


FUSED_ATTENTION = {"optimized_attention_override": fused_attention}


def straight_path(clean: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents (1 - s) z + s e [B, C, h, w], velocities e - z, and times s [B], logit-normal and stratified
    (Esser et al. 2024, eq. 19)."""
    count = len(clean)
    strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    times = torch.special.ndtri(strata.clamp(1e-4, 1 - 1e-4)).sigmoid()
    noise = torch.randn(clean.shape, generator=generator)
    s = times.view(-1, 1, 1, 1)
    return (1 - s) * clean + s * noise, noise - clean, times


def matrices(name: str, parameter: nn.Parameter) -> list[int]:
    """Row blocks of attention and MLP weights: q, k, v and the MLP of a fused layer are matrices of their own."""
    rows = parameter.shape[0]
    if parameter.ndim < 2 or not any(part in name for part in ("_attn.", "_mlp.", ".linear1.", ".linear2.")):
        return []
    width = parameter.shape[1]
    if ".qkv." in name:
        return [width] * 3
    return [width] * 3 + [rows - 3 * width] if ".linear1." in name else [rows]


def text_of(text_encoder: TextEncoder, tokens: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [B, T, C] of token ids [B, T] and the one of the first end token [B, C], CLIP's pooled output."""
    with torch.no_grad():
        embeddings = text_encoder(torch.searchsorted(torch.tensor(text_encoder.token_ids), tokens))
    return embeddings, embeddings[torch.arange(len(tokens)), (tokens == end).int().argmax(1)]


def copy_norm_inputs(network: nn.Module) -> None:
    """Flux's blocks add to their inputs in place, which LayerNorm needs unchanged for its gradient."""
    for layer in network.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))


def centers(patch_size: int) -> dict[str, float]:
    """Rotary positions of patches at their centers in latent pixels, so that weights fit every patch size."""
    shift = (patch_size - 1) / 2
    return {"scale_x": patch_size, "scale_y": patch_size, "shift_x": shift, "shift_y": shift}


def from_patches(state: dict[str, torch.Tensor], patch_size: int) -> dict[str, torch.Tensor]:
    """Convert weights for patches of ``patch_size`` to patches of one latent pixel: input weights are summed over a
    patch, output weights averaged."""
    area, head = patch_size**2, "final_layer.linear."
    return state | {
        "img_in.weight": state["img_in.weight"].unflatten(1, (-1, area)).sum(2),
        head + "weight": state[head + "weight"].unflatten(0, (-1, area)).mean(1),
        head + "bias": state[head + "bias"].unflatten(0, (-1, area)).mean(1),
    }


def train_flow(
    folder: Path, steps: int, batch_size: int, learning_rate: float, decay_steps: int, patch_size: int
) -> None:
    """Train on ``folder``'s encoded training set and ``unet.pt``'s text encoder.

    Writes ``folder/flow.pt`` (the EMA of the weights), or ``flow_patches.pt`` at a patch size of 2, which takes a third
    of the time a step; a training at patch size 1 starts from ``flow_patches.pt`` if it exists. Resumes from
    ``NAME_state.pt``. ``NAME_state_constant.pt`` is the state before the last ``decay_steps``: to train longer, rename
    it to ``NAME_state.pt`` and raise ``steps``.
    """
    import comfy.model_management

    torch.manual_seed(1)
    # Newer engines have kernels without a gradient, except in training.
    comfy.model_management.in_training = True
    latents, tokens, empty = load_training_set(folder)
    end = int(empty[-1])
    if bool((tokens[..., FLOW_TOKENS:] != end).any()):
        raise ValueError(f"a caption of {folder} has more than {FLOW_TOKENS} tokens")
    tokens, empty = tokens[..., :FLOW_TOKENS], empty[:FLOW_TOKENS]
    trained = torch.load(folder / "unet.pt", weights_only=True)
    text_encoder = TextEncoder(trained["token_ids"].tolist())
    text_encoder.load_state_dict(trained["text_encoder"])
    text_encoder.requires_grad_(False)
    flow = make_flow(patch_size=patch_size)
    name, coarse = "flow" if patch_size == 1 else "flow_patches", folder / "flow_patches.pt"
    if patch_size == 1 and coarse.exists():
        flow.load_state_dict(from_patches(torch.load(coarse, weights_only=True), 2))
    options = {**FUSED_ATTENTION, "rope_options": centers(patch_size)}
    copy_norm_inputs(flow)

    def loss_of(step: int) -> torch.Tensor:
        # Seeded by the step, so that a resumed run equals an uninterrupted one.
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(0, len(latents), (batch_size,), generator=generator)
        template = torch.randint(0, tokens.shape[1], (batch_size,), generator=generator)
        text = tokens[chosen, template]
        text[torch.rand(batch_size, generator=generator) < CAPTION_DROPOUT] = empty
        noisy, velocity, times = straight_path(latents[chosen].float(), generator)
        context, pooled = text_of(text_encoder, text, end)
        predicted = flow(noisy, times, context, y=pooled, transformer_options=dict(options))
        return ((predicted.float() - velocity) ** 2).mean()

    def save() -> str:
        torch.save(flow.state_dict(), folder / f"{name}.pt")
        return "saved"

    train(
        {"flow": flow},
        loss_of,
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=40,
        decay_steps=decay_steps,
        weight_decay=0.01,
        average_decay=0.995,
        rows_of=matrices,
        checkpoint=folder / f"{name}_state.pt",
        on_checkpoint=save,
    )
    save()
