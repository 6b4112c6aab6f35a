"""Every node that is given a MODEL or a CLIP, with as little memory on the device as `--lowvram` and `--novram` leave.

ComfyUI then keeps some weights, or all, where they are and computes with copies, into which a LoRA is put on the way.
On a CPU it never does: here it is told that the CPU is none and has little memory, so that its real loading runs.
The results must be those of a model that is loaded completely. Trainings ask ComfyUI for that themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import torch
from identity_edit_pack.tests.nodes.good_inputs import CLASSES, World, good, world_in
from identity_edit_pack.tests.nodes.test_bad_inputs import run, tensors_in

pytestmark = pytest.mark.slow

LITTLE, NOTHING = "a little of the model", "nothing of it"
RUN_NO_NETWORK = {"ScoreModels", "SelectEdit", "InversionSampler", "SourceTargetGuider", "DirectInversionSampler"}
TRAINS = {name for name in CLASSES if name.startswith("Train")} | {"ImagicFineTuning"}
"""Nodes whose trained weights are in memory even where little of the model is."""
NODES = [
    name
    for name, node in CLASSES.items()
    if {"MODEL", "CLIP"} & {kind for item in node.define_schema().inputs for kind in item.get_io_type().split(",")}
]


class WorldWithLoRA(World):
    """Its models and text encoders carry a LoRA, as most users' do."""

    @functools.cached_property
    def model(self) -> Any:
        return with_lora(super().model, "attn2.to_k.weight")

    @functools.cached_property
    def edit_model(self) -> Any:
        return with_lora(super().edit_model, "attn2.to_k.weight")

    @functools.cached_property
    def clip(self) -> Any:
        clip = super().clip.clone()
        clip.patcher = with_lora(clip.patcher, "mlp.fc1.weight")
        return clip


def with_lora(patcher: Any, ending: str) -> Any:
    """A clone whose weights of some name are changed, by a patch as a LoRA's."""
    generator = torch.Generator().manual_seed(5)
    weights = {key: value for key, value in patcher.model.state_dict().items() if key.endswith(ending)}
    assert weights
    changed = patcher.clone()
    changed.add_patches({key: (0.05 * torch.randn(old.shape, generator=generator),) for key, old in weights.items()})
    return changed


def of_little_memory(patch: pytest.MonkeyPatch, share: str) -> None:
    """From now on models are loaded in part only: "a little of the model", or "nothing of it"."""
    management = comfy.model_management
    patch.setattr(management, "is_device_cpu", lambda device: False)
    if share == NOTHING:
        patch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    else:
        patch.setattr(management, "vram_state", management.VRAMState.LOW_VRAM)
        # What is free beside the reserve; the tiny networks have some hundred KiB.
        free = management.minimum_inference_memory() + 2**16

        def get_free_memory(device: Any = None, torch_free_too: bool = False) -> Any:
            return (free, free) if torch_free_too else free

        patch.setattr(management, "get_free_memory", get_free_memory)


@functools.cache
def shared_world() -> WorldWithLoRA:
    """What its inputs are made of is the same for all nodes and all sizes of memory; files are each one's own."""
    return WorldWithLoRA()


def results_of(name: str, root: Path, share: str | None) -> tuple[list[torch.Tensor], list[int]]:
    """The node's tensors, and of each network that was loaded in part how many weights were patched on the way."""
    (root / str(share)).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        world_in(root / str(share), patch)
        world = shared_world()
        inputs = good(world, name)
        comfy.model_management.unload_all_models()  # what the inputs were made with
        if share is not None:
            of_little_memory(patch, share)
        partly: list[int] = []
        count_partial_loads(patch, partly)
        tensors = [tensor.detach().clone() for tensor in tensors_in(run(name, inputs, world))]
        comfy.model_management.unload_all_models()
        return tensors, partly


def count_partial_loads(patch: pytest.MonkeyPatch, partly: list[int]) -> None:
    load: Callable[..., Any] = comfy.model_management.LoadedModel.model_load

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(self, *args, **kwargs)
        if getattr(loaded, "model_lowvram", False):
            partly.append(self.model.lowvram_patch_counter())
        return loaded

    patch.setattr(comfy.model_management.LoadedModel, "model_load", counting)


@functools.cache
def stock_encoding_keeps_a_lora() -> bool:
    """Whether ComfyUI's own text encoding, without a node of the pack, is the same with little memory; 0.33.0's is not
    for a CLIP with a LoRA that has been loaded before."""
    clip = WorldWithLoRA().clip
    embeddings = []
    for share in (None, LITTLE):
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            if share is not None:
                of_little_memory(patch, share)
            embeddings.append(clip.encode_from_tokens(clip.tokenize("a cat")).clone())
            comfy.model_management.unload_all_models()
    return torch.allclose(*embeddings, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NODES)
def test_a_node_gives_what_it_gives_with_enough_memory(name: str, tmp_path: Path) -> None:
    has_clip = "CLIP" in {item.get_io_type() for item in CLASSES[name].GET_SCHEMA().inputs}
    if has_clip and not stock_encoding_keeps_a_lora():
        pytest.skip("this ComfyUI's own text encoding loses the LoRA of a CLIP that is loaded in part")
    expected, never = results_of(name, tmp_path, None)
    assert never == []
    for share in (LITTLE, NOTHING):
        found, partly = results_of(name, tmp_path, share)
        assert partly or name in RUN_NO_NETWORK or (share == LITTLE and name in TRAINS), share
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
