"""Gradients through every flow family against finite differences, and what is optimized with them."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import pytest
import tiny_flow_models
import tiny_models
import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine.gradient_context import gradient_context
from identity_edit_pack.pipelines.inversion import inversion, null_text
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.timestep_aware import text_optimization
from tiny_models import relative_error

SOURCE, TARGET, NEGATIVE = (tiny_models.conditioning(seed) for seed in (1, 2, 3))


@pytest.fixture(scope="module", params=tiny_flow_models.ALL)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_flow_models.ALL[request.param](output_gain=0.2)


def denoised_and_gradient(model: Any, embedding: torch.Tensor, checkpointing: bool) -> tuple[float, torch.Tensor]:
    """A fixed linear functional of the estimate of z_0, and its gradient with respect to the negative embedding."""
    latent = engine.model_latent(model, tiny_flow_models.latent_for(model, 3))
    direction = torch.randn(latent.shape, generator=torch.Generator().manual_seed(9))

    def loop(evaluator: engine.NetworkEvaluator, x: torch.Tensor) -> tuple[float, torch.Tensor]:
        variable = embedding.clone().requires_grad_(True)
        denoised = evaluator.denoised(x, torch.tensor(0.7), "negative", variable)
        value = (denoised * direction.clone()).sum()
        (gradient,) = torch.autograd.grad(value, variable)
        return float(value), gradient

    levels = torch.tensor([0.7, 0.0])
    return engine.run_loop(model, SOURCE, NEGATIVE, latent, levels, loop, gradients=True, checkpointing=checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_finite_differences(model: Any, checkpointing: bool) -> None:
    embedding = NEGATIVE[0][0]
    along = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(5))
    along /= along.norm()
    _, gradient = denoised_and_gradient(model, embedding, checkpointing)
    step = 0.02
    above, below = (denoised_and_gradient(model, embedding + sign * step * along, False)[0] for sign in (1, -1))
    expected = (above - below) / (2 * step)
    # In parts of the gradient's size: along one direction it may be near zero.
    assert abs(float((gradient * along).sum()) - expected) < 0.02 * float(gradient.norm())
    assert float(gradient.norm()) > 1e-3


def test_checkpointing_changes_no_gradient_and_leaves_nothing_behind(model: Any) -> None:
    _, plain = denoised_and_gradient(model, NEGATIVE[0][0], False)
    _, recomputed = denoised_and_gradient(model, NEGATIVE[0][0], True)
    assert relative_error(recomputed, plain) < 1e-5
    assert not getattr(comfy.model_management, "in_training", False)
    for module in model.model.diffusion_model.modules():
        assert "forward" not in vars(module) and not module._forward_pre_hooks


WITH_GUIDANCE = {name: make for name, make in tiny_flow_models.ALL.items() if name != "flux"}


@pytest.mark.parametrize("name", WITH_GUIDANCE)
def test_adaptive_null_text_keeps_guided_sampling_on_the_inversion(name: str) -> None:
    """The paper's learning rate suits Stable Diffusion's text encoder; the adaptive step finds that of a flow model."""
    model = WITH_GUIDANCE[name](output_gain=0.1)
    latent = tiny_flow_models.latent_for(model, 4)
    pivot = inversion.invert_image(model, latent, SOURCE, steps=6, method="fixed point")
    drifted = inversion.sample_inversion(model, pivot, SOURCE, NEGATIVE, 4.0)

    def error(method: str, learning_rate: float) -> float:
        result = null_text.null_text_optimization(
            model, pivot, SOURCE, NEGATIVE, 4.0, inner_steps=6, learning_rate=learning_rate, early_stop=0.0,
            method=method,
        )  # fmt: skip
        return relative_error(result.reconstruction, latent)

    adaptive = error(null_text.ADAPTIVE, null_text.LEARNING_RATE)
    assert adaptive < 0.85 * relative_error(drifted, latent)
    assert adaptive < 0.9 * error(null_text.PAPER, null_text.LEARNING_RATE)
    assert 0.6 * adaptive < error(null_text.ADAPTIVE, 10 * null_text.LEARNING_RATE) < 1.4 * adaptive


def test_distilled_guidance_has_no_null_text() -> None:
    model = tiny_flow_models.flux()
    pivot = inversion.invert_image(model, tiny_flow_models.latent(4), SOURCE, steps=2)
    with pytest.raises(IdentityEditError, match="Flux has distilled guidance and no unconditional side; use "):
        null_text.null_text_optimization(model, pivot, SOURCE, NEGATIVE)


def test_text_optimization_lowers_the_error_of_the_velocity(model: Any) -> None:
    latent = tiny_flow_models.latent_for(model, 4)
    found = text_optimization.optimize_text_embedding(model, latent, TARGET, steps=12, learning_rate=0.05, seed=1)
    again = text_optimization.optimize_text_embedding(
        model, latent, [[found.embedding, TARGET[0][1]]], steps=12, learning_rate=1e-9, seed=1
    )
    before = text_optimization.optimize_text_embedding(model, latent, TARGET, steps=12, learning_rate=1e-9, seed=1)
    assert float(again.losses.mean()) < float(before.losses.mean())


@pytest.mark.skipif(hasattr(comfy.ops, "QuantLinearFunc"), reason="this ComfyUI has a backward pass of its own")
def test_layers_that_quantize_their_input_have_a_gradient() -> None:
    """Scaled float8 with an input scale, as ComfyUI reads it on a card that multiplies float8."""
    operations = comfy.ops.mixed_precision_ops({"layer": {"format": "float8_e4m3fn"}}, torch.float32)
    network = torch.nn.Module()
    network.layer = operations.Linear(16, 16, bias=False, dtype=torch.float32)
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    scales = {"layer.weight_scale": torch.tensor(0.5), "layer.input_scale": torch.tensor(0.02)}
    network.load_state_dict({"layer.weight": weight, **scales})
    attributes = dict(vars(network.layer))
    patcher = comfy.model_patcher.ModelPatcher(network, torch.device("cpu"), torch.device("cpu"))
    with torch.inference_mode(), gradient_context([patcher], load=False):
        x = torch.ones(2, 16, requires_grad=True)
        (gradient,) = torch.autograd.grad(network.layer(x).sum(), x)
    torch.testing.assert_close(gradient, (0.5 * weight.float()).sum(dim=0).expand(2, -1))
    assert vars(network.layer) == attributes
