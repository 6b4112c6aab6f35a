"""Edits cases by methods: in this process, or in several on one or more machines by Ray."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import ray_workers
import torch
from identity_edit_pack.demo_world import family
from identity_edit_pack.pipelines.faces.detection import load_detector
from identity_edit_pack.pipelines.shared.errors import IdentityEditError

from ..benchmarks.harness import DEMO_CHECKPOINT, ROOT
from .cases import EditCase
from .methods import METHODS, Checkpoint, MethodSettings, load_checkpoint

HERE = "this machine"
"""In the place of a cluster's address."""
FILES = {"mcdm": "checkpoint", "w_plus_encoder": "file", "community": "folder", "masactrl": "folder"}
"""Options that name what some methods need."""
NUMBERS = {entry.name for entry in dataclasses.fields(MethodSettings) if entry.type in ("int", "float")} - {"seed"}


@dataclass(frozen=True)
class Task:
    """An edit that is to be made: the method's name and the case."""

    method: str
    case: EditCase


class Editor:
    """Edits by the methods, settings and checkpoint of a command; methods share their work on the case in hand."""

    def __init__(self, arguments: argparse.Namespace, size: int) -> None:
        """Loads nothing yet.

        Raises:
            IdentityEditError: for unknown methods or settings, and for a checkpoint that is missing.
        """
        unknown = sorted(set(arguments.methods) - set(METHODS))
        if unknown:
            raise IdentityEditError(f"There is no method {', '.join(unknown)}; --list names those that there are.")
        self.arguments, self.size = arguments, size
        self.settings = method_settings(arguments)
        self.path = arguments.checkpoint or DEMO_CHECKPOINT
        if arguments.methods and not self.path.is_file():
            raise IdentityEditError(f"The checkpoint {self.path} is missing; give a file with --checkpoint.")
        self._checkpoint: Checkpoint | None = None
        self._case = ""

    def settings_of_images(self) -> dict[str, Any]:
        """What made images depend on."""
        paths = ((name, getattr(self.arguments, name)) for name in FILES)
        return {
            "dataset": self.arguments.dataset,
            "references": self.arguments.references,
            "checkpoint": self.path.name,
            "size": self.size,
            "seed": self.settings.seed,
            **{name: path.name for name, path in paths if path},
            **{name: getattr(self.settings, name) for name in sorted(NUMBERS)},
        }

    def edit(self, task: Task) -> torch.Tensor:
        """The edited image [size, size, 3] in [0, 1]."""
        if task.case.name != self._case:
            self.settings.work.forget("case")
            self._case = task.case.name
        if self._checkpoint is None:
            family.register()
            self._checkpoint = load_checkpoint(self.path, self.size)
        method = METHODS[task.method]
        case = task.case.named() if "references" in method.needs else task.case
        return method.edit(self._checkpoint, case, self.settings)[0].detach().cpu()

    def images(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, torch.Tensor]]:
        """Each task with its image: in order in this process, and as they come from Ray's workers with --ray.

        Raises:
            IdentityEditError: when a method cannot edit a case.
            ScriptError: the same from a worker; when Ray is missing; when workers die over one edit again and again.
        """
        if self.arguments.ray is None:
            yield from ((task, self.edit(task)) for task in tasks)
            return
        # By this name, which a process that has just begun finds; that of the pack is known when it has begun.
        worker = importlib.import_module("evaluation.ray_editor").RayEditor
        yield from ray_workers.results_of_ray(
            worker,
            (self.arguments, self.size),
            tasks,
            count=self.arguments.workers,
            address=None if self.arguments.ray == HERE else self.arguments.ray,
            gpus=self.arguments.gpus,
            paths=(str(ROOT), str(ROOT / "scripts")),
            errors=(IdentityEditError,),
            input_of=with_files,
            group_of=lambda task: task.case.name,
            name_of=lambda task: f"{task.method} of {task.case.name}",
            otherwise="leave out --ray",
        )


def add_model_folders(arguments: argparse.Namespace) -> None:
    """Make the networks of --models known by their names."""
    of_models = ("lpips", "fid", "aesthetic", "arcface", "face_detector")
    if arguments.models is None and any(getattr(arguments, name) for name in of_models):
        raise IdentityEditError("--models is missing; give the ComfyUI models folder that holds image_scores.")
    if arguments.models is not None:
        for name in ("image_scores", "insightface"):
            folder_paths.add_model_folder_path(name, str((arguments.models / name).resolve()), is_default=True)


def method_settings(arguments: argparse.Namespace) -> MethodSettings:
    changes: dict[str, Any] = {name: getattr(arguments, name) for name in (*FILES, "seed")}
    if arguments.face_detector is not None and "pidiff" in arguments.methods:
        add_model_folders(arguments)
        changes["face_detector"] = load_detector(arguments.face_detector)
    for assignment in arguments.set:
        name, _, number = assignment.partition("=")
        try:
            if name not in NUMBERS:
                raise ValueError
            changes[name] = int(number) if isinstance(getattr(MethodSettings(), name), int) else float(number)
        except ValueError as error:
            raise IdentityEditError(
                f"--set {assignment} sets no number; write NAME=NUMBER with a NAME of {', '.join(sorted(NUMBERS))}."
            ) from error
    return MethodSettings(**changes)


# -- tasks for other machines, which see none of this one's files -----------------------------------------------------


def with_files(task: Task) -> tuple[Task, dict[Path, bytes]]:
    """A task with what its files hold."""
    case = task.case
    beside = (path.with_suffix(".txt") for path in case.references)
    paths = [case.image, *case.references, *(path for path in beside if path.exists())]
    return task, {path: path.read_bytes() for path in (*paths, *([case.mask] if case.mask else []))}


def from_files(task: Task, files: dict[Path, bytes], folder: Path) -> Task:
    """The task with its files in a folder, in which a subject's references have the same place for all tasks."""
    places = {path: folder / hashlib.sha256(str(path.parent).encode()).hexdigest()[:16] / path.name for path in files}
    for path, place in places.items():
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(files[path])
    case = task.case
    own: dict[str, Any] = {"image": places[case.image], "mask": places[case.mask] if case.mask else None}
    references = tuple(places[path] for path in case.references)
    return Task(task.method, dataclasses.replace(case, **own, target=None, references=references))
