"""What `sockets.checked` does before every node runs: what no node can use is refused by the socket's type and the
widget's limits, once for all nodes; every node is shown to call it. `test_bad_inputs` has what is left to a node."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from comfy_api.latest import io
from identity_edit_pack.nodes import NODE_CLASSES, sockets
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests import tiny_models, tiny_text_encoders, tiny_vision
from identity_edit_pack.tests.nodes.bad_values import variants
from identity_edit_pack.tests.nodes.test_bad_inputs import complaint_about_message

IMAGES = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))
MASK = torch.ones(1, 64, 64).tril()
NOT_FINITE = {"nan", "infinite", "one huge number"}
REFUSED: dict[str, set[str]] = {
    "IMAGE": {
        *NOT_FINITE, "all huge", "levels of 8 bits as floats", "int64", "bool", "no image", "no pixels",
        "no channels", "five channels", "channels first", "without a batch", "a video", "None",
    },
    "MASK": {*NOT_FINITE, "all huge", "uint8", "no mask", "no pixels", "with a last channel", "None"},
    "LATENT": {
        *NOT_FINITE, "all huge", "without a batch", "two dimensions", "a video", "a hundred", "no image", "no cells",
        "without samples", "a list of samples", "None",
    },
    "SIGMAS": {
        "nan", "infinite", "negative", "uint8", "int64", "bool", "two dimensions", "empty", "one", "None",
    },
    "CONDITIONING": {
        *NOT_FINITE, "no tokens", "no batch", "without a batch", "four dimensions", "empty", "no embedding",
        "an entry without options", "an empty entry", "pooled nan", "a tuple", "None",
    },
    "MODEL": {"None"},
    "CLIP": {"None"},
    "VAE": {"None"},
    "CLIP_VISION": {"None"},
    "INT": {"below the least", "beyond the most"},
    "FLOAT": {"below the least", "beyond the most", "nan", "infinite"},
    "STRING": {"NUL", "half a pair of surrogates"},
}  # fmt: skip
"""By a socket's type, the variants of `bad_values` that no node can use. All others reach the node."""
REFUSED_BESIDE_A_MODEL: dict[str, set[str]] = {
    "LATENT": {"three channels", "sixteen channels"},
    "CONDITIONING": {"another width", "narrower"},
    "VAE": {"of sixteen channels"},
}
"""What is refused beside these where the node has a MODEL before the socket, which it does not fit."""


@pytest.fixture(scope="module")
def inputs() -> dict[str, tuple[Any, Any]]:
    """By type, an input of that type and a good value for it."""
    return {
        "IMAGE": (io.Image.Input("value"), IMAGES),
        "MASK": (io.Mask.Input("value"), MASK),
        "LATENT": (io.Latent.Input("value"), {"samples": tiny_models.latent(4)}),
        "SIGMAS": (io.Sigmas.Input("value"), torch.tensor([14.6, 3.0, 0.0])),
        "CONDITIONING": (io.Conditioning.Input("value"), tiny_models.conditioning(1)),
        "MODEL": (io.Model.Input("value"), tiny_models.sd1()),
        "CLIP": (io.Clip.Input("value"), tiny_text_encoders.clip("sd1")),
        "VAE": (io.Vae.Input("value"), tiny_vision.VAE()),
        "CLIP_VISION": (io.ClipVision.Input("value"), tiny_vision.clip_vision()),
        "INT": (io.Int.Input("value", default=2, min=1, max=9), 2),
        "FLOAT": (io.Float.Input("value", default=0.5, min=0.0, max=1.0), 0.5),
        "STRING": (io.String.Input("value"), "a sks cat"),
    }


def node_of(*items: Any) -> Any:
    """A node with these inputs, which gives what reaches it."""

    class Node(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(node_id="Node", inputs=[*items], outputs=[])

        @classmethod
        @sockets.checked
        def execute(cls, value: Any, model: Any = None) -> io.NodeOutput:
            return io.NodeOutput(value)

    return Node


def refused(node: Any, values: dict[str, Any], **others: Any) -> set[str]:
    """Which of the values a node refuses, each in one sentence that names the input."""
    found = set()
    for name, bad in values.items():
        try:
            node.execute(value=bad, **others)
        except IdentityEditError as error:
            assert complaint_about_message(str(error)) is None, name
            assert "value" in str(error) or str(error).startswith("The model "), name
            found.add(name)
    return found


def test_the_table_has_every_type_that_is_checked() -> None:
    assert set(REFUSED) == set(sockets._CHECKS)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_node_can_use_is_refused(kind: str, inputs: dict[str, tuple[Any, Any]]) -> None:
    item, good = inputs[kind]
    assert refused(node_of(item), {"good": good, **variants(item, good)}) == REFUSED[kind]


@pytest.mark.parametrize("kind", REFUSED_BESIDE_A_MODEL)
def test_what_does_not_fit_the_model_is_refused(kind: str, inputs: dict[str, tuple[Any, Any]]) -> None:
    item, good = inputs[kind]
    node, model = node_of(io.Model.Input("model"), item), inputs["MODEL"][1]
    found = refused(node, {"good": good, **variants(item, good)}, model=model)
    assert found == REFUSED[kind] | REFUSED_BESIDE_A_MODEL[kind]


def test_masks_reach_a_node_in_one_form(inputs: dict[str, tuple[Any, Any]]) -> None:
    item, good = inputs["MASK"]
    for name, mask in variants(item, good).items():
        if name not in REFUSED["MASK"]:
            (given,) = node_of(item).execute(value=mask).args
            assert given.ndim == 3 and given.dtype == torch.float32, name
            if name in ("without a batch", "with a channel", "float16", "bool", "not contiguous"):
                assert torch.equal(given, good), name


@pytest.mark.parametrize("node", NODE_CLASSES, ids=lambda node: node.__name__)
def test_every_node_checks_its_inputs(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in inspect.signature(node.execute).parameters if name != "kwargs"]
    seen: list[str] = []

    def check_inputs(schema: Any, given: dict[str, Any]) -> None:
        seen.extend(given)
        raise IdentityEditError("checked.")

    monkeypatch.setattr(sockets, "check_inputs", check_inputs)
    with pytest.raises(IdentityEditError, match=r"^checked\.$"):
        node.execute(**dict.fromkeys(names))
    assert set(names) <= set(seen)


@pytest.mark.parametrize("kind", ["IMAGE", "MASK", "LATENT", "CONDITIONING"])
def test_a_result_that_is_not_finite_is_refused(kind: str, inputs: dict[str, tuple[Any, Any]]) -> None:
    item, good = inputs[kind]
    outputs = {"IMAGE": io.Image, "MASK": io.Mask, "LATENT": io.Latent, "CONDITIONING": io.Conditioning}
    schema = io.Schema(node_id="Node", outputs=[outputs[kind].Output("result")])
    sockets.check_results(schema, io.NodeOutput(good))
    with pytest.raises(IdentityEditError, match="result contains NaN"):
        sockets.check_results(schema, io.NodeOutput(variants(item, good)["nan"]))
