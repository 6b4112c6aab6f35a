"""What every node with a MODEL does with quantized weights: `python -m benchmarks quantized_weights`.

On the tiny models of the tests, by the inputs of `tests/nodes/good_inputs.py`; ComfyUI's own formats need a ComfyUI
that has them (`COMFYUI_PATH`). Writes benchmarks/results/quantized_weights.json and .md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import comfyui_version
import torch

from ..tests import quantized_models
from ..tests.nodes.good_inputs import CLASSES
from ..tests.nodes.test_quantized_weights import USES, answer
from .harness import markdown


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)  # tiny models are faster so
    answers: dict[str, dict[str, str]] = {}
    for node, weights in USES:
        row = ", ".join(filter(None, (CLASSES[node].GET_SCHEMA().display_name, weights)))
        answers[row] = of_row = {}
        for kind in quantized_models.formats():
            with tempfile.TemporaryDirectory(prefix="identity-edit-") as folder:
                of_row[kind] = answer(node, weights, kind, Path(folder))
    return {"comfyui": comfyui_version.__version__, "answers": answers}


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    answers = figures["answers"]
    sentences = sorted({said for of_row in answers.values() for said in of_row.values()} - {"works"})
    names = [quantized_models.NAMES.get(kind, kind) for kind in quantized_models.formats()]
    rows = [
        (row, *(said if said == "works" else f"({sentences.index(said) + 1})" for said in of_row.values()))
        for row, of_row in answers.items()
    ]
    return [
        "Nodes on quantized weights",
        f"ComfyUI {figures['comfyui']}, every node that has a MODEL, on the tests' tiny models with all linear layers "
        "quantized. GGUF-like layers are the tests' own, made after what GGUF packs do. A number stands for the "
        "sentence below it with which the node refuses.",
        *markdown(("node and its *weights*", *names), rows),
        "",
        *(f"{number}. {said}" for number, said in enumerate(sentences, start=1)),
    ]
