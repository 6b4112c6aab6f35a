"""Reference guidance on flow models: algorithm 2 in float64, and the blended estimate that takes its place where no
unconditional embedding can be optimized."""

from __future__ import annotations

import copy
from typing import Any

import comfy.sample
import pytest
import tiny_flow_models
import tiny_models
import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.hifi_tuner.reference_guidance import (
    first_pass_latent,
    optimizes,
    reference_guided_sampling,
)
from identity_edit_pack.pipelines.inversion import inversion
from identity_edit_pack.pipelines.inversion.inversion import Inversion
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from tiny_models import relative_error

from .test_inversion_methods import velocity_of

POSITIVE, NEGATIVE, REFERENCE = (tiny_models.conditioning(seed) for seed in (1, 3, 5))
for _prompt in (POSITIVE, NEGATIVE, REFERENCE):
    _prompt[0][1]["conditioning_llama3"] = torch.stack([_prompt[0][0]] * 3, dim=1)  # read by HiDream alone
MASK = torch.zeros(1, 64, 64)
MASK[:, 16:48, 8:40] = 1.0  # four by four latent pixels of eight by eight
INSIDE = torch.zeros(8, 8, dtype=torch.bool)
INSIDE[2:6, 1:5] = True
STEPS, GUIDED = 6, range(1, 6)  # 0.2 and 0.8 of six steps
EVERY = {**tiny_flow_models.ALL, "hidream": tiny_flow_models.hidream}
DISTILLED = "flux", 1.0
BLENDED = [DISTILLED, ("flux", 3.0), ("hidream", 3.0), ("sd3", 1.0), ("qwen_image", 1.0)]


def pivot_of(model: Any, batch: int = 1) -> Inversion:
    image = tiny_flow_models.latent_for(model, 4, batch)
    return inversion.invert_image(model, image, REFERENCE, steps=STEPS, end_at_zero=True, method="fixed point")


def start_of(model: Any, pivot: Inversion, batch: int = 1) -> torch.Tensor:
    return first_pass_latent(model, torch.zeros_like(tiny_flow_models.latent_for(model, 4, batch)), pivot.sigmas, 7)


def guided(model: Any, pivot: Inversion, scale: float = 4.0, **settings: Any) -> Any:
    start = start_of(model, pivot, pivot.batch)
    return reference_guided_sampling(model, start, pivot, MASK, POSITIVE, NEGATIVE, scale, **settings)


def test_optimization_is_algorithm_2_with_the_adaptive_step() -> None:
    """On a copy of the network in float64, called directly."""
    model, updates, scale = tiny_flow_models.sd3(output_gain=0.1), 4, 4.0
    pivot = pivot_of(model)
    ours = guided(model, pivot, scale, inner_steps=updates)

    network = copy.deepcopy(model.model.diffusion_model).double()

    def velocity(x: torch.Tensor, s: torch.Tensor, prompt: Any, text: torch.Tensor) -> torch.Tensor:
        return network(x, 1000 * s.reshape(1), context=text, y=prompt[0][1]["pooled_output"].double())

    def step(x: torch.Tensor, i: int, phi: torch.Tensor) -> torch.Tensor:
        s, t = pivot.sigmas[i : i + 2].double()
        v_n = velocity(x, s, NEGATIVE, phi)
        return x + (t - s) * (v_n + scale * (velocity(x, s, POSITIVE, POSITIVE[0][0].double()) - v_n))

    x = engine.to_model_scale(model, start_of(model, pivot)).double()
    x_star, phi = pivot.trajectory.double(), NEGATIVE[0][0].double()
    phi_h, length = phi, 1.0
    for i in range(STEPS):
        if i == GUIDED.start:
            x = torch.where(INSIDE, x_star[i], x)
        with torch.no_grad():
            x_next = step(x, i, phi)
        if i in GUIDED:
            size = float(torch.hypot(1 - pivot.sigmas[i + 1], pivot.sigmas[i + 1]))
            phi_h = phi_h.detach().clone().requires_grad_(True)
            adam = torch.optim.Adam([phi_h])
            residuals: list[torch.Tensor] = []
            for _ in range(updates + 1):
                inside_next = step(x, i, phi_h)
                residuals.append(((inside_next - x_star[i + 1])[..., INSIDE] / size).flatten())
                if len(residuals) > 1:
                    change = (residuals[-2] - residuals[-1]).detach()
                    length *= float((residuals[-2] @ change / (change @ change)).clamp(0.25, 4.0))
                    length = min(length, 0.1 * float(phi.square().mean().sqrt()) / 0.01)
                if len(residuals) > updates:
                    break
                adam.param_groups[0]["lr"] = 0.01 * length
                adam.zero_grad()
                residuals[-1].square().mean().backward()
                adam.step()
                residuals[-1] = residuals[-1].detach()
            losses = torch.stack([each.detach().square().mean() for each in residuals])
            k = i - GUIDED.start
            torch.testing.assert_close(ours.losses[k][:, 0].double(), losses[:-1], rtol=1e-2, atol=0.0)
            torch.testing.assert_close(ours.final_losses[k].double(), losses[-1:], rtol=1e-2, atol=0.0)
            assert relative_error(ours.embeddings[k].double() - phi, phi_h.detach() - phi) < 5e-2
            x_next = torch.where(INSIDE, inside_next.detach(), x_next)
        x = x_next
    assert relative_error(ours.latent, engine.to_socket_scale(model, x)) < 1e-3
    plain = guided(model, pivot, scale, start_percent=1.0)
    assert relative_error(ours.latent, plain.latent) > 1e-2


@pytest.mark.parametrize("name", [name for name in tiny_flow_models.ALL if name != "flux"])
def test_optimization_brings_the_subject_nearer_on_every_family_with_guidance(name: str) -> None:
    """As much at ten times the learning rate: the step size adapts."""
    model = tiny_flow_models.ALL[name](output_gain=0.1)
    pivot = pivot_of(model)
    pasted = guided(model, pivot, inner_steps=0, blending=0.0)
    falls = []
    for learning_rate in (0.01, 0.1):
        found = guided(model, pivot, inner_steps=4, learning_rate=learning_rate, end_percent=1.0)
        falls.append(1.0 - float((found.final_losses / found.unguided_losses).mean()))
        assert falls[-1] > 0.02 and found.warning is None
        reference = pivot.end_latent(model)[..., INSIDE]
        distances = [relative_error(latent[..., INSIDE], reference) for latent in (found.latent, pasted.latent)]
        assert distances[0] < distances[1]
    assert 0.5 < falls[1] / falls[0] < 2.0, falls


@pytest.mark.parametrize(("name", "scale", "updates"), [*((*each, 10) for each in BLENDED), ("sd3", 3.0, 0)])
def test_blending_moves_each_step_toward_the_reference(name: str, scale: float, updates: int) -> None:
    """In float64: F(x)[M] moves by the share toward x*_{t-1}[M], whatever the estimate's form."""
    model = EVERY[name](output_gain=0.1)
    pivot = pivot_of(model)
    previews: list[torch.Tensor] = []
    found = guided(
        model, pivot, scale, inner_steps=updates, blending=0.3,
        callback=lambda i, denoised, x, n: previews.append(denoised),
    )  # fmt: skip
    v_p, v_n = velocity_of(model, POSITIVE), velocity_of(model, NEGATIVE)
    x, x_star = engine.to_model_scale(model, start_of(model, pivot)).double(), pivot.trajectory.double()
    for i in range(STEPS):
        if i == GUIDED.start:
            x[..., INSIDE] = x_star[i][..., INSIDE]
        s, t = pivot.sigmas[i : i + 2].double()
        v = v_p(x, s) if scale == 1.0 else v_n(x, s) + scale * (v_p(x, s) - v_n(x, s))
        x_next = x + (t - s) * v
        if i in GUIDED:
            x_next[..., INSIDE] += 0.3 * (x_star[i + 1] - x_next)[..., INSIDE]
        assert relative_error(previews[i], x - s * (x - x_next) / (s - t)) < 1e-3  # the blended estimate
        x = x_next
    assert relative_error(found.latent, engine.to_socket_scale(model, x)) < 1e-4
    assert found.evaluations == STEPS * (1 if scale == 1.0 else 2)
    assert not found.losses and found.embeddings.numel() == found.final_losses.numel() == 0


def test_full_blending_returns_the_reference_and_none_only_pastes_it() -> None:
    model = tiny_flow_models.flux(output_gain=0.1)
    pivot = pivot_of(model, batch=2)
    start = start_of(model, pivot, 2)
    everywhere = torch.ones(1, 8, 8)
    share: dict[str, Any] = dict(guidance_scale=1.0, start_percent=0.0, end_percent=1.0)
    whole = reference_guided_sampling(model, start, pivot, everywhere, POSITIVE, NEGATIVE, **share, blending=1.0)
    assert relative_error(whole.latent, pivot.end_latent(model)) < 1e-5
    pasted = reference_guided_sampling(model, start, pivot, everywhere, POSITIVE, NEGATIVE, **share, blending=0.0)
    own = inversion.sample_inversion(model, pivot, POSITIVE)
    assert relative_error(pasted.latent, own) < 1e-5
    assert relative_error(pasted.latent, whole.latent) > 1e-3


@pytest.mark.parametrize("name", EVERY)
def test_without_a_guided_step_it_is_ksampler(name: str) -> None:
    """Euler with the scheduler simple, from the same seed, whether the embedding would be optimized or not."""
    model = EVERY[name](output_gain=0.1)
    pivot = pivot_of(model)
    empty = torch.zeros_like(tiny_flow_models.latent_for(model, 4))
    noise = comfy.sample.prepare_noise(empty, 7)
    for scale in (1.0, 4.0):
        stock = comfy.sample.sample(
            model, noise, STEPS, scale, "euler", "simple", POSITIVE, NEGATIVE, empty, disable_pbar=True, seed=7
        )
        ours = guided(model, pivot, scale, start_percent=1.0)
        assert relative_error(ours.latent, stock) < 1e-5
        assert "No step is guided" in str(ours.warning)


def test_latents_without_their_frame_are_taken_with_one() -> None:
    model = tiny_flow_models.qwen_image(output_gain=0.1)
    pivot = pivot_of(model)
    flat = first_pass_latent(model, torch.zeros(1, 16, 8, 8), pivot.sigmas, 7)
    assert torch.equal(flat, start_of(model, pivot))


def test_what_is_optimized() -> None:
    """True guidance, a text that can be exchanged, gradients; a UNet also at scale 1, which it refuses."""
    answers = {name: optimizes(make(), 4.0) for name, make in EVERY.items()}
    assert [name for name, answer in answers.items() if not answer] == ["flux", "hidream"]
    assert not optimizes(tiny_flow_models.sd3(), 1.0)
    assert optimizes(tiny_models.sd1(), 1.0)


def test_bad_settings_are_refused_in_one_sentence() -> None:
    model, distilled = tiny_flow_models.sd3(), tiny_flow_models.flux()
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (model, dict(scale=0.5), "guidance scale is 0.5"),
        (model, dict(learning_rate=0.0), "learning_rate is 0"),
        (distilled, dict(scale=1.0, blending=1.5), "blending is 1.5"),
    ]
    for of, change, words in cases:
        with pytest.raises(IdentityEditError, match=words) as caught:
            guided(of, pivot_of(of), **change)
        assert str(caught.value).count(". ") == 0
    with pytest.raises(IdentityEditError, match="another model"):
        guided(distilled, pivot_of(model), 1.0)
    with pytest.raises(IdentityEditError, match="4 channels but the model takes 16"):
        first_pass_latent(model, torch.zeros(1, 4, 8, 8), torch.tensor([1.0, 0.0]), 7)
