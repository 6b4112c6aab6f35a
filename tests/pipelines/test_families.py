"""The path from image to noise against float64 and ComfyUI, and flow models in the functions of every family."""

from __future__ import annotations

from typing import Any

import comfy.conds
import comfy.model_base
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import pytest
import tiny_flow_models
import tiny_models
import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine.families import noise
from identity_edit_pack.pipelines.inversion import edit_friendly as edit_friendly_inversion
from identity_edit_pack.pipelines.inversion import inversion
from identity_edit_pack.pipelines.inversion.inversion import Inversion
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.text.step_embeddings import StepEmbeddings, apply_step_embeddings, constant_embedding
from identity_edit_pack.pipelines.timestep_aware import text_injection
from tiny_models import relative_error

SOURCE, TARGET, NEGATIVE = (tiny_models.conditioning(seed) for seed in (1, 2, 3))
STEPS = 6
PATHS = {"diffusion": (noise.DIFFUSION, (14.6, 3.0, 0.03)), "flow": (noise.FLOW, (1.0, 0.6, 0.02))}


def draw(*seeds: int) -> list[torch.Tensor]:
    return [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]


@pytest.mark.parametrize("name", PATHS)
def test_steps_end_where_image_and_noise_are_mixed_anew(name: str) -> None:
    """x' = alpha' z_0 + s' eps for the estimates of z_0 and eps, and with fresh noise the same variance."""
    path, levels = PATHS[name]
    alpha = (lambda s: 1.0) if name == "diffusion" else (lambda s: 1.0 - s)
    z_0, eps, fresh = draw(1, 2, 3)
    for s, s_next in zip(levels[:-1], levels[1:], strict=True):
        at, to = torch.tensor(s, dtype=torch.float64), torch.tensor(s_next, dtype=torch.float64)
        x = path.noised(z_0, eps, at)
        torch.testing.assert_close(x, alpha(s) * z_0 + s * eps)
        torch.testing.assert_close(path.predicted_noise(x, z_0, at), eps)
        torch.testing.assert_close(path.scale(at) ** 2, at**2 + alpha(s) ** 2)
        expected = alpha(s_next) * z_0 + s_next * eps
        torch.testing.assert_close(path.step(x, z_0, at, to), expected)
        for eta in (0.0, 0.4, 1.0):
            mean, deviation = path.distribution(x, z_0, s, s_next, eta)
            # The reference implementation's variance, written in the papers' alpha_bar.
            bar, bar_next = (alpha(level) ** 2 / (alpha(level) ** 2 + level**2) for level in (s, s_next))
            var = (1 - bar_next) / (1 - bar) * (1 - bar / bar_next)
            z = bar_next**0.5 * z_0 + (1 - bar_next - eta * var) ** 0.5 * eps + eta * var**0.5 * fresh
            torch.testing.assert_close(mean + deviation * fresh, z * path.scale(to))


@pytest.mark.parametrize(
    ("prediction", "kind", "path"),
    [
        (noise.EPS, comfy.model_sampling.EPS, noise.DIFFUSION),
        (noise.V, comfy.model_sampling.V_PREDICTION, noise.DIFFUSION),
        (noise.VELOCITY, comfy.model_sampling.CONST, noise.FLOW),
    ],
)
def test_the_training_error_is_that_of_the_networks_output(prediction: str, kind: type, path: noise.NoisePath) -> None:
    """ComfyUI makes an estimate of z_0 of the output; a target plus an error comes back as that error."""
    z_0, eps, error = draw(1, 2, 3)
    sigma = torch.tensor(0.7, dtype=torch.float64)
    target = {
        noise.EPS: eps,
        noise.V: (eps - sigma * z_0) / (1 + sigma**2).sqrt(),
        noise.VELOCITY: eps - z_0,
    }[prediction]
    sampling = kind()
    sampling.sigma_data = 1.0
    denoised = sampling.calculate_denoised(sigma[None], target + error, path.noised(z_0, eps, sigma))
    torch.testing.assert_close(noise.training_error(prediction, z_0, eps, sigma, denoised), error)


def velocity(model: Any, x: torch.Tensor, sigma: torch.Tensor, prompt: Any, embedding: Any = None) -> torch.Tensor:
    """The network alone, in float32, with its pooled output and its timestep written out."""
    context = prompt[0][0] if embedding is None else embedding
    batch = x.shape[0]
    timestep = model.get_model_object("model_sampling").timestep(sigma.float()).expand(batch)
    with torch.no_grad():
        out = model.model.diffusion_model(
            x.float(), timestep, context=context.expand(batch, -1, -1),
            y=prompt[0][1]["pooled_output"].expand(batch, -1), guidance=torch.full((batch,), 3.5),
            transformer_options={},
        )  # fmt: skip
    return out.double()


def literal_inversion(model: Any, latent: torch.Tensor, sigmas: torch.Tensor) -> list[torch.Tensor]:
    """The flow's own time in float64: x' = x + (s' - s) v, with v of the same latent at the higher level."""
    up = sigmas.double().flip(0)
    x = model.get_model_object("latent_format").process_in(latent).double() * (1 - up[0])
    path = [x]
    for s, s_next in zip(up[:-1], up[1:], strict=True):
        x = x + (s_next - s) * velocity(model, x, s_next, SOURCE)
        path.append(x)
    return path[::-1]


def literal_sampling(model: Any, x: torch.Tensor, sigmas: torch.Tensor, w: float, rows: Any = None) -> torch.Tensor:
    """Euler in float64 with classifier-free guidance, and an unconditional embedding for each step."""
    levels = sigmas.double()
    for i in range(len(levels) - 1):
        conditional = velocity(model, x, levels[i], TARGET)
        unconditional = velocity(model, x, levels[i], NEGATIVE, None if rows is None else rows[i])
        x = x + (levels[i + 1] - levels[i]) * (unconditional + w * (conditional - unconditional))
    return model.get_model_object("latent_format").process_out(x / (1 - levels[-1]))


@pytest.fixture(scope="module", params=tiny_flow_models.FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_flow_models.FAMILIES[request.param](output_gain=0.2)


@pytest.fixture(scope="module")
def pivot(model: Any) -> Inversion:
    return inversion.invert_image(model, tiny_flow_models.latent(4, 2), SOURCE, steps=STEPS)


def table_of(pivot: Inversion, tokens: int = tiny_models.TOKENS) -> StepEmbeddings:
    rows = torch.randn(STEPS, 1, tokens, tiny_models.CONTEXT, generator=torch.Generator().manual_seed(8))
    return StepEmbeddings(pivot.sigmas, rows)


@pytest.mark.parametrize("end_at_zero", [False, True])
def test_a_flow_is_inverted_from_its_image_to_noise(model: Any, end_at_zero: bool) -> None:
    latent = tiny_flow_models.latent(4, 2)
    ours = inversion.invert_image(model, latent, SOURCE, steps=STEPS, end_at_zero=end_at_zero)
    assert float(ours.sigmas[0]) == 1.0 and (float(ours.sigmas[-1]) == 0.0) == end_at_zero
    stock = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    assert torch.equal(ours.sigmas[:-1], stock[:-1])
    for x, expected in zip(ours.trajectory, literal_inversion(model, latent, ours.sigmas), strict=True):
        assert relative_error(x, expected) < 1e-5
    assert relative_error(ours.end_latent(model), latent) < 1e-6


@pytest.mark.parametrize("tokens", [tiny_models.TOKENS, 2 * tiny_models.TOKENS])
def test_a_flow_is_sampled_back_with_an_embedding_for_each_step(model: Any, pivot: Inversion, tokens: int) -> None:
    """Also with texts of two lengths: one that is repeated, as cross-attention may, is another text here."""
    start = pivot.trajectory[0].double()
    plain = inversion.sample_inversion(model, pivot, TARGET, NEGATIVE, 3.0)
    assert relative_error(plain, literal_sampling(model, start, pivot.sigmas, 3.0)) < 1e-5
    table = table_of(pivot, tokens)
    tabled = apply_step_embeddings(model, constant_embedding(pivot.sigmas, TARGET[0][0]), "positive")
    ours = inversion.sample_inversion(tabled, pivot.with_embeddings(table), TARGET, NEGATIVE, 3.0)
    assert relative_error(ours, literal_sampling(model, start, pivot.sigmas, 3.0, table.embeddings)) < 1e-5
    assert relative_error(ours, plain) > 1e-3


def test_stock_samplers_take_the_embedding_of_each_step(model: Any, pivot: Inversion) -> None:
    table, empty = table_of(pivot), torch.zeros(1, 16, 8, 8)
    noise_ = comfy.sample.prepare_noise(empty, 3)
    stock = comfy.sample.sample_custom(
        apply_step_embeddings(model, table), noise_, 3.0, comfy.samplers.sampler_object("euler"), pivot.sigmas, TARGET,
        NEGATIVE, empty, disable_pbar=True, seed=3,
    )  # fmt: skip
    expected = literal_sampling(model, noise_.double(), pivot.sigmas, 3.0, table.embeddings)
    assert relative_error(stock, expected) < 1e-5


def test_noise_maps_of_a_flow_sample_its_image(model: Any) -> None:
    latent = tiny_flow_models.latent(4)
    made = edit_friendly_inversion.edit_friendly_ddpm_inversion(model, latent, SOURCE, NEGATIVE, steps=STEPS)
    back = inversion.sample_inversion(model, made, SOURCE, NEGATIVE, 3.5)
    assert relative_error(back, latent) < 1e-6
    assert relative_error(inversion.sample_inversion(model, made, TARGET, NEGATIVE, 3.5), latent) > 1e-2


def test_the_prompt_switches_in_time_on_a_flow(model: Any, pivot: Inversion) -> None:
    """The ranges of a CONDITIONING and the table say the same; at ratio 1 it is the source alone."""
    edited = text_injection.timestep_aware_sampling(model, pivot, SOURCE, TARGET, NEGATIVE, 0.5, 3.0)
    rows = text_injection.injection_table(pivot.sigmas, SOURCE, TARGET, 0.5)
    tabled = apply_step_embeddings(model, rows, "positive")
    assert relative_error(inversion.sample_inversion(tabled, pivot, TARGET, NEGATIVE, 3.0), edited.latent) < 1e-4
    source = text_injection.timestep_aware_sampling(model, pivot, SOURCE, TARGET, NEGATIVE, 1.0, 3.0)
    assert relative_error(source.latent, inversion.sample_inversion(model, pivot, SOURCE, NEGATIVE, 3.0)) < 1e-4


def test_another_model_is_refused(model: Any, pivot: Inversion) -> None:
    inversion.check_inversion(pivot, model)
    for make in (*tiny_flow_models.FAMILIES.values(), tiny_models.sd1):
        with pytest.raises(IdentityEditError, match="made with another model"):
            inversion.check_inversion(pivot, make(seed=5))


def test_what_flow_models_lack_is_refused_by_name(model: Any, pivot: Inversion) -> None:
    name = type(model.model).__name__
    refused = [
        (lambda: engine.require(model, engine.Capability.CROSS_ATTENTION), "no text cross-attention"),
        (lambda: engine.require(model, engine.Capability.TRAINING), "cannot be trained"),
        (lambda: engine.require(model, engine.Capability.DISCRETE_TIMESTEPS), "is not a noise-predicting UNet"),
    ]
    for call, words in refused:
        with pytest.raises(IdentityEditError, match=f"The model {name} .*{words}.*; load a Stable Diffusion"):
            call()


def test_another_text_brings_its_length_and_its_pooled_output() -> None:
    """OmniGen 2 counts its tokens by a mask, and some Lumina models take a pooled output."""
    new, length = torch.zeros(1, 5, tiny_models.CONTEXT), comfy.conds.CONDConstant(tiny_models.TOKENS)
    old = {"c_crossattn": comfy.conds.CONDRegular(SOURCE[0][0]), "num_tokens": length}
    base = tiny_flow_models.omnigen2().model
    base.__class__ = comfy.model_base.Omnigen2
    made = engine.conditionings_with_embedding(base, [{"model_conds": old}], new)[0]["model_conds"]
    assert made["num_tokens"].cond == made["c_crossattn"].cond.shape[1] == 5
    base, pooled = tiny_flow_models.z_image().model, TARGET[0][1]["pooled_output"]
    if "clip_text_pooled" not in base.extra_conds(pooled_output=pooled, noise=new, device="cpu"):  # 0.3.75
        return
    old["clip_text_pooled"] = comfy.conds.CONDRegular(SOURCE[0][1]["pooled_output"])
    made = engine.conditionings_with_embedding(base, [{"model_conds": old}], new, pooled)[0]["model_conds"]
    assert torch.equal(made["clip_text_pooled"].cond, pooled)
    exchanged = engine.conditionings_with_text([{"model_conds": old}], [{"model_conds": made}])
    assert torch.equal(exchanged[0]["model_conds"]["clip_text_pooled"].cond, pooled)


def test_a_text_that_an_adapter_makes_of_several_is_not_exchanged_for_a_learned_one() -> None:
    """Anima's, of a language model's embedding and T5's tokens."""
    model = tiny_flow_models.sd3()
    assert engine.Capability.ONE_TEXT in engine.require(model).capabilities
    model.model.diffusion_model.llm_adapter = torch.nn.Identity()
    with pytest.raises(IdentityEditError, match="reads the texts of several encoders"):
        engine.require(model, engine.Capability.ONE_TEXT)
