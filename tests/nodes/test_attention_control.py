"""Edit-friendly DDPM inversion and mutual self-attention as nodes, sampled by the stock SamplerCustomAdvanced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_extras import nodes_custom_sampler as stock
from identity_edit_pack.nodes.attention_control import mutual_self_attention as attention_control
from identity_edit_pack.nodes.inversion.edit_friendly import EditFriendlyDDPMInversion
from identity_edit_pack.nodes.inversion.inversion_sampler import InversionSampler
from identity_edit_pack.nodes.inversion.noise_inversion import NoiseInversion
from identity_edit_pack.pipelines.attention_control.mutual_self_attention import mutual_self_attention
from identity_edit_pack.pipelines.inversion import edit_friendly
from identity_edit_pack.pipelines.inversion.inversion import sample_inversion
from identity_edit_pack.tests import tiny_models

SOURCE, TARGET, NEGATIVE = (tiny_models.conditioning(seed) for seed in (1, 2, 3))
LATENT = {"samples": tiny_models.latent(4, width=12), "noise_mask": torch.ones(1, 8, 12)}


def invert(model: Any, steps: int = 6) -> Any:
    node = EditFriendlyDDPMInversion
    return node.execute(model, SOURCE, LATENT, steps, 3.5, 1.0, 5, False, NEGATIVE).args[0]


def sample(model: Any, sampler: Any, sigmas: torch.Tensor, latent: Any, positive: Any, cfg: float) -> torch.Tensor:
    """What a user connects on the page: CFGGuider, DisableNoise, SamplerCustomAdvanced."""
    guider = stock.CFGGuider.execute(model, positive, NEGATIVE, cfg).args[0]
    noise = stock.DisableNoise.execute().args[0]
    with torch.no_grad():
        return stock.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args[0]["samples"]


def test_the_inversion_node_finds_the_noise_maps() -> None:
    model = tiny_models.sd1()
    made = invert(model)
    expected = edit_friendly.edit_friendly_ddpm_inversion(model, LATENT["samples"], SOURCE, NEGATIVE, 6, 3.5, 1.0, 5)
    assert torch.equal(made.noise_maps, expected.noise_maps) and torch.equal(made.trajectory, expected.trajectory)
    node = EditFriendlyDDPMInversion
    zeroed = node.execute(model, SOURCE, LATENT, 6, 3.5, 1.0, 5, True, NEGATIVE).args[0]
    assert not zeroed.noise_maps[-1].any()


@pytest.mark.parametrize(("skip", "skipped"), [(0.0, 0), (0.36, 2), (1.0, 5)])
def test_the_stock_sampler_node_gives_what_the_function_gives(skip: float, skipped: int) -> None:
    model = tiny_models.sd1()
    made = invert(model)
    sampler, sigmas, start, _ = InversionSampler.execute(model, made, skip).args
    assert list(start) == ["samples"] and sigmas.shape == (7 - skipped,)
    edited = sample(model, sampler, sigmas, start, TARGET, 6.0)
    expected = sample_inversion(model, made, TARGET, NEGATIVE, 6.0, skipped)
    assert float((edited - expected).norm() / expected.norm()) < 1e-6
    again = sample(model, sampler, sigmas, start, SOURCE, 3.5)
    assert float((again - LATENT["samples"]).norm() / LATENT["samples"].norm()) < 1e-4


def test_the_sampler_node_gives_each_inversion_its_sampler() -> None:
    model = tiny_models.sd1()
    for method, function in (("DDIM", "sample_euler"), ("FireFlow", "sample")):
        made = NoiseInversion.execute(model, SOURCE, LATENT, method, 4, 1.0, False, 5, 0.5, 0).args[0]
        sampler, sigmas, start, _ = InversionSampler.execute(model, made, 0.25).args
        assert sampler.sampler_function.__name__ == function
        edited = sample(model, sampler, sigmas, start, TARGET, 1.0)
        scale = made.noise_path.image_scale(made.sigmas[-1])
        expected = sample_inversion(model, made, TARGET, None, 1.0, 1)
        assert tiny_models.relative_error(edited / scale, expected) < 1e-5


def test_the_attention_node_hands_everything_on() -> None:
    model = tiny_models.sd1()
    made = invert(model)
    sampler, sigmas, start, _ = InversionSampler.execute(model, made, 0.2).args
    mask = torch.zeros(1, 8, 12)
    mask[:, 2:6, 3:8] = 1.0
    masks = {"source_mask": mask, "target_mask": mask.flip(-1)}
    node = attention_control.MutualSelfAttention
    for given in ({}, {"negative": tiny_models.conditioning(9)}, masks):
        patched = node.execute(model, made, SOURCE, 0.4, 3, **given).args[0]
        expected = mutual_self_attention(model, made, SOURCE, start_step=0.4, start_layer=3, **given)
        ours, same, plain = (sample(m, sampler, sigmas, start, TARGET, 6.0) for m in (patched, expected, model))
        assert torch.equal(ours, same) and not torch.equal(ours, plain)


def test_a_dual_guider_runs_it() -> None:
    model = tiny_models.sd1()
    made = invert(model)
    sampler, sigmas, start, _ = InversionSampler.execute(model, made, 0.0).args
    patched = attention_control.MutualSelfAttention.execute(model, made, SOURCE, 0.0, 0).args[0]
    noise = stock.DisableNoise.execute().args[0]

    def edit(m: Any, first: Any, second: Any) -> torch.Tensor:
        guider = stock.DualCFGGuider.execute(m, first, second, NEGATIVE, 3.5, 3.5, "regular").args[0]
        with torch.no_grad():
            return stock.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, start).args[0]["samples"]

    # Both positive sides are the source's own prompt: its keys and values are those that each side has anyway.
    assert torch.equal(edit(patched, SOURCE, SOURCE), edit(model, SOURCE, SOURCE))
    assert not torch.equal(edit(patched, TARGET, SOURCE), edit(model, TARGET, SOURCE))
