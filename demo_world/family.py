"""Tells ComfyUI's stock checkpoint loader about the demo world's size of Stable Diffusion 1.x and of InstructPix2Pix.

``comfy.supported_models.models`` is the list that the loader asks, in order, which family a checkpoint belongs to. The
demo world's entries are told apart from every other family by the UNet's width and its context width (128 and 128),
which no published model has, so appending them changes nothing for other checkpoints. The one with eight input channels
comes first, because the other would take any number of them. This beats a loader node of our own:
every shipped workflow then starts at the node that users start from, and another checkpoint is chosen in that node.

The file keeps the 63 rows of CLIP's token table that were trained. The others, a fifth of the file if they were in it,
are made again from a seed when it is loaded, in the step where every family of ComfyUI puts its text encoder's weights
in order.
"""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import torch

from .networks import CONTEXT_DIM, TEXT_CONFIG, UNET_CONFIG

TOKEN_TABLE = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
TOKEN_IDS, TOKEN_MEAN, TOKEN_DEVIATION = (f"demo_world.token_{name}" for name in ("ids", "mean", "deviation"))
"""Keys of the checkpoint: the table's trained rows, their token ids, and per channel the mean and the deviation of
words that the world does not know."""


def whole_token_table(
    rows: torch.Tensor, token_ids: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor
) -> torch.Tensor:
    """CLIP's whole table [49408, C] from the rows [T, C] of ``token_ids`` [T].

    A word that the world does not know has a small random vector of its own around ``mean`` [C], of a third of
    ``deviation`` [C] nearly, the same ones at every call.
    """
    noise = torch.randn(TEXT_CONFIG["vocab_size"], CONTEXT_DIM, generator=torch.Generator().manual_seed(0))
    table = (mean + noise * deviation * 0.3).to(rows.dtype)
    table[token_ids.long()] = rows
    return table


class DemoWorldSDTokenizer(comfy.sd1_clip.SDTokenizer):
    """CLIP's tokenizer; only the width of a textual-inversion embedding differs."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict | None = None) -> None:
        super().__init__(
            embedding_directory=embedding_directory, embedding_size=CONTEXT_DIM, tokenizer_data=tokenizer_data or {}
        )


class DemoWorldTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict | None = None) -> None:
        super().__init__(
            embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {}, tokenizer=DemoWorldSDTokenizer
        )


class DemoWorldSDClipModel(comfy.sd1_clip.SDClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=dict(TEXT_CONFIG),
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class DemoWorldClipModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=DemoWorldSDClipModel)


class DemoWorld(comfy.supported_models.SD15):
    """SD 1.x (epsilon prediction, its noise schedule and latent format) with a narrower UNet and text encoder."""

    unet_config = {
        "context_dim": CONTEXT_DIM,
        "model_channels": UNET_CONFIG["model_channels"],
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
    }
    unet_extra_config = {"num_heads": UNET_CONFIG["num_heads"], "num_head_channels": -1}

    def process_clip_state_dict(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if TOKEN_IDS in state_dict:  # a checkpoint that ComfyUI has saved holds the whole table
            kept = [state_dict.pop(key) for key in (TOKEN_IDS, TOKEN_MEAN, TOKEN_DEVIATION)]
            state_dict[TOKEN_TABLE] = whole_token_table(state_dict[TOKEN_TABLE], *kept)
        return super().process_clip_state_dict(state_dict)

    def clip_target(self, state_dict: dict | None = None) -> comfy.supported_models_base.ClipTarget:
        return comfy.supported_models_base.ClipTarget(DemoWorldTokenizer, DemoWorldClipModel)


class DemoWorldInstructPix2Pix(DemoWorld):
    """The same with the latent of a source image beside the noisy one, as ComfyUI's SD15_instructpix2pix."""

    unet_config = {**DemoWorld.unet_config, "in_channels": 8}

    def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> comfy.model_base.BaseModel:
        return comfy.model_base.SD15_instructpix2pix(self, device=device)


def register() -> None:
    """Append the families once, whatever module name the pack was loaded under."""
    families = comfy.supported_models.models
    for family in (DemoWorldInstructPix2Pix, DemoWorld):
        if not any(other.__name__ == family.__name__ for other in families):
            families.append(family)
