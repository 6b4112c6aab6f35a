"""Keep the rest: of an edit, only what changed; everything else is the original, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import grid_sample, interpolate, max_pool2d

from ..scores.pixels import psnr_of_error, ssim
from ..shared.errors import IdentityEditError
from ..shared.images import as_color
from ..shared.masks import of_size
from .blending import LARGEST_STEP, ROWS, membrane, soft_mask
from .change import EVERYTHING, find_change, likely_unchanged, smooth
from .colors import LARGEST_CAST, SAME_COLOR, ColorMap, fit_colors, no_change
from .structure import matching, planes
from .transform import Transform, sampling_grid

CLIPPED = 0.975
"""Value from which a color counts as clipped."""
MOST_PIXELS = 2_000_000
"""[choice] Pixels of the images in which the change is looked for; editors return one to two megapixels."""
GROW = 0.3
"""[choice] Growth of the mask in percent of the longest side: three pixels of an image of a megapixel."""
FEATHER = 0.6
"""[choice] The same of the soft border around it."""
SSIM_SIDE = 256
"""Shortest side from which halved images are compared by SSIM."""
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
        registered: [H, W, C], likewise, of the same size (`transform.moved_back`).
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
    # At half of the size at first, then without what is known to have changed.
    half = tuple(-(-side // 2) for side in size)
    small = _reduced(first, half), _reduced(second, half)
    here = of_size(covered[None].float(), *half)[0] == 1.0
    colors, warning, guess = no_change(), None, None
    if undo_cast:
        found, warning = _colors(*small, likely_unchanged(*small) * here)
        if found is None:
            guess, undo_cast = (small[0] - small[1]).abs().amax(dim=-1) > 2.0 * SAME_COLOR, False
        else:
            colors = found
    corrected = _corrected(*small, here, colors)
    guess = find_change(small[0], _unclipped(*small, corrected), here, balance, guess).mask
    if undo_cast and warning is None:
        near = max_pool2d(guess[None].float(), 7, 1, 3)[0]  # blurred with the change
        found, warning = _colors(*small, here * (1.0 - near))
        colors = found or no_change()
    guess = of_size(guess[None].float(), *size)[0] > 0.0
    corrected = _corrected(first, second, covered, colors)
    change = find_change(first, _unclipped(first, second, corrected), covered, balance, guess)
    small_corrected = _corrected(*small, here, colors)
    hard = change.mask if mask is None else _with_mask(change.mask, of_size(mask[None], *size)[0] > 0.5, mask_use)
    share = float(hard.float().mean())
    if mask is None and share > EVERYTHING:
        reason = f"The edit changed {share:.0%} of the image, so there is nothing to keep, and it is returned as it is."
        return _as_it_is(original, registered, change.noise, reason)
    outside = of_size((hard | change.mask | ~covered)[None].float(), *half)[0] == 0.0
    if matching(small[0], small_corrected, outside) < LEAST_MATCHING:
        return _as_it_is(original, registered, change.noise, NOT_REGISTERED)
    side = max(size) / 100.0
    soft = soft_mask(hard, grow * side, feather * side)
    outside = soft == 0.0
    error = (second[outside] - first[outside]).square().mean()
    # The authors of SSIM advise images of about 256 pixels.
    compared = small if min(half) >= SSIM_SIDE else (first, second)
    counts = of_size(soft[None], *compared[0].shape[:2]) == 0.0
    structure = ssim(compared[1][None], compared[0][None], counts.float())
    blended, alpha = _blend(original, registered, small[0] - small_corrected, soft, colors)
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


def _as_it_is(original: torch.Tensor, registered: torch.Tensor, noise: float, reason: str) -> Kept:
    """An edit in which nothing can be kept but the original's alpha."""
    image = as_color(registered[None])[0]
    if original.shape[-1] in (2, 4):
        image = torch.cat([image, original[..., -1:].float()], dim=-1)
    ones = torch.ones(image.shape[:2])
    return Kept(image, ones, 1.0, 0.0, float("nan"), float("nan"), noise, reason)


def _reduced(image: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Colors [h, w, 3] of an image at a smaller size, transparent parts in gray."""
    maps = planes(image)
    if tuple(maps.shape[1:]) != size:
        maps = interpolate(maps[None], size=size, mode="bilinear", antialias=True)[0]
    return maps.movedim(0, -1).contiguous()


def _covered(original: torch.Tensor, registered: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """[h, w] bool: where the edit reaches; elsewhere a registered edit has the original's own pixels."""
    from scipy.ndimage import binary_erosion, binary_opening

    strips = []
    for start in range(0, len(original), ROWS):
        rows = slice(start, start + ROWS)
        strips.append((as_color(original[None, rows])[0] == as_color(registered[None, rows])[0]).all(dim=-1))
    equal = of_size(torch.cat(strips)[None].float(), *size)[0] > 0.5
    equal = torch.from_numpy(binary_opening(equal.numpy(), iterations=2))
    if float(equal.float().mean()) > COMPOSITED:
        return torch.ones(size, dtype=torch.bool)
    return torch.from_numpy(binary_erosion(~equal.numpy(), iterations=2, border_value=1))


def _unclipped(first: torch.Tensor, second: torch.Tensor, corrected: torch.Tensor) -> torch.Tensor:
    """The corrected edit, with the original's values where the edit is clipped and cannot show more."""
    is_lost = ((second > CLIPPED) & (first > corrected)) | ((second < 1.0 - CLIPPED) & (first < corrected))
    is_near = (first - corrected).abs() < LARGEST_CAST
    return torch.where(is_lost & is_near, first, corrected)


def _corrected(first: torch.Tensor, second: torch.Tensor, covered: torch.Tensor, colors: ColorMap) -> torch.Tensor:
    """The edit's colors where it reaches, else the original's."""
    return torch.where(covered[..., None], colors(second), first)


def _colors(first: torch.Tensor, second: torch.Tensor, unchanged: torch.Tensor) -> tuple[ColorMap | None, str | None]:
    blurred = [torch.from_numpy(smooth(each.movedim(-1, 0).numpy(), 1.0)).movedim(0, -1) for each in (first, second)]
    colors = fit_colors(blurred[0], blurred[1], unchanged)
    if colors is not None and colors.cast > LARGEST_CAST:
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
    difference: torch.Tensor,
    soft: torch.Tensor,
    colors: ColorMap,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The original with the edit inside of a soft mask, a strip of rows at a time.

    Args:
        difference: [h, w, 3], original less corrected edit at half of the size of the mask, which closes the seam.
    """
    height, width = original.shape[:2]
    image = original.float().clone() if original.shape[-1] in (3, 4) else _with_colors(original)
    alpha = torch.zeros(height, width)
    if not bool(soft.any()):
        return image, alpha
    difference = difference.movedim(-1, 0)
    known = (of_size(soft[None], *difference.shape[1:])[0] == 0.0) & (difference.abs().amax(dim=0) < LARGEST_STEP)
    weight = torch.from_numpy(smooth(known.float().numpy(), 1.0)).clamp(min=1e-6)
    difference = torch.from_numpy(smooth((difference * known).numpy(), 1.0)) / weight
    seam = interpolate(membrane(difference, known.float())[None], size=soft.shape, mode="bilinear")
    maps = torch.cat([soft[None, None], seam], dim=1)
    for start in range(0, height, ROWS):
        rows = slice(start, min(height, start + ROWS))
        strip = maps[:, :, rows] if maps.shape[2:] == (height, width) else _rows(maps, (height, width), rows)
        share, offset = strip[0, 0], strip[0, 1:].movedim(0, -1)
        columns = (share > 0.0).any(dim=0).nonzero()
        if not len(columns):
            continue
        part = slice(int(columns[0]), int(columns[-1]) + 1)
        share, offset = share[:, part, None], offset[:, part]
        target = image[rows, part, :3]
        edit = (colors(as_color(registered[None, rows, part])[0]) + offset).clamp(0.0, 1.0)
        image[rows, part, :3] = torch.where(share > 0.0, target + share * (edit - target), target)
        alpha[rows, part] = share[..., 0]
    return image, alpha


def _rows(maps: torch.Tensor, size: tuple[int, int], rows: slice) -> torch.Tensor:
    """Rows of maps [1, C, h, w] enlarged to a size."""
    grid = sampling_grid(Transform().matrix(), size, (rows.start, rows.stop))
    return grid_sample(maps, grid[None], mode="bilinear", padding_mode="border", align_corners=False)


def _with_colors(original: torch.Tensor) -> torch.Tensor:
    """A gray image [H, W, 1 or 2] in colors, with its alpha."""
    gray = original[..., :1].float().expand(*original.shape[:2], 3)
    return torch.cat([gray, original[..., 1:].float()], dim=-1)
