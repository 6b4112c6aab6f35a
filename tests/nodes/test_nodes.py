"""The nodes on a tiny model, without a server: what comes out of each socket, and files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
import tiny_models
import torch
from from_noise import sample_from
from identity_edit_pack.demo_world.attributes import Attributes
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.nodes import demo, scores, timestep_aware
from identity_edit_pack.nodes.inversion import noise_inversion
from identity_edit_pack.nodes.inversion import null_text as null_text_nodes
from identity_edit_pack.nodes.inversion.noise_inversion import NoiseInversion
from identity_edit_pack.nodes.inversion.saved_inversions import LoadInversion, SaveInversion
from identity_edit_pack.pipelines.inversion import inversion as inversions
from identity_edit_pack.pipelines.inversion import methods, null_text, rf_inversion
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests import tiny_flow_models

SOURCE, TARGET, NEGATIVE = (tiny_models.conditioning(seed) for seed in (1, 2, 3))
NULL_TEXT_SETTINGS: dict[str, Any] = {
    "guidance_scale": 3.0,
    "inner_steps": 2,
    "learning_rate": 0.01,
    "early_stop": 1e-5,
}


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Output and input folders of the test's own."""
    for name in ("output", "input"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path


def invert(model: Any, steps: int = 4, batch: int = 1) -> tuple[Any, ...]:
    latent = {"samples": tiny_models.latent(4, batch), "noise_mask": torch.ones(1, 8, 8)}
    return NoiseInversion.execute(model, SOURCE, latent, "DDIM", steps, 1.0, False, 5, 0.5, 0).args


def test_ddim_inversion_gives_what_a_sampler_needs() -> None:
    model = tiny_models.sd1()
    result, start, sigmas, noise = invert(model, batch=2)
    assert list(start) == ["samples"], "a noise mask would make the sampler blend with noise"
    expected = inversions.invert_image(model, tiny_models.latent(4, 2), SOURCE, steps=4)
    assert torch.equal(start["samples"], expected.start_latent(model))
    assert torch.equal(sigmas, expected.sigmas) and sigmas.shape == (5,)
    assert torch.equal(result.trajectory, expected.trajectory)
    x = engine_start(model, noise, sigmas, {"samples": tiny_models.latent(4, 2)})
    assert tiny_models.relative_error(x, result.trajectory[0]) < 1e-6


def engine_start(model: Any, noise: Any, sigmas: torch.Tensor, latent: dict[str, Any]) -> torch.Tensor:
    """Where ComfyUI starts a run with this NOISE, LATENT and SIGMAS."""
    z_0 = model.get_model_object("latent_format").process_in(latent["samples"])
    return model.get_model_object("model_sampling").noise_scaling(sigmas[0], noise.generate_noise(latent), z_0)


@pytest.mark.parametrize("choice", noise_inversion._METHODS)
def test_each_method_of_the_inversion_node_is_the_pipelines(choice: str) -> None:
    model = tiny_flow_models.flux(output_gain=0.2)
    latent = tiny_flow_models.latent(4)
    made = NoiseInversion.execute(model, SOURCE, {"samples": latent}, choice, 4, 1.0, False, 2, 0.5, 7).args[0]
    if choice == "RF-Inversion":
        expected = rf_inversion.rf_inversion(model, latent, SOURCE, steps=4, end_at_zero=False, gamma=0.5, seed=7)
    else:
        method = {"automatic": methods.FIXED_POINT}.get(choice, noise_inversion._METHODS[choice])
        expected = inversions.invert_image(model, latent, SOURCE, steps=4, method=method, iterations=2)
    assert made.method == expected.method and torch.equal(made.trajectory, expected.trajectory)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (null_text_nodes.NULL_TEXT_OPTIMIZATION, null_text.PAPER),
        (null_text_nodes.ADAPTIVE_NULL_TEXT_OPTIMIZATION, null_text.ADAPTIVE),
    ],
)
def test_null_text_optimization_hands_on_its_table(method: str, name: str) -> None:
    model = tiny_models.sd1()
    result = invert(model)[0]
    patched, negative, carrying, reconstruction, report = null_text_nodes.NullTextOptimization.execute(
        model, result, SOURCE, NEGATIVE, method, **NULL_TEXT_SETTINGS, checkpointing=False
    ).args
    expected = null_text.null_text_optimization(model, result, SOURCE, NEGATIVE, **NULL_TEXT_SETTINGS, method=name)
    assert torch.equal(carrying.embeddings.embeddings, expected.embeddings.embeddings)
    assert torch.equal(reconstruction["samples"], expected.reconstruction)
    assert negative is NEGATIVE
    assert f"{expected.evaluations} model calls" in report and "did not converge" in report
    # The model output alone samples the same latent.
    sampled = sample_from(patched, result, result.start_latent(model), SOURCE, negative, 3.0)
    # Relative to the whole latent: guidance on a random network makes large values of which single ones cancel.
    difference = (sampled - reconstruction["samples"]).norm()
    assert difference <= 1e-4 * reconstruction["samples"].norm()


def test_negative_prompt_inversion_stays_on_ddim_at_any_guidance() -> None:
    model = tiny_models.sd1()
    result = invert(model)[0]
    method = null_text_nodes.NEGATIVE_PROMPT_INVERSION
    patched, negative, _, reconstruction, _ = null_text_nodes.NullTextOptimization.execute(
        model, result, SOURCE, NEGATIVE, method, **NULL_TEXT_SETTINGS, checkpointing=False
    ).args
    unguided = inversions.sample_inversion(model, result, SOURCE)
    assert torch.equal(reconstruction["samples"], unguided)
    for sampling_model in (model, patched):  # both outputs say the same
        guided = sample_from(sampling_model, result, result.start_latent(model), SOURCE, negative, 9.0)
        assert tiny_models.relative_error(guided, unguided) < 1e-4


def test_saved_inversions_are_numbered_listed_and_loaded() -> None:
    model = tiny_models.sd1()
    result = invert(model)[0]
    paths = [SaveInversion.execute(result, "inversions/cat").args[0] for _ in range(2)]
    assert [Path(path).name for path in paths] == ["cat_00001_.safetensors", "cat_00002_.safetensors"]
    listed = [item for item in LoadInversion.define_schema().inputs if item.id == "file"][0].options
    assert listed == ["inversions/cat_00001_.safetensors [output]", "inversions/cat_00002_.safetensors [output]"]
    assert LoadInversion.validate_inputs(listed[0]) is True
    assert "no longer exists" in str(LoadInversion.validate_inputs("inversions/dog.safetensors [output]"))
    loaded, start, sigmas, same_model, _ = LoadInversion.execute(model, listed[1], 4).args
    assert torch.equal(loaded.trajectory, result.trajectory) and torch.equal(sigmas, result.sigmas)
    assert torch.equal(start["samples"], result.start_latent(model)) and same_model is model
    before = LoadInversion.fingerprint_inputs(listed[1])
    SaveInversion.execute(result, "inversions/other")
    assert LoadInversion.fingerprint_inputs(listed[1]) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 5}, "4 steps but steps is 5"),
        ({"latent": {"samples": torch.zeros(1, 4, 8, 9)}}, "the latent is"),
        ({"model": tiny_models.sd1(seed=3)}, "different weights"),
        ({"model": tiny_models.sdxl()}, "another model"),
    ],
)
def test_a_mismatched_inversion_is_refused(change: dict[str, Any], message: str) -> None:
    model = tiny_models.sd1()
    SaveInversion.execute(invert(model)[0], "inversions/cat")
    arguments = {"model": model, "file": "inversions/cat_00001_.safetensors [output]", "steps": 0, **change}
    with pytest.raises(IdentityEditError, match=message):
        LoadInversion.execute(**arguments)


@pytest.mark.parametrize("prefix", ["", "/", "../outside", "inversions/../../outside", "blocked/cat"])
def test_no_file_is_written_where_none_may_be(prefix: str, own_folders: Path) -> None:
    (own_folders / "output" / "blocked").write_text("a file, not a folder")
    before = sorted(own_folders.rglob("*"))
    result = invert(tiny_models.sd1(), steps=1)[0]
    with pytest.raises(IdentityEditError, match="filename_prefix"):
        SaveInversion.execute(result, prefix)
    assert sorted(own_folders.rglob("*")) == before


def test_text_nodes_agree_with_each_other() -> None:
    """Optimized, interpolated and injected: the sampler node and its two stock routes."""
    model = tiny_models.sd1()
    result, start, sigmas, _ = invert(model, steps=6)
    latent = {"samples": tiny_models.latent(4)}
    optimized, report = timestep_aware.OptimizeTextEmbedding.execute(model, latent, TARGET, 4, 0.01, 7, False).args
    assert "4 steps, 4 model calls" in report
    assert not torch.equal(optimized[0][0], TARGET[0][0])
    assert torch.equal(optimized[0][1]["pooled_output"], TARGET[0][1]["pooled_output"])
    edited, _ = timestep_aware.TimestepAwareTextInjectionSampler.execute(
        model, result, SOURCE, TARGET, 0.3, 0.6, 4.0, "ddim", optimized, NEGATIVE
    ).args
    inputs = (model, sigmas, SOURCE, TARGET, 0.3, 0.6, optimized)
    (positive,) = timestep_aware.TimestepAwareTextInjection.execute(*inputs).args
    patched, carrier = timestep_aware.TimestepAwareTextInjectionModel.execute(
        model, sigmas, SOURCE, TARGET, 0.3, 0.6, optimized
    ).args
    for sampling_model, conditioning in ((model, positive), (patched, carrier)):
        sampled = sample_from(sampling_model, result, start["samples"], conditioning, NEGATIVE, 4.0)
        assert torch.allclose(sampled, edited["samples"], rtol=1e-4, atol=1e-4)


def test_the_sampler_counts_its_evaluations() -> None:
    model = tiny_models.sd1()
    result = invert(model, steps=5)[0]
    _, report = timestep_aware.TimestepAwareTextInjectionSampler.execute(
        model, result, SOURCE, TARGET, 0.5, 0.7, 1.0, "ddim"
    ).args
    assert report == "3 of 5 steps with the source prompt, 5 model calls."


def test_reconstruction_check_measures_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    generator = np.random.default_rng(0)
    image = generator.random((2, 16, 16, 3))
    other = np.clip(image + np.array([0.01, 0.2])[:, None, None, None] * generator.standard_normal(image.shape), 0, 1)
    expected = [10 * math.log10(1 / np.mean((a - b) ** 2)) for a, b in zip(image, other, strict=True)]
    output = scores.ReconstructionCheck.execute(torch.tensor(image), torch.tensor(other), 20.0)
    assert output.args[0] == pytest.approx(min(expected))
    assert f"{expected[0]:.1f} dB, {expected[1]:.1f} dB" in output.args[1]
    assert "Warning: The inversion does not reconstruct image 2" in output.args[1]
    assert "does not reconstruct image 2" in caplog.text
    assert output.ui.as_dict() == {"text": (output.args[1],)}
    good = scores.ReconstructionCheck.execute(torch.tensor(image), torch.tensor(image), 20.0)
    assert good.args[0] == math.inf and "Warning" not in good.args[1]


def test_draw_demo_image_draws_what_is_asked() -> None:
    default = Attributes()
    names = [item.id for item in demo.DrawDemoImage.define_schema().inputs]
    choices = {name: getattr(default, name) for name in names if name not in ("wording", "seed")}
    assert {"species", "pose", "hair_color"} <= set(choices)
    image, mask, caption = demo.DrawDemoImage.execute(wording=0, seed=5, **{**choices, "pose": "jumping"}).args
    expected, expected_mask = render(default.replace(pose="jumping"), 5)
    assert image.shape == (1, 128, 128, 3) and mask.shape == (1, 128, 128)
    assert np.array_equal((image[0] * 255).round().byte().numpy(), expected)
    assert np.array_equal((mask[0] * 255).round().byte().numpy(), expected_mask)
    assert caption == "an orange cat jumping on the grass facing right"
    # Only the subject changes when only its pose does.
    standing, standing_mask, _ = demo.DrawDemoImage.execute(wording=0, seed=5, **choices).args
    outside = (mask + standing_mask)[0] == 0
    changed = (image - standing)[0].abs().amax(dim=2)
    assert float(changed[outside].mean()) < 0.02 < float(changed[~outside].mean())
