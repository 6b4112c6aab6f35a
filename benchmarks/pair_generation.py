"""Do generated pairs show one person in the right two states? `python -m benchmarks pair_generation`.

Figure 3 of Chen et al. 2024 as numbers, on the demo checkpoint, which was trained on single images of 128x128 and
never saw one of 256x128. Six edits (three expressions, three costumes) of portraits of training identities:

- person: the prompts say "person", so that nothing but being in one image makes both halves one person;
- identity words: "person" with the identity words of a drawn portrait, trained by the pack on drawn portraits;
- described: the prompts describe the person (hair, eyes, skin, face), so that words tell who it is;

each without and with a pose that both halves share, by composable guidance on a latent of double width; and the
described ones also as two images of their own, from the same noise. Scores by the attribute classifier: both halves
show a portrait of the same hair, eyes, skin and face (eyes that are closed do not count); it is the one of the portrait
or the description; the source and the target show their states; the same person in the right two states.

Writes benchmarks/results/pair_generation.json, .md and .jpg (the first pairs, as they came).
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import comfy.controlnet
import comfy.sample
import comfy.samplers
import numpy as np
import torch
from identity_edit_pack.demo_world.attributes import (
    IDENTITY_OF,
    PLACE_PHRASES,
    Attributes,
    caption,
    description,
    random_attributes,
)
from identity_edit_pack.demo_world.classifier import classify, load_classifier
from identity_edit_pack.demo_world.clip_vision import load_clip_vision
from identity_edit_pack.demo_world.images import EVALUATION_SEED, HEADS
from identity_edit_pack.demo_world.pose import draw_pose
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.demo_world.train_control import CONTROL_PATH
from identity_edit_pack.pipelines.mcdm import pair_dataset as datasets
from identity_edit_pack.pipelines.mcdm.identity_words import IdentityWords, load_identity_words, save_identity_words
from identity_edit_pack.pipelines.mcdm.pair_folder import SOURCE, TARGET, PairFolder, read_pair
from identity_edit_pack.pipelines.mcdm.train_identity_words import IdentitySettings, features_of, train_identity_words
from identity_edit_pack.pipelines.shared.images import read_image
from identity_edit_pack.pipelines.training.images import encode_images
from tqdm import tqdm

from .edits import save_sheet
from .harness import RESULTS, ROOT, SEED, THREADS, Options, load_checkpoint, markdown
from .orders import Cases, Claim, orders_section, shared_options

SHARED_PROMPT = f"a portrait of the same {datasets.SUBJECT} on the left and right"
Condition = tuple[datasets.PairSettings, datasets.Identities | None, datasets.Poses | None, bool]
STATES = {
    "smiling": ("expression", "smiling"),
    "angry": ("expression", "angry"),
    "crying": ("expression", "crying"),
    "santa hat": ("costume", "santa hat"),
    "crown": ("costume", "crown"),
    "scarf": ("costume", "scarf"),
}
EDITS = "\n".join(
    f"{name}: a portrait of a {{subject}} -> a portrait of {'an' if name == 'angry' else 'a'} {name} {{subject}}"
    if kind == "expression"
    else f"{name}: a portrait of a {{subject}} -> a portrait of a {{subject}} wearing a {name}"
    for name, (kind, _) in STATES.items()
)
WORDS = 5
"""Identity words: the demo world's are 128 wide, the paper's two 768. Two learned hair style, skin and face shape, and
no colors."""
STEPS, SAMPLER, SCHEDULER, GUIDANCE_SCALE = 12, "dpmpp_2m", "karras", 4.0
"""Of the shipped workflows; the paper's guidance scale is 7.5, its sampler that of Karras et al. 2022 in 20 steps."""


def portraits(count: int, seed: int) -> list[Attributes]:
    """Training identities, neutral and without a costume."""
    generator = random.Random(f"portraits {seed}")
    return [
        random_attributes(generator, "portrait").replace(expression="neutral", costume="none") for _ in range(count)
    ]


def described(a: Attributes) -> str:
    return f"{description(a)} {PLACE_PHRASES[a.place]}"


def drawn(people: list[Attributes], seed: int) -> list[torch.Tensor]:
    images = [render(a, EVALUATION_SEED + 7_000_000 * (seed + 1) + i)[0] for i, a in enumerate(people)]
    return [torch.from_numpy(np.array(image)).float() / 255 for image in images]


def identity_words(checkpoint: Any, clip_vision: Any, path: Path, count: int, steps: int) -> tuple[IdentityWords, str]:
    """Train on drawn portraits of training identities in all states, or read what was trained."""
    if path.exists():
        learned = load_identity_words(str(path))
        return learned, "{steps} steps on {images} portraits".format(**learned.training)
    model, clip, vae = checkpoint
    generator = random.Random("identity words")
    people = [random_attributes(generator, "portrait") for _ in range(count)]
    images = drawn(people, 1)
    # The captions say everything but who it is.
    captions = []
    for person in people:
        captions.append(caption(person).replace(description(person), "person"))
    start_time = time.perf_counter()
    learned, run = train_identity_words(
        model,
        clip,
        encode_images(vae, images, captions),
        features_of(clip_vision, images),
        IdentitySettings(
            class_word="person", words=WORDS, batch_size=8, steps=steps, learning_rate=1e-3, checkpoint_every=100
        ),
        checkpoint=lambda name: str(path.with_name(f"{name}.safetensors")),
        progress=lambda done, total, loss, _: print(f"\r{done}/{total} {loss:.4f}", end="", file=sys.stderr),
    )
    save_identity_words(learned, str(path))
    few = max(1, len(run.losses) // 10)
    losses = f"loss {sum(run.losses[:few]) / few:.4f} to {sum(run.losses[-few:]) / few:.4f}"
    print(f"{time.perf_counter() - start_time:.0f} s, {losses}")
    return learned, f"{steps} steps on {count} portraits"


def apart(checkpoint: Any, sampler: Any, sigmas: torch.Tensor, settings: datasets.PairSettings, number: int) -> Any:
    """The pair as two images of their own, from the same noise."""
    model, clip, vae = checkpoint
    plan = datasets.plan(settings, number)
    images = []
    for prompt in (plan.drawn_source_prompt, plan.drawn_target_prompt):
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(*(clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "")))
        guider.set_cfg(settings.guidance_scale)
        latent = torch.zeros(1, 4, settings.height // 8, settings.width // 8)
        noise = comfy.sample.prepare_noise(latent, datasets.noise_seed(settings, number, 0))
        images.append(vae.decode(guider.sample(noise, latent, sampler, sigmas, disable_pbar=True))[0])
    return images[0], images[1], plan.edit


def score(pairs: list[tuple[torch.Tensor, torch.Tensor, str]], asked_for: list[Attributes]) -> list[dict[str, float]]:
    """What is right in each pair; `asked_for` is who it should show."""
    classifier = load_classifier()
    answers = [classify(classifier, torch.stack(images)) for images in ([p[0] for p in pairs], [p[1] for p in pairs])]
    rows = []
    for index, ((_, _, edit), person) in enumerate(zip(pairs, asked_for, strict=True)):
        before, after = ({head: choices[int(part[head][index])] for head, choices in HEADS.items()} for part in answers)
        kind, state = STATES[edit]
        compared = [name for name in IDENTITY_OF["portrait"] if not (name == "eye_color" and state == "crying")]
        both_portraits = before["framing"] == after["framing"] == "portrait"
        same = both_portraits and all(before[name] == after[name] for name in compared)
        source = before["expression"] == "neutral" and before["costume"] == "none"
        target = {"expression": "neutral", "costume": "none"} | {kind: state}
        right = all(after[name] == value for name, value in target.items())
        rows.append(
            {
                "same_identity": same,
                "identity_asked_for": same and all(after[name] == getattr(person, name) for name in compared),
                "identity_attributes_alike": sum(before[name] == after[name] for name in compared) / len(compared),
                "source_state": source,
                "target_state": right,
                "same_identity_and_both_states": same and source and right,
                "same_place_and_facing": before["place"] == after["place"] and before["facing"] == after["facing"],
            }
        )
    return rows


def drawn_poses(count: int, seed: int) -> torch.Tensor:
    """Pose images [count, 128, 128, 3] of other portraits."""
    generator = random.Random(f"poses {seed}")
    people = [random_attributes(generator, "portrait") for _ in range(count)]
    images = [draw_pose(a, EVALUATION_SEED + 11_000_000 * (seed + 1) + i) for i, a in enumerate(people)]
    return torch.from_numpy(np.stack(images)).float() / 255


def shown_people(
    settings: datasets.PairSettings,
    who: datasets.Identities | None,
    pose: datasets.Poses | None,
    people: list[Attributes],
) -> list[Attributes]:
    """Who each pair should show: that of its identity image, or of its words."""
    found = []
    for number in range(settings.count):
        plan = datasets.plan(settings, number, len(who.features) if who else 0, len(pose.images) if pose else 0)
        index = plan.identity if plan.identity is not None else settings.subjects.index(plan.subject)
        found.append(people[index])
    return found


CLAIMS = tuple(
    Claim(what, better, worse, score)
    for who in ("identity words", "described")
    for what, better, worse, score in (
        ("figure 3b, no pose", f"{who}, pose", who, "same_place_and_facing"),
        ("figure 3c, no identity", f"{who}, pose", "person, pose", "same_identity"),
        ("figure 3c, no identity", f"{who}, pose", "person, pose", "identity_attributes_alike"),
    )
)
OPTIONS: Options = {
    **shared_options(2, "pair_generation"),
    "pairs": (20, "of each row and seed (20)"),
    "training_images": (1500, "of the identity words"),
    "training_steps": (2000, "of the identity words"),
    "identity_words": (ROOT / "demo_output" / "identity_words.safetensors", "their file, trained where it is missing"),
    **SEED,
    **THREADS,
}
TITLES = {
    "same_identity": "same identity",
    "identity_asked_for": "and the one asked for",
    "source_state": "source state",
    "target_state": "target state",
    "same_identity_and_both_states": "same identity, both states",
    "same_place_and_facing": "place and facing",
    "identity_attributes_alike": "identity attributes alike",
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    checkpoint = load_checkpoint()
    clip_vision = load_clip_vision()
    words, trained = identity_words(
        checkpoint, clip_vision, arguments.identity_words, arguments.training_images, arguments.training_steps
    )
    cases = Cases(arguments, [str(seed) for seed in range(arguments.seed, arguments.seed + arguments.seeds)])
    timed: list[dict[str, float]] = []
    sheet: list[torch.Tensor] = []
    for unit in cases.units:
        rows, seconds, images = pairs_of_seed(checkpoint, clip_vision, words, int(unit), arguments.pairs)
        cases.add(rows, independent=True)
        timed.append(seconds)
        sheet = sheet or images
    save_sheet(RESULTS / f"{arguments.name}.jpg", sheet, columns=6)
    seconds_a_pair = {name: sum(each[name] for each in timed) / len(timed) for name in timed[0]}
    return {**cases.figures(), "identity_words": trained, "seconds_a_pair": seconds_a_pair}


def pairs_of_seed(
    checkpoint: Any, clip_vision: Any, words: IdentityWords, seed: int, count: int
) -> tuple[dict[str, list[dict[str, float]]], dict[str, float], list[torch.Tensor]]:
    """By row the scores of each pair and the seconds it took, and the sheet's rows."""
    model, clip, vae = checkpoint
    people = portraits(count, seed)
    base = datasets.PairSettings(
        count=count, edits=datasets.parse_edits(EDITS), subjects=tuple(map(described, people)),
        shared_prompt=SHARED_PROMPT, width=128, height=128, seed=seed, guidance_scale=GUIDANCE_SCALE,
    )  # fmt: skip
    plain = dataclasses.replace(base, subjects=("person",))
    papers = dataclasses.replace(base, guidance_scale=datasets.GUIDANCE_SCALE)
    identities = datasets.Identities(words, features_of(clip_vision, drawn(people, 2)), "person")
    poses = datasets.Poses(comfy.controlnet.load_controlnet(str(CONTROL_PATH)), drawn_poses(40, seed))
    sampler = comfy.samplers.sampler_object(SAMPLER)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), SCHEDULER, STEPS)
    conditions: dict[str, Condition] = {
        "described, two images": (base, None, None, False),
        "person": (plain, None, None, True),
        "person, pose": (plain, None, poses, True),
        "identity words": (plain, identities, None, True),
        "identity words, pose": (plain, identities, poses, True),
        "described": (base, None, None, True),
        "described, pose": (base, None, poses, True),
        f"described, pose, guidance scale {datasets.GUIDANCE_SCALE}": (papers, None, poses, True),
    }
    rows: dict[str, list[dict[str, float]]] = {}
    times: dict[str, float] = {}
    sheet = []
    for name, (settings, who, pose, composed) in conditions.items():
        start = time.perf_counter()
        numbers = tqdm(range(count), desc=name)
        if composed:
            with tempfile.TemporaryDirectory() as temporary:
                folder = PairFolder(temporary)
                datasets.generate_pairs(
                    model, clip, vae, sampler, sigmas, folder, settings, identities=who, poses=pose, numbers=numbers
                )
                folders = [folder.path / "pairs" / f"{number:06}" for number in range(count)]
                pairs = [
                    (*(read_image(at / side, side)[0] for side in (SOURCE, TARGET)), read_pair(at)["edit"])
                    for at in folders
                ]
        else:
            pairs = [apart(checkpoint, sampler, sigmas, settings, number) for number in numbers]
        times[name] = (time.perf_counter() - start) / count
        rows[name] = score(pairs, shown_people(settings, who, pose, people))
        sheet.append(torch.stack([torch.cat([source, target], dim=1) for source, target, _ in pairs]))
    return rows, times, sheet


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    rows = []
    for name, row in figures["rows"].items():
        nobody = name.startswith("person")  # is asked for
        shares = ("-" if nobody and key == "identity_asked_for" else f"{row[key]:.2f}" for key in TITLES)
        rows.append((name, *shares, f"{figures['seconds_a_pair'][name]:.1f}"))
    return [
        "Generated pairs of the demo checkpoint",
        f"{figures['cases']} pairs a row from {arguments.seeds} seeds from {arguments.seed} on, {STEPS} steps of "
        f"{SAMPLER}, guidance scale {GUIDANCE_SCALE:g}. Identity words: {figures['identity_words']}.",
        *markdown(("", *TITLES.values(), "seconds a pair"), rows),
        *orders_section((), CLAIMS, figures, "Chen et al. 2024"),
    ]
