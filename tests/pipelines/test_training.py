"""The training loop: the optimizer's own steps, and nothing lost by an interrupt, a kill, a full disk."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import pytest
import torch
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.training import loop as training
from identity_edit_pack.pipelines.training.loop import TrainingRun, TrainingSettings, generator_of

SETTINGS = TrainingSettings(
    steps=12, learning_rate=0.01, weight_decay=0.1, accumulation=2, seed=3, checkpoint_every=4, sample_every=3
)


class Problem:
    """A network of two weights fitted to noisy lines; every batch draws its own."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.variables = {
            "a": torch.randn(3, 4, generator=generator).requires_grad_(True),
            "b": torch.randn(3, generator=generator).requires_grad_(True),
        }
        self.batches: list[int] = []

    def losses(self, index: int) -> Iterator[torch.Tensor]:
        self.batches.append(index)
        generator = generator_of(3, index, "batch")
        for scale in (1.0, 0.5):
            x = torch.randn(5, 4, generator=generator)
            yield scale * (torch.tanh(x @ self.variables["a"].T + self.variables["b"]) - x[:, :3]).square().mean()

    def train(self, settings: TrainingSettings = SETTINGS, **arguments) -> TrainingRun:
        return training.train(
            self.variables, self.losses, settings, sample=self.variables["a"].clone, **self.where(**arguments)
        )

    @staticmethod
    def where(checkpoint: str | None = None, run: str = "one", **arguments) -> dict:
        """The file of the checkpoint, and what the run is."""
        path = None if checkpoint is None else lambda name: checkpoint
        return {"checkpoint": path, "description": {"run": run}, **arguments}


def stop_at(step: int):
    def progress(done: int, total: int, loss: float, sample: torch.Tensor | None) -> None:
        if done == step:
            raise comfy.model_management.InterruptProcessingException()

    return progress


def assert_same(problem: Problem, run: TrainingRun, other: Problem, other_run: TrainingRun) -> None:
    assert run.losses == other_run.losses
    assert all(torch.equal(problem.variables[name], other.variables[name]) for name in "ab")
    assert [step for step, _ in run.samples] == [step for step, _ in other_run.samples]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(run.samples, other_run.samples, strict=True))


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("name", training.OPTIMIZERS)
def test_steps_are_those_of_torch(clip: float, name: str):
    """SGD among them, for AdamW hardly sees a loss that is scaled wrongly."""
    ours, theirs = Problem(), Problem()
    settings = TrainingSettings(
        steps=5, learning_rate=0.01, optimizer=name, weight_decay=0.1, accumulation=2, gradient_clip=clip, seed=3
    )
    run = ours.train(settings)
    options = {"weight_decay": 0.1} if name == "AdamW" else {}
    optimizer = getattr(torch.optim, name)(theirs.variables.values(), lr=0.01, **options)
    losses = []
    for step in range(5):
        optimizer.zero_grad()
        loss = sum(sum(theirs.losses(index)) for index in (2 * step, 2 * step + 1)) / 2
        loss.backward()
        losses.append(loss.item())
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.variables.values(), clip)
        optimizer.step()
    assert run.losses == pytest.approx(losses, rel=1e-6)
    for key in "ab":
        torch.testing.assert_close(ours.variables[key], theirs.variables[key], rtol=1e-5, atol=1e-6)
    assert ours.batches == list(range(10)) and all(value.grad is None for value in ours.variables.values())


FALL = {
    "constant_with_warmup": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "linear": lambda done: 1.0 - done,
    "polynomial": lambda done: 1.0 - done + 1e-7 / 0.01 * done,
}
"""Factor on the learning rate 0.01 by the share of the steps after the warmup that are done."""


def scheduled(name: str) -> TrainingSettings:
    return dataclasses.replace(SETTINGS, optimizer="SGD", learning_rate_schedule=name, warmup_steps=3)


@pytest.mark.parametrize("name", FALL)
def test_the_learning_rate_follows_its_schedule(name: str):
    """Against the formulas in float64, and against diffusers' scheduler with a plain torch loop."""
    from diffusers.optimization import get_scheduler

    ours, theirs = Problem(), Problem()
    ours.train(scheduled(name))
    optimizer = torch.optim.SGD(theirs.variables.values(), lr=0.01)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=12)
    for step in range(12):
        optimizer.zero_grad()
        (sum(sum(theirs.losses(index)) for index in (2 * step, 2 * step + 1)) / 2).backward()
        torch.nn.utils.clip_grad_norm_(theirs.variables.values(), 1.0)
        factor = step / 3 if step < 3 else FALL[name]((step - 3) / 9)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * factor, rel=1e-12)
        optimizer.step()
        scheduler.step()
    for key in "ab":
        torch.testing.assert_close(ours.variables[key], theirs.variables[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("step", [2, 8])
@pytest.mark.parametrize("name", FALL)
def test_an_interrupted_run_continues_the_schedule(tmp_path: Path, name: str, step: int):
    whole, path = Problem(), str(tmp_path / "run.safetensors")
    whole_run = whole.train(scheduled(name))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        Problem().train(scheduled(name), checkpoint=path, progress=stop_at(step))
    resumed = Problem()
    assert_same(resumed, resumed.train(scheduled(name), checkpoint=path), whole, whole_run)


def test_a_schedule_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    settings = dataclasses.replace(scheduled("polynomial"), learning_rate=1e-8)
    with pytest.raises(IdentityEditError, match="learning_rate is 1e-08, .*; choose a higher one, or the schedule lin"):
        Problem().train(settings)
    monkeypatch.setitem(sys.modules, "diffusers.optimization", None)
    with pytest.raises(IdentityEditError, match="needs diffusers .*; run `pip install -U diffusers`, or choose the s"):
        Problem().train(scheduled("cosine"))
    Problem().train()


def test_progress_is_told_everything():
    told = []
    problem = Problem()
    run = problem.train(progress=lambda *values: told.append(values))
    assert [done for done, _, _, _ in told] == list(range(1, 13)) and {total for _, total, _, _ in told} == {12}
    assert [loss for _, _, loss, _ in told] == run.losses
    assert [done for done, _, _, sample in told if sample is not None] == [3, 6, 9, 12]
    assert torch.equal(run.samples[-1][1], problem.variables["a"])
    other = Problem()
    only_last = other.train(TrainingSettings(**{**vars(SETTINGS), "sample_every": 0}))
    assert [step for step, _ in only_last.samples] == [12]


def test_a_run_whose_steps_are_all_done_only_gives_its_result(tmp_path: Path):
    path = str(tmp_path / "run.safetensors")
    first, again = Problem(), Problem()
    settings = TrainingSettings(**{**vars(SETTINGS), "sample_every": 0})
    run = first.train(settings, checkpoint=path, run="one")
    assert_same(again, again.train(settings, checkpoint=path, run="one"), first, run)
    assert again.batches == []


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
@pytest.mark.parametrize("step", [2, 8, 9])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, optimizer: str, step: int):
    settings = TrainingSettings(**{**vars(SETTINGS), "optimizer": optimizer})
    whole = Problem()
    whole_run = whole.train(settings)
    path = str(tmp_path / "run.safetensors")
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        Problem().train(settings, checkpoint=path, run="one", progress=stop_at(step))
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]
    again = Problem()
    run = again.train(settings, checkpoint=path, run="one")
    assert run.resumed_at == step and again.batches[0] == 2 * step
    assert_same(again, run, whole, whole_run)


def test_a_run_can_be_made_longer(tmp_path: Path):
    path = str(tmp_path / "run.safetensors")
    short, whole, longer = Problem(), Problem(), Problem()
    short.train(TrainingSettings(**{**vars(SETTINGS), "steps": 9}), checkpoint=path, run="one")
    assert_same(longer, longer.train(checkpoint=path, run="one"), whole, whole.train())


@pytest.mark.parametrize(("run", "steps"), [("another", 12), ("one", 6)])
def test_a_checkpoint_that_does_not_fit_is_not_read(tmp_path: Path, run: str, steps: int):
    path = str(tmp_path / "run.safetensors")
    Problem().train(checkpoint=path, run="one")
    settings = TrainingSettings(**{**vars(SETTINGS), "steps": steps})
    fresh, other = Problem(), Problem()
    made = fresh.train(settings, checkpoint=path, run=run)
    assert made.resumed_at == 0
    assert_same(fresh, made, other, other.train(settings))


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    path = tmp_path / "run.safetensors"
    Problem().train(checkpoint=str(path), run="one")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(IdentityEditError, match="run.safetensors.*delete this checkpoint"):
        Problem().train(checkpoint=str(path), run="one")


KILLED = """
import sys, time
sys.path[:0] = [{scripts!r}, {tests!r}]
import load_pack
load_pack.prepare_engine(cpu=True); load_pack.load_pack()
import torch
from test_training import Problem
def progress(done, *_):
    print(done, flush=True)
    time.sleep(60 if done == 10 else 0)
Problem().train(checkpoint={path!r}, run="one", progress=progress)
"""


def test_a_killed_run_loses_only_the_steps_since_its_checkpoint(tmp_path: Path):
    path = str(tmp_path / "run.safetensors")
    root = Path(__file__).resolve().parents[2]
    code = KILLED.format(scripts=str(root / "scripts"), tests=str(Path(__file__).parent), path=path)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.strip() == "10":
                break
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    again, whole = Problem(), Problem()
    run = again.train(checkpoint=path, run="one")
    assert run.resumed_at == 8
    assert_same(again, run, whole, whole.train())


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """Writing more than a few bytes to a file fails with the system's own error, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_leaves_the_earlier_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = str(tmp_path / "run.safetensors")
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        Problem().train(checkpoint=path, run="one", progress=stop_at(4))
    with small_files():
        with pytest.raises(IdentityEditError, match=r"cannot be written \(.+\); choose another folder"):
            Problem().train(checkpoint=path, run="one")
        # When the user stops the run, that is what happens, and the log says what could not be kept.
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            Problem().train(checkpoint=path, run="one", progress=stop_at(6))
    assert "cannot be written" in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]
    again, whole = Problem(), Problem()
    run = again.train(checkpoint=path, run="one")
    assert run.resumed_at == 4
    assert_same(again, run, whole, whole.train())


def test_a_loss_that_is_no_number_stops_the_run_before_it_spoils_anything(tmp_path: Path):
    path = str(tmp_path / "run.safetensors")
    problem = Problem()

    def losses(index: int) -> Iterator[torch.Tensor]:
        for part in problem.losses(index):
            yield part * float("nan") if index == 11 else part

    with pytest.raises(IdentityEditError, match="not finite at step 6"):
        training.train(problem.variables, losses, SETTINGS, **Problem.where(path))
    assert all(bool(torch.isfinite(value).all()) for value in problem.variables.values())
    assert Problem().train(checkpoint=path, run="one").resumed_at == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"optimizer": "Lion"}, "optimizer is 'Lion'; choose one of"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"batch_size": 0}, "batch_size is 0; choose a number from 1"),
        ({"precision": "float8"}, "precision is 'float8'; choose one of float32, bfloat16"),
        ({"learning_rate_schedule": "cosin"}, "learning_rate_schedule is 'cosin'; choose one of constant, "),
        ({"warmup_steps": -1}, "warmup_steps is -1; choose a number from 0"),
        ({"learning_rate_schedule": "linear", "warmup_steps": 12}, "warmup_steps is 12, .* none of the 12 steps"),
    ],
)
def test_settings_are_checked(change: dict, message: str):
    with pytest.raises(IdentityEditError, match=message):
        TrainingSettings(**{**vars(SETTINGS), **change})


def test_autocast_computes_in_bfloat16_and_keeps_the_variables():
    seen = []
    variable = torch.randn(4, 4, requires_grad=True)

    def losses(index: int) -> Iterator[torch.Tensor]:
        product = torch.ones(2, 4) @ variable
        seen.append(product.dtype)
        yield product.float().square().mean()

    for precision in training.BFLOAT16, training.FLOAT32:
        settings = TrainingSettings(steps=1, learning_rate=0.1, precision=precision)
        training.train({"variable": variable}, losses, settings)
    assert seen == [torch.bfloat16, torch.float32] and variable.dtype == torch.float32


def test_draws_depend_on_seed_batch_and_purpose():
    def draw(*arguments) -> float:
        return float(torch.rand((), generator=generator_of(*arguments)))

    assert draw(1, 2, "a") == draw(1, 2, "a")
    assert len({draw(seed, index, what) for seed in (0, 1) for index in (0, 1) for what in "ab"}) == 8


def test_a_run_is_named_by_what_it_is():
    assert training.run_hash({"a": 1, "b": [2]}) == training.run_hash({"b": [2], "a": 1})
    assert training.run_hash({"a": 1}) != training.run_hash({"a": 2})


@dataclasses.dataclass
class Tag:
    weight: float


class Patched:
    """What a run reads of a ModelPatcher: strength, tensor, and strength of the weight itself."""

    def __init__(self, strength: float) -> None:
        self.patches = {"layer.weight": [(strength, ("diff", ()), 1.0, None, None)]}


def test_a_run_is_described_by_what_changes_its_steps():
    def name(settings: TrainingSettings = SETTINGS, weight: float = 1.0, strength: float = 1.0, **facts) -> str:
        return training.run_hash(training.run_description(settings, Tag(weight), Patched(strength), **facts))

    for change in ({"steps": 99}, {"checkpoint_every": 1}, {"sample_every": 1}, {"checkpointing": True},
                   {"sample_prompt": "a cat"}, {"sample_guidance_scale": 1.0}, {"sample_steps": 3}):  # fmt: skip
        assert name(dataclasses.replace(SETTINGS, **change)) == name(), change
    for change in ({"seed": 4}, {"learning_rate": 0.02}, {"batch_size": 2}, {"accumulation": 1}, {"ema_decay": 0.5},
                   {"precision": "bfloat16"}, {"optimizer": "SGD"}, {"gradient_clip": 2.0}):  # fmt: skip
        assert name(dataclasses.replace(SETTINGS, **change)) != name(), change
    fall = dataclasses.replace(SETTINGS, learning_rate_schedule="cosine")
    hold = dataclasses.replace(fall, learning_rate_schedule="constant_with_warmup")
    longer = {"steps": 99}
    assert name(dataclasses.replace(hold, **longer)) == name(hold) != name(dataclasses.replace(hold, warmup_steps=1))
    assert name(dataclasses.replace(fall, **longer)) != name(fall) != name()
    assert len({name(), name(weight=2.0), name(strength=0.5), name(images="others")}) == 4


# -- the EMA, and processes that train together -------------------------------------------------------------


def test_the_result_is_the_exponential_moving_average_that_diffusers_keeps():
    settings = dataclasses.replace(SETTINGS, ema_decay=0.6, sample_every=0)
    problem = Problem()
    values: list[torch.Tensor] = []
    problem.train(settings, progress=lambda *_: values.append(problem.variables["a"].detach().double().clone()))
    average = values[0]
    for step, value in enumerate(values[1:], start=1):
        decay = min(0.6, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value
    assert torch.allclose(problem.variables["a"].detach().double(), average, atol=1e-6)
    assert not torch.allclose(average, values[-1], atol=1e-4)


def test_a_resumed_run_keeps_its_moving_average(tmp_path: Path):
    settings = dataclasses.replace(SETTINGS, ema_decay=0.6)
    whole, path = Problem(), str(tmp_path / "run.safetensors")
    whole_run = whole.train(settings)
    stopped = Problem()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stopped.train(settings, checkpoint=path, progress=stop_at(7))
    resumed = Problem()
    assert_same(resumed, resumed.train(settings, checkpoint=path), whole, whole_run)


class Threads:
    """Processes as threads of this one: each waits for all and takes the mean of what they bring."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.brought: list[list[torch.Tensor]] = [[] for _ in range(count)]
        self.barrier = threading.Barrier(count)

    def member(self, index: int) -> ThreadMember:
        return ThreadMember(self, index)


@dataclasses.dataclass
class ThreadMember:
    group: Threads
    index: int

    @property
    def count(self) -> int:
        return self.group.count

    def wait(self) -> None:
        self.group.barrier.wait()

    def mean(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        self.group.brought[self.index] = tensors
        self.wait()
        means = [torch.stack(parts).mean(dim=0) for parts in zip(*self.group.brought, strict=True)]
        self.wait()
        return means


def test_two_processes_do_what_one_does_with_twice_the_accumulation(tmp_path: Path):
    alone = Problem()
    run = alone.train(dataclasses.replace(SETTINGS, accumulation=4))
    group, problems, runs = Threads(2), [Problem(), Problem()], {}

    def work(index: int) -> None:
        path = str(tmp_path / f"{index}.safetensors")
        runs[index] = problems[index].train(SETTINGS, processes=group.member(index), checkpoint=path)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert sorted(problems[0].batches + problems[1].batches) == sorted(alone.batches)
    for index in range(2):
        assert runs[index].losses == pytest.approx(run.losses, rel=1e-5)
        assert all(torch.allclose(problems[index].variables[key], alone.variables[key], atol=1e-5) for key in "ab")
    assert os.listdir(tmp_path) == ["0.safetensors"] and runs[0].samples and not runs[1].samples


def test_a_run_that_would_not_change_what_it_is_to_change_is_refused() -> None:
    """As where a loader computes with other weights than the layer's: it would end well, and the file hold nothing."""
    problem = Problem()
    problem.variables["c"] = torch.zeros(2, requires_grad=True)
    with pytest.raises(IdentityEditError, match=r"1 of 3 chosen weights \(c\)"):
        problem.train()
    assert torch.equal(problem.variables["a"], Problem().variables["a"]), "nothing was updated"
    problem.train(needed=["a", "b"])  # of text encoders and tables by step, a batch may use a part
    only = {"c": problem.variables["c"]}
    with pytest.raises(IdentityEditError, match=r"1 of 1 chosen weights"):
        training.train(only, lambda index: iter([torch.ones((), requires_grad=True)]), SETTINGS, needed=[])
