"""Training of the harder world's low-rank adaptation (Hu et al. 2022) of the demo checkpoint's UNet.

The text encoder stays as it is: words that it has never been trained on have random vectors, which differ. The file is
a LoRA that ComfyUI's own loader applies to the demo checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

from .export import CHECKPOINT_NAME, WEIGHTS_FOLDER, write_weights
from .harder import LORA_PATH
from .latents import load_training_set
from .networks import TEXT_CONFIG, TextEncoder, make_unet
from .train_unet import CAPTION_DROPOUT, MATRIX_ATTENTION, add_noise, min_snr_loss, sd1_alphas_cumprod
from .training import train

RANK = 32


class LowRank(nn.Module):
    """Changes of a network's weights, zero before training: of rank ``RANK`` for matrices and kernels, whole for biases
    and scales."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.down, self.up, self.whole = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for name, weight in network.named_parameters():
            key = name.replace(".", "|")  # a parameter's name has no dots
            if weight.ndim < 2 or weight[0].numel() <= RANK:
                self.whole[key] = nn.Parameter(torch.zeros_like(weight))
            else:
                inputs = weight[0].numel()
                self.down[key] = nn.Parameter(torch.randn(RANK, inputs) / inputs**0.5)
                self.up[key] = nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def changed(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The network's weights with the changes."""
        changes = {key: self.up[key] @ down for key, down in self.down.items()} | dict(self.whole.items())
        named = {key.replace("|", "."): change for key, change in changes.items()}
        return {name: weights[name] + change.view(weights[name].shape) for name, change in named.items()}

    def lora(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The changes by the keys of a LoRA file for a network with these weights."""
        state = {}
        for key, down in self.down.items():
            name = key.replace("|", ".")
            base, kernel = f"diffusion_model.{name.removesuffix('.weight')}", weights[name].shape[2:]
            state[f"{base}.lora_down.weight"] = down.view(RANK, -1, *kernel)
            state[f"{base}.lora_up.weight"] = self.up[key].view(-1, RANK, *[1] * len(kernel))
        for key, change in self.whole.items():
            base, _, kind = f"diffusion_model.{key}".replace("|", ".").rpartition(".")
            state[f"{base}.{'diff' if kind == 'weight' else 'diff_b'}"] = change
        return {name: value.detach() for name, value in state.items()}

    def start_from(self, state: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
        """Take the changes of a file that `lora` gave."""
        for name, value in self.lora(weights).items():
            value.copy_(state[name])


def train_harder(folder: Path, steps: int, batch_size: int, learning_rate: float) -> None:
    """Train on ``folder/latents_*.safetensors`` (``encode --world harder``) and write the LoRA.

    An interrupted run resumes from ``folder/harder_state.pt``. A new one starts from the LoRA if there is one.
    """
    import comfy.sd

    from . import family

    torch.manual_seed(1)
    family.register()
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(WEIGHTS_FOLDER / CHECKPOINT_NAME))
    unet = make_unet().to(memory_format=torch.channels_last).requires_grad_(False)
    unet.load_state_dict(model.model.diffusion_model.state_dict())
    text_encoder = TextEncoder(list(range(TEXT_CONFIG["vocab_size"])))
    text_encoder.clip.load_state_dict(clip.cond_stage_model.clip_l.transformer.state_dict())
    text_encoder.requires_grad_(False)
    latents, tokens, empty = load_training_set(folder)
    alphas_cumprod = sd1_alphas_cumprod()
    weights = dict(unet.named_parameters())
    low_rank = LowRank(unet)
    if LORA_PATH.exists():
        low_rank.start_from(load_file(LORA_PATH), weights)

    def loss_of(step: int) -> torch.Tensor:
        # Seeded by the step, so that a resumed run equals an uninterrupted one.
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(0, len(latents), (batch_size,), generator=generator)
        template = torch.randint(0, tokens.shape[1], (batch_size,), generator=generator)
        text = tokens[chosen, template].long()
        text[torch.rand(batch_size, generator=generator) < CAPTION_DROPOUT] = empty.long()
        noisy, noise, timesteps = add_noise(latents[chosen].float(), alphas_cumprod, generator)
        arguments = (noisy, timesteps.float())
        keywords = {"context": text_encoder(text), "transformer_options": MATRIX_ATTENTION}
        predicted = functional_call(unet, low_rank.changed(weights), arguments, keywords)
        return min_snr_loss(predicted, noise, alphas_cumprod[timesteps])

    def save() -> str:
        write_weights(LORA_PATH, low_rank.lora(weights), "demo world, harder")
        return "saved"

    train(
        {"low_rank": low_rank},
        loss_of,
        steps=steps,
        learning_rate=learning_rate,
        checkpoint=folder / "harder_state.pt",
        on_checkpoint=save,
    )
    save()
