"""Random valid graphs: nodes of the pack and stock nodes, joined by socket types as the server's /object_info has them.

A graph is built around a target node. Every socket gets an output of its type: one that the graph has already, or that
of a new node, which gets its own in turn; then nodes are put behind the target, and what is left open is shown. A node
is joined only to nodes that are complete, so that no circle can come about. Widgets are drawn within their ranges and
below the limits that keep a prompt cheap.

Every decision is one call of `choose(options)`, whose first option is the plain one. Hypothesis gives such a function
and shrinks toward the first options; `first_of` gives the plainest graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from api_client import Prompt

Choose = Callable[[Sequence[Any]], Any]
Link = list[Any]

PREFIX = "IdentityEdit"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
MOST_NODES = 28
"""Beyond this number every socket gets the cheapest source."""
MOST_DEPTH = 4

STOCK = (  # fmt: skip
    "BasicGuider",
    "BasicScheduler",
    "CFGGuider",
    "CLIPSetLastLayer",
    "CLIPTextEncode",
    "CLIPVisionEncode",
    "CheckpointLoaderSimple",
    "ConditioningAverage",
    "ConditioningCombine",
    "ConditioningConcat",
    "ConditioningSetArea",
    "ConditioningSetMask",
    "ConditioningSetTimestepRange",
    "ConditioningZeroOut",
    "ControlNetApplyAdvanced",
    "ControlNetLoader",
    "CropMask",
    "DifferentialDiffusion",
    "DisableNoise",
    "DualCFGGuider",
    "EmptyImage",
    "EmptyLatentImage",
    "FeatherMask",
    "FlipSigmas",
    "FreeU_V2",
    "GrowMask",
    "HyperTile",
    "ImageBatch",
    "ImageCompositeMasked",
    "ImageCrop",
    "ImageFromBatch",
    "ImageInvert",
    "ImageScale",
    "ImageToMask",
    "InpaintModelConditioning",
    "InstructPixToPixConditioning",
    "InvertMask",
    "KSampler",
    "KSamplerAdvanced",
    "KSamplerSelect",
    "LatentFlip",
    "LatentFromBatch",
    "LatentUpscale",
    "LossGraphNode",
    "MaskComposite",
    "MaskPreview",
    "MaskToImage",
    "ModelSamplingDiscrete",
    "PerturbedAttentionGuidance",
    "PreviewAny",
    "PreviewImage",
    "RandomNoise",
    "RepeatLatentBatch",
    "RescaleCFG",
    "SamplerCustom",
    "SamplerCustomAdvanced",
    "SelfAttentionGuidance",
    "SetLatentNoiseMask",
    "SolidMask",
    "SplitSigmas",
    "ThresholdMask",
    "TomePatchModel",
    "UNETLoader",
    "VAEDecode",
    "VAEEncode",
    "VAEEncodeForInpaint",
)
"""Stock nodes that take part: those that workflows with the pack's sockets are made of. A fixed list, because the
others need models, accounts or minutes."""

LIMITS: dict[str, tuple[float, float]] = {
    "steps": (1, 3),
    "inner_steps": (0, 2),
    "noise_steps": (1, 3),
    "sampling_steps": (1, 4),
    "updates_per_step": (0, 2),
    "seeds": (1, 3),
    "count": (1, 2),
    "attempts": (1, 2),
    "batch_size": (1, 2),
    "amount": (1, 2),
    "length": (1, 2),
    "batch_index": (0, 2),
    "gradient_accumulation": (1, 2),
    "sample_every": (0, 2),
    "checkpoint_every": (0, 2),
    "width": (64, 128),
    "height": (64, 128),
    "size": (64, 128),
    "longest_side": (64, 256),
    "max_new_tokens": (1, 8),
    "words": (1, 4),
    "tokens": (1, 6),
    "rank": (1, 64),
    "image_tokens": (0, 77),
    "kernel": (1, 9),
    "self_attention_power": (0, 3),
    "learning_rate": (1e-6, 1e-2),
    "expand": (-8, 8),
    "swap_size": (1, 4),
    "tile_size": (16, 128),
}
"""The range of a number by its widget's name, within which it is drawn where the node's own range is wider."""
MOST_OF_OTHERS = 1000
"""The largest number drawn for a widget without a limit of its own."""

PROMPTS = ["an orange cat standing on the grass", "a portrait of a smiling person with short brown hair", "", "sks cat"]
STRANGE = "ü ☃ (((:1.2 \\ 雪"
STRINGS: dict[str, list[str]] = {
    "class_word": ["cat", "person", ""],
    "token": ["sks", ""],
    "subject": ["cat", "", "cat and dog"],
    "identity_prompt": ["cat", "an orange cat", ""],
    "identity_words": ["", "cat", "cat, grass"],
    "subject_words": ["", "cat"],
    "blend_words": ["", "cat", "cat; dog"],
    "reweight": ["", "cat 2", "cat: 0.5"],
    "caption": ["", "a cat on the grass"],
    "captions": ["a sks cat standing on the grass", "", "a sks cat\na cat\na dog"],
    "points": ["", "32, 32", "10,10; 20,20"],
    "box": ["", "8, 8, 64, 64"],
    "timesteps": ["1, 101", "500", "1001", ""],
    "rows": ["10-18", "1", "0-99", ""],
    "row_groups": ["1-5, 6-9, 10-13, 14-18", "1-18", "3"],
    "schedule": ["", "0:1, 0.5:0", "1"],
    "edits": ["smiling: a portrait of a {subject} -> a portrait of a smiling {subject}", "no arrow", ""],
    "subjects": ["person", "man\nwoman", ""],
    "own_prompts": ["a cat\na dog", ""],
    "edit": ["smiling", "", "a/b"],
    "name": ["subject", "../subject", ""],
    "part": ["", "1/2"],
    "filename_prefix": ["random/file", "random/%date%", "", "../file"],
    "folder": ["pairs/random", "pairs", "", "../pairs"],
}
"""Texts by the widget's name, the plain one first; widgets named after prompts get PROMPTS, others what is here or
their default. A strange text is among the options of all of them."""

DEMO, DEMO_MCDM = "identity-edit-demo.safetensors", "identity-edit-demo-mcdm.safetensors"
DEMO_FLOW = "identity-edit-demo-flow.safetensors"
MCDM_FILE = f"{DEMO_MCDM} [diffusion_models]"
OVERRIDES: dict[tuple[str, str], list[Any]] = {
    ("CheckpointLoaderSimple", "ckpt_name"): [DEMO] * 4 + [DEMO_FLOW],
    ("IdentityEditGeneratePairs", "folder"): ["pairs/generated", "pairs/random", ""],
    ("IdentityEditTrainMCDM", "folder"): ["pairs/random", "pairs/generated"] * 4 + ["pairs"],
    ("IdentityEditTrainMCDM", "image_embedding"): ["new", "new", MCDM_FILE],
    ("IdentityEditLoadInversion", "steps"): [0, 0, 0, 3, 2],  # 0 is the file's own number
    ("IdentityEditReferenceGuidedNullTextOptimizer", "steps"): [0, 0, 0, 2],
    ("IdentityEditTrainSubjectEmbedding", "masked_loss"): [False, False, True],
    ("IdentityEditTrainIdentityWords", "masked_loss"): [False, False, False, True],
    ("IdentityEditTrainIdentityPrior", "masked_loss"): [False, False, False, True],
    ("IdentityEditTrainStyleAttention", "masked_loss"): [False, False, False, True],
    ("IdentityEditAlignFace", "method"): ["whole image"] * 6 + ["detector", "points"],
    ("IdentityEditAlignFace", "background"): ["keep", "keep", "remove"],
    ("IdentityEditSaveSubjectAsEmbedding", "overwrite"): [True, True, True, False],
    ("IdentityEditLoadSubjectImages", "folder"): ["cat"] * 9 + ["3d"],
    ("IdentityEditLoadWPlusEncoder", "file"): ["identity-edit-demo-w-plus.safetensors"] * 3 + ["no model"],
    ("IdentityEditMCDMConditioner", "file"): [MCDM_FILE, MCDM_FILE, DEMO],
}
"""Options of one widget of one node, where the name alone does not tell them."""
FITTING: dict[tuple[str, str], tuple[str, int, dict[str, Any]]] = {
    ("IdentityEditMCDMConditioner", "model"): ("UNETLoader", 0, {"unet_name": DEMO_MCDM}),
    ("IdentityEditMCDMGuider", "model"): ("UNETLoader", 0, {"unet_name": DEMO_MCDM}),
    ("IdentityEditMCDMGuider", "positive"): ("IdentityEditMCDMConditioner", 0, {}),
    ("IdentityEditReplaceSubject", "inversion"): ("IdentityEditNullTextOptimization", 2, {}),
    ("IdentityEditAttentionHeatmap", "identity_attention"): ("IdentityEditIdentityAwareMaskBlend", 3, {}),
    ("IdentityEditInversionSampler", "inversion"): ("IdentityEditEditFriendlyDDPMInversion", 0, {}),
    ("IdentityEditDiffEdit", "inversion"): ("IdentityEditNoiseInversion", 0, {}),
    ("IdentityEditNullTextOptimization", "inversion"): ("IdentityEditNoiseInversion", 0, {}),
    ("IdentityEditSaveSubjectAsEmbedding", "subject"): ("IdentityEditTrainSubjectEmbedding", 0, {"kind": "word"}),
}
"""What some inputs need of all that their type allows, by class and input: (class, output, widgets). Three times of
four such a node is put there; without it these nodes would hardly ever come to compute anything."""
PLAIN = {"precision": "float32"}
"""The plain option of a combo by its name, where the default is slow: not every processor has bfloat16."""
ONCE = {"SelfAttentionGuidance"}
"""Stock nodes of which two on one model fail by themselves, under KSampler too."""
OFTEN_CONNECTED = (
    "negative", "model", "clip", "vae", "images", "identity_attention", "target", "mask", "masks", "training_settings",
)  # fmt: skip
SAMPLERS = ["euler", "ddim", "heun", "dpmpp_2m", "uni_pc", "euler_ancestral", "dpmpp_sde", "lcm", "ddpm"]
"""The others take many evaluations a step or are like these."""


def first_of(options: Sequence[Any]) -> Any:
    """The choice that makes the plainest graph."""
    return options[0]


@dataclass
class Catalog:
    """What can take part: the nodes of /object_info that are the pack's or in STOCK, and can be complete.

    Attributes:
        nodes: class -> its description by the server.
        producers: socket type -> (class, output index) of all nodes that give it, the cheapest first.
        consumers: socket type -> (class, input name) of all nodes that take it.
        left_out: nodes of the pack that cannot take part, and why.
    """

    nodes: dict[str, dict[str, Any]]
    producers: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    consumers: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, object_info: dict[str, Any]) -> Catalog:
        known = {key: info for key, info in object_info.items() if key.startswith(PREFIX) or key in STOCK}
        left_out = {key: f"{name} offers nothing" for key, info in known.items() for name in _empty_combos(info)}
        costs = _costs({key: info for key, info in known.items() if key not in left_out})
        for key in known:
            if key not in costs:
                left_out.setdefault(key, "nothing gives one of its inputs")
        catalog = cls({key: known[key] for key in sorted(costs)})
        catalog.left_out = {key: reason for key, reason in left_out.items() if key.startswith(PREFIX)}
        for key in sorted(costs, key=lambda key: (costs[key], key)):
            for index, kind in enumerate(known[key]["output"]):
                catalog.producers.setdefault(kind, []).append((key, index))
            for name, specification in inputs_of(known[key]).items():
                if is_socket(specification):
                    for kind in specification[0].split(","):
                        catalog.consumers.setdefault(kind, []).append((key, name))
        return catalog

    def of_the_pack(self) -> list[str]:
        return [key for key in self.nodes if key.startswith(PREFIX)]


def inputs_of(info: dict[str, Any], groups: Sequence[str] = ("required", "optional")) -> dict[str, list[Any]]:
    """The inputs of a node by name: [type or list of options, settings]."""
    return {name: list(value) for group in groups for name, value in info["input"].get(group, {}).items()}


def is_socket(specification: list[Any]) -> bool:
    return isinstance(specification[0], str) and specification[0] not in WIDGETS


def options_of(specification: list[Any]) -> list[Any] | None:
    """The options of a combo, in either of the two forms of /object_info; None for anything else."""
    if isinstance(specification[0], list):
        return specification[0]
    return specification[1].get("options", []) if specification[0] == "COMBO" else None


def _empty_combos(info: dict[str, Any]) -> list[str]:
    return [name for name, value in inputs_of(info, ("required",)).items() if options_of(value) == []]


def _costs(known: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Number of nodes that the cheapest way to a complete node takes; a training counts as many."""
    of_node: dict[str, int] = {}
    of_kind: dict[str, int] = {}
    changed = True
    while changed:
        changed = False
        for key, info in known.items():
            sockets = [value[0] for value in inputs_of(info, ("required",)).values() if is_socket(value)]
            needed = [min((of_kind[kind] for kind in socket.split(",") if kind in of_kind), default=None)
                      if socket != "*" else 0 for socket in sockets]  # fmt: skip
            if None in needed:
                continue
            own = 20 if info["output_node"] and info["output"] else 1
            cost = own + sum(cost for cost in needed if cost is not None)
            if cost < of_node.get(key, cost + 1):
                of_node[key] = cost
                changed = True
                for kind in info["output"]:
                    of_kind[kind] = min(cost, of_kind.get(kind, cost))
    return of_node


class Builder:
    """Builds one graph; see the module."""

    def __init__(self, catalog: Catalog, choose: Choose) -> None:
        self.catalog = catalog
        self.choose = choose
        self.prompt: Prompt = {}
        self.outputs: dict[str, list[Link]] = {}
        self.used: set[tuple[str, int]] = set()
        self.begun: set[str] = set()  # classes that are there, or will be once their inputs are

    def add(self, key: str, depth: int = 0, given: dict[str, Any] | None = None) -> str:
        """Add a node with all that it needs, and return its id.

        given: links or values for some of its inputs.
        """
        self.begun.add(key)
        info = self.catalog.nodes[key]
        required = info["input"].get("required", {})
        values: dict[str, Any] = dict(given or {})
        for name, specification in inputs_of(info).items():
            if name in values:
                continue
            if not is_socket(specification):
                values[name] = self.widget(key, name, specification)
            elif name in required or (depth < MOST_DEPTH and self.choose(self.optional(name))):
                kind = self.choose(specification[0].split(","))
                fitting = FITTING.get((key, name))
                if fitting and depth < MOST_DEPTH and self.choose([True, True, True, False]):
                    values[name] = [self.add(fitting[0], depth + 1, dict(fitting[2])), fitting[1]]
                elif kind in self.catalog.producers or kind == "*":
                    values[name] = self.source(kind, depth + 1)
        number = str(len(self.prompt) + 1)
        self.prompt[number] = {"class_type": key, "inputs": values}
        for value in values.values():
            if isinstance(value, list):  # a link
                self.used.add((value[0], value[1]))
        for index, kind in enumerate(info["output"]):
            self.outputs.setdefault(kind, []).append([number, index])
        return number

    @staticmethod
    def optional(name: str) -> list[bool]:
        """Whether an optional socket is connected: mostly those without which most settings are refused."""
        return [True, True, True, False] if name in OFTEN_CONNECTED else [False, False, False, True]

    def source(self, kind: str, depth: int) -> Link:
        """An output of a type: mostly one that is there, so that most of a graph shares one model."""
        if kind == "*":
            kind = self.choose(sorted(self.outputs) or ["IMAGE"])
        there = self.outputs.get(kind, [])
        ways = self.catalog.producers[kind]
        if there and (len(self.prompt) >= MOST_NODES or self.choose([True, True, True, False])):
            return self.choose(there)
        few = len(self.prompt) >= MOST_NODES or depth >= MOST_DEPTH
        key, index = ways[0] if few else self.choose(ways)
        if key in ONCE & self.begun:
            key, index = ways[0]
        return [self.add(key, depth, {}), index]

    def follow(self, number: str) -> str | None:
        """Put a node behind one that gives something; None where nothing takes what it gives."""
        info = self.catalog.nodes[self.prompt[number]["class_type"]]
        ways = [
            (index, key, name)
            for index, kind in enumerate(info["output"])
            for key, name in self.catalog.consumers.get(kind, [])
        ]
        if not ways:
            return None
        index, key, name = self.choose([way for way in ways if way[1] not in ONCE])
        return self.add(key, 1, {name: [number, index]})

    def show_the_rest(self) -> None:
        """Show an output of every node that nothing follows, else the server would leave it out."""
        followed = {number for number, _ in self.used}
        for number in list(self.prompt):
            info = self.catalog.nodes[self.prompt[number]["class_type"]]
            if number in followed or info["output_node"]:
                continue
            index = self.choose(range(len(info["output"])))
            kind = info["output"][index]
            shown = {"IMAGE": ("PreviewImage", "images"), "MASK": ("MaskPreview", "mask")}
            key, name = shown.get(kind, ("PreviewAny", "source"))
            self.add(key, 1, {name: [number, index]})

    def widget(self, key: str, name: str, specification: list[Any]) -> Any:
        """A value for a widget: its default first, then the ends of its range and others within."""
        kind, settings = specification[0], specification[1] if len(specification) > 1 else {}
        if (key, name) in OVERRIDES:
            return self.choose(OVERRIDES[key, name])
        options = SAMPLERS if name == "sampler_name" else options_of(specification)
        if options is not None:  # as with texts, mostly the plain one
            plain = PLAIN.get(name, settings.get("default", options[0]))
            return self.choose([plain] * len(options) + options)
        if kind == "BOOLEAN":
            return self.choose([settings.get("default", False), not settings.get("default", False)])
        if kind == "STRING":
            plain = STRINGS.get(name) or (PROMPTS if "prompt" in name or name == "text" else None)
            texts = plain or [settings.get("default", ""), ""]
            if name == "filename_prefix":  # the default's folder is where loaders look
                texts = [settings.get("default", ""), *texts]
            # Mostly plain ones: a graph that fails at its first node says nothing of the others.
            return self.choose([texts[0]] * 10 + [*texts, STRANGE])
        return self.number(kind, name, settings)

    def number(self, kind: str, name: str, settings: dict[str, Any]) -> int | float:
        low, high = LIMITS.get(name, (-MOST_OF_OTHERS, MOST_OF_OTHERS))
        low, high = max(low, settings.get("min", low)), min(high, settings.get("max", high))
        default = min(max(settings.get("default", low), low), high)
        step = settings.get("step") or (1 if kind == "INT" else None)
        between = [low + (high - low) * share for share in (0.25, 0.5, 0.75)]
        if step:
            base = settings.get("min", 0)
            between = [min(max(base + round((value - base) / step) * step, low), high) for value in between]
        values = [default] * 8 + [low, *between, high]
        if kind == "INT":
            return self.choose([int(value) for value in values])
        return self.choose([float(value) for value in values])


def build(catalog: Catalog, target: str, choose: Choose) -> Prompt:
    """A valid graph in the API format in which `target` occurs, with up to three nodes behind it."""
    builder = Builder(catalog, choose)
    last: str | None = builder.add(target)
    for _ in range(choose([0, 1, 2, 3])):
        if last is None or len(builder.prompt) >= MOST_NODES:
            break
        last = builder.follow(last)
    builder.show_the_rest()
    return builder.prompt
