"""Are the flow methods those of their authors' code? `python -m benchmarks published_flow_code --code FOLDER`.

FOLDER holds clones of github.com/DSL-Lab/UniEdit-Flow (which also has Euler, RF-Solver, midpoint and FireFlow),
fallenshock/FlowEdit and DarkMnDragon/rf-inversion-diffuser (RF-Inversion); their sampling functions are run on a smooth
random velocity of one prompt or another in place of a network, and compared with the pack's. Given is the largest
difference relative to the size of the latent; 1e-5 is the goal in float32.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.flow_editing.flow_edit import flow_edit_sampler
from identity_edit_pack.pipelines.flow_editing.uni_edit import uni_edit_sampler
from identity_edit_pack.pipelines.inversion import methods, rf_inversion
from identity_edit_pack.pipelines.inversion.edit_friendly import independent_noise

from .harness import Options, markdown

GOAL = 1e-5
SHAPE = (1, 64, 16)
"""The published code packs a latent into [batch, patches, channels of a patch]."""
WEIGHTS = torch.randn(SHAPE[2], SHAPE[2], generator=torch.Generator().manual_seed(5)) / SHAPE[2] ** 0.5
SOURCE, TARGET, EMPTY = 1.0, -0.6, 0.2
"""What the velocity depends on in place of a prompt's embedding."""

OPTIONS: Options = {"code": (None, "the folder with the three clones", {"type": Path, "required": True})}


def velocity(x: torch.Tensor, t: float | torch.Tensor, prompt: float) -> torch.Tensor:
    """A smooth function of the latent [1, patches, channels], the time and the prompt."""
    t = torch.as_tensor(t).to(x)
    return torch.tanh(x @ WEIGHTS.to(x) + 2 * t + prompt) + 0.3 * prompt * torch.sin(3 * x + t) - 0.5 * x


def packed(estimate_of: float) -> methods.Estimate:
    """The pack's estimate of z_0 for a prompt, on latents [1, channels, patches, 1]."""

    def estimate(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x - sigma * unfolded(velocity(folded(x), sigma, estimate_of))

    return estimate


def unfolded(x: torch.Tensor) -> torch.Tensor:
    """[1, patches, channels] as the pack's [1, channels, patches, 1]."""
    return x.transpose(1, 2).unsqueeze(3)


def folded(x: torch.Tensor) -> torch.Tensor:
    return x.squeeze(3).transpose(1, 2)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)
    rows = {}
    for name, compare in COMPARISONS.items():
        theirs, ours = compare(arguments.code, image, noise)
        rows[name] = float((theirs - ours).abs().max() / theirs.abs().max())
    return {"rows": rows}


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    rows = figures["rows"]
    worst = max(rows.values())
    return [
        "The flow methods against their authors' code",
        "largest difference relative to the largest value of the latent, in float32.",
        *markdown(["method", "difference"], [[name, f"{value:.1e}"] for name, value in rows.items()]),
        "",
        f"The goal is {GOAL:.0e}: {'reached' if worst <= GOAL else 'missed'} by all, {worst:.1e} at most."
        if worst <= GOAL
        else f"The goal is {GOAL:.0e}: missed, {worst:.1e} at most.",
    ]


def load(path: Path, stand_ins: dict[str, ModuleType]) -> Any:
    """A published file as a module, with stand-ins for the modules that it imports but does not need here."""
    package = ModuleType("published")
    package.__path__ = []
    modules = {"published": package, **{f"published.{name}": module for name, module in stand_ins.items()}}
    spec = importlib.util.spec_from_file_location(f"published.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, modules):
        spec.loader.exec_module(module)
    return module


def uni_edit_flow(code: Path) -> Any:
    path = next((code / "UniEdit-Flow").rglob("flux/sampling.py"))
    model, modules, conditioner = (ModuleType(name) for name in ("model", "modules", "conditioner"))
    model.Flux = conditioner.HFEmbedder = object  # type: ignore[attr-defined]
    return load(path, {"model": model, "modules": modules, "modules.conditioner": conditioner})


def network(img: torch.Tensor, txt: float, timesteps: torch.Tensor, info: Any, **_: Any) -> tuple[torch.Tensor, Any]:
    return velocity(img, timesteps[0], txt), info


SCHEDULE = [1.0, 0.93, 0.8, 0.71, 0.55, 0.4, 0.22, 0.1, 0.0]
SIGMAS = torch.tensor(SCHEDULE)


def solver(name: str, method: str, inverse: bool) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def compare(code: Path, image: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        start, info = image if inverse else noise, {"inject_step": 0}
        # Both ask for the velocity at the image itself at their own lowest time.
        schedule = [*SCHEDULE[:-1], methods.LOWEST_LEVEL]
        theirs, _ = getattr(uni_edit_flow(code), name)(
            network, start, None, SOURCE, None, None, schedule, inverse, info
        )
        sigmas = torch.tensor(schedule)
        sigmas = sigmas.flip(0) if inverse else sigmas
        *_, (ours, _) = methods.steps_of(method, engine.FLOW, unfolded(start), sigmas, packed(SOURCE))
        return theirs, folded(ours)

    return compare


def euler(code: Path, image: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    theirs, _ = uni_edit_flow(code).denoise(
        network, noise, None, SOURCE, None, None, SCHEDULE, False, {"inject_step": 0}
    )
    x, estimate = unfolded(noise), packed(SOURCE)
    for s, s_next in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
        x = engine.FLOW.step(x, estimate(x, s), s, s_next)
    return theirs, folded(x)


def edit_run(image: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor, seed: int) -> engine.EditRun:
    return engine.EditRun(
        path=engine.FLOW, sigmas=sigmas, image=unfolded(image), noise=unfolded(noise), noise_scale=1.0,
        start=unfolded(noise), seed=seed, target=packed(TARGET), source=packed(SOURCE), mask=None,
    )  # fmt: skip


def uni_edit(code: Path, image: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    published = uni_edit_flow(code)
    schedule = [*SCHEDULE[:-1], methods.LOWEST_LEVEL]
    info = {"inject_step": 0, "alpha": 0.6, "omega": 5.0, "zero_init": False}
    inverted, info = published.edit_uniedit(network, image, None, SOURCE, None, None, schedule, True, info)
    theirs, _ = published.edit_uniedit(
        network, inverted, None, TARGET, None, None, schedule, False, info, src_txt=SOURCE
    )
    # Ours returns the image at the last level, x / (1 - s); theirs takes x for it.
    scale = 1 - methods.LOWEST_LEVEL
    start = edit_run(image / scale, noise, torch.tensor(schedule), 0)
    *_, (ours, _) = uni_edit_sampler(0.6, 5.0).algorithm(start)
    return theirs, folded(ours) * scale


class Pipe:
    """What FlowEdit's code calls of a diffusers pipeline."""

    vae_scale_factor = 8
    do_classifier_free_guidance = True

    def __init__(self) -> None:
        self.transformer = self.scheduler = self
        self.order = 1
        self.config = SimpleNamespace(in_channels=4 * SHAPE[2], guidance_embeds=False)

    def __call__(self, hidden_states: torch.Tensor, timestep: torch.Tensor, **named: Any) -> tuple[torch.Tensor]:
        prompts = named["encoder_hidden_states"]
        rows = prompts.tolist() if isinstance(prompts, torch.Tensor) else [prompts]
        # SD3's timesteps are 0 to 1000, Flux's are divided before.
        t = timestep[0] / 1000 if isinstance(prompts, torch.Tensor) else timestep[0]
        return (torch.cat([velocity(x[None], t, row) for x, row in zip(hidden_states, rows, strict=True)]),)

    def check_inputs(self, **_: Any) -> None: ...

    def prepare_latents(self, latents: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return latents, None

    def _pack_latents(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return folded(x)

    def _unpack_latents(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return unfolded(x)

    def _prepare_latent_image_ids(self, *_: Any) -> None: ...

    def encode_prompt(self, prompt: float, **named: Any) -> tuple[Any, ...]:
        if "negative_prompt" in named:
            rows = torch.tensor([prompt]), torch.tensor([named["negative_prompt"]])
            return (*rows, *rows)
        return prompt, None, None


@contextmanager
def noise_of(draws: torch.Tensor) -> Iterator[None]:
    """The pack's noise for the published code."""
    rows = iter(draws)
    with mock.patch("torch.randn_like", lambda like: next(rows).reshape(like.shape).to(like)):
        yield


def flow_edit_flux(code: Path, image: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    steps, n_max, n_min = 14, 11, 3
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.15, base_shift=0.5)
    published = load(code / "FlowEdit" / "FlowEdit_utils.py", {})
    draws = independent_noise(steps, unfolded(image), 7)
    with noise_of(torch.stack([folded(each) for each in draws[steps - n_max :]])):
        theirs = published.FlowEditFLUX(
            Pipe(), scheduler, unfolded(image), SOURCE, TARGET, EMPTY, steps, 1, 1.5, 5.5, n_min, n_max
        )
    run = edit_run(image, noise, scheduler.sigmas.float(), 7)
    *_, (ours, _) = flow_edit_sampler(1 - n_max / steps, n_min / steps).algorithm(run)
    return folded(theirs), folded(ours)


def flow_edit_sd3(code: Path, image: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    steps, n_max, averages = 12, 8, 2
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    published = load(code / "FlowEdit" / "FlowEdit_utils.py", {})
    draws = independent_noise(steps * averages, unfolded(image), 7)
    used = torch.stack([folded(each) for each in draws[(steps - n_max) * averages :]])
    with noise_of(used):
        theirs = published.FlowEditSD3(
            Pipe(), scheduler, image, SOURCE, TARGET, EMPTY, steps, averages, 3.5, 13.5, 0, n_max
        )

    def guided(prompt: float, scale: float) -> methods.Estimate:
        conditional, unconditional = packed(prompt), packed(EMPTY)
        return lambda x, s: torch.lerp(unconditional(x, s), conditional(x, s), scale)

    run = edit_run(image, noise, scheduler.sigmas.float(), 7)
    run = engine.EditRun(**{**vars(run), "source": guided(SOURCE, 3.5), "target": guided(TARGET, 13.5)})
    *_, (ours, _) = flow_edit_sampler(1 - n_max / steps, 0.0, averages).algorithm(run)
    return theirs, folded(ours)


class RFPipeline(Pipe):
    """What the code of RF-Inversion calls of a diffusers pipeline."""

    def encode_prompt(self, prompt: Any, **_: Any) -> tuple[Any, ...]:
        return (EMPTY if prompt == "" else TARGET), None, None

    def progress_bar(self, total: int) -> Any:
        bar = mock.MagicMock()
        bar.__enter__.return_value = bar
        return bar


def rf_inversion_both(code: Path, image: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    published = load(code / "rf-inversion-diffuser" / "inversion_editing_cli.py", {})
    pipe, steps, latent = RFPipeline(), 14, unfolded(image)
    with mock.patch("torch.randn", lambda *_, **__: noise), mock.patch("builtins.print"):
        inverted = published.interpolated_inversion(pipe, latent, 0.5, torch.float32, steps, False)
        theirs = published.interpolated_denoise(
            pipe, latent, 0.9, "constant", 1, 5, inverted, True, num_steps=steps, use_shift_t_sampling=False,
            DTYPE=torch.float32, prompt="edit",
        )  # fmt: skip
    sigmas = torch.tensor(published.get_schedule(steps, 4096, shift=False))
    levels = sigmas.flip(0)
    *_, (start, _) = rf_inversion.controlled_inversion(latent, unfolded(noise), levels, packed(EMPTY), 0.5)
    run = engine.EditRun(**{**vars(edit_run(image, noise, sigmas, 0)), "start": start})
    *_, (ours, _) = rf_inversion.rf_inversion_sampler(0.9, 1 / steps, 5 / steps).algorithm(run)
    return folded(theirs), folded(ours)


COMPARISONS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "Euler": euler,
    "RF-Solver, inversion": solver("denoise_rf_solver", methods.MIDPOINT, True),
    "RF-Solver, sampling": solver("denoise_rf_solver", methods.MIDPOINT, False),
    "midpoint, inversion": solver("denoise_midpoint", methods.MIDPOINT, True),
    "FireFlow, inversion": solver("denoise_fireflow", methods.FIREFLOW, True),
    "FireFlow, sampling": solver("denoise_fireflow", methods.FIREFLOW, False),
    "Uni-Inv": solver("denoise_uniinv", methods.UNI_INV, True),
    "Uni-Edit": uni_edit,
    "FlowEdit, Flux": flow_edit_flux,
    "FlowEdit, Stable Diffusion 3": flow_edit_sd3,
    "RF-Inversion, both directions": rf_inversion_both,
}
