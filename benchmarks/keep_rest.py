"""Does Keep the Rest restore what an editor changed by accident? `python -m benchmarks keep_rest`.

Edits with known truth, distorted as image editors distort them: shift to 16 pixels of 512, zoom 0.94 to 1.06, unequal
by up to 2 %, rotation to 1 degree, color cast and gamma, blur, the demo autoencoder, JPEG quality 70, all at once or
one at a time.

- The renderer's edits, drawn at 512 pixels: expression, costume, color, pattern, hair, pose and facing.
- scikit-image's photos at 300 to 512 pixels: objects of another photo pasted, recolored or painted, on 5 to 60 %.

1. Registration: corner error in pixels, and transforms that are wrong (more than 2 pixels) though they are trusted.
   Peers: scikit-image's SIFT with RANSAC, and its phase correlation of the whole image.
2. Change: intersection over union with the true mask, the share of the true change that is lost, and PSNR to the true
   edit.
3. Peers on the same edits: the true mask pasted as ImageCompositeMasked does, before and after registration, ComfyUI's
   Transfer Color where the engine has it, and, with --diff-merge, flux-kontext-diff-merge with its defaults.
4. Unrelated images, which must not be registered, and edits without any change, which must return the original.
5. Processor time and memory at 1, 4 and 24 megapixels, each in a process of its own.
Writes benchmarks/results/keep_rest.json, .md and .jpg; while it runs, so far.
"""

from __future__ import annotations

import argparse
import importlib
import io
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from identity_edit_pack.demo_world import attributes as world
from identity_edit_pack.demo_world import renderer
from identity_edit_pack.pipelines.keep_rest import keep
from identity_edit_pack.pipelines.keep_rest.registration import register
from identity_edit_pack.pipelines.keep_rest.structure import at_size
from identity_edit_pack.pipelines.keep_rest.transform import Transform, moved_back
from PIL import Image
from scipy import ndimage

from . import memory
from .harness import RESULTS, SEED, markdown

PHOTOS = ("astronaut", "cat", "coffee", "rocket")
ATTRIBUTES = ("expression", "costume", "color", "pattern", "hair_color", "pose", "facing")
DISTORTIONS = ("shift", "zoom", "rotation", "colors", "blur", "JPEG", "all", "all and VAE")
WRONG = 2.0
"""Pixels of corner error from which a transform is wrong."""
EDIT, KEPT = "edit as it is", "Register Edit, Keep the Rest"
ABOUT = (
    "edits with known truth, distorted as image editors do (see benchmarks/keep_rest.py). Errors are the largest "
    f"movement of a corner in pixels; images of 300 to 600 pixels. Wrong: more than {WRONG:g} pixels though trusted."
)
EACH = 10
"""Edits after which the table is written again."""
Case = tuple[str, np.ndarray, np.ndarray]
OPTIONS = {
    "rendered": (200, "edits of the renderer"),
    "photos": (64, "edited photos"),
    "peers": (24, "so many edits of each kind also by other methods"),
    "unrelated": (60, "pairs of unrelated images"),
    "megapixels": ([1.0, 4.0, 24.0], "sizes of which time and memory are measured"),
    "diff_merge": ("", "folder with flux-kontext-diff-merge and OpenCV, which are no part of this pack"),
    "only": ("", "print the time and memory of so many megapixels"),
    **SEED,
}


def drawn(attributes: world.Attributes, seed: int, factor: int = 4) -> np.ndarray:
    """The renderer's image at `factor` times its size, [H, W, 3] float64."""
    before = renderer.SUPERSAMPLING
    renderer.SUPERSAMPLING = before * factor
    try:
        canvas, layout = renderer.Canvas(), renderer.layout_of(seed)
        renderer.paint_place(canvas, attributes.place, layout)
        paint = renderer.paint_portrait if attributes.framing == "portrait" else renderer.paint_figure
        paint(canvas, attributes, layout)
        side = renderer.SIZE * factor
        return np.asarray(canvas.image.resize((side, side), Image.Resampling.BOX), dtype=np.float64) / 255.0
    finally:
        renderer.SUPERSAMPLING = before


def rendered_case(number: int, generator: np.random.Generator) -> Case:
    """Name, original and true edit."""
    while True:
        drawing = random.Random(int(generator.integers(1 << 30)))
        source = world.random_attributes(drawing, held_out=None)
        name = drawing.choice([each for each in ATTRIBUTES if each in world.ATTRIBUTES_OF[source.framing]])
        value = drawing.choice(
            [each for each in world.ATTRIBUTES_OF[source.framing][name] if each != getattr(source, name)]
        )
        seed = drawing.getrandbits(40)
        images = drawn(source, seed), drawn(source.replace(**{name: value}), seed)
        if changed(*images).mean() > 0.002:
            return name, *images


def photo(name: str) -> np.ndarray:
    from skimage import data

    return getattr(data, name)().astype(np.float64) / 255.0


def photo_case(number: int, generator: np.random.Generator) -> Case:
    photos = [photo(name) for name in PHOTOS]
    share = (0.05, 0.2, 0.35, 0.5)[number // 4 % 4]
    original = photos[number % 4]
    height, width = original.shape[:2]
    y, x = np.mgrid[:height, :width]
    edited, mask = original.copy(), np.zeros((height, width), bool)
    while mask.mean() < share:
        radius = np.sqrt(share * height * width / np.pi) * generator.uniform(0.5, 0.9)
        middle = generator.uniform(0.0, (height, width))
        here = ((y - middle[0]) / radius) ** 2 + ((x - middle[1]) / radius / generator.uniform(0.6, 1.5)) ** 2 < 1.0
        other = photos[(number + 1 + int(generator.integers(3))) % 4]
        kind = generator.integers(3)
        if kind == 0:
            pasted = Image.fromarray((other * 255).astype(np.uint8)).resize((width, height))
            edited[here] = (np.asarray(pasted) / 255.0)[here]
        elif kind == 1:
            edited[here] = (edited[here][:, [2, 0, 1]] * (0.9, 1.0, 0.7) + 0.1).clip(0.0, 1.0)
        else:
            edited[here] = generator.uniform(0.0, 1.0, 3)
        mask |= here
    return f"{share:.0%}", original, edited


CASES: dict[str, Callable[[int, np.random.Generator], Case]] = {"rendered": rendered_case, "photos": photo_case}


def changed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.abs(first - second).max(axis=-1) > 8 / 255


def distorted(image: np.ndarray, kind: str, generator: np.random.Generator, vae: Any) -> tuple[np.ndarray, Transform]:
    """An edit as an editor returns it, and the movement of its content."""
    has = {each: kind.startswith("all") or kind == each for each in DISTORTIONS}
    scale = image.shape[1] / 512
    zoom = generator.uniform(0.94, 1.06) if has["zoom"] else 1.0
    unequal = generator.uniform(0.99, 1.01, 2) if has["zoom"] else (1.0, 1.0)
    shift = generator.uniform(-16.0, 16.0, 2) * scale if has["shift"] else (0.0, 0.0)
    turn = generator.uniform(-1.0, 1.0) if has["rotation"] else 0.0
    transform = Transform(zoom * unequal[0], zoom * unequal[1], turn, *map(float, shift))
    seen = moved(image, transform.matrix())
    if has["colors"]:
        seen = seen ** generator.uniform(0.8, 1.25) * generator.uniform(0.85, 1.15, 3) + generator.uniform(
            -0.06, 0.06, 3
        )
    if has["blur"]:
        seen = ndimage.gaussian_filter(seen, (*(generator.uniform(0.3, 1.0),) * 2, 0.0))
    seen = seen.clip(0.0, 1.0)
    if kind == "all and VAE":
        height, width = (side // 8 * 8 for side in seen.shape[:2])
        crop = torch.from_numpy(seen[:height, :width]).float()[None]
        seen[:height, :width] = vae.decode(vae.encode(crop))[0].clamp(0.0, 1.0).numpy()
    if has["JPEG"]:
        file = io.BytesIO()
        Image.fromarray((seen * 255).round().astype(np.uint8)).save(file, "JPEG", quality=70)
        seen = np.asarray(Image.open(file)).astype(np.float64) / 255.0
    return seen, transform


def moved(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """An image whose content moved, by spline interpolation in float64."""
    swap = np.array([[0.0, 1.0], [1.0, 0.0]])
    back = swap @ np.linalg.inv(matrix[:, :2]) @ swap
    center = np.array([(side - 1) / 2 for side in image.shape[:2]])
    offset = center - back @ (center + swap @ matrix[:, 2])
    planes = [ndimage.affine_transform(image[..., i], back, offset, order=3, mode="reflect") for i in range(3)]
    return np.stack(planes, axis=-1).clip(0.0, 1.0)


def corner_error(found: np.ndarray, true: np.ndarray, width: int, height: int) -> float:
    corners = np.array([[x, y, 1.0] for x in (-width / 2, width / 2) for y in (-height / 2, height / 2)])
    return float(np.linalg.norm(corners @ (found - true).T, axis=1).max())


def by_sift(original: np.ndarray, seen: np.ndarray) -> np.ndarray | None:
    """The affine transform of SIFT matches by RANSAC, as `Transform.matrix`; None without enough matches."""
    from skimage.feature import SIFT, match_descriptors
    from skimage.measure import ransac
    from skimage.transform import AffineTransform

    found = []
    for image in (original, seen):
        detector = SIFT()
        try:
            detector.detect_and_extract(image.mean(axis=-1))
        except RuntimeError:
            return None
        found.append((detector.keypoints[:, ::-1], detector.descriptors))
    matches = match_descriptors(found[0][1], found[1][1], max_ratio=0.8, cross_check=True)
    if len(matches) < 6:
        return None
    center = np.array([(original.shape[1] - 1) / 2, (original.shape[0] - 1) / 2])
    points = [found[side][0][matches[:, side]] - center for side in (0, 1)]
    model, _ = ransac(points, AffineTransform, min_samples=3, residual_threshold=1.5, max_trials=500, rng=0)
    return None if model is None or not np.isfinite(model.params).all() else model.params[:2]


def by_phase(original: np.ndarray, seen: np.ndarray) -> np.ndarray:
    from skimage.registration import phase_cross_correlation

    shift, _, _ = phase_cross_correlation(original.mean(axis=-1), seen.mean(axis=-1), upsample_factor=20)
    return np.array([[1.0, 0.0, -shift[1]], [0.0, 1.0, -shift[0]]])


def psnr(first: np.ndarray, second: np.ndarray, where: np.ndarray) -> float:
    return float(-10.0 * np.log10(((first - second)[where] ** 2).mean() + 1e-10)) if where.any() else float("nan")


def by_color_transfer(original: torch.Tensor, seen: torch.Tensor) -> torch.Tensor | None:
    """ComfyUI's Transfer Color, which newer engines have."""
    try:
        from comfy_extras.nodes_post_processing import ColorTransfer
    except ImportError:
        return None
    result = ColorTransfer.execute(seen[None], original[None], "reinhard_lab", {"source_stats": "per_frame"})
    return torch.as_tensor(result.args[0][0])


def by_diff_merge(folder: str, original: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """flux-kontext-diff-merge with the settings that its page recommends, which are its defaults."""
    if folder not in sys.path:
        sys.path.append(folder)
    pack = importlib.import_module("flux_kontext_diff_merge")
    merged = pack.FluxKontextDiffMerge().merge_diff(
        original[None], seen[None], 0.02, "adaptive", "poisson", 15, 8, 15, 250, 0.15
    )
    return torch.as_tensor(merged[0][0])


def measured(case: Case, kind: str, generator: np.random.Generator, vae: Any, peers: bool, folder: str) -> Any:
    name, original, edited = case
    seen, true = distorted(edited, kind, generator, vae)
    height, width = original.shape[:2]
    first, second = (torch.from_numpy(each).float() for each in (original, seen))
    start = time.process_time()
    found = register(first, second)
    middle = time.process_time()
    row: dict[str, Any] = {"edit": name, "distortion": kind, "share": float(changed(original, edited).mean())}
    row |= {"error": corner_error(found.transform.matrix(), true.matrix(), width, height), "fault": found.fault}
    row |= {"support": found.support, "doubt": found.doubt, "register_seconds": middle - start}
    if peers:
        for peer, by in (("sift", by_sift), ("phase", by_phase)):
            matrix = by(original, seen)
            row[peer] = None if matrix is None else corner_error(matrix, true.matrix(), width, height)
    if found.fault:
        return row
    start = time.process_time()
    registered, covered = moved_back(found.transform, first, second)
    result = keep.keep_rest(first, registered)
    row["keep_seconds"] = time.process_time() - start
    share = result.mask.numpy()
    exact = keep.keep_rest(first, registered, grow=0.0, feather=0.0).mask.numpy() > 0.5
    reaches = covered.numpy() > 0
    truth = changed(original, edited) & reaches
    amount = np.abs(edited - original).sum(axis=-1) * truth
    row["iou"] = float((exact & truth).sum() / max(1, (exact | truth).sum()))
    row["lost"] = float((amount * (1.0 - share)).sum() / max(amount.sum(), 1e-9))
    row["equal"] = bool(torch.equal(result.image[result.mask == 0.0], first[result.mask == 0.0]))
    row["warning"] = result.warning
    images = {EDIT: seen, KEPT: result.image.numpy()}
    if peers:
        images["ImageCompositeMasked, true mask"] = np.where(truth[..., None], seen, original)
        images["Register Edit, ImageCompositeMasked, true mask"] = np.where(
            truth[..., None], registered.numpy(), original
        )
        if (matched := by_color_transfer(first, second)) is not None:
            images["Transfer Color"] = matched.numpy()
        if folder:
            images["flux-kontext-diff-merge"] = by_diff_merge(folder, first, second).numpy()
            images["Register Edit, flux-kontext-diff-merge"] = by_diff_merge(folder, first, registered).numpy()
    for part, target, where in (
        ("whole", edited, reaches), ("inside", edited, truth), ("outside", original, reaches & ~truth),
    ):  # fmt: skip
        row[part] = {each: psnr(image, target, where) for each, image in images.items()}
    shown = [seen, images.get("flux-kontext-diff-merge", seen), images[KEPT], np.repeat(share[..., None], 3, axis=-1)]
    row["images"] = (original, *shown, edited)
    return row


def sheet(cases: list[tuple[np.ndarray, ...]]) -> Image.Image:
    """Original, distorted edit, diff merge, result, mask and true edit of some cases."""
    lines = []
    for case in cases:
        images = [Image.fromarray((each.clip(0, 1) * 255).astype(np.uint8)).resize((192, 192)) for each in case]
        lines.append(np.concatenate([np.asarray(each) for each in images], axis=1))
    return Image.fromarray(np.concatenate(lines))


def alone(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds and memory for an original of some size and an edit of at most one megapixel."""
    side = round((float(arguments.only) * 1e6) ** 0.5)
    base = torch.from_numpy(photo("astronaut")).float().movedim(-1, 0)[None]
    original = torch.nn.functional.interpolate(base, size=(side, side), mode="bicubic")[0].movedim(0, -1).clamp(0, 1)
    original = original.contiguous()
    small = min(side, 1000)
    edited = at_size(original, (small, small))
    edited[small // 4 : small // 2, small // 4 : small // 2] = torch.tensor([0.1, 0.8, 0.2])
    for _ in range(2 if side < 2000 else 1):  # libraries are loaded at first
        wall, start = time.perf_counter(), time.process_time()
        found = register(original, edited)
        registered, _ = moved_back(found.transform, original, edited)
        middle = time.process_time()
        keep.keep_rest(original, registered)
        end, whole = time.process_time(), time.perf_counter() - wall
    peak = memory.highest_of_this_process() / 1024
    return {"register": middle - start, "keep": end - middle, "wall": whole, "peak_gb": peak}


def quantiles(values: list[float]) -> str:
    return f"{np.median(values):.2f} | {np.percentile(values, 95):.2f} | {max(values):.2f}"


def registration_lines(rows: list[dict[str, Any]], key: str) -> list[str]:
    lines = []
    for value in dict.fromkeys(row[key] for row in rows):
        some = [row for row in rows if row[key] == value]
        trusted = [row["error"] for row in some if row["fault"] is None]
        wrong = sum(error > WRONG for error in trusted)
        if trusted:
            lines.append(f"| {value} | {len(some)} | {len(some) - len(trusted)} | {wrong} | {quantiles(trusted)} |")
    return lines


@torch.inference_mode()
def unrelated_registered(count: int, seed: int) -> int:
    """How many of so many pairs of unrelated images are registered."""
    registered = 0
    for number in range(count // 2):
        _, first, second = rendered_case(number, np.random.default_rng([seed, 2, number]))
        other = photo(PHOTOS[number % 4])[: first.shape[0], : first.shape[1]]
        for pair in ((first, other), (other, second[::-1])):
            one, two = (torch.from_numpy(np.ascontiguousarray(each)).float() for each in pair)
            registered += register(one, two).fault is None
    return registered


@torch.inference_mode()
def noise_changed(generator: np.random.Generator) -> float:
    """Largest share that changed in photos with noise alone."""
    shares = []
    for name in PHOTOS:
        original = photo(name)
        seen = (original + generator.normal(0.0, 0.01, original.shape)).clip(0.0, 1.0)
        shares.append(keep.keep_rest(*(torch.from_numpy(each).float() for each in (original, seen))).changed)
    return max(shares)


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import comfy.utils
    from comfy.sd import VAE

    from .harness import DEMO_CHECKPOINT

    weights = comfy.utils.load_torch_file(str(DEMO_CHECKPOINT))
    prefix = "first_stage_model."
    vae = VAE(sd={key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)})
    times = [
        {"megapixels": size, **memory.in_a_process("keep_rest", f"{size:g}", arguments)}
        for size in arguments.megapixels
    ]
    groups: dict[str, list[dict[str, Any]]] = {group: [] for group in CASES}
    figures = {"cases": groups, "times": times, "noise_changed": noise_changed(np.random.default_rng(arguments.seed))}
    pictured: list[tuple[np.ndarray, ...]] = []
    counts = {group: getattr(arguments, group) for group in CASES}
    order = [(number / count, group, number) for group, count in counts.items() for number in range(count)]
    for done, (_, group, number) in enumerate(sorted(order), start=1):
        generator = np.random.default_rng([arguments.seed, list(CASES).index(group), number])
        kinds = DISTORTIONS if group == "rendered" else DISTORTIONS[:-1]  # the demo VAE knows drawings only
        kind = kinds[number // 2 % len(kinds)] if number % 2 else "all"
        peers = number < arguments.peers
        with torch.inference_mode():
            row = measured(CASES[group](number, generator), kind, generator, vae, peers, arguments.diff_merge)
        images = row.pop("images", None)
        groups[group].append(row)
        if images is not None and peers and len(pictured) < 8:
            pictured.append(images)
            sheet(pictured).save(RESULTS / "keep_rest.jpg", quality=88)
        if done % EACH == 0 or done == len(order):
            yield dict(figures)
    yield {**figures, "unrelated_registered": unrelated_registered(arguments.unrelated, arguments.seed)}


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    groups = {group: rows for group, rows in figures["cases"].items() if rows}
    lines = ["![original, distorted edit, diff merge, result, mask, true edit](keep_rest.jpg)", "", "## Registration"]
    head = ["", "| {} | pairs | not trusted | wrong | median error | 95 % | largest |", "|---|---|---|---|---|---|---|"]
    for group, rows in groups.items():
        for key in ("edit", "distortion"):
            name = f"{group}: {key if (group, key) != ('photos', 'edit') else 'edited share'}"
            lines += [head[0], head[1].format(name), head[2], *registration_lines(rows, key)]
        lines += registration_lines([{**row, "all": "all of them"} for row in rows], "all")
    peers = [row for rows in groups.values() for row in rows if "sift" in row]
    lines += ["", f"By other methods, {len(peers)} of these pairs:", ""]
    rows_of = []
    for key, name in (("error", "Register Edit"), ("sift", "SIFT and RANSAC"), ("phase", "phase correlation")):
        known = [row[key] for row in peers if row[key] is not None and (key != "error" or row["fault"] is None)]
        rows_of.append((name, len(peers) - len(known), *quantiles(known).split(" | ")))
    lines += markdown(("method", "failed", "median", "95 %", "largest"), rows_of)
    if "unrelated_registered" in figures:
        count = arguments.unrelated // 2 * 2
        lines += ["", f"Of {count} pairs of unrelated images {figures['unrelated_registered']} were registered."]
    lines += [
        "",
        "## Change",
        "",
        "Lost: share of the true change that the result lacks. PSNR in dB, medians. Worse outside: results that are "
        "farther from the original than the edit is, outside of the true change.",
        "",
    ]
    titles = ("", "edits", "warned", "IoU, median", "10 %", "lost, mean", "above 1 %", "edit", "kept", "inside",
              "worse outside", "equal outside")  # fmt: skip
    rows_of = []
    for group, rows in groups.items():
        for value in [*dict.fromkeys(row["edit"] for row in rows), "all of them"]:
            every = [row for row in rows if "iou" in row and value in (row["edit"], "all of them")]
            some = [row for row in every if row["warning"] is None]
            if some:
                rows_of.append((f"{group}, {value}", len(every), len(every) - len(some), *change_cells(some)))
    lines += markdown(titles, rows_of)
    lines += ["", f"Four photos with noise alone: {figures['noise_changed']:.2%} changed at most."]
    lines += ["", "## Peers", "", "The same edits by each; PSNR in dB to the true edit, outside of it to the original."]
    for group, rows in groups.items():
        some = [row for row in rows if "iou" in row and "sift" in row]
        names = dict.fromkeys(name for row in some for name in row["whole"])
        lines += ["", f"{len(some)} {group} edits:", ""]
        lines += markdown(
            ("method", "whole, median", "10 %", "inside, median", "outside, median", "10 %"),
            [(name, *peer_cells(some, name)) for name in names],
        )
    lines += [
        "",
        "## Time",
        "",
        "An edit of one megapixel: processor time, wall time beside whatever else ran, and the peak memory of the "
        "process, ComfyUI and torch included.",
        "",
    ]
    return ["Keep the rest", ABOUT, *lines, *markdown(
        ("original, megapixels", "Register Edit", "Keep the Rest", "wall", "peak memory"),
        [(f"{row['megapixels']:g}", f"{row['register']:.1f} s", f"{row['keep']:.1f} s", f"{row['wall']:.1f} s",
          f"{row['peak_gb']:.2f} GB") for row in figures["times"]],
    )]  # fmt: skip


def change_cells(rows: list[dict[str, Any]]) -> list[str]:
    ious, lost = [row["iou"] for row in rows], [row["lost"] for row in rows]
    worse = sum(row["outside"][KEPT] < row["outside"][EDIT] for row in rows)
    return [
        f"{np.median(ious):.2f}",
        f"{np.percentile(ious, 10):.2f}",
        f"{np.mean(lost):.2%}",
        str(sum(each > 0.01 for each in lost)),
        *(f"{np.median([row['whole'][name] for row in rows]):.1f}" for name in (EDIT, KEPT)),
        f"{np.median([row['inside'][KEPT] for row in rows]):.1f}",
        str(worse),
        str(sum(row["equal"] for row in rows)),
    ]


def peer_cells(rows: list[dict[str, Any]], name: str) -> list[str]:
    whole, inside, outside = ([row[part][name] for row in rows] for part in ("whole", "inside", "outside"))
    return [
        f"{each:.1f}"
        for each in (
            np.median(whole), np.percentile(whole, 10), np.median(inside), np.median(outside),
            np.percentile(outside, 10),
        )
    ]  # fmt: skip
