"""The demo world's training loop: autocast, warm-up and cosine decay, EMA, checkpoints to resume from, and a
progress bar; and linear probes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

CHECKPOINT_SECONDS = 120.0


def save_whole(state: dict, path: Path) -> None:
    """Write a training checkpoint atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def fast_precision(device: str) -> torch.autocast:
    """Autocast to bfloat16 where the processor multiplies in it; elsewhere float32 takes a third of the time."""
    native = device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device, torch.bfloat16, enabled=native)


RowsOf = Callable[[str, nn.Parameter], list[int]]


def one_matrix(name: str, parameter: nn.Parameter) -> list[int]:
    return [parameter.shape[0]] if parameter.ndim >= 2 and parameter.shape[0] >= 16 else []


class MuonAndAdamW:
    """Muon for weight matrices and AdamW for the rest, as one optimizer.

    A convolution kernel counts as the matrix [out channels, everything else]; ``torch.optim.Muon`` accepts only
    matrices, so it gets views of the kernels. Embedding tables and layers with fewer than 16 outputs use AdamW. With
    batch size 8 the autoencoder reached 19.1 dB in 145 steps (learning rate 6e-3), and 14.9 dB in 172 steps of AdamW
    alone. ``rows_of`` splits a parameter into matrices by row counts; a parameter without matrices uses AdamW.
    """

    def __init__(
        self, network: nn.Module, learning_rate: float, weight_decay: float, rows_of: RowsOf = one_matrix
    ) -> None:
        tables = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
        named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        rows = {name: [] if id(p) in tables else rows_of(name, p) for name, p in named.items()}
        self.matrices = [(named[name], sizes) for name, sizes in rows.items() if sizes]
        self.views = [
            nn.Parameter(view) for p, sizes in self.matrices for view in self.as_matrix(p.detach()).split(sizes)
        ]
        if {p.untyped_storage().data_ptr() for p, _ in self.matrices} != {
            view.untyped_storage().data_ptr() for view in self.views
        }:
            raise ValueError("a kernel's memory format allows no matrix view: call network.to(channels_last) first")
        rest = [p for name, p in named.items() if not rows[name]]
        muon = torch.optim.Muon(self.views, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(rest, lr=learning_rate / 3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.optimizers = {"muon": muon, "adamw": adamw}

    @staticmethod
    def as_matrix(kernel: torch.Tensor) -> torch.Tensor:
        return kernel.permute(0, 2, 3, 1).flatten(1) if kernel.ndim == 4 else kernel

    def step(self) -> None:
        views = iter(self.views)
        for matrix, sizes in self.matrices:
            gradients = [None] * len(sizes) if matrix.grad is None else self.as_matrix(matrix.grad).split(sizes)
            for gradient in gradients:
                next(views).grad = gradient
        for optimizer in self.optimizers.values():
            optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


def warm_up_and_cosine(optimizer: torch.optim.Optimizer, warmup_steps: int, steps: int) -> SequentialLR:
    warm_up = LinearLR(optimizer, 0.01, total_iters=warmup_steps)
    return SequentialLR(
        optimizer, [warm_up, CosineAnnealingLR(optimizer, steps - warmup_steps)], milestones=[warmup_steps]
    )


def trapezoid(optimizer: torch.optim.Optimizer, warmup_steps: int, steps: int, decay_steps: int) -> LambdaLR:
    """Linear warm-up, constant rate, linear decay to zero over the last ``decay_steps`` of ``steps``."""
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup_steps, (steps - step) / max(decay_steps, 1)))


def probe_accuracy(
    known: torch.Tensor, known_labels: torch.Tensor, unknown: torch.Tensor, unknown_labels: torch.Tensor, choices: int
) -> float:
    """Accuracy of a logistic regression (L-BFGS, L2 1e-4) fitted on ``known`` [N, D] and tested on ``unknown``."""
    head = nn.Linear(known.shape[1], choices)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(known), known_labels) + 1e-4 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return float((head(unknown).argmax(1) == unknown_labels).float().mean())


def train(
    modules: dict[str, nn.Module],
    loss_of: Callable[[int], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    checkpoint: Path,
    warmup_steps: int = 100,
    weight_decay: float = 0.0,
    average_decay: float = 0.998,
    decay_steps: int | None = None,
    rows_of: RowsOf = one_matrix,
    on_checkpoint: Callable[[], str] | None = None,
) -> None:
    """Minimize ``loss_of(step)`` over all trainable parameters of ``modules``, which then hold the EMA of the weights.

    Args:
        modules: the trained modules by name; the names are the keys of the checkpoint.
        loss_of: the loss of one training step, a scalar tensor; runs in ``fast_precision``.
        steps: total optimizer steps, including those of an interrupted run.
        learning_rate: Muon's peak learning rate, in the scale of AdamW's updates.
        checkpoint: file to resume from if it exists; written about every two minutes.
        average_decay: EMA decay of the weights.
        decay_steps: None for a cosine; else the learning rate is constant until the last ``decay_steps`` steps. The
            checkpoint before them is kept with the suffix ``_constant``, to train longer from it.
        rows_of: see ``MuonAndAdamW``.
        on_checkpoint: evaluates the EMA of the weights and returns a line to print.
    """
    network = nn.ModuleDict(modules)
    device = next(network.parameters()).device.type
    optimizer = MuonAndAdamW(network, learning_rate, weight_decay, rows_of)
    schedulers = {
        name: warm_up_and_cosine(o, warmup_steps, steps)
        if decay_steps is None
        else trapezoid(o, warmup_steps, steps, decay_steps)
        for name, o in optimizer.optimizers.items()
    }

    def move_average(averaged: Any, current: Any, updates: Any) -> None:
        # The decay warms up: at a constant decay, short runs would keep too much of the initial weights.
        decay = min(average_decay, (1 + int(updates)) / (10 + int(updates)))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    average = AveragedModel(network, multi_avg_fn=move_average)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        for name, scheduler in schedulers.items():
            scheduler.load_state_dict(state["schedulers"][name])
        start = state["step"]

    def save(step: int, path: Path = checkpoint) -> None:
        state = {
            "network": network.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedulers": {name: scheduler.state_dict() for name, scheduler in schedulers.items()},
            "step": step,
        }
        save_whole(state, path)
        if on_checkpoint is not None:
            current = {name: value.clone() for name, value in network.state_dict().items()}
            network.load_state_dict(average.module.state_dict())
            bar.write(f"step {step}: {on_checkpoint()}")
            network.load_state_dict(current)

    saved_at, smoothed = time.monotonic(), None
    with tqdm(range(start, steps), initial=start, total=steps, mininterval=5, unit="step") as bar:
        for step in bar:
            if decay_steps and step == steps - decay_steps:
                save(step, checkpoint.with_stem(f"{checkpoint.stem}_constant"))
            with fast_precision(device):
                loss = loss_of(step)
            loss.backward()
            nn.utils.clip_grad_norm_(optimizer.parameters, 1.0)
            optimizer.step()
            for scheduler in schedulers.values():
                scheduler.step()
            average.update_parameters(network)
            value = loss.item()
            smoothed = value if smoothed is None else 0.98 * smoothed + 0.02 * value
            bar.set_postfix(loss=f"{smoothed:.4f}", refresh=False)
            if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                save(step + 1)
                saved_at = time.monotonic()
        save(steps)
    network.load_state_dict(average.module.state_dict())
