"""The training loop shared by all trained techniques.

A technique's training module derives its settings from `TrainingSettings`, with its paper's values, and passes its
variables, `losses(index)`, `sample()` and a `run_description` to `train`; batches, the denoising loss and previews are
in `training.images`. The loop contains the optimizer (torch's), gradient accumulation, autocast, gradient clipping,
the learning rate's schedule and the EMA of the variables (diffusers'), the loss history, and checkpoints to resume
interrupted runs. Random draws depend only on the seed and the step (`generator_of`), so a resumed run equals an
uninterrupted one.

A library's trainer (accelerate, Lightning) would control the process, its folders and its signals. Inside a ComfyUI
node, where cancellation is an exception from any operation, the loop itself is the small part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch

from ..shared.comfy_types import Model
from ..shared.errors import IdentityEditError, first_line
from ..shared.files import read_tensors, write_tensors
from ..shared.input_checks import check_above_zero, check_choice, check_number
from .processes import OneProcess, Processes

OPTIMIZERS = ("AdamW", "Adam", "SGD")
CONSTANT = "constant"
SCHEDULES = (CONSTANT, "constant_with_warmup", "cosine", "linear", "polynomial")
"""Learning rate schedules, by their names in `diffusers.optimization`."""
FLOAT32, BFLOAT16 = "float32", "bfloat16"
PRECISIONS = {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16}
_CHECKPOINT = "training checkpoint"


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings common to all trainings; each technique derives its own with its paper's defaults.

    Attributes:
        changes_no_step: names of the settings that do not affect the result of a step: a run can be resumed after
            changing them. A schedule other than CONSTANT does affect it, see `run_description`.
        steps: number of optimizer steps.
        learning_rate: learning rate, multiplied by the schedule's factor at each step.
        learning_rate_schedule: one of SCHEDULES, as in diffusers: "cosine" and "linear" fall to 0 from the end of the
            warmup to the last step, "polynomial" (of power 1) to 1e-7.
        warmup_steps: steps in which the learning rate rises linearly from 0; CONSTANT has no warmup.
        batch_size: images (or image pairs) per batch.
        accumulation: batches whose gradients are averaged for one step.
        optimizer: one of OPTIMIZERS, torch's with their default betas.
        weight_decay: AdamW's weight decay of the variables, toward 0.
        gradient_clip: maximum gradient norm over all variables; 0 disables clipping. 1 in diffusers' scripts.
        ema_decay: EMA decay; the EMA of the variables is then the result. 0 disables it. As in diffusers' EMAModel, the
            decay is limited to (1 + step) / (10 + step) at first.
        precision: compute precision of the networks, a key of PRECISIONS. BFLOAT16 uses autocast. The variables are
            always float32.
        checkpointing: gradient checkpointing: a fraction of the memory for a third more time.
        seed: seed of all random draws.
        checkpoint_every: steps between checkpoints, 0 for none.
        sample_every: steps between previews; 0 makes only the one at the end.
        sample_prompt, sample_guidance_scale, sample_steps: prompt and DDIM settings of previews; "" is the technique's
            default prompt.
    """

    changes_no_step: ClassVar[frozenset[str]] = frozenset({
        "steps", "checkpointing", "checkpoint_every", "sample_every", "sample_prompt", "sample_guidance_scale",
        "sample_steps", "learning_rate_schedule", "warmup_steps",
    })  # fmt: skip
    steps: int
    learning_rate: float
    learning_rate_schedule: str = CONSTANT
    warmup_steps: int = 0
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
        for name in ("steps", "batch_size", "accumulation"):
            check_number(getattr(self, name), name, 1, None)
        for name in ("checkpoint_every", "sample_every", "warmup_steps"):
            check_number(getattr(self, name), name, 0, None)
        check_above_zero(self.learning_rate, "learning_rate")
        if not 0.0 <= self.ema_decay < 1.0:
            raise IdentityEditError(f"ema_decay is {self.ema_decay:g}; choose a value from 0 to below 1.")
        check_choice(self.optimizer, "optimizer", OPTIMIZERS)
        check_choice(self.precision, "precision", PRECISIONS)
        check_choice(self.learning_rate_schedule, "learning_rate_schedule", SCHEDULES)
        if self.warmup_steps >= self.steps and self.learning_rate_schedule != CONSTANT:
            raise IdentityEditError(
                f"warmup_steps is {self.warmup_steps}, which leaves none of the {self.steps} steps; choose fewer."
            )

    @property
    def dtype(self) -> torch.dtype:
        """Compute precision of the networks."""
        return PRECISIONS[self.precision]


@dataclass
class TrainingRun:
    """Record of a run, stored in checkpoints along with the variables and the optimizer.

    Attributes:
        losses: the loss of every step, averaged over its batches.
        samples: (completed steps, preview) of all previews.
        resumed_at: number of steps restored from a checkpoint.
        name: `run_hash` of its description.
    """

    losses: list[float] = field(default_factory=list)
    samples: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    resumed_at: int = 0
    name: str = ""


Progress = Callable[[int, int, float, "torch.Tensor | None"], None]
"""(completed steps, total steps, loss, new preview or None)."""


def generator_of(seed: int, index: int, what: str = "") -> torch.Generator:
    """A CPU generator for batch `index` and purpose `what`, independent of all other seeds, batches and purposes."""
    digest = hashlib.sha256(f"{seed} {index} {what}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def run_hash(description: dict[str, Any]) -> str:
    """Hash of a run's description (JSON-serializable), 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def run_description(settings: TrainingSettings, tag: Any, *patchers: Model, **facts: Any) -> dict[str, Any]:
    """Everything that affects the result of a step; a checkpoint is used only by a run with the same description.

    Args:
        settings: those that do not affect a step are omitted, so that a run can be extended.
        tag: `engine.model_tag` of the model.
        patchers: ModelPatchers, identified by their weight patches (LoRAs, identity priors): for each weight the
            strengths of every patch and of the weight. The patch tensors themselves are too large to hash.
        facts: the training data and other entries.
    """
    chosen = {
        name: value for name, value in dataclasses.asdict(settings).items() if name not in settings.changes_no_step
    }
    if settings.learning_rate_schedule != CONSTANT:
        end = None if settings.learning_rate_schedule == "constant_with_warmup" else settings.steps
        facts["schedule"] = [settings.learning_rate_schedule, settings.warmup_steps, end]
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
    """Training metadata for the saved file; `more` are entries of the technique."""
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
    """Minimize the loss over variables, in place.

    Call it with gradients enabled, in ComfyUI inside `engine.gradient_context` or `engine.trainable`. Several processes
    with the same arguments share the batches of each step and average their gradients: P processes with accumulation A
    are equivalent to one process with accumulation P A.

    Args:
        variables: float32 leaves that require a gradient, by name.
        losses: `losses(index)` yields scalars whose sum is the loss of batch `index` (from 0). Each is differentiated
            before the next is requested, so only one graph is in memory. All random draws must come from
            `generator_of(seed, index)`.
        settings: see `TrainingSettings`.
        description: identifies the run for its checkpoint, see `run_description`.
        checkpoint: returns the checkpoint file for a run's hash. It is written every `checkpoint_every` steps, when the
            run is interrupted, and at the end; a run with the same description resumes from it, so the same run is not
            trained again. Checkpoints of other runs, or of more steps than requested, are ignored.
        sample: makes a preview, without gradients; always called at the end.
        progress: called after every step, in the first process.
        processes: the processes that train together; None for this one alone. Only the first makes previews, reports
            progress and writes checkpoints.
        needed: names of the variables that must get a gradient in the first step, to detect a run that would not train
            them; None for all.

    Returns:
        the record; the variables contain the result, or its EMA if enabled.

    Raises:
        IdentityEditError: when the loss or a gradient is not finite, when needed variables get no gradient, or when a
            checkpoint cannot be written or read.
        BaseException: any exception that interrupts the run, including ComfyUI's InterruptProcessingException, after
            the checkpoint has been written.
    """
    processes = processes or OneProcess()
    optimizer = _optimizer(list(variables.values()), settings)
    average = _moving_average(variables, settings)
    factor = _schedule(settings)
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
            if factor is not None:
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * factor(step)
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
        if path is not None and settings.checkpoint_every and written < settings.steps:
            _write_checkpoint(path, variables, optimizer, average, done)
    except IdentityEditError:  # such as a full disk or a NaN loss: keep the last checkpoint
        raise
    except BaseException:  # ComfyUI's interrupt is not an Exception since 0.19.4
        if path is not None and settings.checkpoint_every and len(done.losses) > written:
            try:
                _write_checkpoint(path, variables, optimizer, average, done)
            except IdentityEditError as error:
                logging.warning("IdentityEdit: the training was interrupted and not saved: %s", error)
        raise
    finally:
        for variable in variables.values():
            variable.grad = None
    if sample is not None and (not done.samples or done.samples[-1][0] != settings.steps):  # all steps were restored
        _take_sample(sample, variables, average, settings, done)
    if average is not None:
        average.copy_to(variables.values())
    return done


def _check_reached(variables: dict[str, torch.Tensor], needed: Collection[str] | None) -> None:
    """Raise `IdentityEditError` if needed variables got no gradient; call it before the first update."""
    unreached = [name for name, variable in variables.items() if variable.grad is None]
    missed = [name for name in unreached if needed is None or name in needed]
    if missed or len(unreached) == len(variables):
        raise IdentityEditError(
            f"The training would not change {len(missed or unreached)} of {len(variables)} chosen weights "
            f"({(missed or unreached)[0]}) because the model does not use them; load it with ComfyUI's own loader, and "
            f"remove other nodes' patches."
        )


def _moving_average(variables: dict[str, torch.Tensor], settings: TrainingSettings) -> Any:
    """diffusers' EMAModel of the variables, or None."""
    if settings.ema_decay == 0.0:
        return None
    ema_model = _from_diffusers("training_utils", "EMAModel", "set ema_decay to 0")
    return ema_model(variables.values(), decay=settings.ema_decay)


def _schedule(settings: TrainingSettings) -> Callable[[int], float] | None:
    """Factor of the learning rate at a step (from 0), or None for a constant one.

    It depends on the step alone, so a resumed run continues it without any state.
    """
    if settings.learning_rate_schedule == CONSTANT:
        return None
    get_scheduler = _from_diffusers("optimization", "get_scheduler", f"choose the schedule {CONSTANT}")
    unused = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)  # the training's optimizer stays unwrapped
    try:
        scheduler = get_scheduler(
            settings.learning_rate_schedule,
            unused,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=settings.steps,
        )
    except ValueError as error:  # a polynomial schedule ends at 1e-7
        raise IdentityEditError(
            f"learning_rate is {settings.learning_rate:g}, which the schedule {settings.learning_rate_schedule} cannot "
            f"lower ({first_line(error)}); choose a higher one, or the schedule linear."
        ) from error
    return scheduler.lr_lambdas[0]


def _from_diffusers(module: str, name: str, otherwise: str) -> Any:
    """An object of diffusers, imported late: the import is slow, and most runs do not use it."""
    try:
        return getattr(importlib.import_module(f"diffusers.{module}"), name)
    except (ImportError, RuntimeError, AttributeError) as error:  # its lazy modules raise RuntimeError
        raise IdentityEditError(
            f"The training needs diffusers 0.31 or newer, which cannot be used ({first_line(error)}); run "
            f"`pip install -U diffusers`, or {otherwise}."
        ) from error


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
    """Compute the gradients of one step and return its loss, averaged over the batches of all processes.

    `check` is called before averaging over processes.
    """
    for variable in variables.values():
        variable.grad = None
    total = torch.zeros(())
    batches = settings.accumulation * processes.count
    for index in range(step * batches + processes.index, (step + 1) * batches, processes.count):
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
            if variable.grad is None:  # all processes must reduce the same tensors
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
    # Fused where available: on a GPU the default needs memory for several copies of all variables.
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
        if not os.path.exists(path):  # another server has just finished the same run and removed its checkpoint
            return None
        raise IdentityEditError(f"{error} To restart the training, delete this checkpoint.") from error
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
