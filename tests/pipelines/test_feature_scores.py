"""Class tokens and structure distance against transformers' own layers and torchvision's sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from identity_edit_pack.pipelines.scores import features as feature_scores
from identity_edit_pack.pipelines.shared.errors import IdentityEditError

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32)
SOURCE = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
EDITED = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))


def save(folder: Path, kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    if kind == "vit":
        network = transformers.ViTModel(transformers.ViTConfig(**SIZES, patch_size=16), add_pooling_layer=False)
    else:
        network = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, patch_size=16))
    for parameter in network.parameters():
        parameter.data.normal_(0.0, 0.3)
    network.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return network.eval()


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_the_class_token_is_the_networks_own(kind: str, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    folder = tmp_path / "dino 重"
    network = save(folder, kind)
    pixels = [(image * 255).round().byte().numpy() for image in (EDITED[0], SOURCE[0, :40])]
    with torch.no_grad():
        prepared = AutoImageProcessor.from_pretrained(folder)(images=pixels, return_tensors="pt")
        wanted = network(**prepared).last_hidden_state[:, 0]
    with feature_scores.open_encoder(str(folder)) as encode:
        assert encode.name == "dino 重"
        found = encode([EDITED[0], SOURCE[0, :40]])
    torch.testing.assert_close(found, wanted)
    cosine = torch.nn.functional.cosine_similarity(wanted[0], wanted[1], dim=0)
    assert float(feature_scores.cosines(found[:1], found[1:])) == pytest.approx(float(cosine), abs=1e-6)


def test_other_encoders_go_the_way_of_select_reference(tmp_path: Path) -> None:
    from identity_edit_pack.tests.tiny_scorers import save_clip

    network = save_clip(tmp_path)
    with feature_scores.open_encoder(str(tmp_path)) as encode:
        found = encode([EDITED[0]])
    assert found.shape == (1, network.config.projection_dim)
    with pytest.raises(IdentityEditError, match="does not exist"), feature_scores.open_encoder(str(tmp_path / "no")):
        pass


def self_similarity(network: Any, image: torch.Tensor, *, scale: float, antialias: bool) -> np.ndarray:
    """Tumanyan et al. 2022, in numpy, from the hidden states before the last block."""
    scaled = scale * torch.nn.functional.interpolate(
        image.movedim(-1, 0)[None], size=(224, 224), mode="bilinear", antialias=antialias
    )
    scaled = (scaled - torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)) / torch.tensor((0.229, 0.224, 0.225)).view(
        3, 1, 1
    )
    block = network.encoder.layer[-1]
    with torch.no_grad():
        states = network(scaled, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        normed = block.layernorm_before(states[-2])[0].double().numpy()
    projection = block.attention.attention.key
    keys = normed @ projection.weight.detach().double().numpy().T + projection.bias.detach().double().numpy()
    lengths = np.sqrt((keys**2).sum(axis=1))
    return keys @ keys.T / np.outer(lengths, lengths)


@pytest.mark.parametrize("as_pie_bench", [False, True])
def test_the_structure_distance_is_that_of_the_keys(as_pie_bench: bool, tmp_path: Path) -> None:
    network = save(tmp_path, "vit")
    how = dict(scale=255.0 if as_pie_bench else 1.0, antialias=not as_pie_bench)
    large = torch.nn.functional.interpolate(EDITED.movedim(-1, 1), scale_factor=6).movedim(1, -1)
    other = torch.nn.functional.interpolate(SOURCE.movedim(-1, 1), scale_factor=6).movedim(1, -1)
    wanted = ((self_similarity(network, large[0], **how) - self_similarity(network, other[0], **how)) ** 2).mean()
    with feature_scores.open_structure(str(tmp_path)) as structure:
        found = structure.distance(large, other, as_pie_bench=as_pie_bench)
        assert found.dtype == torch.float64 and wanted > 1e-4
        assert found.tolist() == pytest.approx([wanted], rel=1e-4)
        assert structure.distance(EDITED, EDITED).tolist() == [0.0]
        both = structure.distance(torch.cat([large, other]), torch.cat([other, other]), as_pie_bench=as_pie_bench)
        assert both.tolist() == pytest.approx([wanted, 0.0], rel=1e-4)


def test_sizes_are_those_of_torchvisions_resize() -> None:
    from torchvision.transforms import Resize

    resize = Resize(224, max_size=480)
    for height, width in ((512, 512), (512, 768), (768, 512), (100, 700), (701, 100), (224, 480), (333, 500)):
        wanted = tuple(resize(torch.zeros(3, height, width)).shape[1:])
        assert feature_scores.structure_size(height, width) == wanted


def test_the_structure_distance_needs_a_dino(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    opening = feature_scores.open_structure(str(tmp_path))
    with pytest.raises(IdentityEditError, match="is 'dinov2', and the structure distance needs a DINO"), opening:
        pass
