"""Registration of an edited image with its original, estimated from the part of the image that was not edited.

Instruction editors return an image that is shifted, zoomed, stretched or slightly rotated, with other colors. The
transform is found in two steps. The coarse step correlates the images' edge orientations (orientation correlation,
Fitch et al. 2002: the phase correlation of images whose values are edge directions), which survive recoloring, over a
grid of zooms and rotations. The fine step is Gauss-Newton on locally normalized brightness with weights from the local
correlation of the images (a robust form of ECC, Evangelidis and Psarakis 2008), from coarse to fine: edited parts do
not correlate and lose their weight.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from statistics import median

import torch

from .alignment import Fit, coarse_transforms, dense_flow, likelihood, refine
from .structure import FIRST_SIDE, brightness, resized, share_by_chance
from .transform import Transform, corner_distance, warp

LONGEST_SIDE = 768
"""[choice] Longest side of the images that are compared; 1024 is no more exact and takes twice as long."""
COARSE_SIDE = 128
"""[choice] The same for the coarse step."""
SMALLEST_SIDE = 32
"""[choice] Shorter images have too few edges."""
LEAST_SUPPORT = 0.2
"""[choice] Smallest share of the structure that must agree, beyond the share that agrees by chance; more where the
image has moved farther, by `likelihood`: a subject that moved by itself has structure too."""
CLOSEST_RIVAL = 0.8
"""[choice] Largest score of another transform, relative to the best."""
LARGEST_DOUBT, DOUBT_OF_SUPPORT = 0.35, 0.7
"""[choice] Largest difference of the transforms from two halves of the image, in pixels of the compared images: the
first, or so many times the support if that is less. Chosen on 120 edits of pose and facing (seed 5 of
benchmarks/keep_rest.py)."""


@dataclass(frozen=True)
class Registration:
    """A transform and how far it can be trusted.

    Attributes:
        transform: of the content, by the editor.
        support: share of the original's structure that is found again, less the share found by chance, 0 to 1.
        doubt: corner distance in pixels of the original between the transforms of two halves of the image.
        fault: a sentence if the transform cannot be trusted, else None.
        flow: [2, h, w], what remains to be undone of movements that differ over the image, x and y in halves of width
            and height; None if it was not asked for.
    """

    transform: Transform
    support: float = 0.0
    doubt: float = float("inf")
    fault: str | None = None
    flow: torch.Tensor | None = None

    def __str__(self) -> str:
        if self.flow is None:
            return str(self.transform)
        return f"{self.transform}, flow up to {float(self.flow.abs().max()) / 2.0:.2%} of the side"


def register(original: torch.Tensor, edited: torch.Tensor, with_flow: bool = False) -> Registration:
    """Find the transform from an original to its edit.

    Args:
        original: [H, W, C], 0 to 1; 1 to 4 channels.
        edited: [h, w, C], likewise, of any size and aspect.
        with_flow: also small smooth movements that differ over the image.

    Returns:
        the transform in pixels of the original. Check `fault` before using it.
    """
    height, width = original.shape[:2]
    if min(height, width, *edited.shape[:2]) < SMALLEST_SIDE:
        return Registration(Transform(), fault=f"The images are smaller than {SMALLEST_SIDE} pixels.")
    pixels = min(height * width, edited.shape[0] * edited.shape[1])
    factor = min(1.0, LONGEST_SIDE / max(height, width), (pixels / (height * width)) ** 0.5)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    pyramid = [(brightness(original, size), brightness(edited, size))]
    while max(pyramid[-1][0].shape) > FIRST_SIDE:
        half = tuple(-(-side // 2) for side in pyramid[-1][0].shape)
        pyramid.append((resized(pyramid[-1][0], half), resized(pyramid[-1][1], half)))
    small = min(1.0, COARSE_SIDE / max(pyramid[-1][0].shape))
    coarse = tuple(round(side * small) for side in pyramid[-1][0].shape)
    frames = _frames((height, width), (edited.shape[0], edited.shape[1]))
    first, second = (resized(each, coarse) for each in pyramid[-1])
    starts = coarse_transforms(first, second, frames)
    fits = [refine(*pyramid[-1], start.scaled(1.0 / small), 6, start.zoom_x / start.zoom_y) for start in starts]
    best, rival, belief = _two_best(fits, [Transform(*frame) for frame in frames], *pyramid[-1][0].shape)
    best = refine(*pyramid[-1], best.transform, 10, best.ratio)
    for level in range(len(pyramid) - 2, -1, -1):
        ratio = pyramid[level][0].shape[1] / pyramid[level + 1][0].shape[1]
        best = refine(*pyramid[level], best.transform.scaled(ratio), 6 if level else 4, best.ratio)
    scale = width / size[1]
    flow, rest = None, best
    if with_flow:
        flow = dense_flow(pyramid, best.transform)
        # What a transform of the moved edit would still change, and how far its halves differ, is the doubt.
        moved, _ = warp(pyramid[0][1][None], best.transform.matrix(), size, flow=flow)
        rest = refine(pyramid[0][0], moved[0], Transform(), 1, 1.0)
    support = rest.votes - share_by_chance(*rest.images)
    fault = _fault(support, belief, rest.doubt, rival)
    return Registration(best.transform.scaled(scale), support, rest.doubt * scale, fault, flow)


def _two_best(fits: list[Fit], frames: list[Transform], height: int, width: int) -> tuple[Fit, float, float]:
    """The best fit, the score of the best other one relative to it, and the belief in its movement, all 0 to 1.

    The subject of an edit may have moved by itself, all of its structure with it. Drift is small, and it moves the
    structure of most of the image.
    """
    longest = max(height, width)

    def belief(fit: Fit) -> float:
        return likelihood(min(corner_distance(fit.transform, frame, width, height) for frame in frames) / longest)

    def score(fit: Fit) -> float:
        return fit.votes * belief(fit)

    best = max(fits, key=score)
    others = [
        score(fit) for fit in fits if corner_distance(fit.transform, best.transform, width, height) > 0.02 * longest
    ]
    return best, max(others, default=0.0) / (score(best) + 1e-6), belief(best)


def _fault(support: float, belief: float, doubt: float, rival: float) -> str | None:
    if support < LEAST_SUPPORT:
        return (
            f"Only {max(support, 0.0):.0%} of the original's structure is found again in the edit, too little to "
            f"register them."
        )
    if support * belief < LEAST_SUPPORT:
        return (
            f"{support:.0%} of the original's structure is found again in the edit, but so far away that it may be a "
            f"subject that moved."
        )
    if not doubt <= min(LARGEST_DOUBT, DOUBT_OF_SUPPORT * support):
        return f"Two halves of the image give transforms that differ by {doubt:.1f} pixels."
    if rival > CLOSEST_RIVAL:
        return "Two movements explain the edit about equally well, as when its subject moved through a plain scene."
    return None


def _frames(original: tuple[int, int], edited: tuple[int, int]) -> list[tuple[float, float]]:
    """Zooms [x, y] of an edit that was stretched, cropped or padded to its aspect."""
    ratio = (edited[1] / edited[0]) / (original[1] / original[0])
    if abs(ratio - 1.0) < 0.02:
        return [(1.0, 1.0)]
    cropped = (1.0, ratio) if ratio > 1.0 else (1.0 / ratio, 1.0)
    padded = (1.0 / ratio, 1.0) if ratio > 1.0 else (1.0, ratio)
    return [(1.0, 1.0), cropped, padded]


def common(found: list[Registration]) -> list[Registration]:
    """The median of the trusted transforms for all of a batch; unchanged if there are none."""
    trusted = [each.transform for each in found if each.fault is None]
    if not trusted:
        return found
    middle = Transform(*(median(getattr(each, field.name) for each in trusted) for field in fields(Transform)))
    return [replace(each, transform=middle, fault=None, flow=None) for each in found]
