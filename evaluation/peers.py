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
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from identity_edit_pack.demo_world import family
from identity_edit_pack.demo_world.attributes import Attributes, caption
from identity_edit_pack.demo_world.classifier import load_classifier
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ..benchmarks import edits, lipe_edit, portrait_edit
from ..benchmarks.edits import Pair
from ..benchmarks.harness import RESULTS, ROOT, source_commit, write_results
from .cases import EditCase, save_image
from .methods import METHODS, SAME_ALGORITHM, SUBJECT, Checkpoint, MethodSettings, load_checkpoint, measured

SIZE = 128
TOKEN = "sks"
SLOW = ("community-imagic",)
PORTRAITS = (
    "img2img", "diffusers-img2img", "sdedit", "ddim", "negative-prompt", "diffedit", "diffusers-diffedit",
    "instruct-pix2pix", "diffusers-instruct-pix2pix", "mcdm",
)  # fmt: skip
FIGURES = tuple(name for name, method in METHODS.items() if "mcdm" not in method.needs)
REASONS = {
    "img2img": ("ComfyUI's own nodes. They end at noise level 0, diffusers' scheduler at that of the first timestep."),
    "instruct-pix2pix": (
        "ComfyUI's own nodes. They scale the first noise by sigma, diffusers does not; the ends differ as above."
    ),
    "diffedit": (
        "diffusers guides the two predictions whose difference makes the mask: twice the evaluations for the same "
        "difference but for a factor, which normalizing takes away. Its noise is drawn in another order, and each of "
        "its steps is blended with the inverted latent of the step before, the pack's with that of the same noise "
        "level. It inverts only as far as the edit goes back, DDIM Inversion the whole way."
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
    kinds = len(lipe_edit.EDITED)
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
            **{key: float(np.mean([row[key] for row in scored])) for key in scored[0]},
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


def table(report: dict[str, dict[str, Any]], shown: str) -> list[str]:
    lines = [
        f"| method | implementation | edit done | identity kept | both | {shown} PSNR | SSIM to true edit | "
        "seconds | evaluations | images |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report.items():
        time = f"{row['seconds']:.1f}" if row["implementation"] else ""
        if row["subject_seconds"]:
            time += f" + {row['subject_seconds']:.0f} for the subject"
        count = f"{row['evaluations']:.0f}" if row["implementation"] else ""
        lines.append(
            f"| {name} | {row['implementation']} | {row['edit_done']:.2f} | {row['identity_kept']:.2f} | "
            f"{row['both']:.2f} | {row['psnr_db']:.1f} dB | {row['ssim']:.3f} | {time} | {count} | {row['cases']} |"
        )
    return lines


def same_algorithm(results: Results, report: dict[str, dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """Two implementations of one algorithm: how alike their images are, and what they cost."""
    lines, figures = [], []
    for ours, theirs in SAME_ALGORITHM.items():
        both = sorted(set(results.get(ours, ())) & set(results.get(theirs, ())))
        if not both:
            continue
        pairs = [(results[ours][number], results[theirs][number]) for number in both]
        alike = statistics.median(edits.mean_psnr(a.image, b.image) for a, b in pairs)
        ratio = statistics.median(a.seconds / b.seconds for a, b in pairs)
        evaluations = [report[name]["evaluations"] for name in (ours, theirs)]
        figures.append(
            {"method": ours, "other": theirs, "psnr_between_db": alike, "time_ratio": ratio, "images": len(both)}
        )
        lines.append(
            f"| {ours} | {theirs} | {alike:.1f} dB | {ratio:.2f} | {evaluations[0]:.0f} / {evaluations[1]:.0f} | "
            f"{REASONS[ours]} |"
        )
    return lines, figures


def sheet_rows(results: Results, tasks: list[Task]) -> list[torch.Tensor]:
    """Sources, methods, true edits; gray where a method made no image."""
    gray = torch.full((SIZE, SIZE, 3), 0.5)
    rows = [torch.stack([task.pair.before for task in tasks])]
    for made in results.values():
        rows.append(torch.stack([made[n].image if n in made else gray for n in range(len(tasks))]))
    return [*rows, torch.stack([task.pair.after for task in tasks])]


def check_kept(folder: Path, settings: dict[str, Any]) -> None:
    """Images of other settings are not mixed with those of this run."""
    path, text = folder / "settings.json", json.dumps(settings, indent=2, sort_keys=True)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{folder} holds images of other settings; name another folder, or remove it.")
    path.write_text(text, encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=int, default=15, help="figures, three of each subject (default 15)")
    parser.add_argument("--portraits", type=int, default=12, help="portraits (default 12)")
    parser.add_argument("--slow-cases", type=int, default=3, help=f"figures by {', '.join(SLOW)} (default 3)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="a part of the methods")
    parser.add_argument("--steps", type=int, default=50, help="of sampling and of inversion (default 50)")
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="of the target prompt, as in the workflows")
    parser.add_argument("--image-guidance-scale", type=float, default=3.0, help="of InstructPix2Pix, as MCDM's")
    parser.add_argument("--seed", type=int, default=0, help="draws subjects, images, edits and noise")
    parser.add_argument("--community", type=Path, help="folder with diffusers' examples/community")
    parser.add_argument("--masactrl", type=Path, help="folder with MasaCtrl's code")
    parser.add_argument("--keep", type=Path, help="folder in which what was made is kept")
    parser.add_argument("--only-kept", action="store_true", help="make nothing more, report what --keep holds")
    parser.add_argument("--threads", type=int, default=1, help="default 1, so that times can be compared")
    world = ROOT / "demo_world"
    parser.add_argument("--checkpoint", type=Path, default=world / "weights/identity-edit-demo.safetensors")
    parser.add_argument("--mcdm", type=Path, default=world / "diffusion_models/identity-edit-demo-mcdm.safetensors")


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    family.register()
    checkpoint = load_checkpoint(arguments.checkpoint, SIZE)

    def class_images(_: Checkpoint, case: EditCase) -> Any:
        base = lipe_edit.Checkpoint(checkpoint.model, checkpoint.clip, checkpoint.vae)
        return lipe_edit.regularization_set(base, case.class_word, arguments.seed)

    settings = MethodSettings(
        steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        source_guidance_scale=2.0,
        image_guidance_scale=arguments.image_guidance_scale,
        regularization=class_images,
        mcdm=arguments.mcdm,
        mcdm_source_prompt=portrait_edit.SOURCE_PROMPT,
        community=arguments.community,
        masactrl=arguments.masactrl,
        seed=arguments.seed,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        check_kept(
            folder,
            {"steps": settings.steps, "guidance_scale": settings.guidance_scale, "seed": settings.seed,
             "image_guidance_scale": settings.image_guidance_scale, "threads": arguments.threads},
        )  # fmt: skip
        figures = figure_tasks(arguments.cases, folder, arguments.seed)
        portraits = portrait_tasks(arguments.portraits, folder, arguments.seed)
        if not arguments.only_kept:
            warm_up([*figures, *portraits][0], checkpoint, settings)
        made: dict[str, Results] = {"figures": {}, "portraits": {}}
        for kind, tasks, names in (
            ("figures", figures, tuple(name for name in FIGURES if name not in SLOW)),
            ("portraits", portraits, PORTRAITS),
            ("figures", figures[: arguments.slow_cases], SLOW),
        ):
            chosen = tuple(name for name in names if name in arguments.methods)
            for name, number, one in edit_all(chosen, tasks, checkpoint, settings, folder, arguments.only_kept):
                made[kind].setdefault(name, {})[number] = one
    write_report(arguments, (figures, made["figures"]), (portraits, made["portraits"]))


def write_report(
    arguments: argparse.Namespace, figures: tuple[list[Task], Results], portraits: tuple[list[Task], Results]
) -> None:
    reports = {}
    for kind, (tasks, results), score in (
        ("figures", figures, score_figures),
        ("portraits", portraits, score_portraits),
    ):
        truth = {number: Made(task.pair.after, 0.0, 0, 0.0) for number, task in enumerate(tasks)}
        reports[kind] = rows_of({**results, "true edit (renderer)": truth} if tasks else {}, tasks, score)
    commit, command = source_commit(), " ".join(["python -m benchmarks peers", *recorded(sys.argv[1:])])
    comparisons = [same_algorithm(figures[1], reports["figures"]), same_algorithm(portraits[1], reports["portraits"])]
    seen = {line.split("|")[1] for line in comparisons[0][0]}
    lines = [
        "# The pack beside stock nodes, diffusers, its community and the authors' code",
        "",
        f"`{command}` at commit {commit}: the demo world, {arguments.steps} steps, guidance scale "
        f"{arguments.guidance_scale:g} where a method has not its own, float32, {arguments.threads} threads, seed "
        f"{arguments.seed}. Seconds are medians of "
        + (
            "elapsed time on a GPU."
            if torch.cuda.is_available()
            else "processor time, which other work on the machine lengthens."
        )
        + " An evaluation is a forward pass of one image with one prompt; backward passes are not counted. Rows of "
        "fewer images are of the first of them."
        + (" Images and times were kept from runs with the same settings." if arguments.keep else ""),
        "",
        "## Figures: pose, expression and view of unseen subjects",
        "",
        *table(reports["figures"], "background"),
        "",
        "## Portraits: expressions and costumes of unseen people",
        "",
        *table(reports["portraits"], "outside"),
        "",
        "## The same algorithm twice",
        "",
        "Time is the median of the first's relative to the second's for the same image. A PSNR of 100 dB is the "
        "highest that is given: equal to rounding.",
        "",
        "| method | other implementation | PSNR between the images | time | evaluations | what differs |",
        "|---|---|---|---|---|---|",
        *comparisons[0][0],
        *(line for line in comparisons[1][0] if line.split("|")[1] not in seen),
        "",
        "Learning a subject beside a plain loop and diffusers' loop: "
        "[identity prior](identity_prior_training.md), [subject embeddings](subject_embedding_training.md).",
        "",
        "Rows of the images: the source, the methods in the table's order, the true edit. The methods:",
        "",
        *(
            f"- {name}: {METHODS[name].description} ({METHODS[name].source})"
            for name in METHODS
            if name in figures[1] or name in portraits[1]
        ),
    ]
    everything = {
        "command": command,
        "commit": commit,
        "seed": arguments.seed,
        "steps": arguments.steps,
        "figures": reports["figures"],
        "portraits": reports["portraits"],
        "same_algorithm": {"figures": comparisons[0][1], "portraits": comparisons[1][1]},
    }
    write_results("peers", everything, lines)
    for name, (tasks, results) in (("peers.jpg", figures), ("peers_portraits.jpg", portraits)):
        if tasks:
            edits.save_sheet(RESULTS / name, sheet_rows(results, tasks), 9)


def recorded(arguments: list[str]) -> list[str]:
    """The command's arguments without the folders, whose places differ from machine to machine."""
    return [Path(each).name if "/" in each else each for each in arguments]
