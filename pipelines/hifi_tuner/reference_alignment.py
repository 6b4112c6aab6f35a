"""Alignment of a reference subject with a generated one: Algorithm 4 of Wang et al. 2023 (appendix B, eq. 8 and 9).

The reference is scaled, rotated and translated until its mask matches the mask of the generated subject. Only the masks
are compared, because a generated subject looks too different for landmarks (Wang et al. 2023, section 3.3).

Coordinates are pixels relative to the image's center, x to the right and y down, so images of different sizes share
them and rotation is about the center.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import grid_sample, interpolate

from ..shared.errors import IdentityEditError, check_finite
from ..shared.input_checks import check_choice, check_number
from ..shared.masks import masks_for

LEAST_SQUARES, GRADIENT_DESCENT = OPTIMIZERS = ("least squares", "gradient descent")

SCALE_LIMIT = 1.5
"""[choice] The scale stays within this factor of the masks' size ratio, because the paper's one-directional sum is
minimal when the reference shrinks to a point."""
ROTATION_LIMIT = 45.0
"""[choice] Maximum rotation in degrees, in either direction; a reference that needs more is rarely a good one."""
ROTATION_STARTS = 5
"""[choice] Initial angles, evenly spaced within the limit; see benchmarks/results/align_reference.md for how many cases
a single start misses."""

POINTS = 4000
"""[choice] Maximum number of pixels of each mask in the sum, on an even grid; 512x512 masks have up to 260,000."""
START_POINTS = 400
"""[choice] Likewise while comparing starts."""

GRADIENT_STEPS = 500
LEARNING_RATE = 0.1
"""[choice] L and eta of Algorithm 4, not given in the paper; lengths are in units of the mask's size."""

Residuals = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""theta [4] -> distances [n] and their derivatives [n, 4]."""

REFLECT, EDGE, GENERATED, GRAY = SURROUNDINGS = ("reflect", "edge", "generated image", "gray")

LARGEST_PART, ALL_PARTS = PARTS = ("largest part", "all parts")
_SPECK = 0.05
"""Components below this fraction of the largest one's area are not reported as a second subject."""


@dataclass(frozen=True)
class Similarity:
    """T_theta of eq. 8: maps a point p of the reference to scale * R(rotation) (p + translation).

    Attributes:
        scale: theta_1.
        rotation: theta_2 in degrees; positive is clockwise on the screen.
        translation_x, translation_y: theta_3 and theta_4 in pixels of the reference, right and down.
        distance: root mean squared nearest distance between the aligned masks, in pixels of the generated image.
    """

    scale: float
    rotation: float
    translation_x: float
    translation_y: float
    distance: float = 0.0

    def matrix(self) -> np.ndarray:
        """[3, 3] float64, the product of eq. 8."""
        turn = np.deg2rad(self.rotation)
        scaling = np.diag([self.scale, self.scale, 1.0])
        rotation = np.array([[np.cos(turn), -np.sin(turn), 0.0], [np.sin(turn), np.cos(turn), 0.0], [0.0, 0.0, 1.0]])
        translation = np.array([[1.0, 0.0, self.translation_x], [0.0, 1.0, self.translation_y], [0.0, 0.0, 1.0]])
        return scaling @ rotation @ translation


@dataclass(frozen=True)
class AlignedReference:
    """An aligned reference.

    Attributes:
        image: T(I_r) [height, width, 3] in [0, 1], at the generated image's size.
        mask: T(M_r) [height, width] float32, 0 or 1.
        similarity: T.
        overlap: intersection over union of T(M_r) and M_g, 0 to 1.
        warning: a sentence about a likely problem, else None.
    """

    image: torch.Tensor
    mask: torch.Tensor
    similarity: Similarity
    overlap: float
    warning: str | None


def align_reference(
    image: torch.Tensor,
    mask: torch.Tensor,
    generated_mask: torch.Tensor,
    generated_image: torch.Tensor | None = None,
    *,
    symmetric: bool = True,
    optimizer: str = LEAST_SQUARES,
    scale_limit: float = SCALE_LIMIT,
    rotation_limit: float = ROTATION_LIMIT,
    parts: str = LARGEST_PART,
    surroundings: str = REFLECT,
) -> AlignedReference:
    """Align a reference image and its mask with the generated subject.

    Args:
        image: I_r [h, w, 3], 0 to 1.
        mask: M_r [h, w] of any size, thresholded at one half.
        generated_mask: M_g [H, W], of any size if generated_image is provided. The two images may have different sizes.
        generated_image: I_g1 [H, W, 3], for the surroundings "generated image".
        symmetric, optimizer, scale_limit, rotation_limit: as for `align_masks`.
        parts: which components of a mask to use: LARGEST_PART or ALL_PARTS.
        surroundings: how to fill the area outside the transformed reference. The result will be inverted by the model,
            so it should look like an image. REFLECT (default) mirrors the reference, EDGE extends its border pixels,
            GRAY is flat. GENERATED uses the generated image everywhere outside the mask: the subject is in its target
            surroundings, but the reference's caption does not describe them. The subject survives inversion about
            equally well with all of them, slightly less with GENERATED (benchmarks/results/align_reference.md).

    Raises:
        IdentityEditError: when a mask is empty, or an option is unknown.
    """
    check_choice(surroundings, "surroundings", SURROUNDINGS)
    if surroundings == GENERATED and generated_image is None:
        raise IdentityEditError(
            f"The surroundings '{GENERATED}' need generated_image; connect the image of generated_mask, or choose "
            f"'{REFLECT}'."
        )
    _check_image(image, "The reference")
    mask = masks_for(mask, "The reference's mask", image.shape[0], image.shape[1], 1)[0]
    if generated_image is not None:
        _check_image(generated_image, "The generated image")
        height, width = generated_image.shape[:2]
        generated_mask = masks_for(generated_mask, "The generated mask", height, width, 1)[0]
    m_r, note_r = subject_part(mask, "The reference's mask", parts)
    m_g, note_g = subject_part(generated_mask, "The generated mask", parts)
    similarity = align_masks(
        m_r,
        m_g,
        symmetric=symmetric,
        optimizer=optimizer,
        scale_limit=scale_limit,
        rotation_limit=rotation_limit,
    )
    size = (m_g.shape[0], m_g.shape[1])
    padding = {REFLECT: "reflection", EDGE: "border"}.get(surroundings, "zeros")
    image = image[..., :3].detach().cpu().float()
    transformed = resample(image, similarity, size, padding)
    covered = resample(torch.ones(*image.shape[:2], 1), similarity, size, "zeros")
    transformed_mask = (resample(m_r.float().unsqueeze(-1), similarity, size, "zeros")[..., 0] > 0.5).float()
    if surroundings == GRAY:
        transformed = transformed + 0.5 * (1 - covered)
    if surroundings == GENERATED and generated_image is not None:
        inside = transformed_mask.unsqueeze(-1)
        transformed = transformed * inside + generated_image[..., :3].detach().cpu().float() * (1 - inside)
    both, either = ((transformed_mask > 0) & m_g).sum(), ((transformed_mask > 0) | m_g).sum()
    notes = [note for note in (note_r, note_g, _limit_note(similarity, m_r, m_g, scale_limit, rotation_limit)) if note]
    return AlignedReference(
        image=transformed.clamp(0.0, 1.0),
        mask=transformed_mask,
        similarity=similarity,
        overlap=float(both / either.clamp(min=1)),
        warning=" ".join(notes) or None,
    )


def align_masks(
    reference: torch.Tensor,
    generated: torch.Tensor,
    *,
    symmetric: bool = True,
    optimizer: str = LEAST_SQUARES,
    scale_limit: float = SCALE_LIMIT,
    rotation_limit: float = ROTATION_LIMIT,
    rotation_starts: int = ROTATION_STARTS,
) -> Similarity:
    """T_theta that aligns M_r with M_g (Wang et al. 2023, Algorithm 4).

    The paper's objective is the sum of squared distances from the transformed reference points to the nearest point of
    the generated mask. It is 0 for every transform that puts the reference inside the generated mask, for example by
    shrinking it; the scale is therefore bounded around the masks' size ratio, and `symmetric` adds the other direction:
    from every point of M_g to the nearest one of T_theta(M_r). Nearest distances are looked up in a Euclidean distance
    transform of each mask, computed once and interpolated; distances to T_theta(M_r) are those of the inversely
    transformed points to M_r, times the scale.

    Two optimizers are available, with the same starts: the paper's gradient descent, and scipy's bounded Gauss-Newton
    method (`scipy.optimize.least_squares`, trust-region reflective), which exploits that the objective is a sum of
    squares; see benchmarks/results/align_reference.md for a comparison.

    Args:
        reference: M_r [h, w], bool or 0 to 1, thresholded at one half.
        generated: M_g [H, W], likewise.
        symmetric: use both directions; False is the paper's objective.
        optimizer: LEAST_SQUARES or GRADIENT_DESCENT (the paper's).
        scale_limit: maximum factor, up or down, relative to the masks' size ratio; 1 fixes the scale.
        rotation_limit: maximum angle in degrees, 0 to 180; 0 disables rotation.
        rotation_starts: number of initial angles.

    Raises:
        IdentityEditError: when a mask is empty or an option is out of its range.
    """
    check_choice(optimizer, "optimizer", OPTIMIZERS)
    check_number(scale_limit, "scale_limit", 1.0, 100.0)
    check_number(rotation_limit, "rotation_limit", 0.0, 180.0)
    m_r = as_mask(reference, "The reference's mask").numpy()
    m_g = as_mask(generated, "The generated mask").numpy()
    masks = _Masks(m_r, m_g, symmetric)
    limits = np.array([np.log(scale_limit), np.deg2rad(rotation_limit), np.inf, np.inf])
    if optimizer == LEAST_SQUARES:
        optimize, start_steps, steps = _gauss_newton, 12, 60
    else:
        optimize, start_steps, steps = _gradient_descent, GRADIENT_STEPS // 5, GRADIENT_STEPS
    residuals = masks.residuals_of(START_POINTS)
    angles = np.deg2rad(rotation_limit) * (
        np.linspace(-0.8, 0.8, rotation_starts) if rotation_starts > 1 else np.zeros(1)
    )
    candidates = []
    for angle in angles:
        theta = optimize(residuals, np.array([0.0, angle, 0.0, 0.0]), limits, start_steps)
        candidates.append((float((residuals(theta)[0] ** 2).sum()), theta))
    best = min(candidates, key=lambda candidate: candidate[0])[1]
    residuals = masks.residuals_of(POINTS)
    theta = optimize(residuals, best, limits, steps)
    return masks.similarity(theta, float((residuals(theta)[0] ** 2).sum()))


class _Masks:
    """The alignment objective for M_r and M_g.

    theta is (log of the scale relative to the masks' size ratio, angle, displacement of the centroids in units): the
    same transforms as eq. 8, without its coupling of angle and translation.
    """

    def __init__(self, m_r: np.ndarray, m_g: np.ndarray, symmetric: bool) -> None:
        self._m_r, self._m_g, self._symmetric = m_r, m_g, symmetric
        self._center_r, self._center_g = _centroid(m_r), _centroid(m_g)
        self._area_ratio = float(np.sqrt(m_g.sum() / m_r.sum()))
        self._unit = float(np.sqrt(m_g.sum() / np.pi))  # unit of length, so that all parameters are of order 1
        self._nearest_g, self._nearest_r = _DistanceField(m_g), _DistanceField(m_r)

    def residuals_of(self, most: int) -> Residuals:
        """`residuals` with at most `most` points of each mask."""
        p_r, p_g = _points(self._m_r, most) - self._center_r, _points(self._m_g, most) - self._center_g
        return lambda theta: self.residuals(theta, p_r, p_g)

    def residuals(self, theta: np.ndarray, p_r: np.ndarray, p_g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nearest distances d [n] and their derivatives [n, 4], weighted so that the sum of d^2 is s / n."""
        unit = self._unit
        scale, turn, shift = self._area_ratio * np.exp(theta[0]), theta[1], theta[2:] * unit
        cos, sin = np.cos(turn), np.sin(turn)
        rotation = np.array([[cos, -sin], [sin, cos]])
        # P_t = T_theta(P_r), and for each p_t the distance to its nearest p_g
        arm = scale * p_r @ rotation.T
        distance, slope = self._nearest_g(arm + self._center_g + shift)
        turned = np.stack([-arm[:, 1], arm[:, 0]], axis=1)
        derivative = np.stack([(slope * arm).sum(1), (slope * turned).sum(1), *(slope * unit).T], axis=1)
        weight = 1 / (unit * np.sqrt(len(p_r)))
        if not self._symmetric:
            return distance * weight, derivative * weight
        # The other direction: p_g transformed by T_theta^-1, nearest p_r, distances scaled back
        back = (p_g - shift) @ rotation / scale
        distance_r, slope_r = self._nearest_r(back + self._center_r)
        turned = np.stack([back[:, 1], -back[:, 0]], axis=1)
        moved = -(slope_r @ rotation.T) * unit  # scale * (-R^T shift / scale), differentiated
        derivative_r = np.stack(
            [scale * (distance_r - (slope_r * back).sum(1)), scale * (slope_r * turned).sum(1), *moved.T], axis=1
        )
        weight_g = 1 / (unit * np.sqrt(len(p_g)))
        return (
            np.concatenate([distance * weight, scale * distance_r * weight_g]),
            np.concatenate([derivative * weight, derivative_r * weight_g]),
        )

    def similarity(self, theta: np.ndarray, s: float) -> Similarity:
        """T_theta by eq. 8: s R (p - c_r) + c_g + shift = s R (p + translation); s: sum of the squared residuals."""
        scale, turn = self._area_ratio * float(np.exp(theta[0])), float(theta[1])
        back = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) / scale
        x, y = (back @ (self._center_g + theta[2:] * self._unit) - self._center_r).tolist()
        distance = self._unit * float(np.sqrt(s / (2 if self._symmetric else 1)))
        return Similarity(scale, float(np.rad2deg(turn)), x, y, distance)


def _gradient_descent(residuals: Residuals, theta: np.ndarray, limits: np.ndarray, steps: int) -> np.ndarray:
    """The gradient descent of Algorithm 4."""
    for _ in range(steps):  # l = 1, ..., L
        d, derivative = residuals(theta)  # s = sum of d^2
        theta = theta - LEARNING_RATE * 2 * derivative.T @ d  # theta = theta - eta grad s
        theta = theta.clip(-limits, limits)
    return theta


def _gauss_newton(residuals: Residuals, theta: np.ndarray, limits: np.ndarray, steps: int) -> np.ndarray:
    from scipy.optimize import least_squares

    free = limits > 0  # scipy rejects equal bounds

    def full(part: np.ndarray) -> np.ndarray:
        whole = theta.copy()
        whole[free] = part
        return whole

    result = least_squares(
        lambda part: residuals(full(part))[0],
        theta[free],
        jac=lambda part: residuals(full(part))[1][:, free],
        bounds=(-limits[free], limits[free]),
        max_nfev=steps,
    )
    return full(result.x)


def resample(image: torch.Tensor, similarity: Similarity, size: tuple[int, int], padding: str) -> torch.Tensor:
    """T_theta(I): an image warped by a similarity transform, bilinear.

    When downscaling, the image is first resized with antialiasing.

    Args:
        image: [h, w, C].
        similarity: T_theta.
        size: height and width of the result.
        padding: padding mode of torch's grid_sample: "zeros", "border", "reflection".

    Returns:
        [height, width, C] float32.
    """
    height, width = image.shape[:2]
    values = image.permute(2, 0, 1).unsqueeze(0).float()
    if similarity.scale < 1.0:
        smaller = [max(1, round(side * similarity.scale)) for side in (height, width)]
        values = interpolate(values, size=smaller, mode="bilinear", antialias=True)
    back = torch.from_numpy(np.linalg.inv(similarity.matrix())).float()
    y = torch.arange(size[0]) - (size[0] - 1) / 2
    x = torch.arange(size[1]) - (size[1] - 1) / 2
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    points = torch.stack([grid_x, grid_y, torch.ones_like(grid_x)], dim=-1) @ back.T
    # grid_sample's coordinates are in half sides from the center.
    grid = points[..., :2] * torch.tensor([2 / width, 2 / height])
    return grid_sample(values, grid.unsqueeze(0), "bilinear", padding, align_corners=False)[0].permute(1, 2, 0)


def as_mask(mask: torch.Tensor, name: str) -> torch.Tensor:
    """A mask [h, w] as bool on the CPU, thresholded at one half.

    Raises:
        IdentityEditError: when it is not a mask, or empty.
    """
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.numel() == 0:
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise IdentityEditError(f"{name} has the shape {shape}; connect one MASK [height, width].")
    check_finite(mask.float(), name)
    inside = mask.detach().cpu() > 0.5 if mask.dtype != torch.bool else mask.detach().cpu()
    if not bool(inside.any()):
        raise IdentityEditError(f"{name} is empty; connect a mask that is white on the subject, as of Segment Subject.")
    return inside


def subject_part(mask: torch.Tensor, name: str, parts: str = LARGEST_PART) -> tuple[torch.Tensor, str | None]:
    """The selected components of a mask [h, w] (bool), and a note if it has several.

    Raises:
        IdentityEditError: when the mask is empty or `parts` is unknown.
    """
    from scipy.ndimage import label

    check_choice(parts, "parts", PARTS)
    inside = as_mask(mask, name)
    labels, count = label(inside.numpy(), structure=np.ones((3, 3)))
    if count == 1:
        return inside, None
    areas = np.bincount(labels.ravel())[1:]
    large = int((areas >= _SPECK * areas.max()).sum())
    note = None
    if large > 1:
        used = "only the largest is used" if parts == LARGEST_PART else "all are used as one subject"
        note = f"{name} has {large} separate parts; {used}."
    if parts == LARGEST_PART:
        inside = torch.from_numpy(labels == 1 + int(areas.argmax()))
    return inside, note


class _DistanceField:
    """Distances from points to the nearest point of a mask, and their gradients.

    scipy's Euclidean distance transform computes them for every pixel in one pass (queries of a k-d tree take about ten
    times as long); between pixels they are interpolated.
    """

    def __init__(self, mask: np.ndarray) -> None:
        from scipy.ndimage import distance_transform_edt

        # The field extends beyond the image by a quarter of its size, and is extrapolated linearly from there. It has
        # four pixels around any point, even for an image of one pixel.
        self._border = max(1, max(mask.shape) // 4)
        padded = np.pad(mask, self._border)
        self._field = distance_transform_edt(~padded).astype(np.float32)
        self._center = np.array([(mask.shape[1] - 1) / 2, (mask.shape[0] - 1) / 2]) + self._border
        self._most = np.array([padded.shape[1] - 1, padded.shape[0] - 1], dtype=np.float64) - 1e-6

    def __call__(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points [n, 2] (x, y from the image's center) -> distances [n] and their gradients [n, 2]."""
        wanted = points + self._center
        inside = wanted.clip(0.0, self._most)
        beyond = wanted - inside
        column, row = inside.astype(np.intp).T
        u, v = (inside - np.stack([column, row], axis=1)).T
        field = self._field
        a, b = field[row, column], field[row, column + 1]
        c, d = field[row + 1, column], field[row + 1, column + 1]
        distance = (a * (1 - u) + b * u) * (1 - v) + (c * (1 - u) + d * u) * v
        gradient = np.stack([(b - a) * (1 - v) + (d - c) * v, (c - a) * (1 - u) + (d - b) * u], axis=1)
        outside = beyond.any(axis=1)
        if outside.any():
            far = np.linalg.norm(beyond[outside], axis=1)
            distance[outside] += far
            gradient[outside] = beyond[outside] / far[:, None]
        return distance, gradient


def _points(mask: np.ndarray, most: int) -> np.ndarray:
    """P(M): coordinates [n, 2] (x, y from the image's center) of about `most` or fewer of the mask's pixels on an even
    grid; for a thin mask that the grid misses, every n-th pixel."""
    rows, columns = np.nonzero(mask)
    step = max(1, int(np.ceil(np.sqrt(len(rows) / most))))
    on_grid = (rows % step == step // 2) & (columns % step == step // 2)
    if on_grid.sum() < min(len(rows), most) / 4:
        on_grid = np.arange(len(rows)) % (step * step) == 0
    points = np.stack([columns[on_grid], rows[on_grid]], axis=1).astype(np.float64)
    return points - np.array([(mask.shape[1] - 1) / 2, (mask.shape[0] - 1) / 2])


def _centroid(mask: np.ndarray) -> np.ndarray:
    return _points(mask, mask.size).mean(axis=0) if mask.any() else np.zeros(2)


def _limit_note(
    similarity: Similarity, m_r: torch.Tensor, m_g: torch.Tensor, scale_limit: float, rotation_limit: float
) -> str | None:
    """A warning if the optimum is at a limit, which suggests that the two masks do not match."""
    ratio = float((m_g.sum() / m_r.sum()).sqrt())
    factor = max(similarity.scale / ratio, ratio / similarity.scale)
    if rotation_limit > 0 and abs(similarity.rotation) > 0.99 * rotation_limit:
        return (
            f"The rotation reached its limit of {rotation_limit:g} degrees; choose another reference, or raise "
            f"rotation_limit."
        )
    if scale_limit > 1 and factor > 0.99 * scale_limit:
        return f"The scale reached its limit of {scale_limit:g}; choose another reference, or raise scale_limit."
    return None


def _check_image(image: torch.Tensor, name: str) -> None:
    if image.ndim != 3 or image.shape[-1] < 3 or 0 in image.shape:
        raise IdentityEditError(f"{name} has the shape {tuple(image.shape)}; connect an image with three channels.")
    check_finite(image, name)
