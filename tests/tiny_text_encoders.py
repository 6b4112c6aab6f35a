"""CLIPs of ComfyUI's own classes at the width of `tiny_models`, with random weights, and transformers' twin of one."""

from __future__ import annotations

from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch
from identity_edit_pack.tests import tiny_models


def _config(width: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 2 * width,
        "hidden_act": "quick_gelu",
        "max_position_embeddings": 77,
        "eos_token_id": 49407,
        "vocab_size": 49408,
        "layer_norm_eps": 1e-5,
        "projection_dim": width,
    }


def _tokenizer(width: int) -> type:
    class Tokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None):
            super().__init__(embedding_directory=embedding_directory, embedding_size=width, tokenizer_data={})

    return Tokenizer


class SD1Tokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(embedding_directory, {}, tokenizer=_tokenizer(tiny_models.CONTEXT))


class SD1Clip(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        class Encoder(comfy.sd1_clip.SDClipModel):
            def __init__(self, device="cpu", dtype=None, model_options=None):
                super().__init__(
                    device=device, dtype=dtype, textmodel_json_config=_config(tiny_models.CONTEXT),
                    return_projected_pooled=False, model_options=model_options or {},
                )  # fmt: skip

        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=Encoder)


class SDXLTokenizer:
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        self.parts = {key: _tokenizer(tiny_models.POOLED)(embedding_directory) for key in ("g", "l")}

    def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
        return {key: part.tokenize_with_weights(text, return_word_ids, **kwargs) for key, part in self.parts.items()}

    def untokenize(self, token_weight_pair):
        return self.parts["g"].untokenize(token_weight_pair)

    def state_dict(self):
        return {}


class SDXLClip(torch.nn.Module):
    """comfy.sdxl_clip.SDXLClipModel, whose encoders' sizes are fixed, with narrower encoders."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        import comfy.sdxl_clip

        super().__init__()
        options = dict(
            layer="hidden", layer_idx=-2, device=device, dtype=dtype, layer_norm_hidden_state=False,
            textmodel_json_config=_config(tiny_models.POOLED), model_options=model_options or {},
        )  # fmt: skip
        self.clip_l = comfy.sd1_clip.SDClipModel(**options)
        self.clip_g = comfy.sd1_clip.SDClipModel(**options)
        self.dtypes = {dtype}
        stock = comfy.sdxl_clip.SDXLClipModel
        for name in ("set_clip_options", "reset_clip_options", "encode_token_weights"):
            setattr(self, name, getattr(stock, name).__get__(self))


def clip(family: str, seed: int = 5) -> comfy.sd.CLIP:
    """A CLIP for the model of `tiny_models.FAMILIES[family]`."""
    parts = (SDXLTokenizer, SDXLClip) if family == "sdxl" else (SD1Tokenizer, SD1Clip)
    target = comfy.supported_models_base.ClipTarget(*parts)
    made = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    tiny_models._draw_weights(made.cond_stage_model, seed)
    return made


def transformers_twin(made: comfy.sd.CLIP) -> Any:
    """transformers' CLIPTextModel with the weights of an SD1 CLIP."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(**_config(tiny_models.CONTEXT), bos_token_id=49406, pad_token_id=49407)
    twin = CLIPTextModel(config)
    state = made.cond_stage_model.clip_l.transformer.state_dict()
    weights = {name: value.clone() for name, value in state.items() if not name.startswith("text_projection")}
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing), (missing, unexpected)
    return twin.eval()
