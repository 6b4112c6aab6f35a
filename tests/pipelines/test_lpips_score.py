"""LPIPS against the authors' package with the same weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from identity_edit_pack.pipelines.scores import lpips as lpips_score
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests import tiny_scorers

SOURCE = torch.rand(2, 70, 64, 3, generator=torch.Generator().manual_seed(1))
EDITED = torch.rand(2, 70, 64, 3, generator=torch.Generator().manual_seed(2)) * 0.3 + 0.7 * SOURCE


@pytest.mark.parametrize("name", list(lpips_score.BACKBONES))
def test_every_backbone_gives_what_the_authors_package_gives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_scorers.score_folder(tmp_path / "wéights 重", monkeypatch)
    theirs = tiny_scorers.lpips_of_the_authors(name)
    tiny_scorers.save_lpips(folder / "lpips", name, theirs)
    with torch.no_grad():
        wanted, by_layer = theirs(*(2 * p.movedim(-1, 1) - 1 for p in (EDITED, SOURCE)), retPerLayer=True)
    with lpips_score.open_lpips(name) as scorer:
        found = scorer.distance(EDITED, SOURCE)
        assert found.dtype == torch.float64 and found.shape == (2,) and bool((found > 1e-3).all())
        torch.testing.assert_close(found, wanted.flatten().double(), rtol=1e-4, atol=1e-6)
        assert len(by_layer) == len(lpips_score.BACKBONES[name].layers)
        torch.testing.assert_close(scorer.distance(EDITED, SOURCE, torch.ones(2, 70, 64)), found)
        assert scorer.distance(SOURCE, SOURCE).tolist() == [0.0, 0.0]
        assert bool(scorer.distance(EDITED, SOURCE, torch.zeros(2, 70, 64)).isnan().all())
        with pytest.raises(IdentityEditError, match="64x31 pixels; give sides of 32"):
            scorer.distance(EDITED[:, :31], SOURCE[:, :31])


def test_a_part_weighs_the_places_of_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lpips

    folder = tiny_scorers.score_folder(tmp_path, monkeypatch)
    theirs = tiny_scorers.lpips_of_the_authors("AlexNet")
    tiny_scorers.save_lpips(folder, "AlexNet", theirs)
    mask = torch.zeros(2, 70, 64)
    mask[:, :35] = 1.0
    wanted = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        pair = [theirs.net(theirs.scaling_layer(2 * p.movedim(-1, 1) - 1)) for p in (EDITED, SOURCE)]
        for first, second, head in zip(*pair, theirs.lins, strict=True):
            layer = head((lpips.normalize_tensor(first) - lpips.normalize_tensor(second)) ** 2)[:, 0].double()
            places = torch.stack(  # how much of each place's share of the image is in the mask, row by row
                [
                    mask[0, row * 70 // len(layer[0]) : -(-(row + 1) * 70 // len(layer[0]))].mean().double()
                    for row in range(len(layer[0]))
                ]
            )
            wanted += (layer.mean(dim=2) * places).sum(dim=1) / places.sum()
    with lpips_score.open_lpips("AlexNet") as scorer:
        found = scorer.distance(EDITED, SOURCE, mask)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(found, scorer.distance(EDITED, SOURCE), rtol=1e-3)


def test_missing_and_wrong_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_scorers.score_folder(tmp_path, monkeypatch)
    with pytest.raises(IdentityEditError, match="needs alexnet-owt-7be5be79.pth .*; put it into"), _open("AlexNet"):
        pass
    torch.save({"features.0.weight": torch.zeros(2, 2)}, folder / "alexnet-owt-7be5be79.pth")
    with pytest.raises(IdentityEditError, match="needs alex.pth"), _open("AlexNet"):
        pass
    (folder / "alex.pth").write_bytes(tiny_scorers.heads_file("AlexNet").read_bytes())
    with pytest.raises(IdentityEditError, match="is not the file of alexnet that torchvision"), _open("AlexNet"):
        pass
    tiny_scorers.save_lpips(folder, "AlexNet", tiny_scorers.lpips_of_the_authors("AlexNet"))
    (folder / "alex.pth").write_bytes(tiny_scorers.heads_file("SqueezeNet").read_bytes())
    with pytest.raises(IdentityEditError, match="has not the 5 linear heads"), _open("AlexNet"):
        pass
    with pytest.raises(IdentityEditError, match="lpips is 'ResNet'; choose one of AlexNet"), _open("ResNet"):
        pass


def test_a_torchvision_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_scorers.score_folder(tmp_path, monkeypatch)
    torch.save({"features.0.weight": torch.zeros(2, 2)}, folder / "alexnet.pth")
    (folder / "alex.pth").write_bytes(tiny_scorers.heads_file("AlexNet").read_bytes())
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(IdentityEditError, match="torchvision cannot be imported"), _open("AlexNet"):
        pass


_open = lpips_score.open_lpips
