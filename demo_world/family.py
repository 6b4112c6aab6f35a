"""Tells ComfyUI's stock checkpoint loader about the demo world's size of Stable Diffusion 1.x and of InstructPix2Pix.

``comfy.supported_models.models`` is the list that the loader asks, in order, which family a checkpoint belongs to. The
demo world's entries are told apart from every other family by the UNet's width and its context width (128 and 128),
which no published model has, so appending them changes nothing for other checkpoints. The one with eight input channels
comes first, because the other would take any number of them. This beats a loader node of our own:
every shipped workflow then starts at the node that users start from, and another checkpoint is chosen in that node.
"""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base

from .networks import CONTEXT_DIM, TEXT_CONFIG, UNET_CONFIG


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

    def clip_target(self, state_dict: dict | None = None) -> comfy.supported_models_base.ClipTarget:
        return comfy.supported_models_base.ClipTarget(DemoWorldTokenizer, DemoWorldClipModel)


class DemoWorldInstructPix2Pix(DemoWorld):
    """The same with the latent of a source picture beside the noisy one, as ComfyUI's SD15_instructpix2pix."""

    unet_config = {**DemoWorld.unet_config, "in_channels": 8}

    def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> comfy.model_base.BaseModel:
        return comfy.model_base.SD15_instructpix2pix(self, device=device)


def register() -> None:
    """Append the families once, whatever module name the pack was loaded under."""
    families = comfy.supported_models.models
    for family in (DemoWorldInstructPix2Pix, DemoWorld):
        if not any(other.__name__ == family.__name__ for other in families):
            families.append(family)
