"""The nodes of portrait editing on a tiny model: training from a folder, and an edit from the file it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import folder_paths
import numpy as np
import pytest
import torch
from identity_edit_pack.nodes.mcdm import edit_mask, train_mcdm
from identity_edit_pack.nodes.mcdm import portrait as nodes
from identity_edit_pack.pipelines.engine import edit_model
from identity_edit_pack.pipelines.inversion.inversion import invert_image
from identity_edit_pack.pipelines.mcdm import model as mcdm
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests import tiny_models, tiny_text_encoders, tiny_vision
from identity_edit_pack.tests.nodes.good_inputs import with_mcdm_settings, with_training_settings
from PIL import Image

SETTINGS: dict[str, Any] = {
    "folder": "my pairs",
    "steps": 3,
    "learning_rate": 1e-3,
    "batch_size": 2,
    "gradient_accumulation": 1,
    "identity_share": 0.05,
    "dropout": 0.2,
    "image_tokens": 77,
    "ema_decay": 0.5,
    "precision": "float32",
    "checkpointing": False,
    "seed": 0,
    "sample_every": 2,
    "checkpoint_every": 2,
    "mirror": False,
    "image_embedding": train_mcdm.NEW,
    "file_contents": train_mcdm.UNET_ALONE,
    "file_dtype": "float32",
    "filename_prefix": "diffusion_models/mcdm",
}


@pytest.fixture
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    output, given = tmp_path / "output", tmp_path / "input"
    given.mkdir()
    (output / "diffusion_models").mkdir(parents=True)
    (output / "checkpoints").mkdir()
    monkeypatch.setattr(folder_paths, "output_directory", str(output))
    monkeypatch.setattr(folder_paths, "input_directory", str(given))
    names = dict(folder_paths.folder_names_and_paths)
    for name in ("diffusion_models", "checkpoints"):
        names[name] = ([str(output / name)], folder_paths.supported_pt_extensions)
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", names)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    write_pairs(output / "my pairs")
    return tmp_path


def write_pairs(folder: Path, count: int = 4) -> None:
    generator = np.random.default_rng(0)
    lines = []
    for number in range(count):
        pair = folder / "pairs" / f"{number:06}"
        pair.mkdir(parents=True)
        for side in ("source", "target"):
            pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(pair / f"{side}.png")
        entry = {side: f"pairs/{number:06}/{side}.png" for side in ("source", "target")}
        entry |= {"number": number, "edit": "laughing", "split": "validation" if number == 0 else "train"}
        entry |= {"source_prompt": "a cat, calm", "target_prompt": "a cat, laughing"}
        lines.append(json.dumps(entry))
    (folder / "index.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def parts() -> tuple[Any, Any, Any, Any]:
    return tiny_models.sd1(), tiny_text_encoders.clip("sd1"), tiny_vision.VAE(), tiny_vision.clip_vision()


def train(parts: tuple[Any, Any, Any, Any], **changes: Any) -> Any:
    return train_mcdm.TrainMCDM.execute(
        *parts, **with_mcdm_settings(with_training_settings({**SETTINGS, **changes}))
    ).args


def image() -> torch.Tensor:
    return torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))


def condition(model: Any, parts: tuple[Any, Any, Any, Any], file: str, **choice: Any) -> Any:
    _, clip, vae, vision = parts
    arguments = {"target_prompt": "a cat, laughing", "source_prompt": "a cat, calm"}
    return nodes.MCDMConditioner.execute(model, clip, vision, vae, image(), file, **arguments, **choice).args


def test_a_model_is_trained_saved_listed_and_edits_an_image(parts: Any, own_folders: Path) -> None:
    model, samples, loss, file, report = train(parts)
    assert samples.shape == (2, 64, 64, 3) and len(loss["loss"]) == 3
    assert "3 steps on 3 pairs" in report and file in report
    name = Path(file).name + " [diffusion_models]"
    assert name in nodes.model_files() and nodes.MCDMConditioner.validate_inputs(name) is True
    assert "no longer exists" in str(nodes.MCDMConditioner.validate_inputs("other.safetensors"))
    assert not list((own_folders / "output" / train_mcdm.RUN_FOLDER).glob("*.safetensors"))

    positive, negative, source, latent, about = condition(model, parts, name)
    assert "3 steps on 3 pairs" in about and "Warning" not in about
    assert latent["samples"].shape == (1, 4, 8, 8)
    mask, contrast, mask_report = edit_mask.MCDMEditMask.execute(
        model, positive, source, latent, 20, 10, 2, 0.0, 3, 0.35, 0
    ).args
    assert mask.shape == contrast.shape == (1, 64, 64) and "4 model calls" in mask_report
    guider, evaluations = nodes.MCDMGuider.execute(model, positive, negative, 3.0, 3.0, 5.0, source, mask).args
    assert evaluations == "4 model calls per step."
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas = torch.tensor([8.0, 2.0, 0.0])
    sampler = comfy.samplers.sampler_object("uni_pc")
    edited = guider.sample(noise, torch.zeros(1, 4, 8, 8), sampler, sigmas, disable_pbar=True, seed=0)
    assert bool(torch.isfinite(edited).all()) and guider.evaluations > 0


def test_conditions_are_removed_in_use_and_those_not_trained_with_never_come_back(
    parts: Any, own_folders: Path
) -> None:
    def tokens_and_latent(model: Any, name: str, **choice: Any) -> tuple[int, bool]:
        conditioning = condition(model, parts, name, **choice)[0]
        return conditioning[0][0].shape[1], "concat_latent_image" in conditioning[0][1]

    model, _, _, file, _ = train(parts)
    name = Path(file).name + " [diffusion_models]"
    text = tokens_and_latent(model, name, conditions="spatial only")[0]
    assert tokens_and_latent(model, name, conditions="spatial only") == (text, True)
    assert tokens_and_latent(model, name, conditions="image only") == (text + 77, False)
    assert tokens_and_latent(model, name) == (text + 77, True)

    model, _, _, file, _ = train(parts, conditions="image only")
    name = Path(file).name + " [diffusion_models]"
    assert tokens_and_latent(model, name) == (text + 77, False)
    assert "trained with 'image only'" in condition(model, parts, name)[4]
    positive, negative, source, latent, _ = condition(model, parts, name)
    guider, _ = nodes.MCDMGuider.execute(model, positive, negative, 3.0, 3.0, 5.0, source, torch.ones(1, 64, 64)).args
    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([8.0, 0.0])
    zeros = torch.zeros_like(latent["samples"])
    assert bool(torch.isfinite(guider.sample(zeros, zeros, sampler, sigmas, disable_pbar=True, seed=0)).all())
    with pytest.raises(IdentityEditError, match="was trained with 'image only'; choose the same"):
        condition(model, parts, name, conditions="spatial only")
    with pytest.raises(IdentityEditError, match="conditions is 'none'; choose one of"):
        train(parts, conditions="none")


def test_a_canceled_training_goes_on_with_the_same_losses(
    parts: Any, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(parts)[2]

    def stop(*_: Any) -> Any:
        def report(done: int, *_: Any) -> None:
            if done == 2:
                raise comfy.model_management.InterruptProcessingException()

        return report

    with monkeypatch.context() as patch:
        patch.setattr(train_mcdm, "training_progress", stop)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(parts)
    folder = own_folders / "output" / train_mcdm.RUN_FOLDER
    assert len(list(folder.glob("*.safetensors"))) == 1
    _, _, loss, _, report = train(parts)
    assert "2 of them from a checkpoint" in report
    assert loss["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_what_cannot_be_used_is_said(parts: Any, own_folders: Path) -> None:
    model, _, _, file, _ = train(parts)
    name = Path(file).name + " [diffusion_models]"
    with pytest.raises(IdentityEditError, match="takes 4 input channels and no source image"):
        condition(parts[0], parts, name)
    with pytest.raises(IdentityEditError, match="The CLIP vision is not the one"):
        condition(model, (*parts[:3], tiny_vision.clip_vision(seed=8)), name)
    ordinary = own_folders / "output" / "checkpoints" / "ordinary.safetensors"
    made = mcdm.load_mcdm(file)
    from safetensors.torch import save_file

    save_file({"model.diffusion_model.x": torch.zeros(1)}, ordinary)
    folder_paths.filename_list_cache.clear()
    with pytest.raises(IdentityEditError, match="contains no MCDM"):
        condition(model, parts, "ordinary.safetensors")
    with pytest.raises(IdentityEditError, match="neither a path nor below"):
        train(parts, folder="nowhere")
    (own_folders / "input" / "empty").mkdir()
    with pytest.raises(IdentityEditError, match="has no readable index.jsonl"):
        train(parts, folder="empty")
    index = own_folders / "output" / "my pairs" / "index.jsonl"
    index.write_text(index.read_text() + '{"source": "x.png"}\n')
    with pytest.raises(IdentityEditError, match="Line 5 of .* is invalid"):
        train(parts)
    assert edit_model.is_edit_model(model) and made.training["pairs"] == 3


def test_diffedit_keeps_what_is_outside_of_the_mask() -> None:
    model = tiny_models.sd1(output_gain=0.1)
    latent, empty = tiny_models.latent(3), tiny_models.conditioning(2)
    inversion = invert_image(model, latent, empty, steps=10)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1.0
    result, report = edit_mask.DiffEdit.execute(
        model, inversion, tiny_models.conditioning(1), empty, mask, 0.5, 4.0
    ).args
    edited = result["samples"]
    assert "10 model calls; the mask covers 50%" in report
    kept = (edited - latent)[..., 4:]
    assert float(kept.abs().max()) < 0.05 * float(latent.abs().max())  # DDIM ends just above sigma 0
    assert float((edited - latent)[..., :4].abs().mean()) > 5 * float(kept.abs().mean())


def test_a_soft_border_is_a_gaussian_of_the_mask_and_off_by_default() -> None:
    from scipy.ndimage import gaussian_filter

    arguments = [tiny_models.sd1(), tiny_models.conditioning(1), tiny_models.conditioning(2)]
    arguments += [{"samples": tiny_models.latent(3)}, 20, 10, 2, 0.0, 3, 0.35, 0]
    hard = edit_mask.MCDMEditMask.execute(*arguments).args[0]
    soft = edit_mask.MCDMEditMask.execute(*arguments, soft_border=4.0).args[0]
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    expected = gaussian_filter(hard[0].double().numpy(), 4.0, mode="nearest", truncate=3.0)
    assert float((soft[0].double() - torch.from_numpy(expected)).abs().max()) < 1e-5
