"""Registration of an edited image with its original, estimated from the part of the image that was not edited.

Instruction editors return an image that is shifted, zoomed, stretched or slightly rotated, with other colors. The
transform is found in two steps. The coarse step correlates the images' edge orientations (orientation correlation,
Fitch et al. 2002: the phase correlation of images whose values are edge directions), which survive recoloring, over a
grid of zooms and rotations. The fine step is Gauss-Newton on locally normalized brightness with weights from the local
correlation of the images (a robust form of ECC, Evangelidis and Psarakis 2008), from coarse to fine: edited parts do
not correlate and lose their weight.

Coordinates are pixels of the original relative to its center, x to the right and y down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import grid_sample, interpolate

from ..shared.images import as_color

if TYPE_CHECKING:
    import numpy as np

LONGEST_SIDE = 768
"""[choice] Longest side of the images that are compared; 1024 is no more exact and takes twice as long."""
FIRST_SIDE = 256
"""[choice] The same for the first level of the fine step."""
COARSE_SIDE = 128
"""[choice] The same for the coarse step."""
ZOOMS = 0.16
"""[choice] Largest zoom of the coarse step, as a logarithm, beyond what the sizes of the images say."""
ZOOM_STEP = 0.02
ROTATIONS = (-1.5, 0.0, 1.5)
"""[choice] Rotations of the coarse step in degrees."""
STARTS = 6
"""[choice] Transforms of the coarse step that are refined."""
SMALLEST_SIDE = 32
"""[choice] Shorter images have too few edges."""
AGREES = 0.6
"""[choice] Local correlation from which the images show the same."""
STRETCH = 0.01
"""[choice] Typical difference of the zooms in x and y."""
CORRELATED = 25.0
"""[choice] Pixels of normalized brightness that count as one observation."""
POINTS = 200_000
"""[choice] Pixels from which a step is computed."""
TILES = 12
"""[choice] Tiles along a side."""
ROWS = 512
"""[choice] Rows that are warped at a time, which bounds the memory of large images."""
LEAST_SUPPORT = 0.2
"""[choice] Smallest share of the structure that must agree, beyond the share that agrees by chance."""
LIKELY_DRIFT = 0.12
"""[choice] Movement of a corner, in parts of the longest side, that halves the belief in a transform."""
CLOSEST_RIVAL = 0.8
"""[choice] Largest score of another transform, relative to the best."""
LARGEST_DOUBT = 0.25
"""[choice] Largest difference of the transforms from two halves of the image, in pixels of the compared images."""
FLOW_SIDE = 48
"""[choice] Longest side of a flow."""
FLOW_WINDOW = 0.04
"""[choice] Standard deviation of the windows of the flow in parts of the longest side, at the largest level."""
FLOW_STEPS = 3
"""[choice] Steps of the flow at every level."""
FLOW_RIDGE = 0.02
"""[choice] Pull towards no movement, in parts of the mean structure."""
LARGEST_FLOW = 0.03
"""[choice] Largest movement of the flow in halves of the side; what moves farther was edited."""
EXTENDED = 3.5
"""[choice] So many times more the transforms of left and right, or of top and bottom, may differ, because each is
extended over the other half."""


@dataclass(frozen=True)
class Transform:
    """The movement of the image content by an editor: p to rotation(zoom p) + shift.

    Attributes:
        zoom_x, zoom_y: 1 for none.
        rotation: degrees, clockwise on the screen.
        shift_x, shift_y: pixels of the original, right and down.
    """

    zoom_x: float = 1.0
    zoom_y: float = 1.0
    rotation: float = 0.0
    shift_x: float = 0.0
    shift_y: float = 0.0

    def matrix(self) -> np.ndarray:
        """[2, 3] float64: from centered pixels of the original to centered pixels of the edit at that size."""
        import numpy as np

        angle = np.deg2rad(self.rotation)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        return np.column_stack([turn * [self.zoom_x, self.zoom_y], [self.shift_x, self.shift_y]])

    def scaled(self, factor: float) -> Transform:
        """The same in pixels of images enlarged by a factor."""
        return Transform(self.zoom_x, self.zoom_y, self.rotation, self.shift_x * factor, self.shift_y * factor)

    def __str__(self) -> str:
        return (
            f"shift {self.shift_x:+.2f}, {self.shift_y:+.2f} pixels, zoom {self.zoom_x:.4f} x {self.zoom_y:.4f}, "
            f"rotation {self.rotation:+.2f} degrees"
        )


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
        pyramid.append((_resized(pyramid[-1][0], half), _resized(pyramid[-1][1], half)))
    small = min(1.0, COARSE_SIDE / max(pyramid[-1][0].shape))
    coarse = tuple(round(side * small) for side in pyramid[-1][0].shape)
    frames = _frames((height, width), (edited.shape[0], edited.shape[1]))
    first, second = (_resized(each, coarse) for each in pyramid[-1])
    starts = _coarse(first, second, frames)
    fits = [_refine(*pyramid[-1], start.scaled(1.0 / small), 6, start.zoom_x / start.zoom_y) for start in starts]
    best, rival = _two_best(fits, [Transform(*frame) for frame in frames], *pyramid[-1][0].shape)
    best = _refine(*pyramid[-1], best.transform, 10, best.ratio)
    for level in range(len(pyramid) - 2, -1, -1):
        ratio = pyramid[level][0].shape[1] / pyramid[level + 1][0].shape[1]
        best = _refine(*pyramid[level], best.transform.scaled(ratio), 6 if level else 4, best.ratio)
    scale = width / size[1]
    flow, rest = None, best
    if with_flow:
        flow = _dense_flow(pyramid, best.transform)
        # What a transform of the moved edit would still change, and how far its halves differ, is the doubt.
        moved, _ = _warp(pyramid[0][1][None], best.transform.matrix(), size, flow=flow)
        rest = _refine(pyramid[0][0], moved[0], Transform(), 1, 1.0)
    support = rest.votes - _chance(*rest.images)
    fault = _fault(support, rest.doubt, rival)
    return Registration(best.transform.scaled(scale), support, rest.doubt * scale, fault, flow)


def _two_best(fits: list[_Fit], frames: list[Transform], height: int, width: int) -> tuple[_Fit, float]:
    """The best fit, and the score of the best other one relative to it, 0 to 1.

    The subject of an edit may have moved by itself, all of its structure with it. Drift is small, and it moves the
    structure of most of the image.
    """
    longest = max(height, width)

    def score(fit: _Fit) -> float:
        drift = min(_corner_distance(fit.transform, frame, width, height) for frame in frames)
        return fit.votes * _likelihood(drift / longest)

    best = max(fits, key=score)
    others = [
        score(fit) for fit in fits if _corner_distance(fit.transform, best.transform, width, height) > 0.02 * longest
    ]
    return best, max(others, default=0.0) / (score(best) + 1e-6)


def _likelihood(drift: float) -> float:
    """Belief in the movement of a corner, in parts of the longest side."""
    return 1.0 / (1.0 + (drift / LIKELY_DRIFT) ** 2)


def _fault(support: float, doubt: float, rival: float) -> str | None:
    if support < LEAST_SUPPORT:
        return (
            f"Only {max(support, 0.0):.0%} of the original's structure is found again in the edit, too little to "
            f"register them."
        )
    if not doubt <= LARGEST_DOUBT:
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


# -- features ----------------------------------------------------------------------------------------------------------


def planes(image: torch.Tensor) -> torch.Tensor:
    """Colors [3, H, W] of an image [H, W, C], transparent parts in gray."""
    maps = torch.empty(3, *image.shape[:2])
    for start in range(0, len(image), ROWS):
        strip = image[start : start + ROWS]
        colors = as_color(strip[None])[0]
        if image.shape[-1] in (2, 4):
            opacity = strip[..., -1:].float().clamp(0.0, 1.0)
            colors = colors * opacity + 0.5 * (1.0 - opacity)
        maps[:, start : start + ROWS] = colors.movedim(-1, 0)
    return maps


def brightness(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Brightness [height, width] float32 of an image [H, W, C] at a size, transparent parts in gray."""
    return _resized(torch.tensordot(torch.tensor([0.299, 0.587, 0.114]), planes(image), 1), size)


def at_size(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """An image [H, W, C] stretched to a size."""
    maps = interpolate(image.movedim(-1, 0)[None], size=size, mode="bicubic", antialias=True)
    return maps[0].movedim(0, -1).clamp(0.0, 1.0)


def _resized(map_: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    if tuple(map_.shape) == tuple(size):
        return map_
    return interpolate(map_[None, None], size=size, mode="bicubic", antialias=True)[0, 0]


def _box(map_: np.ndarray, window: int) -> np.ndarray:
    from scipy.ndimage import uniform_filter

    return uniform_filter(map_, window, mode="nearest")


def _gradient(map_: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    along_y, along_x = np.gradient(map_)
    return along_x, along_y


def _window(shape: tuple[int, ...]) -> int:
    """Side of the windows of local statistics."""
    return max(9, min(33, max(shape) // 24)) | 1


def normalized(map_: np.ndarray) -> np.ndarray:
    """Brightness with local mean 0 and local deviation 1, less in flat parts."""
    window = _window(map_.shape)
    centered = map_ - _box(map_, window)
    return centered / ((_box(centered * centered, window).clip(0.0)) ** 0.5 + 0.02)


# -- coarse ------------------------------------------------------------------------------------------------------------


def _coarse(original: torch.Tensor, edited: torch.Tensor, frames: list[tuple[float, float]]) -> list[Transform]:
    """The transforms of the highest orientation correlation that differ from each other, and no movement at all."""
    import numpy as np
    from scipy.fft import fft2, ifft2, next_fast_len

    height, width = original.shape
    padded = [next_fast_len(side * 5 // 4) for side in (height, width)]

    def orientation(map_: torch.Tensor) -> torch.Tensor:
        """[2, H, W]: the doubled angle of the gradient, less where the gradient is weak or edges are dense."""
        along_x, along_y = _gradient(map_.numpy())
        scale = along_x**2 + along_y**2 + 0.02**2
        parts = np.stack([(along_x**2 - along_y**2) / scale, 2.0 * along_x * along_y / scale])
        density = _box((parts**2).sum(axis=0), max(height, width) // 4)
        return torch.from_numpy((parts / (density + 0.02) ** 0.5 * _frame_weight(height, width)).astype(np.float32))

    first, second = orientation(original).numpy(), orientation(edited)
    spectrum = np.conj(fft2(first[0] + 1j * first[1], padded))
    found = []
    for frame in frames:
        for log_zoom in np.arange(-ZOOMS, ZOOMS + 1e-6, ZOOM_STEP):
            for rotation in ROTATIONS:
                zoom = float(np.exp(log_zoom))
                matrix = Transform(frame[0] * zoom, frame[1] * zoom, rotation).matrix()
                moved = _warp(second, matrix, (height, width), "bilinear")[0].numpy()
                score = ifft2(spectrum * fft2(moved[0] + 1j * moved[1], padded)).real
                peak = np.unravel_index(int(score.argmax()), score.shape)
                # The original at p is the warped edit at p + offset, and the edit at matrix (p + offset).
                offset = [at - side if at > side // 2 else at for at, side in zip(peak, padded, strict=True)]
                shift = matrix[:, :2] @ [offset[1], offset[0]]
                start = Transform(frame[0] * zoom, frame[1] * zoom, rotation, float(shift[0]), float(shift[1]))
                drift = _corner_distance(start, Transform(*frame), width, height) / max(height, width)
                energy = float((moved**2).sum()) ** 0.5 + 1e-6
                found.append((float(score[peak]) / energy * _likelihood(drift), start))
    found.sort(key=lambda each: -each[0])
    starts = [Transform(*frames[0])]
    for _, start in found:
        steps = [_corner_distance(start, other, width, height) for other in starts[1:]]
        if min(steps, default=np.inf) > 0.06 * max(height, width):
            starts.append(start)
        if len(starts) > STARTS:
            break
    return starts


def _warp(
    maps: torch.Tensor,
    matrix: np.ndarray,
    size: tuple[int, int],
    mode: str = "bicubic",
    flow: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps [C, h, w], a whole frame at any size, seen through a transform.

    Args:
        matrix: `Transform.matrix` in pixels of `size`.
        size: height and width of the result.
        flow: as in `Registration`.

    Returns:
        [C, height, width], and [height, width] bool where the maps reach.
    """
    grid = sampling_grid(matrix, size, (0, size[0]), flow)
    warped = grid_sample(maps[None], grid[None], mode=mode, padding_mode="border", align_corners=False)[0]
    return warped, reached(grid)


def sampling_grid(
    matrix: np.ndarray, size: tuple[int, int], rows: tuple[int, int], flow: torch.Tensor | None = None
) -> torch.Tensor:
    """Places [rows, width, 2] for `grid_sample`, of rows of the original in the edit's frame of -1 to 1."""
    height, width = size
    half = torch.tensor([width / 2.0, height / 2.0])
    x = torch.arange(width, dtype=torch.float32) + 0.5 - half[0]
    y = torch.arange(*rows, dtype=torch.float32)[:, None] + 0.5 - half[1]
    a = torch.from_numpy(matrix).float()
    places = [a[i, 0] * x + a[i, 1] * y + a[i, 2] for i in (0, 1)]
    grid = torch.stack([places[0] / half[0], places[1] / half[1]], dim=-1)
    if flow is None:
        return grid
    own = torch.stack(torch.broadcast_tensors(x / half[0], y / half[1]), dim=-1)
    moved = grid_sample(flow[None], own[None], mode="bicubic", padding_mode="border", align_corners=False)[0]
    return grid + moved.movedim(0, -1)


def reached(grid: torch.Tensor) -> torch.Tensor:
    """Where a sampling grid lies inside of the edit's frame."""
    return (grid.abs() <= 1.0).all(dim=-1)


# -- fine --------------------------------------------------------------------------------------------------------------


def agreement(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Local correlation of normalized brightness, -1 to 1."""
    return _correlation(first, second, _energy(first))


def _correlation(first: np.ndarray, second: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """`agreement` with the local energy of the first image known."""
    product = _box(first * second, _window(first.shape))
    return product / (energy.clip(1e-6) * _energy(second).clip(1e-6)) ** 0.5


def _energy(normalized_: np.ndarray) -> np.ndarray:
    return _box(normalized_ * normalized_, _window(normalized_.shape))


@dataclass(frozen=True)
class _Fit:
    """A refined transform in pixels of the level's images.

    Attributes:
        ratio: zoom_x / zoom_y that the frames of the images suggest.
        votes: share of the image's tiles whose structure the warped edit shows too.
        doubt: corner distance of the transforms of two halves of the image, the largest of three divisions, or of the
            last step if that is longer.
        images: both images' normalized brightness, the edit's warped.
    """

    transform: Transform
    ratio: float
    votes: float
    doubt: float
    images: tuple[np.ndarray, np.ndarray]


def _refine(original: torch.Tensor, edited: torch.Tensor, start: Transform, iterations: int, ratio: float) -> _Fit:
    """Gauss-Newton from a start on normalized brightness, with the mean gradient of both images.

    Args:
        ratio: zoom_x / zoom_y that the frames of the images suggest.
    """
    import numpy as np

    height, width = original.shape
    first = normalized(original.numpy())
    gradient = _gradient(first)
    second = torch.from_numpy(normalized(edited.numpy()))[None]
    energy, structure = _energy(first), _structure(first)
    tile = max(16, max(height, width) // 8)
    scale = np.array([width / 2.0, height / 2.0, max(width, height) / 2.0, 1.0, 1.0], dtype=np.float32)
    unequal = np.array([1.0, -1.0, 0.0, 0.0, 0.0]) / scale
    transform = start
    for _ in range(iterations):
        matrix = transform.matrix()
        warped_, inside = _warp(second, matrix, (height, width))
        warped = warped_[0].numpy()
        local = _correlation(first, warped, energy)
        weight = (local - 0.3).clip(0.0) ** 2 * structure * inside.numpy()
        points = np.flatnonzero(weight)
        stride = -(-len(points) // POINTS) or 1
        points = points[::stride]
        weight, residual = weight.reshape(-1)[points], (first - warped).reshape(-1)[points]
        used = np.abs(residual[weight > 0.05])
        spread = 1.5 * float(np.median(used)) + 0.05 if used.size else 1.0
        weight *= stride / (1.0 + (residual / spread) ** 2)
        back = np.linalg.inv(matrix[:, :2]).T.astype(np.float32)
        mean = [
            0.5 * (ours + theirs).reshape(-1)[points] for ours, theirs in zip(gradient, _gradient(warped), strict=True)
        ]
        along_x, along_y = (back[i, 0] * mean[0] + back[i, 1] * mean[1] for i in (0, 1))
        unit_x, unit_y = (matrix[:, i].astype(np.float32) for i in (0, 1))
        row, column = np.divmod(points, width)
        x, y = ((each + 0.5 - side / 2.0).astype(np.float32) for each, side in ((column, width), (row, height)))
        derivatives = [
            (along_x * unit_x[0] + along_y * unit_x[1]) * x,  # log zoom_x
            (along_x * unit_y[0] + along_y * unit_y[1]) * y,  # log zoom_y
            (along_y * unit_x[0] - along_x * unit_x[1]) * x + (along_y * unit_y[0] - along_x * unit_y[1]) * y,
            along_x,
            along_y,
        ]
        columns = np.stack(derivatives) / scale[:, None]
        cell = (column // tile + row // tile) % 2 + 2 * (column >= width // 2) + 4 * (row >= height // 2)
        normals, rights = np.zeros((8, 5, 5)), np.zeros((8, 5))
        for number in range(8):
            chosen = cell == number
            part = columns[:, chosen]
            weighted = part * weight[chosen]
            normals[number], rights[number] = weighted @ part.T, weighted @ residual[chosen]
        # Editors hardly stretch, which decides the zooms where only one end of the image has structure.
        variance = float((weight * residual**2).sum()) / (float(weight.sum()) + 1e-6)
        belief = variance * CORRELATED / STRETCH**2
        missing = np.log(ratio * transform.zoom_y / transform.zoom_x)
        prior, pull = belief * np.outer(unequal, unequal), belief * missing * unequal
        step = _solve(normals.sum(axis=0) + prior, rights.sum(axis=0) + pull) / scale
        before, transform = transform, _moved(transform, step)
        length = _corner_distance(before, transform, width, height)
        if length < 0.005:
            break
    agreeing = structure * inside.numpy() * (local > AGREES)
    # Halves by rows, by columns, and by a checkerboard of tiles.
    distances = []
    for others in ((1, 2), (0, 2), (0, 1)):
        pair = normals.reshape(2, 2, 2, 5, 5).sum(axis=others), rights.reshape(2, 2, 2, 5).sum(axis=others)
        first_half, second_half = (
            _moved(before, _solve(normal + prior, right + pull) / scale) for normal, right in zip(*pair, strict=True)
        )
        distances.append(_corner_distance(first_half, second_half, width, height))
    doubt = max(distances[2], max(distances[:2]) / EXTENDED, length)
    return _Fit(transform, ratio, _votes(structure, agreeing), doubt, (first, warped))


def _chance(first: np.ndarray, second: np.ndarray) -> float:
    """Share of the tiles that agree when the images are displaced, and so by chance."""
    import numpy as np

    step = max(1, round(max(first.shape) / (2 * FIRST_SIDE)))
    first, second = first[::step, ::step], second[::step, ::step]
    structure, distance = _structure(first), _window(first.shape) * 3 // 2
    votes = [
        _votes(structure, structure * (agreement(first, np.roll(second, move, axis)) > AGREES))
        for axis in (0, 1)
        for move in (-distance, distance)
    ]
    return float(np.mean(votes))


def _votes(structure: np.ndarray, agreeing: np.ndarray) -> float:
    """Share of the tiles with structure in which more than half of it agrees."""
    sums = [
        torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(each)[None], (TILES, TILES))[0]
        for each in (structure, agreeing)
    ]
    has = (sums[0] > 0.03) * torch.from_numpy(_frame_weight(TILES, TILES))
    return float(((sums[1] > 0.5 * sums[0]) * has).sum()) / (float(has.sum()) + 1e-6)


def _frame_weight(height: int, width: int) -> np.ndarray:
    """[height, width]: 1 in the middle, 3 at the frame, where there is less of a subject that moved by itself."""
    import numpy as np

    across, along = (np.abs(np.linspace(-1.0, 1.0, side)) for side in (width, height))
    return 1.0 + 2.0 * np.maximum(across[None, :], along[:, None]) ** 2


def _structure(normalized_: np.ndarray) -> np.ndarray:
    """1 where there is enough texture to compare, else 0."""
    return (_energy(normalized_) > 0.25).astype("float32")


def _solve(normal: np.ndarray, side: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.linalg.solve(normal + np.eye(5) * (1e-6 * np.trace(normal) + 1e-9), side)


def _corner_distance(first: Transform, second: Transform, width: int, height: int) -> float:
    """Largest distance in pixels between where two transforms move a corner."""
    import numpy as np

    corners = np.array([[x, y, 1.0] for x in (-width / 2, width / 2) for y in (-height / 2, height / 2)])
    return float(np.linalg.norm(corners @ (first.matrix() - second.matrix()).T, axis=1).max())


def _moved(transform: Transform, step: np.ndarray) -> Transform:
    """A transform changed by a step of log zoom_x, log zoom_y, rotation in radians, shift_x and shift_y."""
    import math

    zoom_x, zoom_y, turn, shift_x, shift_y = (float(value) for value in step)
    return Transform(
        transform.zoom_x * math.exp(max(-0.2, min(0.2, zoom_x))),
        transform.zoom_y * math.exp(max(-0.2, min(0.2, zoom_y))),
        transform.rotation + math.degrees(max(-0.2, min(0.2, turn))),
        transform.shift_x + shift_x,
        transform.shift_y + shift_y,
    )


def _dense_flow(pyramid: list[tuple[torch.Tensor, torch.Tensor]], transform: Transform) -> torch.Tensor:
    """Small smooth movements that a transform leaves, by Lucas and Kanade (1981) with Gaussian windows.

    From small images and wide windows to large images and narrower ones, so that edited parts, which do not correlate
    and have no weight, move with what surrounds them.

    Args:
        pyramid: brightness of both images at every level, the largest first.
        transform: in pixels of the largest.

    Returns:
        as `Registration.flow`.
    """
    import numpy as np
    from scipy.ndimage import gaussian_filter

    height, width = pyramid[0][0].shape
    size = tuple(max(1, round(FLOW_SIDE * side / max(height, width))) for side in (height, width))
    flow = torch.zeros(2, *size)
    for level in (2, 1, 0):
        original, edited = pyramid[min(level, len(pyramid) - 1)]
        height, width = original.shape
        matrix = transform.scaled(width / pyramid[0][0].shape[1]).matrix()
        back = np.linalg.inv(matrix[:, :2]).T.astype(np.float32)
        first, second = normalized(original.numpy()), torch.from_numpy(normalized(edited.numpy()))[None]
        gradient, structure = _gradient(first), _structure(first)
        window = FLOW_WINDOW * FLOW_SIDE * 2.0**level
        for _ in range(FLOW_STEPS):
            warped_, inside = _warp(second, matrix, (height, width), flow=flow)
            warped = warped_[0].numpy()
            residual = first - warped
            weight = (agreement(first, warped) - 0.3).clip(0.0) ** 2 * structure * inside.numpy()
            weight /= 1.0 + (residual / 0.5) ** 2
            mean = [0.5 * (ours + theirs) for ours, theirs in zip(gradient, _gradient(warped), strict=True)]
            x, y = (back[i, 0] * mean[0] + back[i, 1] * mean[1] for i in (0, 1))
            products = torch.from_numpy(np.stack([x * x, x * y, y * y, x * residual, y * residual]) * weight)
            xx, xy, yy, right_x, right_y = (
                gaussian_filter(each, window, mode="nearest")
                for each in torch.nn.functional.adaptive_avg_pool2d(products[None], (size[0], size[1]))[0]
                .double()
                .numpy()
            )
            ridge = FLOW_RIDGE * float((xx + yy).mean()) + 1e-9
            xx, yy = xx + ridge, yy + ridge
            determinant = xx * yy - xy * xy
            step = np.stack([yy * right_x - xy * right_y, xx * right_y - xy * right_x]) / determinant
            step *= np.array([2.0 / width, 2.0 / height])[:, None, None]
            flow = (flow + torch.from_numpy(step).float()).clamp(-LARGEST_FLOW, LARGEST_FLOW)
    return flow


def common(found: list[Registration]) -> list[Registration]:
    """The median of the trusted transforms for all of a batch; unchanged if there are none."""
    from dataclasses import fields, replace
    from statistics import median

    trusted = [each.transform for each in found if each.fault is None]
    if not trusted:
        return found
    middle = Transform(*(median(getattr(each, field.name) for each in trusted) for field in fields(Transform)))
    return [replace(each, transform=middle, fault=None, flow=None) for each in found]


def matching(original: torch.Tensor, edited: torch.Tensor, where: torch.Tensor) -> float:
    """Share of the tiles, with structure inside of a mask, in which two registered images agree.

    Args:
        original, edited: [H, W, 3], 0 to 1.
        where: [H, W] bool.

    Returns:
        0 to 1; 1 where there is no structure to compare.
    """
    gray = torch.tensor([0.299, 0.587, 0.114])
    first, second = (normalized((each @ gray).numpy()) for each in (original, edited))
    structure = _structure(first) * where.numpy()
    if not structure.any():
        return 1.0
    return _votes(structure, structure * (agreement(first, second) > AGREES))


# -- applying ----------------------------------------------------------------------------------------------------------


def apply(
    transform: Transform, original: torch.Tensor, edited: torch.Tensor, flow: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move an edit back onto its original, at the original's size.

    Args:
        transform, flow: from `register`.
        original: [H, W, C], 0 to 1.
        edited: [h, w, C], likewise, of any size.

    Returns:
        the registered edit [H, W, 3] float32, with the original's pixels where the edit does not reach, and
        [H, W] float32, 1 where it reaches.
    """
    height, width = original.shape[:2]
    maps = as_color(edited[None])[0].movedim(-1, 0)
    # An edit with more pixels than the original is reduced first, so that the warp skips none.
    size = [min(side, max(1, round(wanted))) for side, wanted in zip(edited.shape[:2], (height, width), strict=True)]
    if list(maps.shape[1:]) != size:
        maps = interpolate(maps[None], size=size, mode="bicubic", antialias=True)[0]
    registered = torch.empty(height, width, 3)
    covered = torch.empty(height, width)
    for start in range(0, height, ROWS):
        rows = (start, min(height, start + ROWS))
        grid = sampling_grid(transform.matrix(), (height, width), rows, flow)
        strip = grid_sample(maps[None], grid[None], mode="bicubic", padding_mode="border", align_corners=False)[0]
        inside = reached(grid)
        base = as_color(original[None, rows[0] : rows[1]])[0]
        registered[rows[0] : rows[1]] = torch.where(inside[..., None], strip.movedim(0, -1).clamp(0.0, 1.0), base)
        covered[rows[0] : rows[1]] = inside.float()
    return registered, covered
