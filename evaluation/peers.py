"""How does the pack compare with what else there is? `python -m benchmarks peers --community C --masactrl M`.

The pack's methods, ComfyUI's stock nodes, diffusers' pipelines, those of its community and the authors' own code edit
the same images with the same weights in float32, the same number of steps, guidance scale and seed.

- Figures: non-rigid edits (pose, expression, view) of subjects that the demo checkpoint has never seen, as in
  `lipe_edit.py`. Every method is told the whole caption, but for LIPE, which learns the subject from four images and
  is told its rare token and class word alone.
- Portraits: the edits that the demo MCDM has learned, as in `portrait_edit.py`. MCDM and InstructPix2Pix, which run on
  the same eight-channel checkpoint, are told the edit's words, the others the whole caption.

The renderer knows the true edit. Scores: share of edits that the attribute classifier sees done; share of images of
which it sees the identity kept; both; PSNR against the source outside of what the true edit changes (figures: outside
of the subject); SSIM against the true edit. Time and model calls are those of a method alone, with all that it
needs; what is learned once for a subject is given apart. Two implementations of the same algorithm are compared with
one another.
`--community` is a folder with diffusers' examples/community, `--masactrl` a checkout of MasaCtrl's code; without one of
them its methods are left out. With `--keep` a run that was stopped goes on, and `--only-kept` reports what it has.
Writes benchmarks/results/peers.json, .md, .jpg (figures) and peers_portraits.jpg.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from identity_edit_pack.demo_world import family
from identity_edit_pack.demo_world.attributes import Attributes, caption
from identity_edit_pack.demo_world.classifier import load_classifier
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ..benchmarks import edits, lipe_edit, portrait_edit
from ..benchmarks.demo_worlds import WORLDS
from ..benchmarks.edits import Pair
from ..benchmarks.harness import CHECKPOINT, DEMO_MCDM, RESULTS, SEED, Options, markdown, means
from . import generating_methods
from .cases import EditCase, save_image
from .methods import METHODS, SAME_ALGORITHM, SUBJECT, Checkpoint, MethodSettings, load_checkpoint, measured
from .scoring import KeptImages

SIZE = 128
KINDS = ("figures", "portraits")
TOKEN = "sks"
SLOW = ("community-imagic",)
PORTRAITS = (
    "img2img", "diffusers-img2img", "sdedit", "ddim", "negative-prompt", "diffedit", "diffusers-diffedit",
    "instruct-pix2pix", "diffusers-instruct-pix2pix", "mcdm",
)  # fmt: skip
FIGURES = tuple(
    name for name, method in METHODS.items() if "mcdm" not in method.needs and name not in generating_methods.METHODS
)
REASONS = {
    "img2img": ("ComfyUI's own nodes. They end at noise level 0, diffusers' scheduler at that of the first timestep."),
    "instruct-pix2pix": (
        "ComfyUI's own nodes. They scale the first noise by sigma, diffusers does not; the ends differ as above."
    ),
    "diffedit": (
        "diffusers guides the two predictions whose difference makes the mask: twice the evaluations for the same "
        "difference but for a factor, which normalizing takes away. Its noise is drawn in another order, and each of "
        "its steps is blended with the inverted latent of the step before, the pack's with that of the same noise "
        "level. It inverts only as far as the edit goes back, Noise Inversion the whole way."
    ),
    "masactrl": (
        "The same image to rounding. The reference evaluates source and target as one batch; the pack one after the "
        "other, which needs less memory and serves any guider, and is slower on a processor. It leaves the source out "
        "of the first steps, where nothing looks at it."
    ),
    "null-text-7.5": (
        "The same image to rounding. The community's pipeline computes gradients of all weights, and evaluates both "
        "sides once more at the end of each step."
    ),
}
"""Why two implementations of the same algorithm differ."""


@dataclass(frozen=True)
class Task:
    """An image to edit, as every method but those that learn the subject is told, as these are, and the truth."""

    case: EditCase
    named: EditCase
    pair: Pair


def figure_tasks(count: int, folder: Path, seed: int) -> list[Task]:
    """The three kinds of edit of one subject after the other."""
    kinds = len(WORLDS["demo"].edits)
    tasks: list[Task] = []
    for number, subject in enumerate(lipe_edit.draw_subjects(-(-count // kinds), seed)):
        references = write_references(subject, folder / f"subject {number}", seed)
        for pair in lipe_edit.draw_pairs(subject, kinds, seed):
            name = f"figure {len(tasks):02}"
            case = EditCase(
                name=name,
                group=pair.edited,
                image=save_image(pair.before, folder / f"{name}.png"),
                source_prompt=caption(pair.source),
                target_prompt=caption(pair.target),
                target=save_image(pair.after, folder / f"{name} edited.png"),
                references=references,
                subject_word=TOKEN,
                class_word=subject.species,
            )
            by_token = f"{TOKEN} {subject.species}"
            named = dataclasses.replace(
                case,
                source_prompt=lipe_edit.caption_with(pair.source, by_token),
                target_prompt=lipe_edit.caption_with(pair.target, by_token),
            )
            tasks.append(Task(case, named, pair))
    return tasks[:count]


def write_references(subject: Attributes, folder: Path, seed: int) -> tuple[Path, ...]:
    """Four images of a subject, each with its editing-oriented caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, (image, text) in enumerate(lipe_edit.references(subject, f"{TOKEN} {subject.species}", True, seed)):
        paths.append(save_image(image, folder / f"{index}.png"))
        paths[-1].with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    return tuple(paths)


def portrait_tasks(count: int, folder: Path, seed: int) -> list[Task]:
    tasks = []
    for index in range(count):
        pair, name = portrait_edit.draw_pair(seed, index), f"portrait {index:02}"
        case = EditCase(
            name=name,
            group=pair.edited,
            image=save_image(pair.before, folder / f"{name}.png"),
            source_prompt=caption(pair.source),
            target_prompt=caption(pair.target),
            instruction=portrait_edit.edit_words(pair)[1],
            target=save_image(pair.after, folder / f"{name} edited.png"),
            class_word="person",
        )
        tasks.append(Task(case, case, pair))
    return tasks


@dataclass(frozen=True)
class Made:
    """An edited image [128, 128, 3] in [0, 1], what it cost, and what learning its subject did."""

    image: torch.Tensor
    seconds: float
    evaluations: int
    subject_seconds: float


def make(name: str, task: Task, checkpoint: Checkpoint, settings: MethodSettings) -> Made:
    method, work = METHODS[name], settings.work
    case = task.named if "references" in method.needs else task.case
    work.begin()
    with measured() as own:
        image = method.edit(checkpoint, case, settings)
    cost = work.edit_cost(own)
    return Made(image[0].clamp(0, 1), cost.seconds, cost.evaluations, work.used[SUBJECT].seconds)


def kept_or_made(path: Path, make_it: Callable[[], Made]) -> Made:
    if path.exists():
        with safe_open(path, framework="pt") as file:
            said = file.metadata()
            image = file.get_tensor("image")
        return Made(image, float(said["seconds"]), int(said["evaluations"]), float(said["subject_seconds"]))
    made = make_it()
    said = {name: str(getattr(made, name)) for name in ("seconds", "evaluations", "subject_seconds")}
    temporary = path.with_suffix(".tmp")
    save_file({"image": made.image.contiguous()}, temporary, metadata=said)
    temporary.replace(path)
    return made


def edit_all(
    names: tuple[str, ...], tasks: list[Task], checkpoint: Checkpoint, settings: MethodSettings, folder: Path,
    only_kept: bool,
) -> Iterator[tuple[str, int, Made]]:  # fmt: skip
    """(method, number of the task, what it made), one task after the other."""
    for number, task in enumerate(tqdm(tasks, unit="image")):
        for name in names:
            path = folder / f"{name} {task.case.name}.safetensors"
            if METHODS[name].lacks(task.named, settings) or (only_kept and not path.exists()):
                continue
            yield name, number, kept_or_made(path, lambda: make(name, task, checkpoint, settings))  # noqa: B023
        settings.work.forget("case")


def warm_up(task: Task, checkpoint: Checkpoint, settings: MethodSettings) -> None:
    """Load the networks and let the libraries prepare themselves before anything is measured."""
    for name in ("img2img", "diffusers-img2img"):
        make(name, task, checkpoint, dataclasses.replace(settings, steps=2))


Results = dict[str, dict[int, Made]]
Score = Callable[[torch.Tensor, list[Pair]], list[dict[str, Any]]]


def rows_of(results: Results, tasks: list[Task], score: Score) -> dict[str, dict[str, Any]]:
    report: dict[str, dict[str, Any]] = {}
    for name, made in results.items():
        pairs = [tasks[number].pair for number in made]
        scored = score(torch.stack([one.image for one in made.values()]), pairs)
        report[name] = {
            "implementation": METHODS[name].implementation if name in METHODS else "",
            "description": METHODS[name].description if name in METHODS else "",
            "cases": len(made),
            **means(scored),
            "seconds": statistics.median(one.seconds for one in made.values()),
            "evaluations": statistics.median(one.evaluations for one in made.values()),
            "subject_seconds": statistics.median(one.subject_seconds for one in made.values()),
        }
    return report


def score_figures(images: torch.Tensor, pairs: list[Pair]) -> list[dict[str, Any]]:
    rows = edits.score_each(load_classifier(), images, pairs)
    names = {"edit_done_and_identity_kept": "both", "background_psnr_db": "psnr_db", "ssim_to_true_edit": "ssim"}
    return [{names.get(key, key): value for key, value in row.items() if key != "psnr_to_source_db"} for row in rows]


def score_portraits(images: torch.Tensor, pairs: list[Pair]) -> list[dict[str, Any]]:
    rows = portrait_edit.score_each(load_classifier(), images, pairs)
    kept = ("edit_done", "identity_kept", "both", "ssim")
    return [{**{key: row[key] for key in kept}, "psnr_db": row["psnr_outside_db"]} for row in rows]


def methods_table(report: dict[str, dict[str, Any]], shown: str) -> list[str]:
    rows = []
    for name, row in report.items():
        measured = bool(row["implementation"])
        time = f"{row['seconds']:.1f}" if measured else ""
        if row["subject_seconds"]:
            time += f" + {row['subject_seconds']:.0f} for the subject"
        shares = (f"{row[key]:.2f}" for key in ("edit_done", "identity_kept", "both"))
        scores = (f"{row['psnr_db']:.1f} dB", f"{row['ssim']:.3f}", time)
        calls = f"{row['evaluations']:.0f}" if measured else ""
        rows.append((name, row["implementation"], *shares, *scores, calls, row["cases"]))
    scores_of = "edit done", "identity kept", "both", f"{shown} PSNR", "SSIM to true edit"
    return markdown(("method", "implementation", *scores_of, "seconds", "evaluations", "images"), rows)


def same_algorithm(results: Results, report: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Two implementations of one algorithm: how alike their images are, and what they cost."""
    figures = []
    for ours, theirs in SAME_ALGORITHM.items():
        both = sorted(set(results.get(ours, ())) & set(results.get(theirs, ())))
        if not both:
            continue
        pairs = [(results[ours][number], results[theirs][number]) for number in both]
        figures.append(
            {
                "method": ours,
                "other": theirs,
                "psnr_between_db": statistics.median(edits.mean_psnr(a.image, b.image) for a, b in pairs),
                "time_ratio": statistics.median(a.seconds / b.seconds for a, b in pairs),
                "images": len(both),
                "evaluations": [report[name]["evaluations"] for name in (ours, theirs)],
            }
        )
    return figures


def sheet_rows(results: Results, tasks: list[Task]) -> list[torch.Tensor]:
    """Sources, methods, true edits; gray where a method made no image."""
    gray = torch.full((SIZE, SIZE, 3), 0.5)
    rows = [torch.stack([task.pair.before for task in tasks])]
    for made in results.values():
        rows.append(torch.stack([made[n].image if n in made else gray for n in range(len(tasks))]))
    return [*rows, torch.stack([task.pair.after for task in tasks])]


OPTIONS: Options = {
    "cases": (15, "figures, three of each subject (15)"),
    "portraits": (12, "portraits (12)"),
    "slow_cases": (3, f"figures by {', '.join(SLOW)} (3)"),
    "methods": (list(METHODS), "a part of the methods", {"choices": METHODS, "nargs": "+"}),
    "steps": (50, "of sampling and of inversion (50)"),
    "guidance_scale": (4.0, "of the target prompt, as in the workflows"),
    "image_guidance_scale": (3.0, "of InstructPix2Pix, as MCDM's"),
    "community": (None, "folder with diffusers' examples/community", {"type": Path}),
    "masactrl": (None, "folder with MasaCtrl's code", {"type": Path}),
    "keep": (None, "folder in which what was made is kept", {"type": Path}),
    "only_kept": (False, "make nothing more, report what --keep holds"),
    "threads": (1, "of PyTorch (1, so that times can be compared)"),
    "mcdm": (DEMO_MCDM, "a checkpoint of Train MCDM (the demo world's)"),
    **SEED,
    **CHECKPOINT,
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    family.register()
    checkpoint = load_checkpoint(arguments.checkpoint, SIZE)

    def class_images(_: Checkpoint, case: EditCase) -> Any:
        base = lipe_edit.Checkpoint(checkpoint.model, checkpoint.clip, checkpoint.vae)
        return lipe_edit.regularization_set(base, case.class_word, arguments.seed)

    shared = ("steps", "guidance_scale", "image_guidance_scale", "mcdm", "community", "masactrl", "seed")
    settings = MethodSettings(
        source_guidance_scale=2.0,
        regularization=class_images,
        mcdm_source_prompt=portrait_edit.SOURCE_PROMPT,
        **{name: getattr(arguments, name) for name in shared},
    )
    of_images = ("steps", "guidance_scale", "seed", "image_guidance_scale", "threads")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        KeptImages(folder, {name: getattr(arguments, name) for name in of_images})  # or this refuses the folder
        figures = figure_tasks(arguments.cases, folder, arguments.seed)
        portraits = portrait_tasks(arguments.portraits, folder, arguments.seed)
        if not arguments.only_kept:
            warm_up([*figures, *portraits][0], checkpoint, settings)
        made: dict[str, Results] = {kind: {} for kind in KINDS}
        for kind, tasks, names in (
            ("figures", figures, tuple(name for name in FIGURES if name not in SLOW)),
            ("portraits", portraits, PORTRAITS),
            ("figures", figures[: arguments.slow_cases], SLOW),
        ):
            chosen = tuple(name for name in names if name in arguments.methods)
            for name, number, one in edit_all(chosen, tasks, checkpoint, settings, folder, arguments.only_kept):
                made[kind].setdefault(name, {})[number] = one
    found: dict[str, Any] = {"seed": arguments.seed, "steps": arguments.steps, "same_algorithm": {}}
    for kind, tasks, score, file in (
        ("figures", figures, score_figures, "peers.jpg"),
        ("portraits", portraits, score_portraits, "peers_portraits.jpg"),
    ):
        truth = {number: Made(task.pair.after, 0.0, 0, 0.0) for number, task in enumerate(tasks)}
        found[kind] = rows_of({**made[kind], "true edit (renderer)": truth} if tasks else {}, tasks, score)
        found["same_algorithm"][kind] = same_algorithm(made[kind], found[kind])
        if tasks:
            edits.save_sheet(RESULTS / file, sheet_rows(made[kind], tasks), 9)
    return found


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    of_figures, of_portraits = ({row["method"]: row for row in figures["same_algorithm"][kind]} for kind in KINDS)
    twice = {**of_figures, **{ours: row for ours, row in of_portraits.items() if ours not in of_figures}}
    rows = (
        (ours, row["other"], f"{row['psnr_between_db']:.1f} dB", f"{row['time_ratio']:.2f}",
         " / ".join(f"{each:.0f}" for each in row["evaluations"]), REASONS[ours])
        for ours, row in twice.items()
    )  # fmt: skip
    processor = "processor time, which other work on the machine lengthens"
    return [
        "The pack beside stock nodes, diffusers, its community and the authors' code",
        f"the demo world, {arguments.steps} steps, guidance scale {arguments.guidance_scale:g} where a method has not "
        f"its own, float32, {arguments.threads} threads, seed {arguments.seed}. Seconds are medians of "
        f"{'elapsed time on a GPU' if torch.cuda.is_available() else processor}. An evaluation is a forward pass of "
        "one image with one prompt; backward passes are not counted. Rows of fewer images are of the first of them."
        + (" Images and times were kept from runs with the same settings." if arguments.keep else ""),
        "## Figures: pose, expression and view of unseen subjects",
        "",
        *methods_table(figures["figures"], "background"),
        "",
        "## Portraits: expressions and costumes of unseen people",
        "",
        *methods_table(figures["portraits"], "outside"),
        "",
        "## The same algorithm twice",
        "",
        "Time is the median of the first's relative to the second's for the same image. A PSNR of 100 dB is the "
        "highest that is given: equal to rounding.",
        "",
        *markdown(
            ("method", "other implementation", "PSNR between the images", "time", "evaluations", "what differs"), rows
        ),
        "",
        "Learning a subject beside a plain loop and diffusers' loop: "
        "[identity prior](identity_prior_training.md), [subject embeddings](subject_embedding_training.md).",
        "",
        "Rows of the images: the source, the methods in the table's order, the true edit. The methods:",
        "",
        *(
            f"- {name}: {METHODS[name].description} ({METHODS[name].source})"
            for name in METHODS
            if name in figures["figures"] or name in figures["portraits"]
        ),
    ]
