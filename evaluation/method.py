"""What a method of editing is: its checkpoint, its settings, and what it costs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.sd
import torch

from .cases import EditCase

UNETS = ("UNetModel", "UNet2DConditionModel")
"""The networks whose evaluations are counted: ComfyUI's class and diffusers'."""


@dataclass(frozen=True)
class Checkpoint:
    """A model and what belongs to it.

    Attributes:
        model, clip, vae: as ComfyUI's loader gives them.
        path: the file.
        size: width and height of its images in pixels.
    """

    model: Any
    clip: Any
    vae: Any
    path: Path
    size: int


@dataclass
class Cost:
    """Seconds, and evaluations of the network, each of one image with one prompt, forward passes alone."""

    seconds: float = 0.0
    evaluations: int = 0


@contextlib.contextmanager
def measured() -> Iterator[Cost]:
    """Fill a Cost with what happens inside.

    Without a GPU the seconds are the processor time of this process: with one thread that is the time which passes on
    a core that does nothing else, and other work on the machine changes it little. With a GPU it is the time that
    passes.
    """
    cost = Cost()

    def count(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if type(module).__name__ in UNETS:
            cost.evaluations += int(arguments[0].shape[0])

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    begin = _now()
    try:
        yield cost
    finally:
        cost.seconds = _now() - begin
        hook.remove()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


EDIT, SUBJECT, PREPARATION = "edit", "subject", "preparation"
"""What shared work is for: an edit; a subject, for all edits of its images; or reading files, which is no one's."""


@dataclass
class SharedWork:
    """Work that is done once, and counts for every method that uses it.

    Whoever measures calls `begin` before a method and `edit_cost` after it, and `forget("case")` between images.

    Attributes:
        used: what was used since `begin`, by what it is for.
        made: the part of it that was made since then, which is in the clock of whoever measures the method.
    """

    used: dict[str, Cost] = field(default_factory=dict)
    made: Cost = field(default_factory=Cost)
    _results: dict[tuple[Any, ...], tuple[Any, Cost]] = field(default_factory=dict)

    def begin(self) -> None:
        self.used, self.made = {kind: Cost() for kind in (EDIT, SUBJECT, PREPARATION)}, Cost()

    def once(self, key: tuple[Any, ...], make: Callable[[], Any], kind: str = EDIT) -> Any:
        """The result of `make`, made at the first call with this key. `make` calls no `once` itself."""
        if key not in self._results:
            with measured() as cost:
                result = make()
            self._results[key] = result, cost
            _add(self.made, cost)
        result, cost = self._results[key]
        _add(self.used.setdefault(kind, Cost()), cost)
        return result

    def edit_cost(self, own: Cost) -> Cost:
        """What an edit costs, from what was measured around it: its shared work counts whole, a subject's not."""
        total = Cost(own.seconds - self.made.seconds, own.evaluations - self.made.evaluations)
        _add(total, self.used.get(EDIT, Cost()))
        return total

    def forget(self, first: str) -> None:
        """Drop the results whose key begins with `first`."""
        self._results = {key: value for key, value in self._results.items() if key[0] != first}


def _add(total: Cost, cost: Cost) -> None:
    total.seconds += cost.seconds
    total.evaluations += cost.evaluations


@dataclass(frozen=True)
class MethodSettings:
    """What all methods share; each uses what it has.

    Attributes:
        steps: of sampling and of inversion.
        guidance_scale: of the target prompt.
        strength: share of the schedule that image-to-image goes back; 0.5 in the middle of SDEdit's 0.3 to 0.6.
        encoding_ratio: the same for DiffEdit; diffusers' 0.8.
        mask_seeds: noises over which DiffEdit averages.
        ratio: of the steps with the source prompt (timestep-aware injection).
        eta: interpolation between the optimized embedding (0) and the target prompt's (1).
        text_steps: of text optimization, 200 in Jung et al. 2024.
        skip: share of the first steps that edit-friendly sampling leaves out.
        source_guidance_scale: of edit-friendly inversion.
        training_steps, learning_rate: of an identity prior.
        regularization: makes the class's images for it; None samples the checkpoint with the class word.
        image_guidance_scale: of InstructPix2Pix.
        mcdm: a checkpoint of Train MCDM (eight input channels), and what its images are called before the edit.
        imagic_text_steps, imagic_model_steps: 500 and 1000 in Imagic for Stable Diffusion.
        subject_steps, subject_learning_rate, updates_per_step, inner_steps: of textual inversion and HiFi Tuner, as in
            Wang et al. 2023.
        style_steps, style_learning_rate, style_strength: of PIDiff, Gu et al. 2025's but the learning rate, which they
            do not give.
        w_plus_encoder: file of the W+ encoder for PIDiff.
        face_detector: FaceDetector that aligns its photos; None takes them as aligned.
        community: folder with diffusers' community pipelines.
        masactrl: folder of MasaCtrl's reference implementation.
        seed: of all noise.
        work: what was made already.
    """

    steps: int = 50
    guidance_scale: float = 7.5
    strength: float = 0.5
    encoding_ratio: float = 0.8
    mask_seeds: int = 10
    ratio: float = 0.2
    eta: float = 0.7
    text_steps: int = 200
    skip: float = 0.1
    source_guidance_scale: float = 3.5
    training_steps: int = 150
    learning_rate: float = 1e-4
    regularization: Callable[[Checkpoint, EditCase], Any] | None = None
    image_guidance_scale: float = 1.5
    mcdm: Path | None = None
    mcdm_source_prompt: str = "a portrait of a person"
    imagic_text_steps: int = 500
    imagic_model_steps: int = 1000
    subject_steps: int = 1000
    subject_learning_rate: float = 5e-3
    updates_per_step: int = 10
    inner_steps: int = 10
    style_steps: int = 600
    style_learning_rate: float = 1e-4
    style_strength: float = 0.4
    w_plus_encoder: Path | None = None
    face_detector: Any = None
    community: Path | None = None
    masactrl: Path | None = None
    seed: int = 0
    work: SharedWork = field(default_factory=SharedWork)


@dataclass(frozen=True)
class Method:
    """A way of editing.

    Attributes:
        implementation: "stock" (ComfyUI's own nodes), "pack", "diffusers", "community" (diffusers' examples) or
            "reference" (the authors').
        description: one line.
        source: paper or code.
        needs: what it cannot do without: "references", "class word" and "instruction" of a case, "mcdm",
            "w_plus_encoder", "community" and "masactrl" of the settings.
        edit: gives the edited image [1, size, size, 3] in [0, 1].
    """

    implementation: str
    description: str
    source: str
    edit: Callable[[Checkpoint, EditCase, MethodSettings], torch.Tensor]
    needs: tuple[str, ...] = ()

    def lacks(self, case: EditCase, settings: MethodSettings) -> tuple[str, ...]:
        """What it needs and does not have."""
        has = {
            "references": bool(case.references and case.subject_word),
            "class word": bool(case.class_word),
            "instruction": bool(case.instruction),
            "mcdm": settings.mcdm is not None,
            "w_plus_encoder": settings.w_plus_encoder is not None,
            "community": settings.community is not None,
            "masactrl": settings.masactrl is not None,
        }
        return tuple(need for need in self.needs if not has[need])


def load_checkpoint(path: Path, size: int) -> Checkpoint:
    """By ComfyUI's own loader, the UNet in float32."""
    options = {"dtype": torch.float32}
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(path), model_options=options)
    return Checkpoint(model, clip, vae, path, size)
