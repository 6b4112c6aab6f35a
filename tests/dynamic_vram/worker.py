"""Runs cases under dynamic VRAM: a JSON line of `run`'s arguments in, a JSON line of what it found out.

In a process of its own, since the device in host memory and the imitation of aimdo are there for the whole process.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
sys.path += [str(HERE), *(str(ROOT / folder) for folder in ("scripts", "tests"))]

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what ComfyUI prints, from its first import on

import load_pack  # noqa: E402  (found on the path that was extended just above)

load_pack.prepare_engine(cpu=True)

import device  # noqa: E402
import torch  # noqa: E402

DEVICE = device.load()
torch.set_num_threads(1)
load_pack.load_pack()

import imitation  # noqa: E402
import pytest  # noqa: E402
import worlds  # noqa: E402
from identity_edit_pack.tests.nodes.good_inputs import world_in  # noqa: E402

Found = list[tuple[str, torch.Tensor]]


def results(case: str, world: worlds.WideWorld, before: Any) -> Found:
    """In folders of its own."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        world_in(Path(folder), patch)
        found = worlds.results_of(world, case, Path(folder), before)
        return [(name, tensor.detach().float().cpu().clone()) for name, tensor in found]


@functools.cache
def expected(case: str, lora: bool) -> Found:
    """What plain models on the processor give."""
    return results(case, worlds.WideWorld(lora), lambda: None)


def run(case: str, lora: bool, used: bool, leave: int = -1, **settings: Any) -> dict[str, Any]:
    """Compare a case under dynamic VRAM with plain models on the processor.

    Args:
        case: a name in `worlds.CASES`, or of a node.
        lora: whether the MODEL and the CLIP carry a LoRA.
        used: whether weights have been sampled with, in inference mode, and are where that left them.
        leave: bytes of the device that the node finds free; below zero for all that the processor has.
        settings: of `imitation.dynamic_vram`.

    Returns:
        how many tensors were compared, the largest relative error of one and its name, and how often
        weights were taken back or had no room.
    """
    reference = expected(case, lora)
    with imitation.dynamic_vram(DEVICE, **settings) as room:
        world = worlds.DynamicWorld(lora, DEVICE)

        def before() -> None:
            if used:
                worlds.sampled(world)
            else:
                room.evict()
            torch.ops.hostgpu.leave(leave)

        try:
            found = results(case, world, before)
        finally:
            torch.ops.hostgpu.leave(-1)
    if [name for name, _ in found] != [name for name, _ in reference]:
        raise ValueError(f"{[name for name, _ in found]} and not {[name for name, _ in reference]}")
    errors = {name: error_of(tensor, right) for (name, tensor), (_, right) in zip(found, reference, strict=True)}
    worst = max(errors, key=lambda name: errors[name])
    return {
        "compared": len(errors),
        "error": errors[worst],
        "worst": worst,
        "evictions": room.evictions,
        "refusals": room.refusals,
    }


def error_of(found: torch.Tensor, right: torch.Tensor) -> float:
    """The mean absolute difference relative to the mean absolute value: where the gradient of one number in a hundred
    thousand is nearly zero, rounding decides the direction of Adam's step. Infinite where shapes differ or something is
    not finite."""
    if found.shape != right.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found.double() - right.double()).abs().sum() / right.double().abs().sum().clamp(min=1e-12))


def main() -> None:
    for line in sys.stdin:
        try:
            answer = run(**json.loads(line))
        except BaseException as error:  # an interrupt of ComfyUI's is one
            frames = "".join(traceback.format_exception(error))
            answer = {"failed": f"{type(error).__name__}: {error}", "trace": frames}
        print(json.dumps(answer), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
