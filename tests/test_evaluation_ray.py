"""Edits that are spread over workers by Ray are those of one process, also when workers die; with a Ray that runs its
actors in this process, and with Ray itself where it is installed."""

from __future__ import annotations

import pickle
import sys
from types import ModuleType
from typing import Any

import pytest
import ray_workers
from user_comfyui import PACK, ScriptError

pytestmark = pytest.mark.slow

METHODS = ("img2img", "ddim", "edit-friendly")


class ActorError(Exception):
    """Stands for RayActorError."""


class TaskError(Exception):
    """Stands for RayTaskError."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Call:
    """What Ray's `method.remote(...)` returns; the method has run when it is asked for."""

    def __init__(self, actor: Any, name: str, given: tuple[Any, ...]) -> None:
        self.actor, self.name, self.given = actor, name, pickle.dumps(given)

    def result(self) -> Any:
        if self.name == "make":
            self.actor.ray.made += 1
            if self.actor.ray.made in self.actor.ray.deadly:
                self.actor.is_dead = True
            if self.actor.is_dead:
                raise ActorError("the actor died")
        try:
            return pickle.loads(pickle.dumps(getattr(self.actor.worker, self.name)(*pickle.loads(self.given))))
        except Exception as error:
            raise TaskError(error) from error


class Actor:
    def __init__(self, ray: Any, worker: Any) -> None:
        self.ray, self.worker, self.is_dead = ray, worker, False

    def __getattr__(self, name: str) -> Any:
        return type("Method", (), {"remote": lambda _, *given: Call(self, name, given)})()


class LocalRay(ModuleType):
    """As much of Ray as is used; `deadly` are numbers of calls of `make` at which the actor dies."""

    def __init__(self, deadly: tuple[int, ...] = ()) -> None:
        super().__init__("ray")
        self.deadly, self.made, self.actors, self.is_up = deadly, 0, [], False
        self.exceptions = ModuleType("ray.exceptions")
        self.exceptions.RayActorError, self.exceptions.RayTaskError = ActorError, TaskError

    def init(self, **cluster: Any) -> None:
        self.is_up, self.cluster = True, cluster

    def shutdown(self) -> None:
        self.is_up = False

    def remote(self, **settings: Any) -> Any:
        def of(kind: type) -> Any:
            def start(*given: Any) -> Actor:
                self.actors.append(Actor(self, kind(*pickle.loads(pickle.dumps(given)))))
                return self.actors[-1]

            return type("Remote", (), {"remote": staticmethod(start)})

        return of

    def get(self, call: Call) -> Any:
        return call.result()

    def wait(self, calls: list[Call], num_returns: int) -> tuple[list[Call], list[Call]]:
        return calls[:1], calls[1:]

    def kill(self, actor: Actor) -> None:
        actor.is_dead = True


@pytest.fixture
def local_ray(monkeypatch):
    def install(deadly: tuple[int, ...] = ()) -> LocalRay:
        ray = LocalRay(deadly)
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setitem(sys.modules, "ray.exceptions", ray.exceptions)
        return ray

    monkeypatch.syspath_prepend(str(PACK))
    return install


def edited(folder, *options: str) -> dict[str, bytes]:
    """The kept files of two cases by three methods."""
    from identity_edit_pack.benchmarks.harness import arguments_of
    from identity_edit_pack.evaluation import score_edits

    words = ["--methods", *METHODS, "--cases", "2", "--set", "steps=2", "--folder", str(folder / "demo"), *options]
    arguments = arguments_of(score_edits, words)
    cases = score_edits.read_cases(arguments, folder)
    score_edits.made_images(arguments, cases, 128, folder / "kept")
    return {str(path.relative_to(folder / "kept")): path.read_bytes() for path in sorted(folder.glob("kept/*/*.png"))}


@pytest.fixture(scope="module")
def alone(pack, tmp_path_factory) -> dict[str, bytes]:
    """The edits of one process."""
    made = edited(tmp_path_factory.mktemp("alone"))
    assert len(made) == 2 * len(METHODS) and len(set(made.values())) == len(made)
    return made


def test_edits_of_workers_of_whom_two_die_are_those_of_one_process(alone, tmp_path, local_ray) -> None:
    ray = local_ray(deadly=(2, 5))
    assert edited(tmp_path, "--ray", "--workers", "2") == alone
    assert len(ray.actors) == 4 and not ray.is_up
    assert ray.made == len(alone) + 2, "nothing was made twice"
    next((tmp_path / "kept").glob("*/*.png")).unlink()
    ray = local_ray()
    assert edited(tmp_path, "--ray") == alone and ray.made == 1, "what is there is not made again"


def test_edits_of_rays_own_workers_are_those_of_one_process(alone, tmp_path, monkeypatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray keeps a token in the home folder
    monkeypatch.syspath_prepend(str(PACK))
    assert edited(tmp_path, "--ray", "--workers", "2") == alone


@pytest.mark.usefixtures("pack")
def test_a_worker_needs_none_of_this_machines_files(tmp_path) -> None:
    from identity_edit_pack.evaluation.demo_dataset import read_demo_dataset, write_demo_dataset
    from identity_edit_pack.evaluation.editing import Task, from_files, with_files

    write_demo_dataset(tmp_path / "demo", 1)
    (case,) = read_demo_dataset(tmp_path / "demo", tmp_path / "masks")
    image, mask = case.load_image(128), case.load_mask(128)
    texts = [path.with_suffix(".txt").read_text() for path in case.references]
    sent = with_files(Task("lipe", case))
    (tmp_path / "demo").rename(tmp_path / "away")
    (tmp_path / "other").mkdir()
    there, again = (from_files(*sent, tmp_path / "other").case for _ in range(2))
    assert there == again and (there.load_image(128) == image).all() and (there.load_mask(128) == mask).all()
    assert [path.with_suffix(".txt").read_text() for path in there.references] == texts


@pytest.mark.usefixtures("pack")
def test_without_ray_one_sentence_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.syspath_prepend(str(PACK))
    with pytest.raises(ScriptError, match="needs Ray: 'pip install ray', or leave out --ray"):
        edited(tmp_path, "--ray")


class Worker:
    """Says which worker made what; cannot make 13."""

    count = 0

    def __init__(self, pack: str | None) -> None:
        Worker.count += 1
        self.number = Worker.count

    def make(self, item: tuple[str, int]) -> int:
        if item[1] == 13:
            raise ScriptError("there is no 13")
        return self.number

    def stop(self) -> None: ...


def test_a_worker_goes_on_with_the_group_that_it_has_begun(local_ray) -> None:
    local_ray()
    items = [(group, number) for group in "ab" for number in range(3)]
    made = dict(ray_workers.results_of_ray(Worker, (), items, count=2, group_of=lambda item: item[0]))
    assert sorted(made) == items
    assert all(len({made[group, number] for number in range(3)}) == 1 for group in "ab")


def test_an_item_that_kills_its_workers_and_one_that_fails_end_the_run(local_ray) -> None:
    ray = local_ray(deadly=(1, 2, 3))
    with pytest.raises(ScriptError, match="3 workers have died over thing 7; the last one said: the actor died"):
        list(ray_workers.results_of_ray(Worker, (), [7], count=1, name_of="thing {}".format))
    assert not ray.is_up
    local_ray()
    with pytest.raises(ScriptError, match=r"^a 13: there is no 13$"):
        list(ray_workers.results_of_ray(Worker, (), [("a", 13)], count=1, name_of="{0[0]} {0[1]}".format))
