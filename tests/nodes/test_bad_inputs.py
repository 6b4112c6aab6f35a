"""Every node with every wrong input that a user can hand it: it works, or says in one sentence what to do.

Good inputs are in `good_inputs`, what is done to them in `bad_values`. What the checks that all nodes share refuse, or
bring to the form of the good input, is proved once in `test_sockets` and left out here. A node must give finite results
or raise `IdentityEditError`; it raises nothing else, gives no NaN, and changes no input.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.samplers
import pytest
import torch
from identity_edit_pack.nodes import sockets
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests.nodes.bad_values import variants
from identity_edit_pack.tests.nodes.good_inputs import CLASSES, GOOD, World, good, world_in

COSTLY = {
    "steps", "inner_steps", "seeds", "count", "sampling_steps", "updates_per_step", "batch_size",
    "gradient_accumulation", "size", "width", "height", "max_new_tokens", "attempts", "longest_side", "image_tokens",
    "noise_steps", "tokens",
}  # fmt: skip
"""Integers whose largest value is honest work of hours; only their least ones are tried."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        yield world_in(tmp_path_factory.mktemp("comfyui"), patch)


def test_every_node_has_an_entry() -> None:
    assert set(GOOD) == set(CLASSES)


def run(name: str, inputs: dict[str, Any], world: World) -> tuple[Any, ...]:
    """The node's outputs, as ComfyUI runs it; models and guiders that it gives are sampled from."""
    with torch.inference_mode():
        outputs = CLASSES[name].execute(**as_comfyui_gives(name, inputs)).args
        outputs += use(name, outputs, world)
    return outputs


def as_comfyui_gives(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs as the node gets them: in lists where its schema says so."""
    if not CLASSES[name].GET_SCHEMA().is_input_list:
        return dict(inputs)
    return {key: value if value is None or isinstance(value, list) else [value] for key, value in inputs.items()}


SAMPLED = {
    "NullTextOptimization": 8, "LoadInversion": 8, "TimestepAwareTextInjectionModel": 8, "IdentityAttention": 77,
    "ApplySubject": 77, "MutualSelfAttention": 8, "PromptToPrompt": 77, "PairGuider": 8, "MCDMGuider": 8,
    "ApplyStyleCrossAttention": 8, "LoadIdentityPrior": 77, "TimestepAwareTextInjection": 8,
}  # fmt: skip
"""Nodes whose models, guiders and conditionings are sampled with, and the tokens of the prompts for it."""


def use(name: str, outputs: tuple[Any, ...], world: World) -> tuple[Any, ...]:
    """What comes after a node: an input that it has accepted must not fail only there."""
    if name not in SAMPLED:
        return ()
    kinds = [output.get_io_type() for output in CLASSES[name].define_schema().outputs]
    given = dict(zip(kinds, outputs, strict=True))
    guider = given.get("GUIDER")
    if guider is None:
        guider = comfy.samplers.CFGGuider(given.get("MODEL", world.model))
        positive = given.get("CONDITIONING", world.conditioning(2, SAMPLED[name]))
        guider.set_conds(positive, world.conditioning(3, SAMPLED[name]))
        guider.set_cfg(2.0)
    latent = world.inversion.start_latent(world.model)
    if name == "PairGuider":
        latent = torch.cat([latent, latent], dim=3)
    channels = guider.model_patcher.get_model_object("latent_format").latent_channels
    if latent.shape[1] != channels:  # a model of another family, with a latent of its own
        latent = latent[:, :1].expand(-1, channels, -1, -1)
    sampler = comfy.samplers.sampler_object("euler")
    return (guider.sample(torch.zeros_like(latent), latent, sampler, world.sigmas, disable_pbar=True, seed=7),)


# -- what must hold ----------------------------------------------------------------------------------------------------


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors inside of what goes through sockets; networks are left out."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(first.detach().nan_to_num(7.0), second.detach().nan_to_num(7.0))


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from numbers_in(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from numbers_in(each)


def complaint_about_message(text: str) -> str | None:
    """A message is one sentence with a remedy: what is wrong; what to do."""
    if len(text.splitlines()) != 1 or not text.endswith("."):
        return f"no sentence: {text!r}"
    if not re.search(r"[;,:.] ", text):
        return f"no remedy: {text!r}"
    return f"{len(text)} characters: {text[:200]!r}" if len(text) > 700 else None


def fault(name: str, inputs: dict[str, Any], world: World) -> str | None:
    """What a node does wrong with these inputs, or None."""
    before = [tensor.detach().clone() for tensor in tensors_in(inputs)]
    model = inputs.get("model")
    patches = None if model is None or isinstance(model, str) else (len(model.patches), sorted(model.model_options))
    try:
        outputs = run(name, inputs, world)
    except IdentityEditError as error:
        outputs = ()
        found = complaint_about_message(str(error))
        if found:
            return found
    except Exception as error:
        if "Expected more than 1 value per channel" in str(error):
            return None  # torch, of a group of one number: real models have ten channels in a group where this has one
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}{place(error)}"
    if not all(map(same, before, tensors_in(inputs))):
        return "an input was changed"
    if patches is not None and patches != (len(model.patches), sorted(model.model_options)):
        return "the model was changed"
    for output in outputs:
        for tensor in tensors_in(output):
            if not bool(torch.isfinite(tensor).all()):
                return "a result is not finite"
        if not all(map(math.isfinite, numbers_in(output))):
            return "a number is not finite"
    return None


def place(error: Exception) -> str:
    """The last lines of the pack on the way to an exception."""
    trace, found = error.__traceback__, []
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.parts[-2] in ("nodes", "pipelines", "attention", "engine") and "tests" not in path.parts:
            found.append(f"{path.parts[-2]}/{path.name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f" ({' < '.join(found[::-1][:3])})" if found else ""


pytestmark = pytest.mark.fuzz
QUICK = {
    "below the least", "beyond the most", "nan", "not among them", "upwards", "off", "empty", "unicode",
    "NUL", "path upwards", "a path upwards",
}  # fmt: skip
WIDGETS = ("INT", "FLOAT", "BOOLEAN", "COMBO", "STRING")
"""What is tried on the widgets of the nodes that train, as each value that is taken costs a training."""
INPUTS = [(name, item.id) for name, node in CLASSES.items() for item in node.define_schema().inputs]


@pytest.mark.parametrize("name", GOOD)
def test_good_inputs_are_good(name: str, world: World) -> None:
    outputs = run(name, good(world, name), world)
    assert len(outputs) >= len(CLASSES[name].define_schema().outputs)
    for tensor in tensors_in(outputs):
        assert bool(torch.isfinite(tensor).all())


def is_left_to_the_node(name: str, inputs: dict[str, Any], good_inputs: dict[str, Any]) -> bool:
    """Whether inputs pass the shared checks, and reach the node as others than the good ones."""
    schema = CLASSES[name].GET_SCHEMA()
    given, expected = as_comfyui_gives(name, inputs), as_comfyui_gives(name, good_inputs)
    try:
        sockets.check_inputs(schema, given)
    except IdentityEditError:
        return False
    sockets.bring_to_form(schema, given)
    sockets.bring_to_form(schema, expected)
    return any(not alike(given[key], expected.get(key)) for key in given)


def alike(value: Any, other: Any) -> bool:
    """Whether no node could tell one value from another; only of tensors is that asked."""
    if not (isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor)):
        return value is other
    facts = [(t.shape, t.dtype, t.stride(), t.requires_grad) for t in (value, other)]
    return facts[0] == facts[1] and torch.equal(value, other)


@pytest.mark.parametrize(("name", "input_name"), INPUTS)
def test_bad_inputs(name: str, input_name: str, world: World) -> None:
    item = next(item for item in CLASSES[name].define_schema().inputs if item.id == input_name)
    inputs = good(world, name)
    value = inputs.get(input_name)
    if isinstance(value, list) and CLASSES[name].define_schema().is_input_list:
        value = value[0]
    if value is None:
        value = world.example(item.get_io_type())
    faults = []
    for variant, bad in variants(item, value).items():
        if variant == "most" and input_name in COSTLY:
            continue
        if "training_settings" in inputs and item.get_io_type() in WIDGETS and variant not in QUICK:
            continue
        if not is_left_to_the_node(name, {**inputs, input_name: bad}, inputs):
            continue
        found = fault(name, {**inputs, input_name: bad}, world)
        if found:
            faults.append(f"{variant}: {found}")
    assert not faults, "\n" + "\n".join(faults)
