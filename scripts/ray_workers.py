"""Work that is done by several workers at once, on several machines or GPUs: for the commands that spread theirs.

Across machines by Ray, of the two engines that come into question. Items are independent jobs of seconds to minutes for
workers that differ (a GPU here, a CPU there) and may die: Ray places actors where a GPU is free, sets
CUDA_VISIBLE_DEVICES, brings results back without a shared folder, and reports the death of one actor as that actor's
error. Hugging Face accelerate starts the same program in lockstep on equal processes with a collective group between
them: the death of one ends them all, and there is no queue. Ray is optional and in no list of requirements
(`pip install ray`).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

from user_comfyui import PACK, ScriptError

MOST_LOSSES = 3
"""Workers that may die over one item before the run is given up: then it is the item that kills them."""
NOT_SENT = (".venv", ".git", "demo_output", "node_modules", "tests", "**/__pycache__")

Item = TypeVar("Item", bound=Hashable)


def results_of_ray(
    kind: type,
    given: tuple[Any, ...],
    items: Sequence[Item],
    *,
    count: int,
    address: str | None = None,
    gpus: float = 0.0,
    paths: Sequence[str] = (),
    not_sent: Sequence[str] = NOT_SENT,
    errors: tuple[type[Exception], ...] = (ScriptError,),
    input_of: Callable[[Item], Any] = lambda item: item,
    group_of: Callable[[Item], Hashable] = lambda item: item,
    name_of: Callable[[Item], str] = str,
    otherwise: str = "--workers 1",
    on_worker: Callable[[int], None] | None = None,
) -> Iterator[tuple[Item, Any]]:
    """What workers make of items, in any order; the item of a worker that dies is given to another one.

    Args:
        kind: a worker's class, with `process_id()`, `make(input)` and `stop()`.
        given: what it is made with; then the pack's folder, or None in a cluster, where Ray sends it into the working
            directory.
        items: what is to be made.
        count: workers at once.
        address: of a cluster; None starts one on this machine for the time of the run.
        gpus: for each worker.
        paths: folders from which the workers of this machine import.
        not_sent: what of the pack a cluster does not need.
        errors: the worker's own errors, which would come again on every worker and end the run.
        input_of: what a worker is given for an item.
        group_of: a worker goes on with items of the group that it has begun, where there are any.
        name_of: what an item is called in errors.
        otherwise: what does without Ray.
        on_worker: told the process id of each worker that has started.

    Raises:
        ScriptError: when Ray is missing, a worker reports one of `errors`, or workers die over one item too often.
    """
    try:
        import ray
        from ray.exceptions import RayActorError, RayTaskError
    except ImportError:
        raise ScriptError(f"More than one worker needs Ray: 'pip install ray', or {otherwise}.") from None
    cluster: dict[str, Any]
    if address:
        # Run as a command, a file is sent by value; what it imports is in the working directory.
        cluster = {"address": address, "runtime_env": {"working_dir": str(PACK), "excludes": list(not_sent)}}
    else:
        path = os.pathsep.join(filter(None, (*paths, os.environ.get("PYTHONPATH"))))
        cluster = {"num_cpus": count, "include_dashboard": False, "runtime_env": {"env_vars": {"PYTHONPATH": path}}}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    ray.init(log_to_driver=False, **cluster)
    actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(kind)
    waiting, losses = list(items), dict.fromkeys(items, 0)
    busy: dict[Any, tuple[Any, Item]] = {}
    begun: dict[Any, Hashable] = {}
    """The group of each worker's last item."""

    def start() -> Any:
        started = actor.remote(*given, None if address else str(PACK))
        if on_worker is not None:
            on_worker(ray.get(started.process_id.remote()))
        return started

    def lost(item: Item, error: Exception) -> None:
        losses[item] += 1
        if losses[item] >= MOST_LOSSES:
            raise ScriptError(f"{MOST_LOSSES} workers have died over {name_of(item)}; the last one said: {error}")
        waiting.insert(0, item)

    def next_for(worker: Any) -> Item:
        """An item of the worker's own group, else of one that is nobody's, else any; the first of them."""
        own, others = begun.get(worker), set(begun.values())
        best = min(waiting, key=lambda item: 0 if group_of(item) == own else 1 + (group_of(item) in others))
        waiting.remove(best)
        begun[worker] = group_of(best)
        return best

    try:
        idle = deque(start() for _ in range(min(count, len(waiting))))
        while waiting or busy:
            while waiting and idle:
                worker = idle.popleft()
                item = next_for(worker)
                busy[worker.make.remote(input_of(item))] = worker, item
            ready, _ = ray.wait(list(busy), num_returns=1)
            worker, item = busy.pop(ready[0])
            try:
                result = ray.get(ready[0])
            except (RayActorError, RayTaskError) as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, errors):
                    raise ScriptError(f"{name_of(item)}: {cause}") from None
                if isinstance(error, RayTaskError):
                    ray.kill(worker)  # what it works with is gone, or does not answer
                begun.pop(worker)
                lost(item, error)
                idle.append(start())
            else:
                idle.append(worker)
                yield item, result
        for worker in idle:
            ray.get(worker.stop.remote())
    finally:
        ray.shutdown()
