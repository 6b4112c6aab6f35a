"""Choosing a reference by features: the built-in ones, local folders of transformers and timm, and CLIP_VISION."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from identity_edit_pack.demo_world.attributes import Attributes
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.pipelines.hifi_tuner import reference_selection as selection
from identity_edit_pack.pipelines.networks import image_encoders
from identity_edit_pack.pipelines.shared.errors import IdentityEditError

CAT = Attributes(color="orange", pattern="striped")


def drawn(attributes: Attributes, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    image, mask = render(attributes, seed)
    return torch.from_numpy(image.copy()).float() / 255, torch.from_numpy(mask.copy()).float() / 255


def save_vit(folder: Path, kind: str = "vit", seed: int = 0) -> Any:
    """A tiny random encoder of transformers in a folder; gives the network."""
    import transformers

    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32)
    torch.manual_seed(seed)
    if kind == "vit":
        network = transformers.ViTModel(transformers.ViTConfig(**sizes, patch_size=16), add_pooling_layer=False)
        processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    elif kind == "dinov2":
        sizes.pop("intermediate_size")
        network = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, patch_size=16))
        processor = transformers.BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    else:
        vision = transformers.CLIPVisionConfig(**sizes, patch_size=16, projection_dim=8)
        text = transformers.CLIPTextConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
        )
        config = transformers.CLIPConfig(text.to_dict(), vision.to_dict(), projection_dim=8)
        network = transformers.CLIPModel(config)
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return network.eval()


def test_the_built_in_features_choose_the_same_pose_and_view() -> None:
    """Five images of one subject in other poses and views; the generated one shares its pose with one of them."""
    right = 0
    for pose in ("standing", "sitting", "jumping", "lying"):
        sources = [
            drawn(CAT.replace(pose=other, facing=facing, place=place), 10 + i)
            for i, (other, facing, place) in enumerate(
                [(p, f, "grass") for p in ("standing", "sitting", "jumping", "lying") for f in ("left", "right")]
            )
        ]
        generated = drawn(CAT.replace(pose=pose, facing="left", place="snow"), 77)
        choice = selection.select_reference(
            [generated[0]],
            [image for image, _ in sources],
            selection.histogram_features,
            generated_masks=[generated[1]],
            source_masks=[mask for _, mask in sources],
        )
        expected = ("standing", "sitting", "jumping", "lying").index(pose) * 2
        right += choice.index == expected
    assert right >= 3


def test_the_same_image_has_similarity_one_and_several_generated_ones_are_averaged() -> None:
    images = [drawn(CAT.replace(place=place), 3)[0] for place in ("grass", "snow", "night")]
    choice = selection.select_reference([images[1]], images, selection.histogram_features)
    assert choice.index == 1 and float(choice.similarities[1]) == pytest.approx(1.0, abs=1e-5)
    both = selection.select_reference([images[1], images[2]], images, selection.histogram_features)
    other = selection.select_reference([images[2]], images, selection.histogram_features)
    assert torch.allclose(both.similarities, (choice.similarities + other.similarities) / 2, atol=1e-6)


def test_the_background_does_not_count_where_only_the_subject_does() -> None:
    first, second = (drawn(CAT.replace(place=place), 3) for place in ("grass", "night"))
    a, b = (selection.subject_only(*image) for image in (first, second))
    assert a.shape == b.shape and a.shape[0] == a.shape[1]
    whole = torch.nn.functional.cosine_similarity(*selection.histogram_features([first[0], second[0]]), dim=0)
    alone = torch.nn.functional.cosine_similarity(*selection.histogram_features([a, b]), dim=0)
    assert alone > 0.99 and alone > whole + 0.1


def test_the_subject_is_cut_to_a_square_also_at_the_border() -> None:
    image, mask = torch.rand(20, 40, 3), torch.zeros(20, 40)
    mask[2:18, 36:40] = 1
    cut = selection.subject_only(image, mask, margin=0.0)
    assert cut.shape == (16, 16, 3)
    assert torch.equal(cut[:, 6:10], image[2:18, 36:40])
    cut[:, 6:10] = selection.BACKGROUND
    assert float((cut - selection.BACKGROUND).abs().max()) == 0


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip"])
def test_a_folder_of_transformers_gives_the_network_s_own_features(kind: str, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    network = save_vit(tmp_path, kind)
    images = [drawn(CAT, 1)[0], drawn(CAT, 2)[0]]
    found = image_encoders.encoder_of_folder(str(tmp_path))(images)
    prepared = AutoImageProcessor.from_pretrained(tmp_path)(
        images=[(image * 255).round().byte().numpy() for image in images], return_tensors="pt"
    )
    with torch.no_grad():
        if kind == "clip":
            expected = network.get_image_features(**prepared)
        else:
            expected = network(**prepared).last_hidden_state[:, 0]
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_folder_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm is not among the requirements: an object with its one function stands in for it."""
    from safetensors.torch import save_file

    path = str(tmp_path)
    with pytest.raises(IdentityEditError, match="does not exist|has no config.json"):
        image_encoders.encoder_of_folder(path)
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 4))
    save_file({**network.state_dict(), "head.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    config = {
        "architecture": "tiny",
        "pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(IdentityEditError, match="pip install timm"):
        image_encoders.encoder_of_folder(path)
    asked = []

    def create_model(name: str, **options: Any) -> torch.nn.Module:
        asked.append((name, options))
        fresh = torch.nn.Linear(12, 4)
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), fresh)

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    image = torch.rand(16, 16, 3)
    found = image_encoders.encoder_of_folder(path)([image])
    assert asked == [("tiny", {"pretrained": False, "num_classes": 0})]
    with torch.no_grad():
        assert torch.allclose(found, network((image.permute(2, 0, 1)[None] - 0.5) / 0.5), atol=1e-5)


def test_clip_vision_of_comfyui() -> None:
    class ClipVision:
        def encode_image(self, image: torch.Tensor, crop: bool = True) -> dict[str, torch.Tensor]:
            assert not crop and image.ndim == 4
            return {"image_embeds": image.mean(dim=(1, 2)), "last_hidden_state": torch.zeros(1, 2, 3)}

    found = image_encoders.encoder_of_clip_vision(ClipVision())([torch.rand(4, 4, 3), torch.rand(6, 5, 3)])
    assert found.shape == (2, 3)


def test_folders_that_cannot_be_used_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(IdentityEditError, match="does not exist; create it with config.json"):
        image_encoders.encoder_of_folder(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(IdentityEditError, match="no weights"):
        image_encoders.encoder_of_folder(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(IdentityEditError, match="only pickled weights"):
        image_encoders.encoder_of_folder(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(IdentityEditError, match="no preprocessor_config.json"):
        image_encoders.encoder_of_folder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(IdentityEditError, match="is 'llama', which is not a supported image encoder"):
        image_encoders.encoder_of_folder(str(tmp_path))


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_vit(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights.pop("encoder.layer.0.attention.attention.query.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(IdentityEditError, match="lack 1 tensors"):
        image_encoders.encoder_of_folder(str(tmp_path))([torch.rand(8, 8, 3)])


def test_bad_input_is_named() -> None:
    image = torch.rand(8, 8, 3)
    with pytest.raises(IdentityEditError, match="no image to choose from"):
        selection.select_reference([image], [], selection.histogram_features)
    with pytest.raises(IdentityEditError, match="2 masks for 1 images"):
        selection.select_reference([image], [image], selection.histogram_features, source_masks=[None, None])
    with pytest.raises(IdentityEditError, match="A mask is empty"):
        selection.subject_only(image, torch.zeros(8, 8))
