"""The demo world's CLIP for scoring images: an image and a text encoder in a transformers folder.

``CLIPModel``, ``AutoTokenizer`` and ``CLIPImageProcessor`` read the folder like that of a published CLIP. The image
encoder has the sizes of ``clip_vision.py``; the text encoder is smaller.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .attributes import CAPTION_TEMPLATES, caption, random_attributes
from .clip_vision import CLIP_VISION_CONFIG

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

# In the folder of the networks that score images, which no editing method may use.
CLIP_FOLDER = Path(__file__).parent / "scoring" / "identity-edit-demo-clip"
TEXT_LENGTH = 77
TEXT_WIDTH = 128
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def write_vocabulary(folder: Path) -> None:
    """Write the tokenizer's files: a byte-pair encoding in which every word of the captions is one token.

    It is trained with the `tokenizers` library on captions of all identities. Other text is encoded as bytes, like
    unknown words in CLIP's tokenizer.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # type: ignore[import-untyped]

    generator = random.Random(0)
    captions = [
        caption(random_attributes(generator, held_out=None), number % CAPTION_TEMPLATES) for number in range(4000)
    ]
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    learner.train_from_iterator(captions, trainers.BpeTrainer(end_of_word_suffix="</w>", show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = sorted(learned["vocab"], key=learned["vocab"].get)
    symbols = list(dict.fromkeys([*letters, *(letter + "</w>" for letter in letters), *symbols, BEGIN, END]))
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in learned["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_LENGTH}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def make_tokenizer() -> PreTrainedTokenizerBase:
    """CLIP's tokenizer class with the demo world's vocabulary."""
    from transformers import CLIPTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(Path(folder))
        return CLIPTokenizerFast.from_pretrained(folder)


def make_clip(tokenizer: PreTrainedTokenizerBase) -> CLIPModel:
    """An untrained CLIP of the demo world's sizes."""
    from transformers import CLIPConfig, CLIPModel

    vision = {key: value for key, value in CLIP_VISION_CONFIG.items() if key != "model_type"}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 4 * TEXT_WIDTH,
        "projection_dim": vision["projection_dim"],
        "max_position_embeddings": TEXT_LENGTH,
        "hidden_act": "quick_gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=vision["projection_dim"])
    return CLIPModel(config)


def save_clip(model: CLIPModel, tokenizer: PreTrainedTokenizerBase, folder: Path = CLIP_FOLDER) -> None:
    """Write the folder atomically, with weights in fp16."""
    from transformers import CLIPImageProcessor

    size = CLIP_VISION_CONFIG["image_size"]
    processor = CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".clip-"))
    try:
        state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
        model.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        temporary.chmod(0o755)  # temporary folders are private
        for path in temporary.iterdir():
            path.chmod(0o644)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_clip(folder: Path = CLIP_FOLDER) -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    """The model in float32 and evaluation mode, and its tokenizer."""
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def image_embeddings(model: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, 128, 128] in [-1, 1] -> image embeddings [B, 128] of length 1."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    embeddings = model.get_image_features(pixel_values=((images + 1) / 2 - mean) / std)
    return torch.nn.functional.normalize(embeddings.float(), dim=-1)


def text_embeddings(model: CLIPModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """Texts -> text embeddings [B, 128] of length 1."""
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    embeddings = model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return torch.nn.functional.normalize(embeddings.float(), dim=-1)
