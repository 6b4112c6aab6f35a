"""How well does a model's own attention segment a subject? `python -m benchmarks segment_subject`.

The masks of `attention_segmentation.attention_masks` against those of the renderer (intersection over union), on
images of held-out identities of the demo world that no training has seen. The network looks at each image once at
every timestep of a grid; every set of timesteps, threshold and lambda of equation 2 (Liu et al. 2024) is then cut out
of the same recordings. Half of the images choose, the other half is what is reported. The network is evaluated with
the class word alone ("a cat") and with the caption; a model with joint attention with the class word against an empty
prompt, and with the class word of the caption against the caption's place.
Writes benchmarks/results/segment_subject.json, .md and .jpg (the first images of the reported half, as they came).
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import torch
from identity_edit_pack.attention import identity_mask as masks
from identity_edit_pack.demo_world.attributes import PLACE_PHRASES, caption
from identity_edit_pack.demo_world.images import evaluation_set
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.lipe import attention_segmentation as by_attention
from identity_edit_pack.pipelines.lipe import heatmap
from identity_edit_pack.pipelines.lipe.identity_prompt import (
    IdentityPrompt,
    encode_identity_prompt,
    identity_in_caption,
)

from .edits import embed, save_sheet
from .harness import CHECKPOINT, RESULTS, Options, load_checkpoint, markdown

TIMESTEPS = (1, 101, 201, 301, 401, 501, 601, 701, 801)
SETS = [
    *((timestep,) for timestep in TIMESTEPS),
    *itertools.combinations(TIMESTEPS, 2),
    *(TIMESTEPS[i : i + 3] for i in range(len(TIMESTEPS) - 2)),
    TIMESTEPS[1:6],
]
POWERS = (0, 1, 2, 4, 6, 8)
THRESHOLDS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)
SEED = 11


def overlap(found: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Intersection over union of masks [B, H, W]: [B]."""
    both, either = ((found > 0) & (true > 0)).sum((1, 2)), ((found > 0) | (true > 0)).sum((1, 2))
    return both / either.clamp(min=1)


def record(
    model: Any, clip: Any, latents: torch.Tensor, identities: list[IdentityPrompt], texts: list[str]
) -> dict[int, Any]:
    """By timestep: rough mask [B, h, w] and self-attention [B, N, N]. Images with the same identity prompt are
    evaluated together."""
    together: dict[int, list[int]] = {}
    for row, identity in enumerate(identities):
        together.setdefault(id(identity), []).append(row)
    found: dict[int, Any] = {}
    for timestep in TIMESTEPS:
        rough, own = [], []
        for rows in together.values():
            attention = by_attention.record_attention(
                model,
                latents[rows],
                identities[rows[0]],
                embed(clip, [texts[row] for row in rows]),
                timesteps=(timestep,),
            )
            rough.append((rows, masks.rough_mask(attention)))
            own.append((rows, attention.self_attention()))
        found[timestep] = tuple(_in_order(parts, len(identities)) for parts in (rough, own))
    return found


def _in_order(parts: list[tuple[list[int], torch.Tensor]], count: int) -> torch.Tensor:
    result = torch.empty(count, *parts[0][1].shape[1:])
    for rows, values in parts:
        result[rows] = values
    return result


def cut(recorded: dict[int, Any], chosen: tuple[int, ...], power: int) -> torch.Tensor:
    """The normalized map [B, 128, 128] of a set of timesteps, as `identity_map` makes it."""
    rough = torch.stack([recorded[timestep][0] for timestep in chosen]).mean(0)
    if power > 0:
        rough = masks.refined_mask(rough, torch.stack([recorded[timestep][1] for timestep in chosen]).mean(0), power)
    return masks.resized(masks.normalized(rough), (128, 128))


OPTIONS: Options = {
    "images": (40, "half of them choose, half are reported"),
    "name": ("segment_subject", "of the files of results"),
    **CHECKPOINT,
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    model, clip, vae = load_checkpoint(arguments.checkpoint)
    shown = evaluation_set(arguments.images, seed=SEED, held_out=True)
    drawn = [render(attributes, seed) for attributes, seed in shown]
    images = torch.stack([torch.from_numpy(image.copy()).float() / 255 for image, _ in drawn])
    true = torch.stack([torch.from_numpy(mask != 0) for _, mask in drawn])
    names = ["person" if a.framing == "portrait" else a.species for a, _ in shown]
    latents = vae.encode(images)
    half = arguments.images // 2
    figures: dict[str, Any] = {
        "images": arguments.images, "reported": arguments.images - half, "name": arguments.name
    }  # fmt: skip
    sheets = [images[half:]]
    is_joint = engine.is_joint(model)
    by_name = {name: encode_identity_prompt(clip, name, contrast="" if is_joint else None) for name in set(names)}
    by_class = by_caption = [by_name[name] for name in names]
    captions = [caption(attributes) for attributes, _ in shown]
    if is_joint:
        places = [PLACE_PHRASES[attributes.place] for attributes, _ in shown]
        by_caption = [
            identity_in_caption(clip, name, text, place)
            for name, text, place in zip(names, captions, places, strict=True)
        ]
    for label, identities, texts in (
        ("class word", by_class, [f"a {name}" for name in names]),
        ("caption", by_caption, captions),
    ):
        recorded = record(model, clip, latents, identities, texts)
        rows = []
        for chosen, power in itertools.product(SETS, POWERS):
            values = cut(recorded, chosen, power)
            for threshold in THRESHOLDS:
                each = overlap(values > threshold, true)
                rows.append((float(each[:half].mean()), chosen, threshold, power, each[half:]))
        settings = by_attention.default_settings(model)
        defaults = settings.timesteps, settings.threshold, settings.power
        own = next(row for row in rows if row[1:4] == defaults)
        best = {f"best of {n}": max((r for r in rows if len(r[1]) == n), key=lambda row: row[0]) for n in (1, 2, 3, 5)}
        for what, (choosing, chosen, threshold, power, reported) in {**best, "defaults": own}.items():
            figures[f"{label}, {what}"] = {
                "timesteps": list(chosen),
                "threshold": threshold,
                "lambda": power,
                "iou_choosing_half": choosing,
                "iou_reported_half": float(reported.mean()),
                "iou_reported_lowest_tenth": float(reported.quantile(0.1)),
            }
        sheets.append(heatmap.outlined(images, (cut(recorded, own[1], own[3]) > own[2]).float())[half:])
    start = time.perf_counter()
    by_attention.attention_masks(model, latents[:1], by_class[0], embed(clip, [f"a {names[0]}"]), (128, 128))
    figures["seconds_an_image"] = time.perf_counter() - start
    figures["model_calls"] = len(settings.timesteps)
    save_sheet(RESULTS / f"{arguments.name}.jpg", sheets)
    return figures


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    rows = [
        (what, ", ".join(map(str, row["timesteps"])), f"{row['threshold']:g}", row["lambda"],
         *(f"{row[f'iou_{key}']:.3f}" for key in ("choosing_half", "reported_half", "reported_lowest_tenth")))
        for what, row in figures.items() if isinstance(row, dict)
    ]  # fmt: skip
    half = arguments.images // 2
    scores = "IoU, choosing half", "reported half", "worst tenth below"
    return [
        "Segment Subject by attention",
        f"{arguments.images} images of held-out identities; timesteps, threshold and lambda chosen on {half}, reported "
        f"on the other {arguments.images - half}. Intersection over union with the renderer's masks.",
        *markdown(("evaluated with", "timesteps", "threshold", "lambda", *scores), rows),
        "",
        f"One image with the defaults: {figures['seconds_an_image']:.2f} s on this machine's "
        f"{'GPU' if torch.cuda.is_available() else 'CPU'}, {figures['model_calls']} model calls.",
        "",
        f"![images; masks with the class word; masks with the caption]({arguments.name}.jpg)",
    ]
