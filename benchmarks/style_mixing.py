"""People that nobody trained on, and mixes of two: `python -m benchmarks style_mixing`.

The committed demo style attention knows many people and none of these: a person is nothing but the W+ codes of photos
here (Gu et al. 2025, section 2.2.2).

- Lambda: the mean styles of six photos of each person, drawn at the prompts of `style_identity` for lambda
  0 to 1 and scored as there.
- Mixing (section 3.4.1): the rows of single photos of two people, of whom one smiles and looks left and the other is
  angry and looks right, mixed by rows 10-18 and by each group of rows alone. Given is how often each attribute that the
  parents differ in comes from the right one.

Writes benchmarks/results/style_mixing.json, .md, and .jpg: for each pair the two photos, then the mixes in the table's
order.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from identity_edit_pack.demo_world.classifier import load_classifier
from identity_edit_pack.demo_world.images import EVALUATION_SEED
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.demo_world.train_style_attention import STYLE_PATH, caption_calling
from identity_edit_pack.demo_world.train_w_plus import GROUPS
from identity_edit_pack.pipelines.pidiff.style_attention import ROW_GROUPS, StyleAttention
from identity_edit_pack.pipelines.pidiff.style_attention_files import load_style_attention
from identity_edit_pack.pipelines.pidiff.w_plus import average_styles, mix_styles, parse_rows
from identity_edit_pack.pipelines.pidiff.w_plus_encoder import encode_w_plus, fitted, load_w_plus_encoder
from tqdm import tqdm

from .edits import save_sheet
from .harness import RESULTS, Options, load_checkpoint, markdown
from .hifi_subjects import seen
from .orders import Cases, orders_section, shared_options
from .style_identity import (
    CLAIMS,
    PROMPTS,
    SAMPLING,
    STRENGTHS,
    Parts,
    Person,
    asked_of,
    by_style,
    draw_people,
    part_table,
    photograph,
    score,
)

ROWS_OF = {"10-18": (2, 3), "1-5": (0,), "6-9": (1,), "10-13": (2,), "14-18": (3,)}
"""Rows that are taken from the second parent, and the groups that they are."""
MIXING_PROMPT = "a portrait of a person on the beach"
"""Says neither mood nor direction: both are left to the rows."""

Mixing = dict[str, list[float]]


def score_mixing(
    parts: Parts, style: StyleAttention, first: Person, second: Person
) -> tuple[Mixing, list[torch.Tensor]]:
    """By "rows: attribute", whether what the parents differ in comes from the right one; and the parents' photos with
    their mixes."""
    shown, photos, styles = [], [], []
    for person, expression, facing in ((first, "smiling", "left"), (second, "angry", "right")):
        shown.append(person.identity.replace(expression=expression, facing=facing, costume="none", place="grass"))
        image, _ = render(shown[-1], EVALUATION_SEED + parts.arguments.seed)
        photos.append(torch.from_numpy(image.copy()).float() / 255)
        styles.append(encode_w_plus(parts.encoder, fitted(photos[-1][None], parts.encoder.size)))
    of_first, of_second = styles
    rows = torch.cat([mix_styles(of_first, of_second, parse_rows(text, of_first.count)).rows for text in ROWS_OF])
    mixed = dataclasses.replace(of_first, rows=rows)
    images = by_style(parts, style, mixed, [MIXING_PROMPT] * len(ROWS_OF), parts.arguments.strength)
    found: Mixing = {}
    for what, (text, groups) in zip(seen(load_classifier(), images), ROWS_OF.items(), strict=True):
        for number, (_, names) in enumerate(GROUPS):
            parent = shown[1] if number in groups else shown[0]
            for name in names:
                if getattr(shown[0], name) != getattr(shown[1], name):
                    found.setdefault(f"{text}: {name}", []).append(float(what[name] == getattr(parent, name)))
    return found, [*photos, *images]


OPTIONS: Options = {
    **shared_options(2, "style_mixing"),
    "people": (4, "for each seed; each is mixed with the next (4)"),
    "style_attention": (STYLE_PATH, "the trained attention (the demo world's)"),
    **SAMPLING,
}


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    style = load_style_attention(str(arguments.style_attention))
    parts = Parts(*load_checkpoint(arguments.checkpoint), load_w_plus_encoder(str(arguments.encoder)), arguments)
    cases = Cases(
        arguments, [str(seed) for seed in range(arguments.seed, arguments.seed + arguments.seeds)], resume=False
    )
    mixing: Mixing = {}
    sheet = []
    for unit in cases.units:
        seed = int(unit)
        of_seed = dataclasses.replace(parts, arguments=argparse.Namespace(**{**vars(arguments), "seed": seed}))
        people = [photograph(of_seed, identity, 6) for identity in draw_people(arguments.people, seed)]
        for number, person in enumerate(tqdm(people, unit="person")):
            asked = asked_of(person.identity, len(PROMPTS))
            mean, prompts = average_styles([person.styles]), [caption_calling(each) for each in asked]
            rows = {
                f"strength: {strength:g}": score(
                    by_style(of_seed, style, mean, prompts, strength), asked, person.images
                )
                for strength in STRENGTHS
            }
            cases.add(rows)
            found, images = score_mixing(of_seed, style, person, people[(number + 1) % len(people)])
            sheet.append(torch.stack(images))
            for name, right in found.items():
                mixing.setdefault(name, []).extend(right)
    save_sheet(RESULTS / f"{arguments.name}.jpg", sheet)
    mixed = {name: sum(right) / len(right) for name, right in mixing.items()}
    yield {**cases.figures(), "training": style.training, "mixing": mixed}


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    names = [name for _, names in GROUPS for name in names]
    groups = [
        f"{name.replace('_', ' ')} ({rows})"
        for (_, names), rows in zip(GROUPS, ROW_GROUPS.split(", "), strict=True)
        for name in names
    ]
    mixing = {
        text: [figures["mixing"].get(f"{text}: {name}") for name in names]  # None where all parents are alike
        for text in ROWS_OF
    }
    training = figures["training"]
    return [
        "People that nobody trained on, by their W+ codes",
        f"{arguments.seeds} seeds from {arguments.seed} on, {arguments.people} people each, {len(PROMPTS)} prompts; "
        f"style attention of {training['steps']} steps and {training['images']} portraits; {arguments.steps} steps of "
        f"DDIM, guidance {arguments.guidance_scale:g}; mixes at lambda {arguments.strength:g}; "
        f"{figures['minutes']:.0f} minutes.",
        *part_table(figures["rows"], "strength", "Lambda")[1:],
        *orders_section((), CLAIMS, figures, "Gu et al. 2025"),
        "",
        "## Mixing: attributes from the right parent, by row group",
        "",
        *markdown(
            ("rows of the second parent", *groups),
            ((text, *("-" if each is None else f"{each:.3f}" for each in cells)) for text, cells in mixing.items()),
        ),
    ]
