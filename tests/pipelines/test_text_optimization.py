"""Text optimization against a plain torch loop on diffusers' UNet with the same weights."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.timestep_aware import text_optimization
from identity_edit_pack.pipelines.timestep_aware.text_injection import edit_conditioning
from tiny_models import relative_error

TARGET = tiny_models.conditioning(1)


def test_it_reproduces_a_plain_loop():
    """Eq. 2 in the papers' scale: |eps - eps_theta(z_t, t, e)|^2 at the same draws, Adam, no guidance."""
    steps, seed, latent = 25, 11, tiny_models.latent(3, width=6)
    with torch.inference_mode():
        ours = text_optimization.optimize_text_embedding(tiny_models.sd1(), latent, TARGET, steps=steps, seed=seed)

    twin = tiny_models.diffusers_twin(tiny_models.sd1())
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, 0).float()
    generator = torch.Generator().manual_seed(seed)
    e = TARGET[0][0].clone().requires_grad_(True)
    optimizer = torch.optim.Adam([e], lr=1e-3)
    for step in range(steps):
        t = int(torch.randint(1000, (1,), generator=generator))
        noise = torch.randn(latent.shape, generator=generator)
        z_t = alphas_cumprod[t] ** 0.5 * latent * 0.18215 + (1 - alphas_cumprod[t]) ** 0.5 * noise
        loss = torch.nn.functional.mse_loss(twin(z_t, t, e).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert abs(float(ours.losses[step, 0]) - loss.item()) < 1e-4 * loss.item(), step
    assert relative_error(ours.embedding - TARGET[0][0], e.detach() - TARGET[0][0]) < 2e-3
    assert ours.evaluations == steps


@pytest.mark.parametrize("family", ["sd1", "sd2_v", "sdxl"])
def test_the_loss_falls_in_every_family(family: str):
    patcher = tiny_models.FAMILIES[family]()
    result = text_optimization.optimize_text_embedding(
        patcher, tiny_models.latent(3), TARGET, steps=40, learning_rate=0.1
    )
    unmoved = text_optimization.optimize_text_embedding(
        patcher, tiny_models.latent(3), TARGET, steps=40, learning_rate=1e-12
    )
    assert float(result.losses[20:].mean()) < 0.98 * float(unmoved.losses[20:].mean())  # of the same draws


def test_the_seed_decides_and_a_batch_is_its_latents_one_by_one():
    patcher = tiny_models.sd1()
    latent = tiny_models.latent(3, batch=2)

    def run(of: torch.Tensor, seed: int) -> torch.Tensor:
        return text_optimization.optimize_text_embedding(patcher, of, TARGET, steps=4, seed=seed).embedding

    both = run(latent, 5)
    assert torch.equal(both, run(latent, 5)) and not torch.equal(both, run(latent, 6))
    for b in range(2):
        assert relative_error(both[b : b + 1] - TARGET[0][0], run(latent[b : b + 1], 5) - TARGET[0][0]) < 2e-3


def test_checkpointing_changes_nothing():
    plain, recomputed = (
        text_optimization.optimize_text_embedding(
            tiny_models.sd1(), tiny_models.latent(3), TARGET, steps=3, checkpointing=checkpointing
        ).embedding
        for checkpointing in (False, True)
    )
    assert relative_error(recomputed - TARGET[0][0], plain - TARGET[0][0]) < 1e-4


def test_interpolation():
    target, optimized = TARGET[0][0], torch.randn(1, 8, 32)
    for eta in (0.0, 0.3, 1.0, 1.4):
        expected = eta * target.double() + (1 - eta) * optimized.double()
        mixed = edit_conditioning(TARGET, [[optimized, {}]], eta)
        torch.testing.assert_close(mixed[0][0], expected.float(), rtol=1e-5, atol=1e-5)
        assert torch.equal(mixed[0][1]["pooled_output"], TARGET[0][1]["pooled_output"])
    assert torch.equal(edit_conditioning(TARGET, [[optimized, {}]], 1.0)[0][0], target)
    with pytest.raises(IdentityEditError, match="tokens or channels"):
        edit_conditioning(TARGET, [[torch.randn(1, 9, 32), {}]], 0.5)


@pytest.mark.parametrize(("change", "words"), [(dict(steps=0), "steps is 0"), (dict(learning_rate=0.0), "above 0")])
def test_bad_inputs_are_refused(change: dict, words: str):
    given = dict(model=tiny_models.sd1(), latent=tiny_models.latent(3), target=TARGET)
    with pytest.raises(IdentityEditError, match=words):
        text_optimization.optimize_text_embedding(**given, **change)
