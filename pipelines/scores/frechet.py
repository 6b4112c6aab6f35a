"""Distance of two sets of images: FID (Heusel et al. 2017) and KID (Bińkowski et al. 2018).

Both compare features of an Inception v3, 2048 numbers an image. Two files of it are in use, and their values must not
be mixed: the one that published FIDs were computed with (`pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, whose
averages leave out the padding and whose last block takes a maximum), and torchvision's own
(`inception_v3_google-0cc3c7bd.pth`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d

from ..networks.model_folders import loaded, read_checkpoint
from ..shared.errors import IdentityEditError
from .files import files, missing_file, torchvision_network, with_weights

SIDE = 299
"""Pixels along a side of what Inception v3 takes."""
CLASSES_OF_FID = 1008
"""Classes of the network of published FIDs; torchvision's has 1000."""
FEATURES = 2048
FEWEST = 50
"""[choice] Images in each set below which no distance is given: it would say more of their number than of them."""
NEEDED = "Inception v3, of pytorch-fid or of torchvision"
PURPOSE = "FID"


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Fréchet distance of two normal distributions fitted to features (Heusel et al. 2017, eq. 6).

        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

    The last trace is the sum of the singular values of A1 A2^T, where C = A^T A and A holds the centered features over
    sqrt(n - 1). This is exact also where there are fewer images than features, where roots of C1 C2 are known to
    fail, and takes no root of a matrix.

    Args:
        first, second: [n, D], n of 2 or more each; their numbers may differ.
    """
    sets = [features.double() for features in (first, second)]
    if any(features.ndim != 2 or len(features) < 2 for features in sets) or first.shape[1] != second.shape[1]:
        raise IdentityEditError(
            f"The features {tuple(first.shape)} and {tuple(second.shape)} cannot be compared; give two or more "
            f"images on each side, and the same network for both."
        )
    means = [features.mean(dim=0) for features in sets]
    roots = [(features - mean) / (len(features) - 1) ** 0.5 for features, mean in zip(sets, means, strict=True)]
    variances = sum(float(root.square().sum()) for root in roots)
    # With more images than features, a triangle [D, D] with the same A^T A makes the product small.
    small = [torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root for root in roots]
    shared = torch.linalg.svdvals(small[0] @ small[1].T).sum()
    distance = float((means[0] - means[1]).square().sum()) + variances - 2.0 * float(shared)
    return max(0.0, distance)  # rounding may leave -1e-13 of two equal sets


def kernel_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, without bias (Bińkowski et al. 2018, sec. 4).

    Over all images at once, where the authors take the mean over random subsets to save time. Unlike FID it does not
    grow when there are few images; it may be a little below 0 for sets of the same kind.

    Args:
        first, second: [n, D], n of 2 or more each.
    """
    x, y = first.double(), second.double()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    def mean_of_pairs(a: torch.Tensor) -> float:
        found = kernel(a, a)
        return float((found.sum() - found.diagonal().sum()) / (len(a) * (len(a) - 1)))

    return mean_of_pairs(x) + mean_of_pairs(y) - 2.0 * float(kernel(x, y).mean())


@dataclass(frozen=True)
class Inception:
    """A loaded Inception v3; `name` is its file's."""

    name: str
    network: Any
    device: torch.device

    def features(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """[n, 2048] float32 of n images [h, w, 3], 0 to 1, of any sizes: scaled to 299 pixels as pytorch-fid does,
        bilinear and without smoothing, and to -1 to 1."""
        found = []
        for image in images:
            scaled = image.float().permute(2, 0, 1)[None].to(self.device)
            scaled = interpolate(scaled, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
            found.append(self.network(2.0 * scaled - 1.0).cpu())
        return torch.cat(found)


@contextmanager
def open_inception(name: str) -> Iterator[Inception]:
    """Context manager for an Inception v3 from a file in models/image_scores.

    Raises:
        IdentityEditError: when the file is missing or holds something else.
    """
    paths = files()
    if name not in paths:
        raise IdentityEditError(missing_file(name, PURPOSE, NEEDED))
    path = paths[name]

    def load() -> tuple[Any, None]:
        return inception_of(read_checkpoint(path), path), None

    with loaded(path, load) as (network, _, device):
        yield Inception(os.path.basename(name), network, device)


def inception_of(state: dict[str, torch.Tensor], path: str) -> Any:
    """Inception v3 that returns its pooled features, from the tensors of either file (distinguished by the number of
    classes)."""
    head = state.get("fc.weight")
    is_of_fid = head is not None and len(head) == CLASSES_OF_FID
    # Neither the classifier nor the second one of training is needed.
    own = {key: value for key, value in state.items() if not key.startswith(("fc.", "AuxLogits."))}

    def make(models: Any) -> Any:
        network = models.inception.Inception3(
            aux_logits=False, init_weights=False, inception_blocks=_blocks(models.inception) if is_of_fid else None
        )
        network.fc = torch.nn.Identity()
        if is_of_fid:
            network.Mixed_7c.pool = _largest
        return network

    return with_weights(torchvision_network(make), own, path, "Inception v3").eval()


def _average(values: torch.Tensor) -> torch.Tensor:
    return avg_pool2d(values, kernel_size=3, stride=1, padding=1, count_include_pad=False)


def _largest(values: torch.Tensor) -> torch.Tensor:
    return max_pool2d(values, kernel_size=3, stride=1, padding=1)


def _blocks(inception: Any) -> list[Any]:
    """torchvision's blocks with the pooling of the network of published FIDs; its last pooling branch differs."""

    class PooledAnew:
        pool = staticmethod(_average)

        def _forward(self, values: torch.Tensor) -> list[torch.Tensor]:
            branches = super()._forward(values)  # type: ignore[misc]
            return [*branches[:-1], self.branch_pool(self.pool(values))]  # type: ignore[attr-defined]

    class BlockA(PooledAnew, inception.InceptionA):
        pass

    class BlockC(PooledAnew, inception.InceptionC):
        pass

    class BlockE(PooledAnew, inception.InceptionE):
        pass

    rest = (inception.InceptionAux,)
    return [inception.BasicConv2d, BlockA, inception.InceptionB, BlockC, inception.InceptionD, BlockE, *rest]
