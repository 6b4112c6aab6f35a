"""Other packs beside this one in a real ComfyUI: those that patch the same attention, and those with bad manners.

Two small packs stand for many. One takes the `attn2` slot of every block and adds the attention of an image prompt to
it, with weights and tokens made while a prompt runs. The other uses the lists `attn1_patch` and `attn2_patch` and the
one `optimized_attention_override`. Each is put in front of a node of ours and behind it.
"""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from api_client import Client
from engine import PACK_FOLDER, Server

from .test_timestep_aware_edit import Prompt, inversion_prompt, node, text_optimization, with_image

STEPS = 2

IMAGE_PROMPT = '''
"""An image prompt on the attn2 slot of every block, the last owner of a slot wins."""
import torch
from comfy.ldm.modules.attention import optimized_attention


class Slot:
    def __init__(self, kwargs):
        self.kwargs = [kwargs]

    def __call__(self, q, k, v, extra):
        out = optimized_attention(q, k, v, extra["n_heads"])
        for given in self.kwargs:
            layer = given["layers"][str(k.shape[-1])]
            tokens = layer(given["tokens"].to(k)).repeat(len(q), 1, 1)
            out = out + given["weight"] * optimized_attention(q, tokens, tokens, extra["n_heads"])
        return out


class ImagePrompt:
    CATEGORY, FUNCTION, RETURN_TYPES = "neighbors", "apply", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "strength": ("FLOAT", {"default": 0.5})}}

    def apply(self, model, strength):
        model = model.clone()
        network = model.model.diffusion_model
        middle = [network.middle_block]
        places = [("input", network.input_blocks), ("middle", middle), ("output", network.output_blocks)]
        found, layers = [], torch.nn.ModuleDict()
        generator = torch.Generator().manual_seed(0)
        for name, blocks in places:
            for number, block in enumerate(blocks):
                for transformer in (part for part in block if hasattr(part, "transformer_blocks")):
                    for index, inner in enumerate(transformer.transformer_blocks):
                        width = inner.attn2.to_k.out_features
                        if str(width) not in layers:
                            layers[str(width)] = torch.nn.Linear(32, width, bias=False)
                            layers[str(width)].weight.data = torch.randn(width, 32, generator=generator) / 6
                        found.append((name, number, index))
        tokens = torch.randn(1, 4, 32, generator=generator)
        for name, number, index in found:
            slot = Slot({"layers": layers, "tokens": tokens, "weight": strength})
            model.set_model_attn2_replace(slot, name, number, index)
        return (model,)


NODE_CLASS_MAPPINGS = {"NeighborImagePrompt": ImagePrompt}
'''

ATTENTION_LISTS = '''
"""Patches on the lists and the one override of the attention function."""


class AttentionLists:
    CATEGORY, FUNCTION, RETURN_TYPES = "neighbors", "apply", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "strength": ("FLOAT", {"default": 0.5})}}

    def apply(self, model, strength):
        def lower_values(n, context, value, extra):
            return n, context, (context if value is None else value) * (1.0 - 0.3 * strength)

        def lower_queries(n, context, value, extra):
            return n * (1.0 - strength), context, value

        def override(function, *args, **kwargs):
            return function(*args, **kwargs) * (1.0 - 0.2 * strength)

        model = model.clone()
        model.set_model_attn1_patch(lower_values)
        model.set_model_attn2_patch(lower_queries)
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        return (model,)


NODE_CLASS_MAPPINGS = {"NeighborAttentionLists": AttentionLists}
'''

NODE = """
class Nothing:
    CATEGORY, FUNCTION, RETURN_TYPES = "neighbors", "apply", ("INT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def apply(self):
        return (0,)


"""

PACKS = {
    "neighbor_image_prompt": {"__init__.py": IMAGE_PROMPT},
    "neighbor_attention_lists": {"__init__.py": ATTENTION_LISTS},
    # Its own folder first on the path, and modules of our rooms' names left in sys.modules.
    "a_neighbor_with_our_names": {
        "__init__.py": """
            import sys
            from pathlib import Path

            sys.path.insert(0, str(Path(__file__).parent))
            import attention
            import pipelines
            from attention.capture import Nothing

            NODE_CLASS_MAPPINGS = {"NeighborWithOurNames": Nothing}
        """,
        "attention/__init__.py": "",
        "attention/capture.py": NODE,
        "attention/layers.py": "raise RuntimeError('the layers of another pack')",
        "pipelines.py": "raise_it = False",
        "demo_world.py": "raise RuntimeError('the demo world of another pack')",
        "extension.py": "raise RuntimeError('the extension of another pack')",
    },
    "neighbor_with_nodes": {
        "__init__.py": "from .nodes import NODE_CLASS_MAPPINGS",
        "nodes.py": NODE + "NODE_CLASS_MAPPINGS = {'NeighborWithNodes': Nothing}",
    },
    "neighbor_that_fails": {"__init__.py": "import a_library_that_nobody_has"},
}
OURS_WITH_THEIRS = ("NeighborImagePrompt", "NeighborAttentionLists")


class Neighborhood:
    """A ComfyUI with this pack and its neighbors; images are kept, as many cases ask for the same."""

    def __init__(self, process: Server) -> None:
        self.process = process
        self.client = Client(process.address)
        self._images: dict[str, np.ndarray] = {}

    def image(self, prompt: Prompt) -> np.ndarray:
        key = repr(prompt)
        if key not in self._images:
            run = self.client.run(prompt, timeout=600)
            (image,) = self.client.images(run, "result_shown")
            self._images[key] = np.asarray(image.convert("RGB"), dtype=np.int16)
            assert self._images[key].std() > 5
        return self._images[key]


@pytest.fixture(scope="module")
def neighborhood(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neighborhood]:
    base = tmp_path_factory.mktemp("neighbors")
    for pack, files in PACKS.items():
        for name, text in files.items():
            path = base / "custom_nodes" / pack / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text), encoding="utf-8")
    with Server(base, environment={"HF_HUB_OFFLINE": "1"}) as process:
        yield Neighborhood(process)


def test_it_loads_beside_packs_with_bad_manners(neighborhood: Neighborhood, node_classes: dict[str, Any]) -> None:
    assert neighborhood.process.pack_failure() is None
    known = neighborhood.client.object_info()
    assert set(node_classes) <= set(known)
    assert {known[key]["python_module"] for key in node_classes} == {f"custom_nodes.{PACK_FOLDER}"}
    assert {"NeighborWithOurNames", "NeighborWithNodes", *OURS_WITH_THEIRS} <= set(known)
    assert "a_library_that_nobody_has" in neighborhood.process.log_text()


# One graph a node of ours. Each takes a MODEL and gives one, with a positive conditioning to sample it with.


@dataclass(frozen=True)
class Case:
    """A node of ours between a model and a sampler.

    add: puts it into the prompt, after the given model; returns its MODEL and the positive conditioning.
    without: changed inputs of the node "ours" with which it does nothing at all.
    real: whether it edits the inverted image, whose noise and sigmas are then sampled.
    changes_image: whether it is there to change the image.
    """

    add: Callable[[Prompt, list[Any]], tuple[list[Any], list[Any]]]
    without: dict[str, Any]
    real: bool = False
    changes_image: bool = True


def style(prompt: Prompt, model: list[Any]) -> tuple[list[Any], list[Any]]:
    portrait = dict(framing="portrait", species="person", hair_color="red", hair_style="long", skin="tan")
    prompt["face"] = copy.deepcopy(prompt["image"])
    prompt["face"]["inputs"] |= portrait
    prompt["encoder"] = node("IdentityEditLoadWPlusEncoder", file="identity-edit-demo-w-plus.safetensors")
    prompt["w_plus"] = node("IdentityEditEncodeWPlus", encoder=["encoder", 0], faces=["face", 0])
    file = "identity-edit-demo-style.safetensors [style_attention]"
    prompt["style"] = node("IdentityEditLoadStyleAttention", file=file)
    settings = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "schedule": ""}
    links = {"style_attention": ["style", 0], "w_plus": ["w_plus", 0]}
    prompt["ours"] = node("IdentityEditApplyStyleCrossAttention", model=model, **links, **settings)
    return ["ours", 0], ["target", 0]


def prompt_to_prompt(prompt: Prompt, model: list[Any]) -> tuple[list[Any], list[Any]]:
    prompts = {"source_prompt": "an orange dog standing on the grass", "target_prompt": "an orange cat on the beach"}
    shares = {"cross_replace_steps": 0.8, "self_replace_steps": 0.4, "self_attention_grid": "automatic"}
    words = {"reweight": "", "blend_words": "", "blend_threshold": 0.3, "blend_start": 0.0}
    prompt["ours"] = node(
        "IdentityEditPromptToPrompt", model=model, clip=["model", 1], edit="refine", **prompts, **shares, **words
    )
    return ["ours", 0], ["ours", 1]


def mutual_self_attention(prompt: Prompt, model: list[Any]) -> tuple[list[Any], list[Any]]:
    links = {"inversion": ["inversion", 0], "source": ["source", 0]}
    prompt["ours"] = node("IdentityEditMutualSelfAttention", model=model, start_step=0.0, start_layer=-1, **links)
    return ["ours", 0], ["target", 0]


def text_injection(prompt: Prompt, model: list[Any]) -> tuple[list[Any], list[Any]]:
    links = {"sigmas": ["inversion", 2], "source": ["source", 0], "target": ["target", 0]}
    prompt["ours"] = node("IdentityEditTimestepAwareTextInjectionModel", model=model, ratio=0.5, eta=0.0, **links)
    return ["ours", 0], ["ours", 1]


def identity_attention(prompt: Prompt, model: list[Any]) -> tuple[list[Any], list[Any]]:
    settings = {"identity_prompt": "cat", "identity_words": "", "layers": "automatic"}
    prompt["ours"] = node("IdentityEditIdentityAttention", model=model, clip=["model", 1], **settings)
    return ["ours", 0], ["target", 0]


CASES = {
    "style cross-attention": Case(style, {"strength": 0.0}),
    "prompt-to-prompt": Case(prompt_to_prompt, {"cross_replace_steps": 0.0, "self_replace_steps": 0.0}),
    "mutual self-attention": Case(mutual_self_attention, {"start_step": 1.0}, real=True),
    "text injection": Case(text_injection, {"ratio": 0.0}, real=True),
    "identity attention": Case(identity_attention, {}, changes_image=False),
}


def graph(
    case: Case,
    neighbor: str | None = None,
    *,
    place: str = "before",
    strength: float = 0.5,
    ours: bool = True,
    changes: dict[str, Any] | None = None,
) -> Prompt:
    """A sampled image with our node, and with the neighbor before or after it."""
    prompt = inversion_prompt()
    prompt["inversion"]["inputs"]["steps"] = STEPS
    model: list[Any] = ["model", 0]
    positive: list[Any] = ["target", 0]
    if neighbor and place == "before":
        prompt["neighbor"] = node(neighbor, model=model, strength=strength)
        model = ["neighbor", 0]
    if ours:
        model, positive = case.add(prompt, model)
        prompt["ours"]["inputs"] |= changes or {}
    elif case.add is prompt_to_prompt:
        # Without control it samples its target prompt.
        prompt["target"]["inputs"]["text"] = "an orange cat on the beach"
    if neighbor and place == "after":
        prompt["neighbor"] = node(neighbor, model=model, strength=strength)
        model = ["neighbor", 0]
    prompt["guider"] = node("CFGGuider", model=model, positive=positive, negative=["empty", 0], cfg=4.0)
    prompt["sampler"] = node("KSamplerSelect", sampler_name="ddim")
    latent, sigmas = ["inversion", 1], ["inversion", 2]
    prompt["noise"] = node("DisableNoise")
    if not case.real:
        prompt["blank"] = node("EmptyLatentImage", width=128, height=128, batch_size=1)
        prompt["sigmas"] = node(
            "BasicScheduler", model=["model", 0], scheduler="ddim_uniform", steps=STEPS, denoise=1.0
        )
        prompt["noise"] = node("RandomNoise", noise_seed=3)
        latent, sigmas = ["blank", 0], ["sigmas", 0]
        del prompt["inversion"]
    prompt["samples"] = node(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        sampler=["sampler", 0],
        sigmas=sigmas,
        latent_image=latent,
    )
    # Prompt-to-prompt samples its source beside the target. Latents of a batch are decoded by other operations than a
    # single one, which some processors round otherwise: the target is decoded alone, as it is without the node.
    target = 1 if ours and case.add is prompt_to_prompt else 0
    prompt["result"] = node("LatentFromBatch", samples=["samples", 0], batch_index=target, length=1)
    return with_image(prompt, "result")


def difference(one: np.ndarray, two: np.ndarray) -> int:
    return int(np.abs(one - two).max())


@pytest.mark.parametrize("neighbor", OURS_WITH_THEIRS)
@pytest.mark.parametrize("name", CASES)
def test_both_effects_are_there_in_either_order(name: str, neighbor: str, neighborhood: Neighborhood) -> None:
    case = CASES[name]
    ours = neighborhood.image(graph(case))
    theirs = neighborhood.image(graph(case, neighbor, ours=False))
    before = neighborhood.image(graph(case, neighbor, place="before"))
    after = neighborhood.image(graph(case, neighbor, place="after"))
    assert difference(before, ours) > 10, "the neighbor has no effect"
    if case.changes_image:
        assert difference(before, theirs) > 10, "our node has no effect"
    else:
        assert difference(before, theirs) == 0
    assert difference(before, after) == 0, "the order of the two nodes matters"


@pytest.mark.parametrize("neighbor", OURS_WITH_THEIRS)
@pytest.mark.parametrize("name", CASES)
def test_a_node_that_does_nothing_leaves_the_other_exact(name: str, neighbor: str, neighborhood: Neighborhood) -> None:
    case = CASES[name]
    theirs = neighborhood.image(graph(case, neighbor, ours=False))
    ours = neighborhood.image(graph(case))
    for place in ("before", "after"):
        idle = neighborhood.image(graph(case, neighbor, place=place, changes=case.without))
        assert difference(idle, theirs) == 0, f"our node changes what the neighbor does {place} it"
        unpatched = neighborhood.image(graph(case, neighbor, place=place, strength=0.0))
        # Prompt-to-prompt adds its change to what the owner of a slot returns: the same numbers, rounded otherwise.
        assert difference(unpatched, ours) <= (1 if name == "prompt-to-prompt" else 0)


@pytest.mark.parametrize("neighbor", OURS_WITH_THEIRS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_pass_through_a_neighbor(checkpointing: bool, neighbor: str, neighborhood: Neighborhood) -> None:
    """Its tensors were made while a prompt ran, in inference mode, and autograd must save them all the same."""

    def fitted(strength: float | None) -> np.ndarray:
        prompt = inversion_prompt()
        prompt["inversion"]["inputs"]["steps"] = STEPS
        model: list[Any] = ["model", 0]
        if strength is not None:
            prompt["neighbor"] = node(neighbor, model=model, strength=strength)
            model = ["neighbor", 0]
        prompt["optimized"] = text_optimization(model=model, steps=2, learning_rate=0.05, checkpointing=checkpointing)
        prompt["guider"] = node(
            "CFGGuider", model=["model", 0], positive=["optimized", 0], negative=["empty", 0], cfg=4.0
        )
        prompt["noise"], prompt["sampler"] = node("DisableNoise"), node("KSamplerSelect", sampler_name="ddim")
        prompt["result"] = node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["inversion", 2],
            latent_image=["inversion", 1],
        )
        return neighborhood.image(with_image(prompt, "result"))

    assert difference(fitted(0.5), fitted(None)) > 2, "the neighbor's attention was not used in the optimization"
    assert difference(fitted(0.0), fitted(None)) <= 2
