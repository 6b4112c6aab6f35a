"""LAION's aesthetic predictors against torch's own layers, from files with the published names of tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from identity_edit_pack.pipelines.scores import aesthetic as aesthetic_score
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests import tiny_scorers
from safetensors.torch import save_file

EMBEDDINGS = torch.nn.functional.normalize(torch.randn(3, 768, generator=torch.Generator().manual_seed(0)), dim=1)
load = aesthetic_score.load_aesthetic_predictor


class Published(torch.nn.Module):
    """The shape of sac+logos+ava1-l14-linearMSE.pth."""

    def __init__(self) -> None:
        super().__init__()
        sizes, drops = [768, 1024, 128, 64, 16, 1], [0.2, 0.2, 0.1]
        layers: list[torch.nn.Module] = []
        for number in range(5):
            layers.append(torch.nn.Linear(sizes[number], sizes[number + 1]))
            if number < len(drops):
                layers.append(torch.nn.Dropout(drops[number]))
        self.layers = torch.nn.Sequential(*layers)


def test_both_kinds_give_what_their_layers_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_scorers.score_folder(tmp_path / "schön", monkeypatch)
    torch.manual_seed(0)
    several, one = Published().eval(), torch.nn.Linear(768, 1)
    torch.save(several.state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    torch.save(one.state_dict(), folder / "sa_0_4_vit_l_14_linear.pth")
    save_file(several.state_dict(), folder / "several.safetensors")
    with torch.no_grad():
        wanted = several.layers(EMBEDDINGS)[:, 0]
        torch.testing.assert_close(
            load("sa_0_4_vit_l_14_linear.pth").predict(EMBEDDINGS).float(), one(EMBEDDINGS)[:, 0]
        )
    for name in ("sac+logos+ava1-l14-linearMSE.pth", "several.safetensors"):
        found = load(name).predict(EMBEDDINGS)
        assert found.dtype == torch.float64 and found.shape == (3,)
        torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-5)


def test_other_files_and_other_clips_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_scorers.score_folder(tmp_path, monkeypatch)
    with pytest.raises(IdentityEditError, match="The aesthetic score needs any.pth .*; put it into"):
        load("any.pth")
    torch.save({"weight": torch.zeros(2, 768), "bias": torch.zeros(2)}, folder / "any.pth")
    with pytest.raises(IdentityEditError, match="any.pth is not an aesthetic predictor"):
        load("any.pth")
    torch.save({"layers.0.weight": torch.zeros(1, 768)}, folder / "any.pth")
    with pytest.raises(IdentityEditError, match="any.pth is not an aesthetic predictor"):
        load("any.pth")
    torch.save(torch.nn.Linear(768, 1).state_dict(), folder / "any.pth")
    with pytest.raises(IdentityEditError, match="needs embeddings of 768 channels and this CLIP has 512"):
        load("any.pth").predict(EMBEDDINGS[:, :512])
    torch.save(torch.nn.Linear(768, 1), folder / "any.pth")
    with pytest.raises(IdentityEditError, match="cannot be read as plain weights"):
        load("any.pth")
