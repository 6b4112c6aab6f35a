"""The W+ nodes as the graph calls them, on a tiny encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from identity_edit_pack.nodes.pidiff import w_plus as nodes
from identity_edit_pack.pipelines.pidiff import w_plus_encoder as encoders
from identity_edit_pack.pipelines.pidiff.w_plus_encoder import SmallWPlusEncoder
from identity_edit_pack.pipelines.shared.errors import IdentityEditError


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("models", "output", "input"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    paths = [str(tmp_path / place / nodes.ENCODER_FOLDER) for place in ("models", "output")]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, nodes.ENCODER_FOLDER, (paths, {".safetensors"}))
    torch.manual_seed(0)
    network = SmallWPlusEncoder(size=32, groups=((2, 3), (4, 1)), width=6, channels=(8, 16, 16), hidden=12, grid=2)
    path = tmp_path / "models" / nodes.ENCODER_FOLDER / "tiny.safetensors"
    encoders.save_w_plus_encoder(str(path), network, torch.randn(6, 6), "tiny")
    return tmp_path


def run(node: Any, *inputs: Any, **options: Any) -> tuple[Any, ...]:
    with torch.inference_mode():  # as ComfyUI runs nodes
        return node.execute(*inputs, **options).args


@pytest.fixture
def encoder() -> Any:
    return run(nodes.LoadWPlusEncoder, "tiny.safetensors")[0]


def faces(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


def test_encoders_are_listed_loaded_and_described() -> None:
    assert "tiny.safetensors" in nodes.LoadWPlusEncoder.define_schema().inputs[0].options
    encoder, report = run(nodes.LoadWPlusEncoder, "tiny.safetensors")
    assert "6 codes of width 6, from images of 32x32" in report and encoder.name.startswith("tiny (")
    assert nodes.LoadWPlusEncoder.validate_inputs("tiny.safetensors") is True
    message = str(nodes.LoadWPlusEncoder.validate_inputs("e4e_ffhq_encode.pt"))
    assert "e4e_ffhq_encode.pt" in message and nodes.ENCODER_FOLDER in message
    with pytest.raises(IdentityEditError, match="is not in"):
        run(nodes.LoadWPlusEncoder, nodes.NO_MODEL)


def test_a_saved_encoder_is_the_same(encoder: Any) -> None:
    (path,) = run(nodes.SaveWPlusEncoder, encoder, "w_plus_encoders/copy")
    again = run(nodes.LoadWPlusEncoder, Path(path).name)[0]
    assert again.name == encoder.name
    before, after = (run(nodes.EncodeWPlus, each, faces(1))[0] for each in (encoder, again))
    assert torch.equal(before.rows, after.rows)


def test_faces_are_encoded_and_resizing_is_said(encoder: Any) -> None:
    styles, report = run(nodes.EncodeWPlus, encoder, faces(3))
    assert styles.rows.shape == (3, 6, 6) and "3 faces, 6 codes of width 6" in report and "resized" not in report
    one = run(nodes.EncodeWPlus, encoder, faces(3)[1:2])[0]
    torch.testing.assert_close(styles.rows[1:2], one.rows)
    assert "resized from 64x64 to 32x32" in run(nodes.EncodeWPlus, encoder, faces(1, 64))[1]
    assert "Warning: The faces are 16 pixels wide" in run(nodes.EncodeWPlus, encoder, faces(1, 16))[1]
    gray = faces(1)[..., :1]
    both = [run(nodes.EncodeWPlus, encoder, each)[0].rows for each in (gray, gray.expand(-1, -1, -1, 3))]
    assert torch.equal(*both)
    with pytest.raises(IdentityEditError, match="Align Face"):
        run(nodes.EncodeWPlus, encoder, torch.rand(1, 32, 40, 3))


def test_styles_are_mixed_averaged_saved_and_loaded(encoder: Any) -> None:
    first, second = (run(nodes.EncodeWPlus, encoder, faces(1, seed=seed))[0] for seed in (1, 2))
    mixed, report = run(nodes.MixWPlus, first, second, "4-6", 1.0)
    assert torch.equal(mixed.rows[:, :3], first.rows[:, :3]) and torch.equal(mixed.rows[:, 3:], second.rows[:, 3:])
    assert "codes 4, 5, 6 from the second face" in report
    with pytest.raises(IdentityEditError, match="rows 1 to 6"):
        run(nodes.MixWPlus, first, second, "10-18", 1.0)

    mean, report = run(nodes.AverageWPlus, first, third=second)
    torch.testing.assert_close(mean.rows, (first.rows + second.rows) / 2)
    assert "2 faces" in report

    (path,) = run(nodes.SaveWPlus, mixed, "w_plus/person")
    name = f"w_plus/{Path(path).name} [output]"
    assert name in nodes.LoadWPlus.define_schema().inputs[0].options and nodes.LoadWPlus.validate_inputs(name) is True
    loaded, report = run(nodes.LoadWPlus, name)
    assert torch.equal(loaded.rows, mixed.rows) and loaded.encoder == encoder.name in report
    assert "no longer exists" in str(nodes.LoadWPlus.validate_inputs("w_plus/none.safetensors [output]"))
