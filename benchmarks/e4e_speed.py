"""How long does e4e take for a face? `python -m benchmarks e4e_speed`.

Random weights: they take as long as the published ones, which are the user's to have. With --published FOLDER, a copy
of the published implementation (omertov/encoder4editing), its network gets the same weights and is compared: number,
names and shapes of the tensors, and the largest difference of the rows. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import comfy.model_management
import torch
from identity_edit_pack.pipelines.engine.managed_network import managed
from identity_edit_pack.pipelines.pidiff import e4e
from identity_edit_pack.pipelines.pidiff.w_plus_encoder import WPlusEncoder, encode_w_plus

from .harness import Options, markdown

GOAL = 2.0


def random_weights() -> dict[str, torch.Tensor]:
    """Weights of the published names and shapes that keep features at their size, so that nothing becomes NaN."""
    draw = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in e4e.E4E().state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(shape, dtype=torch.int64)
        elif len(shape) < 2:
            state[name] = torch.rand(shape, generator=draw) * 0.5 + (0.75 if name.endswith(("weight", "var")) else 0.0)
        else:
            fan = 1 if name.endswith("linear.weight") else shape[1:].numel()
            state[name] = torch.randn(shape, generator=draw) / fan**0.5
    return state


def published(folder: Path, state: dict[str, torch.Tensor]) -> Any:
    """The published network with these weights; its CUDA operators, which the encoder does not use, are left out."""
    sys.path.insert(0, str(folder))
    operators = ModuleType("models.stylegan2.op")
    for name in ("FusedLeakyReLU", "fused_leaky_relu", "upfirdn2d"):
        setattr(operators, name, None)
    sys.modules["models.stylegan2.op"] = operators
    encoders: Any = importlib.import_module("models.encoders.psp_encoders")
    network = encoders.Encoder4Editing(50, "ir_se", SimpleNamespace(stylegan_size=1024))
    network.load_state_dict(state)
    return network.eval()


OPTIONS: Options = {
    "published": (None, "a copy of the published implementation to compare with", {"type": Path}),
    "faces": (5, "that are encoded"),
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    state = random_weights()
    network = e4e.with_weights(e4e.E4E, {"rows": e4e.ROWS}, state, "random weights")
    encoder = WPlusEncoder(network, torch.zeros(e4e.ROWS, e4e.WIDTH), "random", managed(network))
    faces = torch.rand(arguments.faces, 3, e4e.SIZE, e4e.SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    encode_w_plus(encoder, faces[:1])  # loads it and warms up
    seconds, computing = [], []
    for face in faces:
        start, start_computing = time.perf_counter(), time.process_time()
        encode_w_plus(encoder, face[None])
        seconds.append(time.perf_counter() - start)
        computing.append(time.process_time() - start_computing)
    figures: dict[str, Any] = {
        "device": str(comfy.model_management.get_torch_device()),
        "threads": torch.get_num_threads(),
        "seconds_a_face": seconds,
        "processor_seconds_a_face": computing,
        "median": statistics.median(seconds),
        "tensors": len(state),
        "million_weights": sum(parameter.numel() for parameter in network.parameters()) / 1e6,
    }
    if arguments.published is not None:
        other = published(arguments.published, state)
        theirs, ours = ([(n, t.shape) for n, t in each.state_dict().items()] for each in (other, network))
        with torch.no_grad():
            rows = other(faces[:1])
            difference = float((rows - network.cpu()(faces[:1])).abs().max())
        figures["published"] = {
            "same_names_and_shapes": theirs == ours,
            "largest_difference": difference,
            "largest_value": float(rows.abs().max()),
        }
    return figures


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    seconds = figures["seconds_a_face"]
    times = (figures["median"], min(seconds), max(seconds), statistics.median(figures["processor_seconds_a_face"]))
    lines = [
        "e4e",
        f"{figures['tensors']} tensors, {figures['million_weights']:.1f} million weights, float32, random.",
        *markdown(
            ("device", "threads", "seconds a face, median", "fastest", "slowest", "processor seconds, median", "goal"),
            [(figures["device"], figures["threads"], *(f"{each:.2f}" for each in times), f"< {GOAL:g}")],
        ),
        "",
        "Processor seconds are what the process was given; on a machine that does other things at the same time the "
        "clock says more.",
    ]
    if found := figures.get("published"):
        lines += [
            "",
            "Against the published implementation with the same weights: names, shapes and order of the tensors "
            f"{'are the same' if found['same_names_and_shapes'] else 'DIFFER'}; rows of a face differ by at most "
            f"{found['largest_difference']:.1e}, values go up to {found['largest_value']:.2g}.",
        ]
    return lines
