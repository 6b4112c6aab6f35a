"""Every node with a MODEL, on quantized weights: it works, or says in one sentence why it cannot.

`python -m benchmarks quantized_weights` writes what each does into a table.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import quantized_models
import tiny_flow_models
import tiny_models
import torch
from identity_edit_pack.attention.joint_capture import capture_joint_attention
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine import model_tag
from identity_edit_pack.pipelines.inversion import inversion, methods
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests.nodes.good_inputs import CLASSES, World, good, world_in
from identity_edit_pack.tests.nodes.test_bad_inputs import run

pytestmark = pytest.mark.slow

NODES = [name for name, node in CLASSES.items() if "MODEL" in {item.get_io_type() for item in node.GET_SCHEMA().inputs}]
WEIGHTS = {
    name: item.options for name in NODES for item in CLASSES[name].define_schema().inputs if item.id == "weights"
}
USES = [(name, weights) for name in NODES for weights in WEIGHTS.get(name, [""])]
"""Nodes, and every value of their input *weights*."""
LEARN_ALL_WEIGHTS = {("TrainMCDM", "")}
"""They refuse weights which are quantized."""
LEARN_WEIGHTS = {("TrainStyleAttention", ""), *LEARN_ALL_WEIGHTS} | {
    (name, weights) for name, weights in USES if weights not in ("", "low rank")
}
"""They refuse weights which only their layer can read."""


class QuantizedWorld(World):
    """Its models are quantized. Files were made with the plain ones, since not all can be with these."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    @functools.cached_property
    def model(self) -> Any:
        return quantized_models.quantized(super().model, self.kind)

    @functools.cached_property
    def edit_model(self) -> Any:
        return quantized_models.quantized(super().edit_model, self.kind)

    def saved_mcdm(self) -> str:
        return World().saved_mcdm()

    def saved_prior(self) -> str:
        return World().saved_prior()


def answer(name: str, weights: str, kind: str, folder: Path) -> str:
    """'works', or the sentence with which the node refuses."""
    with pytest.MonkeyPatch.context() as patch:
        world_in(folder, patch)
        world = QuantizedWorld(kind)
        try:
            chosen = {"weights": weights} if weights else {}
            with torch.inference_mode():  # as ComfyUI runs all of a prompt
                run(name, {**good(world, name), **chosen}, world)
        except IdentityEditError as error:
            return str(error)
        return "works"


@pytest.mark.parametrize("kind", quantized_models.formats())
@pytest.mark.parametrize(("name", "weights"), USES)
def test_a_node_works_or_says_why_not(name: str, weights: str, kind: str, tmp_path: Path) -> None:
    said = answer(name, weights, kind, tmp_path)
    refuses = (name, weights) in (LEARN_WEIGHTS if kind == quantized_models.GGUF else LEARN_ALL_WEIGHTS)
    assert ("quantized" in said and "float16" in said) if refuses else said == "works", said


@pytest.mark.parametrize("kind", quantized_models.formats())
def test_a_checkpoint_is_recognized_in_its_quantized_form_and_no_other_is(kind: str) -> None:
    quantized = model_tag(quantized_models.quantized(tiny_models.sd1(output_gain=0.1), kind))
    plain = model_tag(tiny_models.sd1(output_gain=0.1))
    other = model_tag(tiny_models.sd1(seed=1, output_gain=0.1))
    assert quantized.quantized and not plain.quantized
    assert quantized.difference(plain) is None and plain.difference(quantized) is None
    assert quantized.difference(other) == "different weights"


@pytest.mark.parametrize("kind", quantized_models.formats())
def test_an_identity_prior_moves_a_quantized_model_as_it_moves_the_plain_one(kind: str) -> None:
    from identity_edit_pack.pipelines.lipe import identity_prior
    from identity_edit_pack.tests.attention.sampling import sample
    from tiny_text_encoders import clip

    plain = tiny_models.sd1(output_gain=0.1)
    keys, _ = identity_prior.attention_keys(plain, clip("sd1"))
    generator = torch.Generator().manual_seed(3)
    weights = dict(plain.model.named_parameters())
    change = {key: torch.randn(weights[key].shape, generator=generator) / weights[key].shape[-1] ** 0.5 for key in keys}
    prior = identity_prior.IdentityPrior(change, {}, "sks", "cat", model_tag(plain), {})

    def moved(model: Any) -> torch.Tensor:
        patched, _ = identity_prior.apply_identity_prior(model, clip("sd1"), prior)
        return sample(patched, tiny_models.latent(4)) - sample(model, tiny_models.latent(4))

    with torch.inference_mode():
        expected, found = moved(plain), moved(quantized_models.quantized(tiny_models.sd1(output_gain=0.1), kind))
    cosine = torch.nn.functional.cosine_similarity(expected.flatten(), found.flatten(), dim=0)
    # ComfyUI rounds the changed weights again, in four bits by about as much as this change.
    assert cosine > (0.5 if kind == "nvfp4" else 0.9)


@pytest.mark.parametrize("kind", quantized_models.formats())
@pytest.mark.parametrize("family", ["sd3", "qwen_image", "z_image", "flux2"])
def test_a_flow_model_is_inverted_read_and_optimized_in_its_quantized_form(family: str, kind: str) -> None:
    """Its estimates and its gradients are those of the plain model but for rounding, of weights and of inputs."""
    source, negative = tiny_models.conditioning(1), tiny_models.conditioning(3)

    def estimate_and_gradient(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        z_0 = engine.model_latent(model, tiny_flow_models.latent_for(model, 4))

        def loop(evaluator: engine.NetworkEvaluator, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            variable = negative[0][0].clone().requires_grad_(True)
            denoised = evaluator.denoised(x, torch.tensor(0.7), "negative", variable)
            (gradient,) = torch.autograd.grad((denoised * z_0.clone()).sum(), variable)
            return denoised.detach(), gradient

        return engine.run_loop(model, source, negative, z_0, torch.tensor([0.7, 0.0]), loop, gradients=True)

    with torch.inference_mode():
        plain = estimate_and_gradient(tiny_flow_models.ALL[family](output_gain=0.2))
        model = quantized_models.quantized(tiny_flow_models.ALL[family](output_gain=0.2), kind)
        for found, expected in zip(estimate_and_gradient(model), plain, strict=True):
            cosine = torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
            # Random networks amplify what float8 and four bits round of their inputs, too.
            assert cosine > {"nvfp4": 0.5, "float8_e4m3fn": 0.7}.get(kind, 0.95), cosine
        z_0 = tiny_flow_models.latent_for(model, 4)
        recording, attention = capture_joint_attention(model, None, (1, 2), (5,))
        made = inversion.invert_image(recording, z_0, source, steps=6, method=methods.FIXED_POINT, iterations=8)
        back = inversion.sample_inversion(recording, made, source)
        assert tiny_models.relative_error(back, z_0) < 0.05
        assert all(bool(each.total.isfinite().all()) for each in attention.cross.values()) and attention.cross
