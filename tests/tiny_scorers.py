"""Files of the networks that scores are computed with, in their published forms, with random weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import comfy.sd1_clip
import lpips
import torch
from identity_edit_pack.pipelines.scores import files as score_files
from identity_edit_pack.pipelines.scores import lpips as lpips_score

LPIPS_NAMES = {"AlexNet": "alex", "VGG-16": "vgg", "SqueezeNet": "squeeze"}


def draw_weights(network: torch.nn.Module, seed: int = 0) -> None:
    """Give a network from the meta device random weights under which its values neither vanish nor explode."""
    generator = torch.Generator().manual_seed(seed)
    network.to_empty(device="cpu")
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        if name.endswith("running_var"):
            value.data.fill_(1.0)
        elif value.ndim < 2 or not value.is_floating_point():
            value.data.fill_(1 if name.endswith("weight") else 0)
        else:
            fan = value[0].numel()
            value.data.copy_(torch.randn(value.shape, generator=generator) * (2.0 / fan) ** 0.5)


def lpips_of_the_authors(name: str, seed: int = 0) -> Any:
    """The package lpips with its own heads and a random backbone."""
    short = LPIPS_NAMES[name]
    with torch.device("meta"):
        network = lpips.LPIPS(net=short, pretrained=False, pnet_rand=True, verbose=False)
    draw_weights(network, seed)
    network.scaling_layer = lpips.lpips.ScalingLayer()
    heads = torch.load(heads_file(name), map_location="cpu", weights_only=True)
    assert not network.load_state_dict(heads, strict=False).unexpected_keys
    return network.eval()


def heads_file(name: str) -> Path:
    """The published linear heads, which the package brings along."""
    return Path(lpips.__file__).parent / "weights" / "v0.1" / f"{LPIPS_NAMES[name]}.pth"


def save_lpips(folder: Path, name: str, network: Any) -> None:
    """A backbone as torchvision publishes it, and the heads, into a folder."""
    state = {"classifier.1.weight": torch.zeros(2, 2)}
    for key, value in network.net.state_dict().items():
        state[f"features.{key.split('.', 1)[1]}"] = value.detach().clone()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / lpips_score.EXAMPLES[name])
    (folder / heads_file(name).name).write_bytes(heads_file(name).read_bytes())


def score_folder(folder: Path, monkeypatch: Any) -> Path:
    """Makes a folder that of the files of scores for one test."""
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(score_files, "model_roots", lambda name: [str(folder)])
    return folder


def save_clip(folder: Path, seed: int = 0, projection: int = 8) -> Any:
    """A tiny CLIP with both encoders and CLIP's own tokenizer, in the form of transformers; gives the network."""
    import transformers

    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    text = transformers.CLIPTextConfig(
        **sizes, vocab_size=49408, bos_token_id=49406, eos_token_id=49407, projection_dim=projection
    )
    vision = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=16, projection_dim=projection)
    network = transformers.CLIPModel(
        transformers.CLIPConfig(text.to_dict(), vision.to_dict(), projection_dim=projection)
    )
    for parameter in network.parameters():
        parameter.data.normal_(0.0, 0.3)
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(
        os.path.join(os.path.dirname(comfy.sd1_clip.__file__), "sd1_tokenizer")
    )
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    network.save_pretrained(folder)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return network.eval()
