"""Under dynamic VRAM, ComfyUI's default on NVIDIA, every node gives what it gives with plain models on the processor.

ComfyUI then brings weights layer by layer and takes them back when it likes. Here its own code for that runs on a
device in host memory (device.py, imitation.py), in a process of its own (worker.py).
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_patcher
import pytest
from identity_edit_pack.tests.dynamic_vram import device
from identity_edit_pack.tests.nodes.test_low_memory import NODES

HERE = Path(__file__).parent
TOLERANCE = 1e-4
ROOM, LITTLE = 1e12, 1e6
FRESH = {"used": False, "lora": False}
USED = {"used": True, "lora": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "room for all, never used": FRESH,
    "room for all, used, LoRA": USED,
    "room for 1 MB in two streams, never used": {**FRESH, "budget": LITTLE, "streams": 2},
    "room for 1 MB in two streams, used, LoRA": {**USED, "budget": LITTLE, "streams": 2},
    "taken back before the backward pass, used, LoRA": {**USED, "evict_before_backward": True},
}
HARDEST = "room for 1 MB in two streams, used, LoRA"
WITH_GRADIENTS = [
    "null-text", "null-text, recomputed", "null-text, adaptive", "null-text, ControlNet",
    "null-text, recomputed, ControlNet", "null-text, ControlNet on the source alone", "null-text, GLIGEN",
    "null-text, style attention", "negative-prompt inversion", "reference-guided null-text", "text embedding",
    "text embedding, ControlNet", "text embedding, GLIGEN", "identity prior", "identity prior, recomputed",
    "subject, row for each step", "subject, word", "identity words", "style attention", "MCDM, UNet alone",
    "MCDM, whole checkpoint",
]  # fmt: skip
"""The names of `worlds.CASES`, which only the process with the device can import."""
IN_EVERY_SETTING = ("null-text", "identity prior")
"""The two kinds of gradient: of what goes into a model and of its weights."""
TRAINED = {
    "NullTextOptimization", "ReferenceGuidedNullTextOptimizer", "OptimizeTextEmbedding", "TrainIdentityPrior",
    "TrainSubjectEmbedding", "TrainIdentityWords", "TrainStyleAttention", "TrainMCDM",
}  # fmt: skip
"""Their nodes."""
CASES = [
    *((case, setting) for setting in SETTINGS for case in IN_EVERY_SETTING),
    *((case, HARDEST) for case in [*WITH_GRADIENTS, *NODES] if case not in {*IN_EVERY_SETTING, *TRAINED}),
]
THRESHOLDS = {"SegmentSubject": 1e-2}
"""What is decided by a threshold flips where a number lies on it: so many of its pixels may."""


def reason_for_none() -> str | None:
    if not hasattr(comfy.model_patcher, "ModelPatcherDynamic") or importlib.util.find_spec("comfy_aimdo") is None:
        return "this ComfyUI has no dynamic VRAM"
    return device.reason_for_none()


pytestmark = [pytest.mark.slow, pytest.mark.skipif(reason_for_none() is not None, reason=reason_for_none() or "")]


class Worker:
    """worker.py in a process of its own, which is started again when it has died."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def run(self, case: str, **settings: Any) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    [sys.executable, str(HERE / "worker.py")],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"case": case, **settings}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the process ended:\n{self._log.read_text()[-3000:]}"
        found: dict[str, Any] = json.loads(answer)
        return found

    def stop(self) -> None:
        if self._process is not None:
            self._process.communicate()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    device.library()  # compiled here, where an error of the compiler is seen
    made = Worker(tmp_path_factory.mktemp("dynamic_vram") / "worker.log")
    yield made
    made.stop()


@pytest.mark.parametrize(("case", "setting"), CASES)
def test_the_results_are_those_of_plain_models(case: str, setting: str, worker: Worker) -> None:
    found = worker.run(case, **SETTINGS[setting])
    assert "failed" not in found, found["failed"] + "\n" + found["trace"][-3000:]
    assert found["error"] <= THRESHOLDS.get(case, TOLERANCE), found["worst"]
    if "budget" in SETTINGS[setting]:
        assert found["refusals"], "there was room for all"


def test_every_case_is_named_here() -> None:
    source = (HERE / "worlds.py").read_text(encoding="utf-8")
    named = re.findall(r'^    "([^"]+)": \(', source.split("CASES: dict")[1], re.MULTILINE)
    assert sorted(named) == sorted(WITH_GRADIENTS)


def test_what_does_not_fit_is_said_in_words_and_leaves_no_trace(worker: Worker) -> None:
    found = worker.run("null-text", **USED, leave=2**20)
    kind, _, message = found["failed"].partition(": ")
    assert kind == "IdentityEditError", found["trace"][-3000:]
    for remedy in ("checkpointing", "image", "batch"):
        assert remedy in message
    assert worker.run("null-text", **USED)["error"] <= TOLERANCE
