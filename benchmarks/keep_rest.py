"""Does Keep the Rest restore what an editor changed by accident? `python -m benchmarks keep_rest`.

Edits with known truth, distorted as image editors distort them: shift to 16 pixels of 512, zoom 0.94 to 1.06, unequal
by up to 2 %, rotation to 1 degree, color cast and gamma, blur, the demo autoencoder, JPEG quality 70, all at once or
one at a time.

- The renderer's edits, drawn at 512 pixels: expression, costume, color, pattern, hair, pose and facing.
- scikit-image's photos at 300 to 512 pixels: objects of another photo pasted, recolored or painted, on 5 to 60 %.

1. Registration: corner error in pixels, and transforms that are wrong (more than 2 pixels) though they are trusted.
   Peers: scikit-image's SIFT with RANSAC, and its phase correlation of the whole image.
2. Change: intersection over union with the true mask, the share of the true change that is lost, and PSNR to the true
   edit. Peers: the true mask pasted without registration and after it, and a difference threshold with a blurred mask,
   as difference-blending nodes are described.
3. Unrelated photos, which must not be registered, and edits without any change, which must return the original.
4. Time and memory at 1, 4 and 24 megapixels.
Writes benchmarks/results/keep_rest.json, .md and .jpg.
"""

from __future__ import annotations

import argparse
import io
import random
import resource
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from identity_edit_pack.demo_world import attributes as world
from identity_edit_pack.demo_world import renderer
from identity_edit_pack.pipelines.keep_rest import keep, registration
from PIL import Image
from scipy import ndimage

from .harness import RESULTS, made_by, write_results

PHOTOS = ("astronaut", "cat", "coffee", "rocket")
ATTRIBUTES = ("expression", "costume", "color", "pattern", "hair_color", "pose", "facing")
DISTORTIONS = ("shift", "zoom", "rotation", "colors", "blur", "JPEG", "all", "all and VAE")
WRONG = 2.0
"""Pixels of corner error from which a transform is wrong."""
Case = tuple[str, np.ndarray, np.ndarray]


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


def rendered_cases(count: int, generator: np.random.Generator) -> Iterator[Case]:
    """Name, original and true edit."""
    while count:
        drawing = random.Random(int(generator.integers(1 << 30)))
        source = world.random_attributes(drawing, held_out=None)
        name = drawing.choice([each for each in ATTRIBUTES if each in world.ATTRIBUTES_OF[source.framing]])
        value = drawing.choice(
            [each for each in world.ATTRIBUTES_OF[source.framing][name] if each != getattr(source, name)]
        )
        seed = drawing.getrandbits(40)
        images = drawn(source, seed), drawn(source.replace(**{name: value}), seed)
        if changed(*images).mean() > 0.002:
            count -= 1
            yield name, *images


def photo(name: str) -> np.ndarray:
    from skimage import data

    return getattr(data, name)().astype(np.float64) / 255.0


def photo_cases(count: int, generator: np.random.Generator) -> Iterator[Case]:
    photos = {name: photo(name) for name in PHOTOS}
    for number in range(count):
        name = PHOTOS[number % 4]
        share = (0.05, 0.2, 0.35, 0.5)[number // 4 % 4]
        original = photos[name]
        height, width = original.shape[:2]
        y, x = np.mgrid[:height, :width]
        edited, mask = original.copy(), np.zeros((height, width), bool)
        while mask.mean() < share:
            radius = np.sqrt(share * height * width / np.pi) * generator.uniform(0.5, 0.9)
            middle = generator.uniform(0.0, (height, width))
            here = ((y - middle[0]) / radius) ** 2 + ((x - middle[1]) / radius / generator.uniform(0.6, 1.5)) ** 2 < 1.0
            other = photos[PHOTOS[(number + 1 + int(generator.integers(3))) % 4]]
            kind = generator.integers(3)
            if kind == 0:
                pasted = Image.fromarray((other * 255).astype(np.uint8)).resize((width, height))
                edited[here] = (np.asarray(pasted) / 255.0)[here]
            elif kind == 1:
                edited[here] = (edited[here][:, [2, 0, 1]] * (0.9, 1.0, 0.7) + 0.1).clip(0.0, 1.0)
            else:
                edited[here] = generator.uniform(0.0, 1.0, 3)
            mask |= here
        yield f"{share:.0%}", original, edited


def changed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.abs(first - second).max(axis=-1) > 8 / 255


def distorted(
    image: np.ndarray, kind: str, generator: np.random.Generator, vae: Any
) -> tuple[np.ndarray, registration.Transform]:
    """An edit as an editor returns it, and the movement of its content."""
    has = {each: kind.startswith("all") or kind == each for each in DISTORTIONS}
    scale = image.shape[1] / 512
    zoom = generator.uniform(0.94, 1.06) if has["zoom"] else 1.0
    unequal = generator.uniform(0.99, 1.01, 2) if has["zoom"] else (1.0, 1.0)
    shift = generator.uniform(-16.0, 16.0, 2) * scale if has["shift"] else (0.0, 0.0)
    turn = generator.uniform(-1.0, 1.0) if has["rotation"] else 0.0
    transform = registration.Transform(zoom * unequal[0], zoom * unequal[1], turn, *map(float, shift))
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


def by_difference(original: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The edit through a blurred mask of differences above 10 %, dilated; without registration."""
    mask = ndimage.binary_dilation(np.abs(original - seen).max(axis=-1) > 0.1, iterations=4)
    soft = ndimage.gaussian_filter(mask.astype(float), 3.0)[..., None]
    return original * (1.0 - soft) + seen * soft


def measure(case: Case, kind: str, generator: np.random.Generator, vae: Any, peers: bool) -> dict[str, Any]:
    name, original, edited = case
    seen, true = distorted(edited, kind, generator, vae)
    height, width = original.shape[:2]
    first, second = (torch.from_numpy(each).float() for each in (original, seen))
    start = time.process_time()
    found = registration.register(first, second)
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
    registered, covered = registration.apply(found.transform, first, second)
    result = keep.keep_rest(first, registered)
    row["keep_seconds"] = time.process_time() - start
    image, share = result.image.numpy(), result.mask.numpy()
    exact = keep.keep_rest(first, registered, grow=0.0, feather=0.0).mask.numpy() > 0.5
    reaches = covered.numpy() > 0
    truth = changed(original, edited) & reaches
    amount = np.abs(edited - original).sum(axis=-1) * truth
    row["iou"] = float((exact & truth).sum() / max(1, (exact | truth).sum()))
    row["lost"] = float((amount * (1.0 - share)).sum() / max(amount.sum(), 1e-9))
    row["equal"] = bool(torch.equal(result.image[result.mask == 0.0], first[result.mask == 0.0]))
    row["inside"] = psnr(image, edited, truth)
    pasted = np.where(truth[..., None], registered.numpy(), original)
    unregistered = np.where(truth[..., None], seen, original)
    whole = {"kept": image, "edit": seen, "true mask": unregistered, "true mask, registered": pasted}
    whole["difference"] = by_difference(original, seen)
    row["whole"] = {each: psnr(value, edited, reaches) for each, value in whole.items()}
    row["outside"] = {each: psnr(value, original, reaches & ~truth) for each, value in whole.items()}
    row["warning"] = result.warning
    row["images"] = (original, seen, image, np.repeat(share[..., None], 3, axis=-1), edited)
    return row


def sheet(cases: list[tuple[np.ndarray, ...]]) -> Image.Image:
    """Original, distorted edit, result, mask and true edit of some cases."""
    lines = []
    for case in cases:
        images = [Image.fromarray((each.clip(0, 1) * 255).astype(np.uint8)).resize((192, 192)) for each in case]
        lines.append(np.concatenate([np.asarray(each) for each in images], axis=1))
    return Image.fromarray(np.concatenate(lines))


def timings(megapixels: list[float]) -> list[dict[str, float]]:
    """Seconds and memory for an original of some size and an edit of at most one megapixel."""
    rows = []
    for size in megapixels:
        side = round((size * 1e6) ** 0.5)
        base = torch.from_numpy(photo("astronaut")).float().movedim(-1, 0)[None]
        original = (
            torch.nn.functional.interpolate(base, size=(side, side), mode="bicubic")[0].movedim(0, -1).clamp(0, 1)
        )
        del base
        small = min(side, 1000)
        edited = registration.at_size(original, (small, small))
        edited[small // 4 : small // 2, small // 4 : small // 2] = torch.tensor([0.1, 0.8, 0.2])
        start = time.perf_counter()
        found = registration.register(original, edited)
        registered, _ = registration.apply(found.transform, original, edited)
        middle = time.perf_counter()
        keep.keep_rest(original, registered)
        end = time.perf_counter()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append({"megapixels": size, "register": middle - start, "keep": end - middle, "peak_gb": memory})
    return rows


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rendered", type=int, default=200, help="edits of the renderer")
    parser.add_argument("--photos", type=int, default=64, help="edited photos")
    parser.add_argument(
        "--peers", type=int, default=24, help="the first so many photos also by SIFT and phase correlation"
    )
    parser.add_argument("--unrelated", type=int, default=60, help="pairs of unrelated images")
    parser.add_argument("--megapixels", type=float, nargs="*", default=[1.0, 4.0, 24.0])


@torch.inference_mode()
def main(arguments: argparse.Namespace) -> None:
    import comfy.utils
    from comfy.sd import VAE

    from .harness import DEMO_CHECKPOINT

    weights = comfy.utils.load_torch_file(str(DEMO_CHECKPOINT))
    prefix = "first_stage_model."
    vae = VAE(sd={key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)})
    generator = np.random.default_rng(0)
    groups: dict[str, list[dict[str, Any]]] = {}
    pictured: list[tuple[np.ndarray, ...]] = []
    for group, cases in (
        ("renderer", rendered_cases(arguments.rendered, generator)),
        ("photos", photo_cases(arguments.photos, generator)),
    ):
        rows = groups[group] = []
        for number, case in enumerate(cases):
            kinds = DISTORTIONS if group == "renderer" else DISTORTIONS[:-1]  # the demo VAE knows drawings only
            kind = kinds[number // 2 % len(kinds)] if number % 2 else "all"
            peers = group == "photos" and number < arguments.peers
            rows.append(measure(case, kind, generator, vae, peers))
            images = rows[-1].pop("images", None)
            if images is not None and number < 7:
                pictured.append(images)
    sheet(pictured).save(RESULTS / "keep_rest.jpg", quality=88)
    unrelated = []
    for number, (_, first, second) in enumerate(rendered_cases(arguments.unrelated // 2, generator)):
        other = photo(PHOTOS[number % 4])[: first.shape[0], : first.shape[1]]
        for one, two in ((first, other), (other, np.ascontiguousarray(second[::-1]))):
            found = registration.register(
                *(torch.from_numpy(np.ascontiguousarray(each)).float() for each in (one, two))
            )
            unrelated.append(found.fault is None)
    unchanged = []
    for name in PHOTOS:
        original = photo(name)
        seen = (original + generator.normal(0.0, 0.01, original.shape)).clip(0.0, 1.0)
        result = keep.keep_rest(*(torch.from_numpy(each).float() for each in (original, seen)))
        unchanged.append(result.changed)
    times = timings(arguments.megapixels)
    write(arguments, groups, unrelated, unchanged, times)


def write(
    arguments: argparse.Namespace,
    groups: dict[str, list[dict[str, Any]]],
    unrelated: list[bool],
    unchanged: list[float],
    times: list[dict[str, float]],
) -> None:
    lines = [
        "# Keep the rest",
        "",
        f"{made_by()}: edits with known truth, distorted as image editors do (see benchmarks/keep_rest.py). Errors are "
        f"the largest movement of a corner in pixels; images of 300 to 600 pixels. Wrong: more than {WRONG:g} pixels "
        "though trusted.",
        "",
        "![original, distorted edit, result, mask, true edit](keep_rest.jpg)",
        "",
        "## Registration",
    ]
    head = ["", "| {} | pairs | not trusted | wrong | median error | 95 % | largest |", "|---|---|---|---|---|---|---|"]
    for group, rows in groups.items():
        for key in ("edit", "distortion"):
            name = f"{group}: {key if (group, key) != ('photos', 'edit') else 'edited share'}"
            lines += [head[0], head[1].format(name), head[2], *registration_lines(rows, key)]
        lines += registration_lines([{**row, "all": "all of them"} for row in rows], "all")
    with_peers = [row for row in groups["photos"] if "sift" in row]
    lines += [
        "",
        f"The first {len(with_peers)} photos by other methods:",
        "",
        "| method | failed | median | 95 % | largest |",
    ]
    lines += ["|---|---|---|---|---|"]
    for key, name in (("error", "Register Edit"), ("sift", "SIFT and RANSAC"), ("phase", "phase correlation")):
        known = [row[key] for row in with_peers if row[key] is not None and (key != "error" or row["fault"] is None)]
        lines.append(f"| {name} | {len(with_peers) - len(known)} | {quantiles(known)} |")
    lines += [
        "",
        f"Of {len(unrelated)} pairs of unrelated images {sum(unrelated)} were registered.",
        "",
        "## Change",
        "",
        "Lost: share of the true change that the result lacks. PSNR in dB to the true edit inside of the true change, "
        "and of the whole image, where 'true mask' is the edit pasted through that mask as ImageCompositeMasked does, "
        "before and after registration, and 'difference' a dilated and blurred threshold of the difference.",
        "",
        "| | edits | IoU, median | 10 % | lost, mean | above 1 % | inside | kept | edit | true mask "
        "| true mask, registered | difference | equal outside |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group, rows in groups.items():
        key = "edit"
        for value in [*dict.fromkeys(row[key] for row in rows), "all of them"]:
            some = [row for row in rows if "iou" in row and value in (row[key], "all of them")]
            some = [row for row in some if row["warning"] is None]
            if some:
                ious, lost = [row["iou"] for row in some], [row["lost"] for row in some]
                whole = " | ".join(
                    f"{np.median([row['whole'][each] for row in some]):.1f}" for each in some[0]["whole"]
                )
                lines.append(
                    f"| {group}, {value} | {len(some)} | {np.median(ious):.2f} | {np.percentile(ious, 10):.2f} | "
                    f"{np.mean(lost):.2%} | {sum(each > 0.01 for each in lost)} | "
                    f"{np.median([row['inside'] for row in some]):.1f} | {whole} | "
                    f"{sum(row['equal'] for row in some)} |"
                )
    lines += [
        "",
        f"Four photos with noise alone: {max(unchanged):.2%} changed at most.",
        "",
        "## Time",
        "",
        "An edit of one megapixel, wall time; peak memory of the process, ComfyUI and torch included.",
        "",
        "| original, megapixels | Register Edit | Keep the Rest | peak memory |",
        "|---|---|---|---|",
        *(
            f"| {row['megapixels']:g} | {row['register']:.1f} s | {row['keep']:.1f} s | {row['peak_gb']:.1f} GB |"
            for row in times
        ),
    ]
    figures = {"cases": groups, "unrelated_registered": sum(unrelated), "unrelated": len(unrelated), "times": times}
    write_results("keep_rest", figures, lines)
