"""The small encoder, its files, and what encoding refuses."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import pytest
import torch
from identity_edit_pack.pipelines.pidiff import w_plus_encoder as encoders
from identity_edit_pack.pipelines.pidiff.w_plus_encoder import SmallWPlusEncoder
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.shared.files import write_tensors

CONFIG = dict(size=32, groups=((2, 3), (3, 1)), width=6, channels=(8, 16, 16), hidden=12, grid=2)


def small(seed: int = 0) -> SmallWPlusEncoder:
    torch.manual_seed(seed)
    return SmallWPlusEncoder(**CONFIG)


def saved(folder: Path, seed: int = 0, name: str = "tiny") -> str:
    path = str(folder / f"{name}.safetensors")
    encoders.save_w_plus_encoder(path, small(seed), torch.linspace(-1, 1, 30).reshape(5, 6), name, {"steps": 7})
    return path


def test_rows_read_their_own_depth() -> None:
    network = small()
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    before = network(images)
    assert before.shape == (1, 5, 6)
    with torch.no_grad():
        for parameter in network.stages[2].parameters():
            parameter.add_(0.5)
    after = network(images)
    assert torch.equal(before[:, 2:], after[:, 2:]), "fine rows depend on deep features"
    assert not torch.allclose(before[:, :2], after[:, :2])


def test_a_file_gives_the_encoder_back(tmp_path: Path) -> None:
    encoder = encoders.load_w_plus_encoder(saved(tmp_path))
    assert encoder.size == 32 and encoder.training == {"steps": 7} and encoder.name.startswith("tiny (")
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    styles = encoders.encode_w_plus(encoder, images)
    average = torch.linspace(-1, 1, 30).reshape(5, 6)
    torch.testing.assert_close(styles.rows, small().eval()(images) + average)
    assert torch.equal(styles.average, average) and styles.encoder == encoder.name
    again = encoders.load_w_plus_encoder(saved(tmp_path))
    other = encoders.load_w_plus_encoder(saved(tmp_path, seed=1))
    assert again.name == encoder.name != other.name, "different weights have the same fingerprint"


def test_encoding_in_a_node_gives_styles_that_can_be_trained_with(tmp_path: Path) -> None:
    with torch.inference_mode():
        encoder = encoders.load_w_plus_encoder(saved(tmp_path))
        styles = encoders.encode_w_plus(encoder, torch.zeros(1, 3, 32, 32))
    layer = torch.nn.Linear(6, 1)
    layer(styles.rows).sum().backward()
    assert layer.weight.grad is not None
    assert not any(parameter.is_inference() for parameter in encoder.network.parameters())


def test_comfyui_manages_the_network(tmp_path: Path) -> None:
    encoder = encoders.load_w_plus_encoder(saved(tmp_path))
    encoders.encode_w_plus(encoder, torch.zeros(1, 3, 32, 32))
    loaded = [each.model for each in comfy.model_management.current_loaded_models]
    assert any(model is encoder.patcher for model in loaded)
    comfy.model_management.unload_all_models()
    assert not any(each.model is encoder.patcher for each in comfy.model_management.current_loaded_models)
    encoders.encode_w_plus(encoder, torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("shape", [(1, 3, 40, 40), (1, 1, 32, 32), (3, 32, 32), (1, 3, 32, 64)])
def test_other_sizes_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(IdentityEditError, match="32x32"):
        encoders.encode_w_plus(encoders.load_w_plus_encoder(saved(tmp_path)), torch.zeros(shape))


def test_another_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IdentityEditError, match="-1 to 1"):
        encoders.encode_w_plus(encoders.load_w_plus_encoder(saved(tmp_path)), torch.full((1, 3, 32, 32), 200.0))


def test_images_are_brought_to_size_and_range() -> None:
    ramp = torch.linspace(0, 1, 64)[None, :, None, None].expand(1, -1, 64, 3)
    fitted = encoders.fitted(ramp, 32)
    assert fitted.shape == (1, 3, 32, 32) and float(fitted.min()) >= -1 and float(fitted.max()) <= 1
    pairs = (ramp[0, ::2, 0, 0] + ramp[0, 1::2, 0, 0]) - 1.0  # a pixel of half the size is the mean of two
    torch.testing.assert_close(fitted[0, 0, 1:-1, 16], pairs[1:-1], atol=1e-3, rtol=0)
    exact = torch.rand(1, 32, 32, 3)
    assert torch.equal(encoders.fitted(exact, 32), exact.movedim(-1, 1) * 2 - 1)
    with pytest.raises(IdentityEditError, match="Align Face"):
        encoders.fitted(torch.rand(1, 32, 48, 3), 32)


def test_configurations_that_cannot_be_are_refused() -> None:
    for wrong in ({"size": 30}, {"groups": ((2, 4),)}, {"groups": ((2, 0),)}):
        with pytest.raises(IdentityEditError, match="stages"):
            SmallWPlusEncoder(**{**CONFIG, **wrong})


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "x.safetensors")
    write_tensors(path, {"a": torch.zeros(1)}, {"kind": "inversion"})
    with pytest.raises(IdentityEditError, match="contains no encoder of W"):
        encoders.load_w_plus_encoder(path)
    write_tensors(path, {"latent_avg": torch.zeros(5, 6)}, {"kind": encoders.KIND, "architecture": "huge"})
    with pytest.raises(IdentityEditError, match="unknown kind"):
        encoders.load_w_plus_encoder(path)
    encoders.save_w_plus_encoder(path, small(), torch.zeros(4, 6), "tiny")
    with pytest.raises(IdentityEditError, match="latent average"):
        encoders.load_w_plus_encoder(path)
