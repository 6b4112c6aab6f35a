"""Training of the demo world's ControlNet for poses: ComfyUI's own ControlNet class on the frozen UNet.

As in Zhang et al. 2023, the encoder starts as a copy of the UNet's, its outputs pass zero-initialized convolutions, and
half of the captions are dropped, so that the pose must come from the pose image. Training uses single portraits; that
the ControlNet also works on pairs of double width is not trained.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from .attributes import CAPTION_TEMPLATES, caption, random_attributes
from .export import write_weights
from .images import EVALUATION_SEED, to_tensor
from .latents import WordTokenizer
from .networks import UNET_CONFIG, TextEncoder, initialize, make_autoencoder, make_unet
from .pose import draw_pose
from .renderer import render
from .train_unet import MATRIX_ATTENTION, add_noise, sd1_alphas_cumprod
from .training import train

CONTROL_FOLDER = Path(__file__).parent / "control"
CONTROL_PATH = CONTROL_FOLDER / "identity-edit-demo-pose.safetensors"
CAPTION_DROPOUT = 0.5


def make_control() -> nn.Module:
    """SD 1.x's ControlNet at the demo world's size, untrained, with the zero initializations of the original."""
    import comfy.ops
    from comfy.cldm.cldm import ControlNet

    config = {name: value for name, value in UNET_CONFIG.items() if name != "out_channels"}
    operations = comfy.ops.disable_weight_init
    control = initialize(
        ControlNet(**config, hint_channels=3, dtype=torch.float32, device="cpu", operations=operations)
    )
    for name, parameter in control.named_parameters():
        if name.startswith(("zero_convs.", "middle_block_out.", "input_hint_block.14.")):
            nn.init.zeros_(parameter)
    return control


class PosedPortraits(IterableDataset):
    """``count`` training portraits [3, 128, 128], their poses as uint8, and a caption of each."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, str]]:
        for index in range(self.count):
            generator = random.Random(f"posed portrait {index}")
            attributes = random_attributes(generator, "portrait")
            seed = generator.randrange(EVALUATION_SEED)
            image, _ = render(attributes, seed)
            pose = torch.from_numpy(np.array(draw_pose(attributes, seed))).permute(2, 0, 1)
            yield to_tensor(image), pose, caption(attributes, generator.randrange(CAPTION_TEMPLATES))


@torch.no_grad()
def encode_portraits(autoencoder: nn.Module, path: Path, count: int) -> None:
    """Write ``latents`` [N, 4, 16, 16] (fp16), ``poses`` [N, 3, 128, 128] (uint8) and ``tokens`` [N, 77]."""
    tokenizer = WordTokenizer()
    latents, poses, tokens = [], [], []
    autoencoder.to(memory_format=torch.channels_last).eval()
    for images, drawn, captions in tqdm(DataLoader(PosedPortraits(count), batch_size=32), total=-(-count // 32)):
        with torch.autocast("cpu", torch.bfloat16):
            encoded = autoencoder.taesd_encoder(images.to(memory_format=torch.channels_last) * 0.5 + 0.5)
        latents.append(encoded.to(torch.float16).contiguous())
        poses.append(drawn)
        tokens.append(torch.tensor([tokenizer(text) for text in captions], dtype=torch.int32))
    empty = torch.tensor(tokenizer(""), dtype=torch.int32)
    everything = {"latents": torch.cat(latents), "poses": torch.cat(poses), "tokens": torch.cat(tokens), "empty": empty}
    save_file(everything, path)


def train_control(folder: Path, steps: int, batch_size: int, learning_rate: float, count: int) -> None:
    """Train on ``folder/unet.pt`` and ``folder/autoencoder.pt`` (``python -m demo_world unpack``) and save the weights.

    An interrupted run resumes from ``folder/control_state.pt``.
    """
    torch.manual_seed(4)
    data_path = folder / "portraits.safetensors"
    if not data_path.exists():
        autoencoder = make_autoencoder()
        autoencoder.load_state_dict(torch.load(folder / "autoencoder.pt", weights_only=True))
        encode_portraits(autoencoder, data_path, count)
    data = load_file(data_path)
    trained = torch.load(folder / "unet.pt", weights_only=True)
    unet = make_unet().to(memory_format=torch.channels_last).requires_grad_(False)
    unet.load_state_dict(trained["unet"])
    text_encoder = TextEncoder(trained["token_ids"].tolist()).requires_grad_(False)
    text_encoder.load_state_dict(trained["text_encoder"])
    control = make_control().to(memory_format=torch.channels_last)
    control.load_state_dict(trained["unet"], strict=False)
    # The text encoder's table has only the tokens of the captions.
    row_of = {token: row for row, token in enumerate(trained["token_ids"].tolist())}
    rows = data["tokens"].apply_(lambda token: row_of[token]).long()
    empty = data["empty"].apply_(lambda token: row_of[token]).long()
    alphas_cumprod = sd1_alphas_cumprod()

    def loss_of(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(0, len(rows), (batch_size,), generator=generator)
        text = rows[chosen].clone()
        text[torch.rand(batch_size, generator=generator) < CAPTION_DROPOUT] = empty
        noisy, noise, timesteps = add_noise(data["latents"][chosen].float(), alphas_cumprod, generator)
        context = text_encoder(text)
        hint = (data["poses"][chosen].float() / 255).to(memory_format=torch.channels_last)
        added = control(noisy, hint, timesteps.float(), context, transformer_options=MATRIX_ATTENTION)
        predicted = unet(noisy, timesteps.float(), context=context, control=added, transformer_options=MATRIX_ATTENTION)
        # Without min-SNR weights, which lower the high noise levels, where the pose is decided.
        return ((predicted.float() - noise) ** 2).mean()

    def save() -> str:
        write_weights(CONTROL_PATH, control.state_dict(), "demo world pose control")
        return "saved"

    train(
        {"control": control},
        loss_of,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=0.01,
        checkpoint=folder / "control_state.pt",
        on_checkpoint=save,
    )
    save()
