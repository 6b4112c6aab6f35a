"""The nodes' good inputs with models as they are under dynamic VRAM, and what is asked of the nodes with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.gligen
import comfy.model_patcher
import comfy.ops
import imitation
import tiny_vision
import torch
from identity_edit_pack.pipelines.engine import edit_model
from identity_edit_pack.tests import tiny_models
from identity_edit_pack.tests.nodes.good_inputs import World, good
from identity_edit_pack.tests.nodes.test_bad_inputs import run, tensors_in
from identity_edit_pack.tests.nodes.test_low_memory import with_lora

import nodes as stock

WIDTH = 96
"""Channels of the UNet at which most of its weights are above the 16 KiB from which ComfyUI loads them dynamically."""


class WideWorld(World):
    """With weights of a size that ComfyUI brings layer by layer, on the processor.

    lora: whether MODEL and CLIP carry one.
    """

    def __init__(self, lora: bool) -> None:
        self.lora = lora

    def placed(self, patcher: Any, make: Callable[[], Any]) -> Any:
        """The patcher where this world's models are; `make` makes the same anew."""
        return patcher

    def unet(self, seed: int) -> Any:
        def make() -> Any:
            with imitation.plain_models():
                return tiny_models.sd1(seed, output_gain=0.1, model_channels=WIDTH)

        placed = self.placed(make(), make)
        return with_lora(placed, "attn2.to_k.weight") if self.lora else placed

    @functools.cached_property
    def model(self) -> Any:
        return self.unet(0)

    @functools.cached_property
    def other_model(self) -> Any:
        return self.unet(3)

    @functools.cached_property
    def edit_model(self) -> Any:
        return edit_model.as_edit_model(self.unet(4))

    @functools.cached_property
    def clip(self) -> Any:
        def make() -> Any:
            with imitation.plain_models():
                return World.clip.func(self)  # type: ignore[attr-defined]

        clip = make()
        clip.patcher = self.placed(clip.patcher, lambda: make().patcher)
        if self.lora:
            clip = clip.clone()
            clip.patcher = with_lora(clip.patcher, "mlp.fc1.weight")
        return clip

    @functools.cached_property
    def clip_vision(self) -> Any:
        with imitation.plain_models():
            made = tiny_vision.clip_vision()
        made.patcher = self.placed(made.patcher, lambda: made.patcher)
        made.load_device = made.patcher.load_device
        return made

    @functools.cached_property
    def control_net(self) -> Any:
        left_out = ("out_channels", "transformer_depth_output")
        config = tiny_models._unet_config(model_channels=WIDTH)
        with imitation.plain_models():
            network = comfy.cldm.cldm.ControlNet(
                **{name: value for name, value in config.items() if name not in left_out},
                hint_channels=3, num_heads=8, dtype=torch.float32, device="cpu",
                operations=comfy.ops.disable_weight_init,
            )  # fmt: skip
            tiny_models._draw_weights(network, 4)
            made = comfy.controlnet.ControlNet(network.eval(), load_device=imitation.CPU)
        made.control_model_wrapped = self.placed(made.control_model_wrapped, lambda: made.control_model_wrapped)
        made.load_device = made.control_model_wrapped.load_device
        return made

    @functools.cached_property
    def gligen(self) -> Any:
        network = self.model.model.diffusion_model
        widths = [block.attn1.to_q.in_features for block in blocks_of(network)]
        with imitation.plain_models():
            dense = comfy.gligen.GatedSelfAttentionDense
            layers = [dense(width, tiny_models.CONTEXT, 8, width // 8) for width in widths]
            position = comfy.gligen.PositionNet(tiny_models.CONTEXT, tiny_models.CONTEXT)
            made = comfy.gligen.Gligen(layers, position, tiny_models.CONTEXT)
            tiny_models._draw_weights(made, 6)
            for layer in layers:  # their gates are closed at the beginning of a training
                layer.alpha_attn.data.fill_(1.0)
                layer.alpha_dense.data.fill_(1.0)
            patcher = comfy.model_patcher.ModelPatcher(made.eval(), imitation.CPU, imitation.CPU)
        return self.placed(patcher, lambda: patcher)

    @property
    def model_with_style(self) -> Any:
        return run("ApplyStyleCrossAttention", good(self, "ApplyStyleCrossAttention"), self)[0]

    def with_control(self, positive: list[Any], negative: list[Any]) -> tuple[list[Any], list[Any]]:
        apply = stock.ControlNetApplyAdvanced().apply_controlnet
        return apply(positive, negative, self.control_net, self.images, 0.8, 0.0, 1.0)

    def with_gligen(self, conditioning: list[Any]) -> list[Any]:
        box = (torch.randn(1, tiny_models.CONTEXT, generator=torch.Generator().manual_seed(8)), 4, 4, 2, 2)
        return [
            [embedding, {**options, "gligen": ("position", self.gligen, [box])}] for embedding, options in conditioning
        ]


def blocks_of(network: torch.nn.Module) -> list[Any]:
    from comfy.ldm.modules.attention import BasicTransformerBlock

    return [module for module in network.modules() if isinstance(module, BasicTransformerBlock)]


class DynamicWorld(WideWorld):
    """The same with everything dynamic, on the device in host memory."""

    def __init__(self, lora: bool, device: torch.device) -> None:
        super().__init__(lora)
        self.device = device

    def placed(self, patcher: Any, make: Callable[[], Any]) -> Any:
        placed = imitation.on_device(patcher, self.device)

        def again(disable_dynamic: bool = False) -> Any:
            """What ComfyUI's loaders leave with a model: how it is loaded once more."""
            made = make()
            if disable_dynamic:
                return comfy.model_patcher.ModelPatcher(made.model, self.device, imitation.CPU)
            return imitation.on_device(made, self.device)

        placed.cached_patcher_init = (again, ())
        return placed


# -- cases -------------------------------------------------------------------------------------------------------------

MUCH = {"learning_rate": 0.1}
"""So that what is learned is as large as what it began with, and an error shows in numbers that hold both."""
MODERATE = {"learning_rate": 0.01}
"""The same for weights, of which whole layers have some tenths."""
CASES: dict[str, tuple[str, Callable[[WideWorld], dict[str, Any]]]] = {
    "null-text": ("NullTextOptimization", lambda w: {**MUCH, "inner_steps": 2}),
    "null-text, recomputed": ("NullTextOptimization", lambda w: {**MUCH, "inner_steps": 2, "checkpointing": True}),
    "null-text, adaptive": (
        "NullTextOptimization", lambda w: {**MUCH, "inner_steps": 2, "method": "null-text optimization (adaptive)"},
    ),
    "negative-prompt inversion": (
        "NullTextOptimization", lambda w: {"method": "negative-prompt inversion (fast)"},
    ),
    "null-text, ControlNet": (
        "NullTextOptimization",
        lambda w: {
            **MUCH, "inner_steps": 2,
            **dict(zip(("source", "negative"), w.with_control(w.conditioning(1), w.conditioning(3)), strict=True)),
        },
    ),
    "null-text, recomputed, ControlNet": (
        "NullTextOptimization",
        lambda w: {
            **MUCH, "inner_steps": 2, "checkpointing": True,
            **dict(zip(("source", "negative"), w.with_control(w.conditioning(1), w.conditioning(3)), strict=True)),
        },
    ),
    "null-text, ControlNet on the source alone": (
        "NullTextOptimization",
        lambda w: {
            **MUCH, "inner_steps": 2, "source": w.with_control(w.conditioning(1), w.conditioning(3))[0],
        },
    ),
    "null-text, GLIGEN": (
        "NullTextOptimization", lambda w: {**MUCH, "inner_steps": 2, "source": w.with_gligen(w.conditioning(1))},
    ),
    "null-text, style attention": (
        "NullTextOptimization", lambda w: {**MUCH, "inner_steps": 2, "model": w.model_with_style},
    ),
    "reference-guided null-text": ("ReferenceGuidedNullTextOptimizer", lambda w: {**MUCH, "inner_steps": 2}),
    "text embedding": ("OptimizeTextEmbedding", lambda w: {**MUCH, "steps": 2}),
    "text embedding, ControlNet": (
        "OptimizeTextEmbedding",
        lambda w: {**MUCH, "steps": 2, "target": w.with_control(w.conditioning(2), w.conditioning(3))[0]},
    ),
    "text embedding, GLIGEN": (
        "OptimizeTextEmbedding", lambda w: {**MUCH, "steps": 2, "target": w.with_gligen(w.conditioning(2))},
    ),
    "identity prior": ("TrainIdentityPrior", lambda w: {}),
    "identity prior, recomputed": ("TrainIdentityPrior", lambda w: {"training_settings": {"precision": "float32"}}),
    "subject, row for each step": ("TrainSubjectEmbedding", lambda w: MUCH),
    "subject, word": ("TrainSubjectEmbedding", lambda w: {**MUCH, "kind": "word"}),
    "identity words": ("TrainIdentityWords", lambda w: MUCH),
    "style attention": ("TrainStyleAttention", lambda w: MUCH),
    "MCDM, UNet alone": ("TrainMCDM", lambda w: MODERATE),
    "MCDM, whole checkpoint": ("TrainMCDM", lambda w: {**MODERATE, "mcdm_settings": {}}),
}  # fmt: skip
"""Nodes with gradients, and what is different from their good inputs."""
WITHOUT_GRADIENT = "k_proj.bias"
"""A softmax does not see what is added to all keys: the gradient is rounding alone, of which Adam makes a step."""


def results_of(
    world: WideWorld, case: str, root: Path, before: Callable[[], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors that a node gives, that stand in the files it writes, and what its MODEL samples afterwards.

    Args:
        case: of `CASES`, or a node's name.
        root: the folder of ComfyUI's folders.
        before: called between the making of the inputs and the node.
    """
    from safetensors.torch import load_file

    node, change = CASES.get(case, (case, lambda w: {}))
    inputs = {**good(world, node), **change(world)}
    there = set(root.rglob("*.safetensors"))
    before()
    for number, tensor in enumerate(tensors_in(run(node, inputs, world))):
        yield f"output {number}", tensor
    for path in sorted(set(root.rglob("*.safetensors")) - there):
        weights = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(WITHOUT_GRADIENT)}
        yield path.name, torch.cat([weights[name].float().flatten() for name in sorted(weights)])
    yield "image of the model afterwards", sampled(world)


def sampled(world: WideWorld) -> torch.Tensor:
    """A step with the MODEL, as a stock sampler makes it."""
    from identity_edit_pack.tests.attention.sampling import sample

    with torch.inference_mode():
        return sample(world.model, world.latent["samples"])
