"""The encoded training set: latents and captions, so that training steps do not run the autoencoder."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from .attributes import CAPTION_TEMPLATES, caption, random_attributes
from .images import EVALUATION_SEED, to_tensor
from .renderer import render

MAX_TOKENS = 77


class CaptionedImages(IterableDataset):
    """``count`` training images [3, 128, 128] with their captions in all templates."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, list[str]]]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(first, self.count, stride):
            generator = random.Random(f"caption {self.seed} {index}")
            attributes = random_attributes(generator)
            image, _ = render(attributes, generator.randrange(EVALUATION_SEED))
            yield to_tensor(image), [caption(attributes, template) for template in range(CAPTION_TEMPLATES)]


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
def encode_training_set(autoencoder: nn.Module, path: Path, count: int, seed: int = 0) -> None:
    """Write ``latents`` [N, 4, 16, 16] (unit variance, fp16), ``tokens`` [N, templates, 77] and ``empty`` [77]."""
    tokenizer = WordTokenizer()
    latents, tokens = [], []
    autoencoder.to(memory_format=torch.channels_last).eval()
    loader = DataLoader(CaptionedImages(count, seed), batch_size=32, num_workers=1)
    for images, captions in tqdm(loader, total=-(-count // 32), mininterval=5, unit="batch"):
        with torch.autocast("cpu", torch.bfloat16):
            encoded = autoencoder.taesd_encoder(images.to(memory_format=torch.channels_last) * 0.5 + 0.5)
        latents.append(encoded.to(torch.float16).contiguous())
        # The loader collates the lists to one tuple of captions per template.
        rows = [[tokenizer(text) for text in texts] for texts in captions]
        tokens.append(torch.tensor(rows, dtype=torch.int32).transpose(0, 1).contiguous())
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = {
        "latents": torch.cat(latents),
        "tokens": torch.cat(tokens),
        "empty": torch.tensor(tokenizer(""), dtype=torch.int32),
    }
    save_file(everything, path)
