"""What every node with a MODEL does with quantized weights: `python -m benchmarks quantized_weights`.

On the tiny models of the tests, by the inputs of `tests/nodes/good_inputs.py`; ComfyUI's own formats need a ComfyUI
that has them (`COMFYUI_PATH`). Writes benchmarks/results/quantized_weights.json and .md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import comfyui_version
import torch

from ..tests import quantized_models
from ..tests.nodes.good_inputs import CLASSES
from ..tests.nodes.test_quantized_weights import NODES, answer
from .harness import made_by, write_results


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # tiny models are faster so
    kinds = quantized_models.formats()
    answers: dict[str, dict[str, str]] = {}
    for node in NODES:
        answers[CLASSES[node].GET_SCHEMA().display_name] = of_node = {}
        for kind in kinds:
            with tempfile.TemporaryDirectory(prefix="identity-edit-") as folder:
                of_node[kind] = answer(node, kind, Path(folder))
    version = comfyui_version.__version__
    names = [quantized_models.NAMES.get(kind, kind) for kind in kinds]
    sentences = sorted({said for of_node in answers.values() for said in of_node.values()} - {"works"})
    lines = [
        "# Nodes on quantized weights",
        "",
        f"{made_by()} on ComfyUI {version}: every node that has a",
        "MODEL, on the tests' tiny models with all linear layers quantized. GGUF-like layers are the tests' own, made",
        "after what GGUF packs do. A number stands for the sentence below it with which the node refuses.",
        "",
        f"| node | {' | '.join(names)} |",
        "|---|" + "---|" * len(names),
    ]
    for node, of_node in answers.items():
        cells = [said if said == "works" else f"({sentences.index(said) + 1})" for said in of_node.values()]
        lines.append(f"| {node} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {said}" for number, said in enumerate(sentences, start=1))]
    write_results("quantized_weights", {"comfyui": version, "answers": answers}, lines)
