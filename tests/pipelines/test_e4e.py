"""e4e: its parameters' names and shapes, its output against the same computation written in functions, its files."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from identity_edit_pack.pipelines.pidiff import e4e, w_plus_encoder
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from safetensors.torch import save_file

PUBLISHED = "0e43f86813078aa5aa49a7da57320488d1829293663110410a2b6d153f467e62"
"""SHA-256 of the names and shapes of the published architecture's state, in their order, as JSON."""
WIDTH = 32


def test_names_and_shapes_are_the_published_ones() -> None:
    with torch.device("meta"):
        network = e4e.E4E()
    state = network.state_dict()
    assert len(state) == 621
    assert sum(parameter.numel() for parameter in network.parameters()) == 267_136_704
    names = json.dumps([[name, list(tensor.shape)] for name, tensor in state.items()])
    assert hashlib.sha256(names.encode()).hexdigest() == PUBLISHED


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same network with few channels."""
    monkeypatch.setattr(e4e, "UNITS", ((16, 16, 3), (16, 16, 4), (16, 32, 14), (32, 32, 3)))
    monkeypatch.setattr(e4e, "WIDTH", WIDTH)


def random_network(rows: int = 18) -> e4e.E4E:
    torch.manual_seed(0)
    network = e4e.E4E(rows)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, torch.nn.PReLU):
            torch.nn.init.uniform_(module.weight, 0.0, 0.5)
    return network.eval().requires_grad_(False)


def literal(state: dict[str, torch.Tensor], x: torch.Tensor, rows: int) -> torch.Tensor:
    """The published computation, tensor by tensor from its names, in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, variance, weight, bias = (
            state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def rectify(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.where(x > 0, x, x * state[f"{name}.weight"][:, None, None])

    x = rectify(norm(F.conv2d(x.double(), state["input_layer.0.weight"], padding=1), "input_layer.1"), "input_layer.2")
    kept = {}
    for unit in range(24):
        stride = 2 if unit in (0, 3, 7, 21) else 1
        name = f"body.{unit}.res_layer"
        y = F.conv2d(norm(x, f"{name}.0"), state[f"{name}.1.weight"], padding=1)
        y = norm(F.conv2d(rectify(y, f"{name}.2"), state[f"{name}.3.weight"], padding=1, stride=stride), f"{name}.4")
        scale = F.conv2d(y.mean(dim=(2, 3), keepdim=True), state[f"{name}.5.fc1.weight"]).relu()
        y = y * F.conv2d(scale, state[f"{name}.5.fc2.weight"]).sigmoid()
        short = f"body.{unit}.shortcut_layer"
        if f"{short}.0.weight" in state:
            x = norm(F.conv2d(x, state[f"{short}.0.weight"], stride=stride), f"{short}.1")
        else:
            x = x[:, :, ::stride, ::stride]
        x = x + y
        kept[unit] = x

    def lateral(deep: torch.Tensor, shallow: torch.Tensor, name: str) -> torch.Tensor:
        large = F.interpolate(deep, scale_factor=2, mode="bilinear", align_corners=True)
        return large + F.conv2d(shallow, state[f"{name}.weight"], state[f"{name}.bias"])

    second = lateral(kept[23], kept[20], "latlayer1")
    third = lateral(second, kept[6], "latlayer2")
    result = []
    for row in range(rows):
        y, layer = (kept[23] if row < 3 else second if row < 7 else third), 0
        while y.shape[-1] > 1:
            name = f"styles.{row}.convs.{layer}"
            y = F.leaky_relu(F.conv2d(y, state[f"{name}.weight"], state[f"{name}.bias"], stride=2, padding=1), 0.01)
            layer += 2
        weight, bias = (state[f"styles.{row}.linear.{part}"] for part in ("weight", "bias"))
        result.append(y.flatten(1) @ weight.T / weight.shape[1] ** 0.5 + bias)
    return torch.stack([result[0]] + [result[0] + each for each in result[1:]], dim=1)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("rows", [18, 14])
def test_the_output_is_the_published_computations(rows: int) -> None:
    network = random_network(rows)
    images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = network(images)
    wanted = literal(network.state_dict(), images, rows)
    assert found.shape == (2, rows, WIDTH)
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def published_file(path: Path, network: e4e.E4E, **changes: Any) -> str:
    """A checkpoint as the authors publish it: encoder, StyleGAN, options, mean style."""
    state = {f"encoder.{name}": tensor for name, tensor in network.state_dict().items()}
    state["decoder.style.1.weight"] = torch.zeros(4)
    content = {
        "state_dict": state,
        "latent_avg": torch.arange(18 * WIDTH).reshape(18, WIDTH) / 100.0,
        "opts": {"encoder_type": "Encoder4Editing", "start_from_latent_avg": True, "stylegan_size": 1024},
    }
    torch.save({**content, **changes}, path)
    return str(path)


@pytest.mark.usefixtures("narrow")
def test_the_official_layout_is_read(tmp_path: Path) -> None:
    network = random_network()
    for options in ({"start_from_latent_avg": True}, argparse.Namespace(encoder_type="Encoder4Editing")):
        encoder = w_plus_encoder.load_w_plus_encoder(published_file(tmp_path / "e4e_ffhq.pt", network, opts=options))
        images = torch.rand(1, 3, 256, 256) * 2 - 1
        styles = w_plus_encoder.encode_w_plus(encoder, images)
        average = torch.arange(18 * WIDTH).reshape(18, WIDTH) / 100.0
        torch.testing.assert_close(styles.rows, network(images) + average)
        assert torch.equal(styles.average, average) and styles.encoder.startswith("e4e_ffhq (")
    flat = {name.removeprefix("encoder."): tensor for name, tensor in network.state_dict().items()}
    save_file({**flat, "latent_avg": average}, str(tmp_path / "flat.safetensors"))
    again = w_plus_encoder.load_w_plus_encoder(str(tmp_path / "flat.safetensors"))
    assert torch.equal(w_plus_encoder.encode_w_plus(again, images).rows, styles.rows)
    one_for_all = published_file(tmp_path / "one.pt", network, latent_avg=average[0])
    assert torch.equal(w_plus_encoder.load_w_plus_encoder(one_for_all).average, average[:1].expand(18, -1))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opts": {"encoder_type": "GradualStyleEncoder"}}, "GradualStyleEncoder"),
        ({"opts": {"start_from_latent_avg": False}}, "without a latent average"),
        ({"latent_avg": None}, "latent_avg"),
        ({"latent_avg": torch.zeros(16, WIDTH)}, "latent_avg"),
        ({"state_dict": {"decoder.style.1.weight": torch.zeros(4)}}, "no e4e encoder"),
    ],
)
def test_other_checkpoints_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(IdentityEditError, match=message):
        w_plus_encoder.load_w_plus_encoder(published_file(tmp_path / "other.pt", random_network(), **changes))


@pytest.mark.usefixtures("narrow")
def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    network = random_network()
    state = {f"encoder.{name}": tensor for name, tensor in network.state_dict().items()}
    del state["encoder.body.5.res_layer.0.weight"]
    with pytest.raises(IdentityEditError, match="body.5.res_layer.0.weight"):
        w_plus_encoder.load_w_plus_encoder(published_file(tmp_path / "less.pt", network, state_dict=state))
    state["encoder.body.5.res_layer.0.weight"] = torch.zeros(3)
    with pytest.raises(IdentityEditError, match="do not fit"):
        w_plus_encoder.load_w_plus_encoder(published_file(tmp_path / "shape.pt", network, state_dict=state))


class Malicious:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("old_form", [False, True])
def test_code_in_a_file_does_not_run(tmp_path: Path, old_form: bool) -> None:
    path, trace = tmp_path / "e4e.pt", tmp_path / "it-ran"
    torch.save({"state_dict": {}, "opts": Malicious(str(trace))}, path, _use_new_zipfile_serialization=not old_form)
    with pytest.raises(IdentityEditError, match="contains code"):
        w_plus_encoder.load_w_plus_encoder(str(path))
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the file of this test is harmless, so it proves nothing"


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(b"no weights at all")
        with pytest.raises(IdentityEditError, match=name):
            w_plus_encoder.load_w_plus_encoder(str(tmp_path / name))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(IdentityEditError, match="no e4e encoder"):
        w_plus_encoder.load_w_plus_encoder(str(tmp_path / "list.pt"))
    with pytest.raises(IdentityEditError, match="does not exist"):
        w_plus_encoder.load_w_plus_encoder(str(tmp_path / "none.pt"))
