"""Language models of transformers at a size that a test runs in milliseconds, with random weights, saved to folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

WORDS = ("dog", "cat", "runs", "sleeps", "on", "grass", "photo", "of", "a", "the", "left", "facing")
LLAVA_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
)
TEXT_TEMPLATE = "{% for message in messages %}USER: {{ message['content'] }}{% endfor %} ASSISTANT:"


def tokenizer(words: Sequence[str] = WORDS) -> Any:
    """A tokenizer of whole words; everything else is <unk>, which a decoder leaves out."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<pad>", "<s>", "</s>", "<image>"]
    vocabulary = {word: number for number, word in enumerate([*special, "USER", "ASSISTANT", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],
    )


def save_llava(folder: Path, *, template: str | None = LLAVA_TEMPLATE, seed: int = 0) -> None:
    """A LLaVA with a two-layer CLIP and a two-layer Llama."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    words = tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    torch.manual_seed(seed)
    network = LlavaForConditionalGeneration(
        LlavaConfig(vision, text, image_token_index=words.convert_tokens_to_ids("<image>"))
    )
    with torch.no_grad():
        network.lm_head.weight[: words.convert_tokens_to_ids("USER")] = 0.0  # it says words, and no <image>
    network.save_pretrained(folder)
    square = {"height": 16, "width": 16}
    images = CLIPImageProcessor(size=square, crop_size=square)
    LlavaProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)


def save_blip(folder: Path, seed: int = 0) -> None:
    """A BLIP: an encoder and a decoder, and no chat template."""
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder.mkdir(parents=True, exist_ok=True)
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    vocabulary = folder / "words.txt"
    vocabulary.write_text("\n".join(entries))
    words = BertTokenizerFast(str(vocabulary))
    config = BlipConfig(
        text_config={
            "vocab_size": len(entries),
            "hidden_size": 16,
            "encoder_hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "initializer_range": 0.5,
            "bos_token_id": 5,
            "eos_token_id": 3,
            "sep_token_id": 3,
            "pad_token_id": 0,
            "max_position_embeddings": 64,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
    )
    torch.manual_seed(seed)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), words).save_pretrained(folder)


def save_blip2(folder: Path, seed: int = 0) -> None:
    """A BLIP-2: a vision model, a Q-Former and OPT, and no chat template."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        BlipImageProcessor,
        OPTConfig,
    )

    words = tokenizer()
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        Blip2VisionConfig(intermediate_size=16, image_size=16, patch_size=8, **small).to_dict(),
        Blip2QFormerConfig(vocab_size=8, intermediate_size=16, encoder_hidden_size=16, **small).to_dict(),
        OPTConfig(
            vocab_size=len(words), ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=512,
            bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, **small,
        ).to_dict(),
        num_query_tokens=2,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    torch.manual_seed(seed)
    network = Blip2ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(8.0)
    network.save_pretrained(folder)
    square = {"height": 16, "width": 16}
    Blip2Processor(BlipImageProcessor(size=square), words, num_query_tokens=2).save_pretrained(folder)


def save_gpt2(folder: Path, *, words: Sequence[str] = WORDS, template: str | None = None, seed: int = 0) -> None:
    """A GPT-2 with two layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    own = tokenizer(words)
    own.chat_template = template
    config = GPT2Config(
        vocab_size=len(own),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=512,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
    )
    torch.manual_seed(seed)
    GPT2LMHeadModel(config).save_pretrained(folder)
    own.save_pretrained(folder)
