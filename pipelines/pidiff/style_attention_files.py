"""Files of style attentions: the pack's own; others are recognized and refused by name.

The pack's file is one safetensors file of float16 (65 MB for SD1.5 and e4e): `mapping.layers.I.weight` and `.bias` of
mapping layer I and `mapping.normalize.*`, and `attention.layers.BLOCK_NUMBER_INDEX.to_q.weight`, `to_k`, `to_v` of each
transformer block. The header's `identity_edit` is JSON: kind, attention ("sequential" or "parallel"), row_groups,
style_rows, style_width, text_width, encoder, pseudo_word, model (the tag of the model it was trained with, or null) and
training.

The published w-plus-adapter (Li et al. 2024) is another network: its mapping layers read 4, 4, 4 and 6 rows without
subtracting the latent average, its null style is zero, and its query is taken before the output projection, where no
patch on a list can be. Its weights here would give other images, so its files are refused.
"""

from __future__ import annotations

import dataclasses
import os

import torch

from .. import engine
from ..shared.errors import IdentityEditError
from ..shared.files import checked_record, header_of, load_external, parsing_file, read_tensors, write_tensors
from .style_attention import StyleAttention, StyleNetwork

KIND = "style attention"
ENDINGS = (".safetensors", ".bin", ".pt", ".pth")
"""Extensions of the pack's files, and of other files that are listed and refused with a reason."""

_ADAPTER_PARTS = {"w_proj", "wplus_adapter"}
_ADAPTER_WEIGHT = "to_k_wplus"
_IP_ADAPTER_PARTS = {"image_proj", "ip_adapter"}


def in_file_precision(network: StyleNetwork) -> StyleNetwork:
    """Round the weights to float16, as in a saved file, and freeze them."""
    with torch.inference_mode(False), torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.to(torch.float16))
    return network.eval().requires_grad_(False)


def save_style_attention(style: StyleAttention, path: str) -> None:
    """Write a style attention atomically.

    Raises:
        IdentityEditError: when a weight is not finite, or the file cannot be written.
    """
    tensors = {name: tensor.to(torch.float16) for name, tensor in style.network.state_dict().items()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise IdentityEditError(
            "The style attention contains NaN or infinite values and was not saved; train it with a lower learning "
            "rate."
        )
    description = {
        "kind": KIND,
        "attention": style.kind,
        "row_groups": [list(group) for group in style.row_groups],
        "style_rows": style.style_rows,
        "style_width": style.style_width,
        "text_width": style.text_width,
        "encoder": style.encoder,
        "pseudo_word": style.pseudo_word,
        "model": None if style.model is None else dataclasses.asdict(style.model),
        "training": style.training,
    }
    write_tensors(path, tensors, description)


def load_style_attention(path: str) -> StyleAttention:
    """Read a file of `save_style_attention`. Nothing in a file is ever executed.

    Raises:
        IdentityEditError: when the file is missing, damaged, or holds something else; a w-plus-adapter and an
            IP-Adapter are called by their names.
    """
    if not os.path.isfile(path):
        raise IdentityEditError(f"The file {path} does not exist; choose another one, or train a style attention.")
    _refuse_others(path)
    tensors, description = read_tensors(path, KIND)
    with parsing_file(path, "The style attention"):
        tag, training = description["model"], description["training"]
        checked_record(training, ("steps", "learning_rate", "images"))
        attention = "attention.layers."
        sizes = {}
        for name in sorted({name[len(attention) :].split(".")[0] for name in tensors if name.startswith(attention)}):
            block, number, index = name.split("_")
            inner, channels = tensors[f"{attention}{name}.to_q.weight"].shape
            text = tensors[f"{attention}{name}.to_k.weight"].shape[1]
            sizes[block, int(number), int(index)] = (int(channels), int(inner), int(text))
        groups = tuple((int(first), int(last)) for first, last in description["row_groups"])
        # ComfyUI runs nodes in inference mode, in which weights would be made that nothing can be trained through.
        with torch.inference_mode(False), torch.no_grad():
            with torch.device("meta"):  # whatever sizes a file claims, no memory is taken for them
                network = StyleNetwork(groups, description["style_width"], description["text_width"], sizes)
            network.load_state_dict({name: tensor.float().clone() for name, tensor in tensors.items()}, assign=True)
        style = StyleAttention(
            network=network.eval().requires_grad_(False),
            kind=description["attention"],
            style_rows=int(description["style_rows"]),
            style_width=int(description["style_width"]),
            text_width=int(description["text_width"]),
            encoder=str(description["encoder"]),
            pseudo_word=str(description["pseudo_word"]),
            model=None if tag is None else engine.ModelTag.from_description(tag),
            training=training,
        )
    if not all(bool(torch.isfinite(parameter).all()) for parameter in network.parameters()):
        raise IdentityEditError(f"The style attention {path} holds NaN or infinite values; train it again.")
    return style


def _refuse_others(path: str) -> None:
    names, _ = header_of(path)
    if not path.lower().endswith(".safetensors"):
        content = load_external(path, "save it again", "choose one that Train Style Attention has saved", device="meta")
        names = {str(name) for name in content} if isinstance(content, dict) else set()
    if any(_ADAPTER_WEIGHT in name for name in names) or names >= _ADAPTER_PARTS:
        raise IdentityEditError(
            f"The file {path} is a w-plus-adapter, whose layers and row groups differ; train a style attention "
            f"of your own with Train Style Attention."
        )
    if names >= _IP_ADAPTER_PARTS or any(name.startswith("ip_adapter.") for name in names):
        raise IdentityEditError(
            f"The file {path} is an IP-Adapter and not a style attention; load it with a node for IP-Adapters."
        )
    if not path.lower().endswith(".safetensors"):
        raise IdentityEditError(
            f"The file {path} contains no style attention; choose one that Train Style Attention has saved."
        )
