"""Does Algorithm 4 find the transform between two masks? `python -m benchmarks align_reference`.

Random asymmetric masks of 512x512 pixels and a known similarity transform of each (scale +-30 %, rotation +-40
degrees, translation; both masks are drawn from the outline's formula, none is resampled). A case is recovered when the
scale is within 2 %, the angle within 1 degree and the translation within 1 pixel. Both forms of the sum (the paper's
one direction, and both) with both optimizers (the paper's gradient descent, and scipy's least squares), a single start
in the place of several, and the time of nearest distances by a k-d tree in the place of the distance transform. Times
are processor time of one CPU core, in which other work on the machine does not count. Then: which surroundings of the
transformed reference keep it easy for a model to invert, by the peak signal-to-noise ratio within the mask after DDIM
inversion and sampling of aligned references of the demo world.
Writes benchmarks/results/align_reference.json, .md and .png (four pairs of held-out identities).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from identity_edit_pack.demo_world.attributes import POSES, Attributes, caption, random_attributes
from identity_edit_pack.demo_world.images import EVALUATION_SEED
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.pipelines.hifi_tuner import reference_alignment as alignment
from identity_edit_pack.pipelines.inversion.inversion import invert_image, sample_inversion
from identity_edit_pack.pipelines.lipe import heatmap
from PIL import Image
from scipy.spatial import cKDTree
from tqdm import tqdm

from .edits import embed, mean_psnr
from .harness import RESULTS, Options, load_checkpoint, markdown

SIZE = 512
SCALE, ROTATION, SHIFT = 0.3, 40.0, 40.0
MOST_SCALE, MOST_ROTATION, MOST_TRANSLATION = 0.02, 1.0, 1.0
WAVES = 7
ROWS = (
    ("both directions, least squares (default)", dict(symmetric=True, optimizer=alignment.LEAST_SQUARES)),
    ("both directions, least squares, one start", dict(symmetric=True, rotation_starts=1)),
    ("both directions, gradient descent", dict(symmetric=True, optimizer=alignment.GRADIENT_DESCENT)),
    ("one direction, gradient descent (Algorithm 4)", dict(symmetric=False, optimizer=alignment.GRADIENT_DESCENT)),
    ("one direction, least squares", dict(symmetric=False, optimizer=alignment.LEAST_SQUARES)),
)


def draw_case(generator: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, alignment.Similarity]:
    """A mask, its image under a similarity transform, and the transform."""
    amplitudes = generator.normal(size=(WAVES, 2)) * (0.25 / np.sqrt(np.arange(1, WAVES + 1)))[:, None]

    def inside(points: np.ndarray) -> torch.Tensor:
        angle, radius = np.arctan2(points[..., 1], points[..., 0]), np.linalg.norm(points, axis=-1)
        outline = np.ones_like(angle)
        for wave, (a, b) in enumerate(amplitudes, start=1):
            outline += a * np.cos(wave * angle) + b * np.sin(wave * angle)
        return torch.from_numpy(radius < 0.16 * SIZE * outline.clip(0.35, 2.0))

    center_r, center_g = generator.uniform(-SHIFT, SHIFT, (2, 2))
    scale, rotation = generator.uniform(1 - SCALE, 1 + SCALE), generator.uniform(-ROTATION, ROTATION)
    turn = np.deg2rad(rotation)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    translation = matrix.T @ center_g / scale - center_r
    grid = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE)), axis=-1) - (SIZE - 1) / 2
    true = alignment.Similarity(float(scale), float(rotation), float(translation[0]), float(translation[1]))
    return inside(grid - center_r), inside(grid @ matrix / scale - translation - center_r), true


def errors_of(cases: list[Any], options: dict[str, Any]) -> dict[str, float]:
    errors, times = [], []
    for reference, generated, true in tqdm(cases, leave=False):
        start = time.process_time()
        found = alignment.align_masks(reference, generated, **options)
        times.append(time.process_time() - start)
        moved = (found.translation_x - true.translation_x, found.translation_y - true.translation_y)
        errors.append((abs(found.scale / true.scale - 1), abs(found.rotation - true.rotation), float(np.hypot(*moved))))
    limits = (MOST_SCALE, MOST_ROTATION, MOST_TRANSLATION)
    recovered = [all(e <= limit for e, limit in zip(error, limits, strict=True)) for error in errors]
    scale, rotation, translation = np.median(errors, axis=0).tolist()
    return {
        "cases": len(cases),
        "recovered": statistics.mean(recovered),
        "median_seconds": statistics.median(times),
        "most_seconds": max(times),
        "median_scale_error": scale,
        "median_rotation_error_degrees": rotation,
        "median_translation_error_pixels": translation,
    }


def lookup_times(case: Any, repetitions: int = 20) -> dict[str, float]:
    """Seconds of one evaluation of the nearest distances of 4000 points, by either means."""
    reference, generated, _ = case
    field = alignment._DistanceField(generated.numpy())
    points = alignment._points(reference.numpy(), alignment.POINTS)
    tree = cKDTree(alignment._points(generated.numpy(), generated.numel()))

    def seconds(function: Any) -> float:
        times = []
        for _ in range(repetitions):
            start = time.process_time()
            function(points + 10)
            times.append(time.process_time() - start)
        return statistics.median(times)

    return {"distance_transform": seconds(field), "k_d_tree": seconds(tree.query)}


def draw_pairs(
    count: int,
) -> list[tuple[Attributes, tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
    """Of held-out identities: the reference's attributes, (image, mask) of it, and those of another pose."""
    generator = random.Random("aligned references")
    pairs: list[tuple[Attributes, tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = []
    while len(pairs) < count:
        reference = random_attributes(generator, "figure", held_out=True)
        generated = reference.replace(pose=generator.choice([pose for pose in POSES if pose != reference.pose]))
        drawn = [render(a, EVALUATION_SEED + generator.randrange(1 << 30)) for a in (reference, generated)]
        images = [
            (torch.from_numpy(image.copy()).float() / 255, torch.from_numpy(mask != 0).float()) for image, mask in drawn
        ]
        pairs.append((reference, images[0], images[1]))
    return pairs


def inverted_psnr(pairs: list[Any], steps: int) -> dict[str, float]:
    """For each kind of surroundings: mean PSNR in dB within the mask, after inversion and sampling."""
    model, clip, vae = load_checkpoint()
    texts = embed(clip, [caption(reference) for reference, _, _ in pairs])
    result = {}
    for surroundings in alignment.SURROUNDINGS:
        aligned = [
            alignment.align_reference(reference[0], reference[1], generated[1], generated[0], surroundings=surroundings)
            for _, reference, generated in pairs
        ]
        images = torch.stack([each.image for each in aligned])
        with torch.no_grad():
            inverted = invert_image(model, vae.encode(images), texts, steps=steps)
        with torch.no_grad():
            sampled = vae.decode(sample_inversion(model, inverted, texts))
        result[surroundings] = statistics.mean(
            mean_psnr(found[each.mask > 0], each.image[each.mask > 0])
            for found, each in zip(sampled.cpu(), aligned, strict=True)
        )
    return result


def save_image(path: Path, pairs: list[Any]) -> None:
    """For each pair a row: reference, generated, aligned reference (mirrored), the generated mask on it."""
    rows = []
    for _, reference, generated in pairs:
        aligned = alignment.align_reference(reference[0], reference[1], generated[1])
        shown = heatmap.outlined(aligned.image[None], generated[1][None])[0]
        rows.append(torch.cat([reference[0], generated[0], aligned.image, shown], dim=1))
    sheet = torch.cat(rows)
    Image.fromarray((sheet * 255).round().to(torch.uint8).numpy()).resize(
        (sheet.shape[1] * 2, sheet.shape[0] * 2)
    ).save(path)


OPTIONS: Options = {
    "cases": (200, "random masks"),
    "descent_cases": (50, "the first so many for gradient descent, which is slow"),
    "pairs": (10, "aligned references to invert; 0 inverts none"),
    "steps": (50, "of the inversion"),
}


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    cases = [draw_case(generator) for _ in range(arguments.cases)]
    figures: dict[str, Any] = {"cases": arguments.cases}
    for name, options in ROWS:
        slow = options.get("optimizer") == alignment.GRADIENT_DESCENT
        figures[name] = errors_of(cases[: arguments.descent_cases] if slow else cases, options)
    figures["nearest_distances"] = lookup_times(cases[0])
    pairs = draw_pairs(max(4, arguments.pairs))
    save_image(RESULTS / "align_reference.png", pairs[:4])
    yield figures
    if arguments.pairs:
        yield figures | {"inverted_psnr_db": inverted_psnr(pairs[: arguments.pairs], arguments.steps)}


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    rows = []
    for name, _ in ROWS:
        row = figures[name]
        errors = (
            f"{row['median_scale_error']:.2%}, {row['median_rotation_error_degrees']:.2f} degrees, "
            f"{row['median_translation_error_pixels']:.2f} pixels"
        )
        seconds = (f"{row[key]:.2f} s" for key in ("median_seconds", "most_seconds"))
        rows.append((name, row["cases"], f"{row['recovered']:.1%}", *seconds, errors))
    times = figures["nearest_distances"]
    titles = "sum and optimizer", "cases", "recovered", "median time", "longest"
    lines = [
        "Align Reference",
        f"{arguments.cases} random masks of {SIZE}x{SIZE} and known transforms (scale +-{SCALE:.0%}, rotation "
        f"+-{ROTATION:g} degrees, translation); recovered means within {MOST_SCALE:.0%}, {MOST_ROTATION:g} degree and "
        f"{MOST_TRANSLATION:g} pixel. Processor time of one CPU core.",
        *markdown((*titles, "median errors: scale, angle, translation"), rows),
        "",
        f"The nearest distances of {alignment.POINTS} points take {1000 * times['distance_transform']:.2f} ms by the "
        f"distance transform and {1000 * times['k_d_tree']:.2f} ms by a k-d tree.",
        "",
        "![reference, generated, aligned reference, outline of the generated mask on it](align_reference.png)",
    ]
    if found := figures.get("inverted_psnr_db"):
        lines += [
            "",
            f"{arguments.pairs} references of held-out identities of the demo world, warped onto another pose; PSNR "
            f"within the mask after DDIM inversion of {arguments.steps} steps with the reference's caption and "
            "sampling back, by what stands where the transformed reference ends:",
            "",
            *markdown(("surroundings", "PSNR"), ((name, f"{value:.2f} dB") for name, value in found.items())),
        ]
    return lines
