"""Segment Anything and Grounding DINO of transformers at a size that a test runs in milliseconds, saved to folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIDE = 64


def save_sam(folder: Path, seed: int = 0) -> Any:
    """A Segment Anything with a two-layer encoder and random weights; gives the network."""
    from transformers import (
        SamConfig,
        SamImageProcessor,
        SamMaskDecoderConfig,
        SamModel,
        SamProcessor,
        SamPromptEncoderConfig,
        SamVisionConfig,
    )

    vision = SamVisionConfig(
        hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8,
        window_size=4, global_attn_indexes=[1], mlp_dim=32, num_pos_feats=8,
    )  # fmt: skip
    prompts = SamPromptEncoderConfig(hidden_size=16, image_size=SIDE, patch_size=8, mask_input_channels=4)
    decoder = SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16
    )
    torch.manual_seed(seed)
    network = SamModel(SamConfig(vision, prompts, decoder)).eval()
    network.save_pretrained(folder)
    size = {"longest_edge": SIDE}
    SamProcessor(
        SamImageProcessor(
            size=size, pad_size={"height": SIDE, "width": SIDE}, mask_size={"longest_edge": 32},
            mask_pad_size={"height": 32, "width": 32},
        )
    ).save_pretrained(folder)  # fmt: skip
    return network


def save_grounding_dino(folder: Path, seed: int = 0) -> Any:
    """A Grounding DINO with a small Swin and BERT and random weights; gives the network."""
    from transformers import (
        BertConfig,
        BertTokenizerFast,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    folder.mkdir(parents=True, exist_ok=True)
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "cat", "dog"]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(entries))
    backbone = SwinConfig(
        window_size=7, image_size=SIDE, embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2],
        out_features=["stage2", "stage3", "stage4"], out_indices=[2, 3, 4],
    )  # fmt: skip
    text = BertConfig(
        vocab_size=len(entries), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(seed)
    network = GroundingDinoForObjectDetection(
        GroundingDinoConfig(
            backbone_config=backbone, text_config=text, d_model=32, num_queries=5, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
            use_pretrained_backbone=False, num_feature_levels=3, max_text_len=16,
        )
    ).eval()  # fmt: skip
    network.save_pretrained(folder)
    images = GroundingDinoImageProcessor(size={"shortest_edge": SIDE, "longest_edge": SIDE})
    GroundingDinoProcessor(images, BertTokenizerFast(str(vocabulary))).save_pretrained(folder)
    return network
