"""Keep the rest: of an edit, only what changed; everything else is the original, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import avg_pool2d, grid_sample, interpolate

from ..scores.pixels import mean_squared_error, psnr_of_error, ssim
from ..shared.errors import IdentityEditError
from ..shared.images import as_color
from ..shared.masks import of_size
from .blending import LARGEST_STEP, ROWS, membrane, soft_mask
from .change import EVERYTHING, find_change, likely_unchanged, smooth
from .colors import LARGEST_CAST, ColorMap, fit_colors, no_change
from .registration import Transform, matching, sampling_grid

CLIPPED = 0.975
"""Value from which a color counts as clipped."""
MOST_PIXELS = 2_000_000
"""[choice] Pixels of the images in which the change is looked for; editors return one to two megapixels."""
GROW = 0.3
"""[choice] Growth of the mask in percent of the longest side: three pixels of an image of a megapixel."""
FEATHER = 0.6
"""[choice] The same of the soft border around it."""
COMPOSITED = 0.4
"""[choice] Share of equal pixels from which the editor itself kept the rest; a zoom leaves fewer."""
LEAST_MATCHING = 0.5
"""[choice] Smallest share of the tiles outside of the change that must agree."""
NOT_REGISTERED = (
    "Outside of the change the edit does not match the original, so it is returned as it is; connect Register Edit "
    "before, or paint a mask of the edit."
)
ONLY_INSIDE, GROWN, AS_GIVEN = MASK_USES = ("change inside the mask", "changes that touch the mask", "the mask itself")


@dataclass(frozen=True)
class Kept:
    """An original with the change of an edit.

    Attributes:
        image: [H, W, C] float32: the original's values where `mask` is 0.
        mask: [H, W] float32, 0 to 1: the share of the edit.
        changed: share of the image with a mask above 0.
        cast: mean color change that was undone, 0 to 1.
        psnr, ssim: of the registered edit outside of the mask, before anything was kept.
        noise: typical difference of unchanged pixels that the editor left, 0 to 1.
        warning: a sentence, else None.
    """

    image: torch.Tensor
    mask: torch.Tensor
    changed: float
    cast: float
    psnr: float
    ssim: float
    noise: float
    warning: str | None = None


def keep_rest(
    original: torch.Tensor,
    registered: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    mask_use: str = ONLY_INSIDE,
    balance: float = 0.0,
    undo_cast: bool = True,
    grow: float = GROW,
    feather: float = FEATHER,
) -> Kept:
    """Restore everything that an edit was not asked to change.

    Args:
        original: [H, W, C], 0 to 1, 1 to 4 channels. Its alpha is kept.
        registered: [H, W, C], likewise, of the same size (`registration.apply`).
        mask: [h, w], 0 to 1, where the edit was asked for.
        mask_use: one of `MASK_USES`.
        balance: -1 keeps more of the original, 1 more of the edit.
        undo_cast: undo the color cast that the editor left outside of the change.
        grow, feather: growth and soft border of the mask, in percent of the longest side.

    Raises:
        IdentityEditError: for different sizes, or a mask that leaves nothing.
    """
    if original.shape[:2] != registered.shape[:2]:
        raise IdentityEditError(
            f"registered has {registered.shape[1]}x{registered.shape[0]} pixels and original {original.shape[1]}x"
            f"{original.shape[0]}; connect the output of Register Edit."
        )
    height, width = original.shape[:2]
    factor = min(1.0, (MOST_PIXELS / (height * width)) ** 0.5)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    first, second = (_reduced(each, size) for each in (original, registered))
    covered = _covered(original, registered, size)
    colors, warning = no_change(), None
    guess, sides = None, [-(-side // 2) for side in size]
    halves = [_reduced(first, sides), _reduced(second, sides)], [first, second]
    for ours, theirs in halves:  # at half the size at first, then without what is known to have changed
        here = of_size(covered[None].float(), *ours.shape[:2])[0] == 1.0
        if undo_cast and warning is None:
            likely = likely_unchanged(ours, theirs) if guess is None else (~guess).float()
            colors, warning = _colors(ours, theirs, likely * here)
        corrected = torch.where(here[..., None], colors(theirs), ours)
        change = find_change(ours, _unclipped(ours, theirs, corrected), here, balance, guess)
        guess = of_size(change.mask[None].float(), *size)[0] > 0.0
    hard = change.mask if mask is None else _with_mask(change.mask, of_size(mask[None], *size)[0] > 0.5, mask_use)
    share = float(hard.float().mean())
    if mask is None and share > EVERYTHING:
        reason = f"The edit changed {share:.0%} of the image, so there is nothing to keep, and it is returned as it is."
        return _as_it_is(registered, change.noise, reason)
    if matching(first, corrected, covered & ~hard & ~change.mask) < LEAST_MATCHING:
        return _as_it_is(registered, change.noise, NOT_REGISTERED)
    side = max(size) / 100.0
    soft = soft_mask(hard, grow * side, feather * side)
    outside = (soft == 0.0).float()
    error = mean_squared_error(second[None], first[None], outside[None])
    structure = ssim(second[None], first[None], outside[None])
    blended, alpha = _blend(original, registered, first, corrected, soft, colors)
    return Kept(
        blended,
        alpha,
        float((soft > 0.0).float().mean()),
        colors.cast,
        float(psnr_of_error(error)),
        float(structure),
        change.noise,
        warning,
    )


def _as_it_is(registered: torch.Tensor, noise: float, reason: str) -> Kept:
    """An edit in which nothing can be kept."""
    image = registered.float() if registered.shape[-1] in (3, 4) else _with_colors(registered)
    ones = torch.ones(image.shape[:2])
    return Kept(image, ones, 1.0, 0.0, float("nan"), float("nan"), noise, reason)


def _reduced(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Colors [h, w, 3] of an image at a smaller size, transparent parts in gray."""
    colors = as_color(image[None])[0]
    if image.shape[-1] in (2, 4):
        opacity = image[..., -1:].float().clamp(0.0, 1.0)
        colors = colors * opacity + 0.5 * (1.0 - opacity)
    if tuple(colors.shape[:2]) == tuple(size):
        return colors
    maps = colors.movedim(-1, 0)[None]
    while maps.shape[2] >= 2 * size[0] and maps.shape[3] >= 2 * size[1]:
        maps = avg_pool2d(maps, 2)
    maps = interpolate(maps, size=tuple(size), mode="bilinear", antialias=True)
    return maps[0].movedim(0, -1).contiguous()


def _covered(original: torch.Tensor, registered: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[h, w] bool: where the edit reaches; elsewhere a registered edit has the original's own pixels."""
    from scipy.ndimage import binary_erosion, binary_opening

    equal = (as_color(original[None])[0] == as_color(registered[None])[0]).all(dim=-1)
    equal = torch.from_numpy(binary_opening(equal.numpy(), iterations=2))
    if float(equal.float().mean()) > COMPOSITED:
        return torch.ones(size, dtype=torch.bool)
    share = of_size((~equal).float()[None], *size)[0]
    return torch.from_numpy(binary_erosion((share > 0.99).numpy(), iterations=2, border_value=1))


def _unclipped(first: torch.Tensor, second: torch.Tensor, corrected: torch.Tensor) -> torch.Tensor:
    """The corrected edit, with the original's values where the edit is clipped and cannot show more."""
    is_lost = ((second > CLIPPED) & (first > corrected)) | ((second < 1.0 - CLIPPED) & (first < corrected))
    is_near = (first - corrected).abs() < LARGEST_CAST
    return torch.where(is_lost & is_near, first, corrected)


def _colors(first: torch.Tensor, second: torch.Tensor, unchanged: torch.Tensor) -> tuple[ColorMap, str | None]:
    blurred = [torch.from_numpy(smooth(each.numpy(), 1.5)) for each in (first, second)]
    colors = fit_colors(blurred[0], blurred[1], unchanged)
    if colors.cast > LARGEST_CAST:
        return no_change(), (
            f"The colors of the whole image changed by {colors.cast:.0%}, more than an editor's cast, and are left as "
            f"the edit has them."
        )
    return colors, None


def _with_mask(found: torch.Tensor, given: torch.Tensor, use: str) -> torch.Tensor:
    """The change [H, W] that a mask allows."""
    from scipy import ndimage

    if use not in MASK_USES:
        raise IdentityEditError(f"mask_use is '{use}'; choose one of {', '.join(MASK_USES)}.")
    if not bool(given.any()):
        raise IdentityEditError("mask is empty; paint where the edit may be, or disconnect it.")
    if use == AS_GIVEN:
        return given
    if use == ONLY_INSIDE:
        return found & given
    labels, _ = ndimage.label((found | given).numpy())
    touched = torch.from_numpy(labels)[given].unique()
    return torch.isin(torch.from_numpy(labels), touched[touched > 0])


def _blend(
    original: torch.Tensor,
    registered: torch.Tensor,
    first: torch.Tensor,
    corrected: torch.Tensor,
    soft: torch.Tensor,
    colors: ColorMap,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The original with the edit inside of a soft mask of the compared images, a strip of rows at a time."""
    height, width = original.shape[:2]
    image = original.float().clone() if original.shape[-1] in (3, 4) else _with_colors(original)
    alpha = torch.zeros(height, width)
    if not bool(soft.any()):
        return image, alpha
    difference = first - corrected
    known = (soft == 0.0) & (difference.abs().amax(dim=-1) < LARGEST_STEP)
    weight = torch.from_numpy(smooth(known.float().numpy(), 2.0))[..., None].clamp(min=1e-6)
    difference = torch.from_numpy(smooth((difference * known[..., None]).numpy(), 2.0)) / weight
    seam = membrane(difference, known.float())
    maps = torch.cat([soft[..., None], seam], dim=-1).movedim(-1, 0)[None]
    for start in range(0, height, ROWS):
        rows = slice(start, min(height, start + ROWS))
        strip = maps[:, :, rows] if maps.shape[2:] == (height, width) else _rows(maps, (height, width), rows)
        share, offset = strip[0, 0], strip[0, 1:].movedim(0, -1)
        inside = share > 0.0
        if not bool(inside.any()):
            continue
        target = image[rows, :, :3]
        edit = (colors(as_color(registered[None, rows])[0]) + offset).clamp(0.0, 1.0)
        mixed = target + share[..., None] * (edit - target)
        image[rows, :, :3] = torch.where(inside[..., None], mixed, target)
        alpha[rows] = share
    return image, alpha


def _rows(maps: torch.Tensor, size: tuple[int, int], rows: slice) -> torch.Tensor:
    """Rows of maps [1, C, h, w] enlarged to a size."""
    grid = sampling_grid(Transform().matrix(), size, (rows.start, rows.stop))
    return grid_sample(maps, grid[None], mode="bilinear", padding_mode="border", align_corners=False)


def _with_colors(original: torch.Tensor) -> torch.Tensor:
    """A gray image [H, W, 1 or 2] in colors, with its alpha."""
    gray = original[..., :1].float().expand(*original.shape[:2], 3)
    return torch.cat([gray, original[..., 1:].float()], dim=-1)
