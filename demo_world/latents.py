"""The encoded training set: latents and captions, so that training steps do not run the autoencoder."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .attributes import CAPTION_TEMPLATES, Attributes, caption, random_attributes
from .images import EVALUATION_SEED, to_tensor
from .renderer import render
from .training import fast_precision

MAX_TOKENS = 77
SHARD, BATCH = 1024, 32


class CaptionedImages(Dataset):
    """Training images [3, 128, 128] of these indices with their captions in all templates."""

    def __init__(self, indices: range, seed: int, draw: Callable[[random.Random], Attributes]) -> None:
        self.indices, self.seed, self.draw = indices, seed, draw

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, list[str]]:
        generator = random.Random(f"caption {self.seed} {self.indices[position]}")
        attributes = self.draw(generator)
        image, _ = render(attributes, generator.randrange(EVALUATION_SEED))
        return to_tensor(image), [caption(attributes, template) for template in range(CAPTION_TEMPLATES)]


class WordTokenizer:
    """CLIP token ids of captions, cached by word: CLIP's byte-pair merges never cross a space."""

    def __init__(self) -> None:
        from comfy.sd1_clip import SDTokenizer

        self.tokenizer = SDTokenizer().tokenizer
        self.words: dict[str, list[int]] = {}
        self.start, self.end = self.tokenizer("")["input_ids"]

    def __call__(self, text: str) -> list[int]:
        """Token ids with the start token, padded with end tokens to ``MAX_TOKENS`` like ComfyUI."""
        ids = [self.start]
        for word in text.split():
            if word not in self.words:
                self.words[word] = self.tokenizer(word)["input_ids"][1:-1]
            ids += self.words[word]
        return ids + [self.end] * (MAX_TOKENS - len(ids))


@torch.no_grad()
def encode_training_set(
    autoencoder: nn.Module,
    folder: Path,
    count: int,
    seed: int = 0,
    draw: Callable[[random.Random], Attributes] = random_attributes,
) -> None:
    """Write the first ``count`` images, rounded up to whole shards; existing shards are kept.

    Shards have ``latents`` [N, 4, 16, 16] (unit variance, fp16), ``tokens`` [N, templates, 77] and ``empty`` [77].
    """
    tokenizer = WordTokenizer()
    autoencoder.to(memory_format=torch.channels_last).eval()
    folder.mkdir(parents=True, exist_ok=True)
    for shard in tqdm(range(-(-count // SHARD)), unit="shard"):
        path = folder / f"latents_{shard:04d}.safetensors"
        if path.exists():
            continue
        latents, tokens = [], []
        drawn = CaptionedImages(range(shard * SHARD, (shard + 1) * SHARD), seed, draw)
        for images, captions in DataLoader(drawn, BATCH):
            with fast_precision("cpu"):
                encoded = autoencoder.taesd_encoder(images.to(memory_format=torch.channels_last) * 0.5 + 0.5)
            latents.append(encoded.to(torch.float16).contiguous())
            # The loader collates the lists to one tuple of captions per template.
            rows = [[tokenizer(text) for text in texts] for texts in captions]
            tokens.append(torch.tensor(rows, dtype=torch.int32).transpose(0, 1).contiguous())
        everything = {
            "latents": torch.cat(latents),
            "tokens": torch.cat(tokens),
            "empty": torch.tensor(tokenizer(""), dtype=torch.int32),
        }
        save_file(everything, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)


def load_training_set(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents [N, 4, 16, 16], token ids [N, templates, 77] and those of the empty caption [77] of all shards."""
    shards = [load_file(path) for path in sorted(folder.glob("latents_*.safetensors"))]
    if not shards:
        raise FileNotFoundError(f"{folder} has no training set: run `python -m demo_world encode`")
    latents, tokens = (torch.cat([shard[name] for shard in shards]) for name in ("latents", "tokens"))
    return latents, tokens, shards[0]["empty"]
