"""The training loop that every trained technique shares.

A technique's `train_*.py` has its settings, derived from `TrainingSettings` with its paper's values, and hands to
`train` its variables, `losses(index)`, `sample()` and a `run_description`; batches of images, the denoising loss and
previews are in `training_images`. The loop has the optimizer (torch's), gradient accumulation, autocast, gradient
clipping, the EMA of the variables (diffusers'), the record of losses, and checkpoints from which a run that
was interrupted or killed goes on. Draws depend on the seed and the step alone (`generator_of`), so that a resumed run
is the uninterrupted one.

A trainer of a library (accelerate, Lightning) would own the process, its folders and its signals; inside a node of
ComfyUI, which stops a run by an exception from any operation, the loop itself is the small part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..shared.errors import IdentityEditError
from ..shared.files import read_tensors, write_tensors
from .processes import OneProcess, Processes

OPTIMIZERS = ("AdamW", "Adam", "SGD")
FLOAT32, BFLOAT16 = "float32", "bfloat16"
PRECISIONS = {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16}
_CHECKPOINT = "training checkpoint"
_CHANGES_NO_STEP = {
    "steps", "checkpointing", "checkpoint_every", "sample_every", "sample_prompt", "sample_guidance_scale",
    "sample_strength", "sample_steps", "file_dtype",
}  # fmt: skip
"""Settings of all trainings that change no step's result: a run with others of them goes on from its checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What every training needs; the settings of a technique derive from these and have its paper's defaults.

    Attributes:
        steps: updates of the variables.
        learning_rate: constant over the run.
        batch_size: images (or pairs of them) in a batch.
        accumulation: batches whose gradients are averaged for one step.
        optimizer: one of OPTIMIZERS, torch's with their default betas.
        weight_decay: AdamW's, toward the origin of the variables. 0 leaves a change of weights alone.
        gradient_clip: largest norm of the gradient over all variables; 0 does not clip. 1 in diffusers' scripts.
        ema_decay: of the variables' exponential EMA, which then is the result; 0 keeps none. The average
            begins faster, as diffusers' EMAModel has it: by (1 + step) / (10 + step) where that is less.
        precision: a key of PRECISIONS, in which the networks compute. BFLOAT16 runs the batches under autocast. The
            variables are float32 in either case.
        checkpointing: recompute blocks in the backward pass: a fraction of the memory for a third more time.
        seed: of all draws.
        checkpoint_every: steps between checkpoints, 0 for none.
        sample_every: steps between samples; 0 makes the one at the end alone.
        sample_prompt, sample_guidance_scale, sample_steps: what samples show, and how (DDIM); "" is the technique's
            own prompt.
    """

    steps: int
    learning_rate: float
    batch_size: int = 1
    accumulation: int = 1
    optimizer: str = "AdamW"
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    ema_decay: float = 0.0
    precision: str = FLOAT32
    checkpointing: bool = False
    seed: int = 0
    checkpoint_every: int = 0
    sample_every: int = 0
    sample_prompt: str = ""
    sample_guidance_scale: float = 5.0
    sample_steps: int = 20

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1), ("batch_size", 1), ("accumulation", 1), ("checkpoint_every", 0), ("sample_every", 0)
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise IdentityEditError(f"{name} is {getattr(self, name)}; choose {least} or more.")
        if not self.learning_rate > 0.0:
            raise IdentityEditError(f"learning_rate is {self.learning_rate:g}; choose a value above 0.")
        if not 0.0 <= self.ema_decay < 1.0:
            raise IdentityEditError(f"ema_decay is {self.ema_decay:g}; choose a value from 0 to below 1.")
        if self.optimizer not in OPTIMIZERS:
            raise IdentityEditError(f"The optimizer {self.optimizer} is unknown; choose {', '.join(OPTIMIZERS)}.")
        self.check_choice("precision", PRECISIONS)

    def check_choice(self, name: str, choices: Iterable[str]) -> None:
        """Raise `IdentityEditError` unless the setting `name` is one of `choices`."""
        if getattr(self, name) not in choices:
            raise IdentityEditError(f"{name} is {getattr(self, name)}; choose one of {', '.join(choices)}.")

    @property
    def dtype(self) -> torch.dtype:
        """In which the networks compute."""
        return PRECISIONS[self.precision]


@dataclass
class TrainingRun:
    """What a run did, and what a checkpoint keeps of it beside the variables and the optimizer.

    Attributes:
        losses: the loss of every step, averaged over its batches.
        samples: (number of steps done, sample) for every sample that was made.
        resumed_at: steps that were read from a checkpoint.
        name: the `run_hash` of its description.
    """

    losses: list[float] = field(default_factory=list)
    samples: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    resumed_at: int = 0
    name: str = ""


Progress = Callable[[int, int, float, "torch.Tensor | None"], None]
"""(steps done, steps in all, loss, a new sample or None)."""


def generator_of(seed: int, index: int, what: str = "") -> torch.Generator:
    """A CPU generator for the draws of batch `index`, independent of all other seeds, batches and purposes."""
    digest = hashlib.sha256(f"{seed} {index} {what}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def run_hash(description: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that name a run: equal for equal descriptions (of what JSON can hold)."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def run_description(settings: TrainingSettings, tag: Any, *patchers: Any, **facts: Any) -> dict[str, Any]:
    """Everything that the result of a step depends on: what a checkpoint must have in common with a run.

    Args:
        settings: those that change no step's result are left out, so that a run can be made longer.
        tag: `engine.model_tag` of the model.
        patchers: ModelPatchers, told by the strengths of the weight patches (LoRAs, identity priors) on them: by the
            weight's name, each patch's strength and that of the weight itself. The patches' own tensors are too large
            to be hashed at each run.
        facts: what the run is trained on, and the rest.
    """
    chosen = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _CHANGES_NO_STEP}
    if patchers:
        facts["patches"] = {
            key: [[float(patch[0]), float(patch[2])] for patch in value]
            for patcher in patchers
            for key, value in patcher.patches.items()
        }
    return {
        "settings": {**chosen, "bfloat16": settings.precision == BFLOAT16},
        "model": dataclasses.asdict(tag),
        **facts,
    }


def training_record(settings: TrainingSettings, run: TrainingRun, **more: Any) -> dict[str, Any]:
    """How something was trained, for its file; `more` is what else the technique wants to tell."""
    return {
        "steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "settings": dataclasses.asdict(settings),
        "last_losses_mean": sum(run.losses[-50:]) / len(run.losses[-50:]),
        **more,
        "run": run.name,
    }


def train(
    variables: dict[str, torch.Tensor],
    losses: Callable[[int], Iterable[torch.Tensor]],
    settings: TrainingSettings,
    *,
    description: dict[str, Any] | None = None,
    checkpoint: Callable[[str], str] | None = None,
    sample: Callable[[], torch.Tensor] | None = None,
    progress: Progress | None = None,
    processes: Processes | None = None,
    needed: Collection[str] | None = None,
) -> TrainingRun:
    """Minimize the loss over variables, which are changed in place.

    Call it where gradients are wanted, in ComfyUI inside `engine.gradient_context` or `engine.trainable`. Several
    processes that call it with the same arguments share the batches of each step and average their gradients: what P
    processes do with an accumulation of A is what one does with P A.

    Args:
        variables: float32 leaves that require a gradient, by name.
        losses: `losses(index)` gives the parts of the loss of batch `index` (from 0), scalars whose sum is the loss.
            Each is differentiated before the next is asked for, so that one graph at a time is in memory. All its
            draws must come from `generator_of(seed, index)`.
        settings: see `TrainingSettings`.
        description: what the checkpoint must have in common with this run, see `run_description`.
        checkpoint: gives, for the hash of the description, the file to which the state is written every
            `checkpoint_every` steps and when the run is stopped, and from which a run of the same description goes on.
            A checkpoint of another run, or of more steps than are wanted, is not read.
        sample: makes an image (or anything else) to look at, without gradients; called at the end in any case.
        progress: called after every step, in the first process.
        processes: that train together; None is this one alone. Samples, progress and checkpoints are the first's.
        needed: names of the variables that the loss of every batch depends on; None are all. A run in whose first step
            one of them gets no gradient would end well and change nothing.

    Returns:
        the record; the variables hold the result, which is their EMA where one is kept.

    Raises:
        IdentityEditError: when the loss or a gradient is not finite, when the loss does not depend on what is needed,
            or when a checkpoint cannot be written or read.
        BaseException: whatever stopped the run, ComfyUI's InterruptProcessingException included, after its checkpoint
            has been written.
    """
    processes = processes or OneProcess()
    optimizer = _optimizer(list(variables.values()), settings)
    average = _moving_average(variables, settings)
    done = TrainingRun(name=run_hash(description or {}))
    path = None if checkpoint is None else checkpoint(done.name)
    if path is not None and os.path.exists(path):
        done = _read_checkpoint(path, done.name, variables, optimizer, average, settings.steps) or done
    written = done.resumed_at
    if processes.index > 0:
        sample, progress, path = None, None, None
    try:
        for step in range(done.resumed_at, settings.steps):
            check = partial(_check_reached, variables, needed) if step == done.resumed_at else None
            loss = _gradients(variables, losses, step, settings, processes, check)
            optimizer.step()
            if average is not None:
                average.step(variables.values())
            done.losses.append(loss)
            new_sample = None
            due = settings.sample_every and (step + 1) % settings.sample_every == 0
            if sample is not None and (due or step + 1 == settings.steps):
                new_sample = _take_sample(sample, variables, average, settings, done)
            if path is not None and settings.checkpoint_every and (step + 1) % settings.checkpoint_every == 0:
                _write_checkpoint(path, variables, optimizer, average, done)
                written = step + 1
            if progress is not None:
                progress(step + 1, settings.steps, loss, new_sample)
    except IdentityEditError:  # a full disk, a loss that is no number: the last checkpoint is the best there is
        raise
    except BaseException:  # ComfyUI's interrupt is no Exception since 0.19.4
        if path is not None and settings.checkpoint_every and len(done.losses) > written:
            try:
                _write_checkpoint(path, variables, optimizer, average, done)
            except IdentityEditError as error:
                logging.warning("IdentityEdit: the training was stopped, and its last %s", error)
        raise
    finally:
        for variable in variables.values():
            variable.grad = None
    if sample is not None and (not done.samples or done.samples[-1][0] != settings.steps):  # all steps were read
        _take_sample(sample, variables, average, settings, done)
    if average is not None:
        average.copy_to(variables.values())
    return done


def _check_reached(variables: dict[str, torch.Tensor], needed: Collection[str] | None) -> None:
    """Refuse a run that would not change what it is to change: call it between the gradients and the first update."""
    unreached = [name for name, variable in variables.items() if variable.grad is None]
    missed = [name for name in unreached if needed is None or name in needed]
    if missed or len(unreached) == len(variables):
        raise IdentityEditError(
            f"The training would not change {len(missed or unreached)} of {len(variables)} chosen weights "
            f"({(missed or unreached)[0]}): the model does not compute with them; load it with ComfyUI's own loader, "
            f"and remove what other nodes have patched into it."
        )


def _moving_average(variables: dict[str, torch.Tensor], settings: TrainingSettings) -> Any:
    """diffusers' EMAModel of the variables, or None."""
    if settings.ema_decay == 0.0:
        return None
    from diffusers.training_utils import EMAModel  # seconds to import, and most runs keep no average

    return EMAModel(variables.values(), decay=settings.ema_decay)


def _take_sample(
    sample: Callable[[], torch.Tensor],
    variables: dict[str, torch.Tensor],
    average: Any,
    settings: TrainingSettings,
    done: TrainingRun,
) -> torch.Tensor:
    before: list[torch.Tensor] = []
    if average is not None:
        before = [variable.detach().clone() for variable in variables.values()]
        average.copy_to(variables.values())
    try:
        with torch.no_grad(), _autocast(variables, settings.dtype):
            taken = sample().detach().float().cpu()
    finally:
        with torch.no_grad():
            for variable, value in zip(variables.values(), before, strict=bool(before)):
                variable.copy_(value)
    done.samples.append((len(done.losses), taken))
    return taken


def _gradients(
    variables: dict[str, torch.Tensor],
    losses: Callable[[int], Iterable[torch.Tensor]],
    step: int,
    settings: TrainingSettings,
    processes: Processes,
    check: Callable[[], None] | None = None,
) -> float:
    """Fill the gradients of one step and return its loss, both as means over the step's batches of all processes.

    `check` is called when this process has its own.
    """
    for variable in variables.values():
        variable.grad = None
    total = torch.zeros(())
    in_a_step = settings.accumulation * processes.count
    for index in range(step * in_a_step + processes.index, (step + 1) * in_a_step, processes.count):
        with _autocast(variables, settings.dtype):
            parts = iter(losses(index))
        while True:
            with _autocast(variables, settings.dtype):
                loss = next(parts, None)
            if loss is None:
                break
            (loss / settings.accumulation).backward()
            total += loss.detach().float().cpu() / settings.accumulation
    if check is not None:
        check()
    if processes.count > 1:
        for variable in variables.values():
            if variable.grad is None:  # every process must give the same tensors
                variable.grad = torch.zeros_like(variable)
        device = next(iter(variables.values())).device
        gradients = [variable.grad for variable in variables.values() if variable.grad is not None]
        *means, mean_loss = processes.mean([*gradients, total.to(device)])
        for variable, mean in zip(variables.values(), means, strict=True):
            variable.grad = mean
        total = mean_loss.cpu()
    reached = [variable for variable in variables.values() if variable.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(reached, settings.gradient_clip or float("inf"))
    if not (bool(torch.isfinite(total)) and bool(torch.isfinite(norm))):
        raise IdentityEditError(
            f"The loss or its gradient is not finite at step {step + 1}; lower the learning rate, or choose precision "
            f"float32."
        )
    return float(total)


@contextlib.contextmanager
def _autocast(variables: dict[str, torch.Tensor], dtype: torch.dtype) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for kind in sorted({variable.device.type for variable in variables.values()}) if dtype != torch.float32 else ():
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        yield


def _optimizer(variables: list[torch.Tensor], settings: TrainingSettings) -> torch.optim.Optimizer:
    # Fused where torch has it: without it a step needs memory for several copies of all variables on a GPU.
    fused = all(variable.device.type in ("cpu", "cuda") for variable in variables)
    if settings.optimizer == "AdamW":
        return torch.optim.AdamW(
            variables, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=fused or None
        )
    if settings.optimizer == "Adam":
        return torch.optim.Adam(variables, lr=settings.learning_rate, fused=fused or None)
    return torch.optim.SGD(variables, lr=settings.learning_rate, fused=fused or None)


def _write_checkpoint(
    path: str,
    variables: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    average: Any,
    done: TrainingRun,
) -> None:
    tensors = {f"variable.{name}": variable for name, variable in variables.items()}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in zip(variables, average.shadow_params, strict=True)}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items() if value is not None}
    tensors |= {f"sample.{step}": image for step, image in done.samples}
    tensors["losses"] = torch.tensor(done.losses, dtype=torch.float64)
    write_tensors(path, tensors, {"kind": _CHECKPOINT, "run": done.name, "steps": len(done.losses)})


def _read_checkpoint(
    path: str,
    run: str,
    variables: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    average: Any,
    steps: int,
) -> TrainingRun | None:
    try:
        tensors, description = read_tensors(path, _CHECKPOINT)
    except IdentityEditError as error:
        if not os.path.exists(path):  # a server that makes the same run has just finished it and removed this
            return None
        raise IdentityEditError(f"{error} To train from the beginning, delete this checkpoint.") from error
    if description.get("run") != run or description["steps"] > steps:
        return None
    with torch.no_grad():
        for name, variable in variables.items():
            variable.copy_(tensors[f"variable.{name}"])
        if average is not None:
            for name, value in zip(variables, average.shadow_params, strict=True):
                value.copy_(tensors[f"average.{name}"])
            average.optimization_step = int(description["steps"])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, part = name.split(".", 2)
            state.setdefault(int(index), {})[part] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    samples = [(int(name.split(".")[1]), tensor) for name, tensor in tensors.items() if name.startswith("sample.")]
    return TrainingRun(
        losses=tensors["losses"].tolist(),
        samples=sorted(samples, key=lambda item: item[0]),
        resumed_at=int(description["steps"]),
        name=run,
    )
