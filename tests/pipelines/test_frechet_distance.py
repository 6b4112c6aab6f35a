"""FID and KID against scipy's matrix root and torchmetrics, and both forms of Inception v3 against torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from identity_edit_pack.pipelines.scores import frechet as frechet_distance
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests import tiny_scorers
from torch.nn.functional import avg_pool2d, max_pool2d


def features(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(count, width, generator=generator) @ mixed + 0.3 * seed


def by_scipy(first: torch.Tensor, second: torch.Tensor) -> float:
    """Heusel et al. 2017, eq. 6, with a root of the product of covariances."""
    from scipy.linalg import sqrtm

    a, b = first.double().numpy(), second.double().numpy()
    root = sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    traces = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False)) - 2 * np.trace(root)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + traces)


def test_fid_of_many_images_is_scipys_and_torchmetrics() -> None:
    from torchmetrics.image.fid import _compute_fid

    first, second = features(60, 12, 1), features(45, 12, 2)
    found = frechet_distance.frechet_distance(first, second)
    assert found == pytest.approx(by_scipy(first, second), rel=1e-9)
    a, b = first.double(), second.double()
    wanted = _compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    assert found == pytest.approx(float(wanted), rel=1e-9)


def test_fid_of_fewer_images_than_features() -> None:
    """Two sets in a plane of a larger space: the distance is that within the plane, which scipy can do."""
    plane = torch.linalg.qr(torch.randn(40, 5, generator=torch.Generator().manual_seed(3)).double()).Q
    first, second = features(9, 5, 1).double(), features(7, 5, 2).double()
    found = frechet_distance.frechet_distance(first @ plane.T, second @ plane.T)
    assert found == pytest.approx(by_scipy(first, second), rel=1e-9)
    assert frechet_distance.frechet_distance(first @ plane.T, first @ plane.T) == pytest.approx(0.0, abs=1e-9)


def test_kid_is_that_of_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    first, second = features(30, 12, 1), features(30, 12, 2)
    wanted = poly_mmd(first.double(), second.double())
    assert frechet_distance.kernel_distance(first, second) == pytest.approx(float(wanted), rel=1e-9)
    # Of two halves of one set it is around 0, and FID is not.
    one = features(200, 12, 1)
    assert abs(frechet_distance.kernel_distance(one[:100], one[100:])) < 0.1 * float(wanted)


def test_sets_that_cannot_be_compared_are_named() -> None:
    for pair in ((features(1, 4, 1), features(5, 4, 1)), (features(5, 4, 1), features(5, 6, 1))):
        with pytest.raises(IdentityEditError, match="cannot be compared; give two or more images"):
            frechet_distance.frechet_distance(*pair)


@pytest.fixture(scope="module")
def torchvisions() -> Any:
    """torchvision's own Inception v3 with random weights, giving its pooled features."""
    import torchvision

    with torch.device("meta"):
        network = torchvision.models.inception_v3(weights=None, aux_logits=True, init_weights=False)
    tiny_scorers.draw_weights(network)
    return network.eval()


def own_features(network: Any, images: torch.Tensor) -> torch.Tensor:
    found: list[torch.Tensor] = []
    handle = network.avgpool.register_forward_hook(lambda module, given, output: found.append(output.flatten(1)))
    with torch.no_grad():
        network(images)
    handle.remove()
    return found[0]


IMAGES = [torch.rand(64, 48, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
SCALED = torch.cat(
    [2 * torch.nn.functional.interpolate(p.movedim(-1, 0)[None], size=(299, 299), mode="bilinear") - 1 for p in IMAGES]
)


def test_torchvisions_file_gives_torchvisions_features(
    torchvisions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_scorers.score_folder(tmp_path / "重", monkeypatch)
    torch.save(torchvisions.state_dict(), folder / "inception_v3_google-0cc3c7bd.pth")
    with frechet_distance.open_inception("inception_v3_google-0cc3c7bd.pth") as inception:
        found = inception.features(IMAGES)
    assert found.shape == (2, frechet_distance.FEATURES)
    torch.testing.assert_close(found, own_features(torchvisions, SCALED), rtol=1e-3, atol=1e-5)


def test_the_file_of_published_fids_gives_the_features_of_its_network(torchvisions: Any) -> None:
    """That network averages without the padding, and takes a maximum in its last block (the description in TensorFlow's
    graph); told to torchvision's by hooks."""
    state = {key: value for key, value in torchvisions.state_dict().items() if not key.startswith("AuxLogits")}
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    handles = []

    def without_padding(module: Any, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        ones = torch.ones_like(given[0][:, :1])
        return (given[0] / avg_pool2d(ones, kernel_size=3, stride=1, padding=1),)

    def maximum_of(kept: list[torch.Tensor]) -> Callable[[Any, tuple[torch.Tensor]], tuple[torch.Tensor]]:
        return lambda module, given: (max_pool2d(kept[-1], kernel_size=3, stride=1, padding=1),)

    kept: list[torch.Tensor] = []
    for name, module in torchvisions.named_children():
        if name == "Mixed_7c":
            handles.append(module.register_forward_pre_hook(lambda module, given: kept.append(given[0])))
            handles.append(module.branch_pool.register_forward_pre_hook(maximum_of(kept)))
        elif hasattr(module, "branch_pool"):
            handles.append(module.branch_pool.register_forward_pre_hook(without_padding))
    wanted = own_features(torchvisions, SCALED)
    for handle in handles:
        handle.remove()
    network = frechet_distance.inception_of(state, "pt_inception-2015-12-05-6726825d.pth")
    found = frechet_distance.Inception("", network, torch.device("cpu")).features(IMAGES)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found, own_features(torchvisions, SCALED), rtol=1e-2, atol=1e-3)


def test_missing_and_wrong_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_scorers.score_folder(tmp_path, monkeypatch)
    opening = frechet_distance.open_inception("pt_inception.pth")
    with pytest.raises(IdentityEditError, match="FID needs pt_inception.pth .*; put it into .*, and press R"), opening:
        pass
    torch.save({"weight": torch.zeros(2)}, folder / "pt_inception.pth")
    opening = frechet_distance.open_inception("pt_inception.pth")
    with pytest.raises(IdentityEditError, match="pt_inception.pth is not the file of Inception v3"), opening:
        pass
