"""The identity prior's nodes on a tiny model: what comes out of each socket, files, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from identity_edit_pack.nodes.lipe import identity_prior as nodes
from identity_edit_pack.nodes.saved_files import loadable_files
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.subjects.images import SubjectImages
from identity_edit_pack.pipelines.training import loop as training_loop
from identity_edit_pack.tests import tiny_models, tiny_text_encoders
from identity_edit_pack.tests.nodes.good_inputs import with_training_settings

SETTINGS: dict[str, Any] = {
    "steps": 3,
    "learning_rate": 1e-3,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "regularization_weight": 1.0,
    "train_text_encoder": True,
    "precision": "float32",
    "checkpointing": False,
    "masked_loss": False,
    "min_snr_gamma": 0.0,
    "seed": 0,
    "sample_every": 2,
    "sample_prompt": "",
    "checkpoint_every": 2,
    "filename_prefix": "identity_priors/prior",
}


class Autoencoder:
    """Images of eight times the latent's size, both ways; counts what it encodes."""

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        self.encoded += 1
        small = torch.nn.functional.avg_pool2d(image.movedim(-1, 1), 8)
        return 5.0 * torch.cat([small, small[:, :1]], dim=1)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(latent[:, :3], scale_factor=8).movedim(1, -1).sigmoid()


def images(captions: list[str], masks: list[torch.Tensor | None] | None = None, seed: int = 0) -> SubjectImages:
    generator = torch.Generator().manual_seed(seed)
    return SubjectImages(
        images=[torch.rand(64, 64, 3, generator=generator) for _ in captions],
        captions=captions,
        masks=masks or [None] * len(captions),
        names=[f"{number}.png" for number in range(1, len(captions) + 1)],
        class_word="cat",
        token="sks",
    )


SUBJECT = images(["a sks cat sitting", "a smiling sks cat, lying down"])
CLASS = images(["a cat", "a black cat in the snow"], seed=1)


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("output", "input", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    with torch.inference_mode():
        return tiny_models.sd1(), tiny_text_encoders.clip("sd1")


def train(models: tuple[Any, Any], subject: Any = SUBJECT, regularization: Any = CLASS, **changes: Any) -> Any:
    with torch.inference_mode():
        return nodes.TrainIdentityPrior.execute(
            *models,
            Autoencoder(),
            subject,
            **with_training_settings({**SETTINGS, **changes}),
            regularization=regularization,
        )


def test_training_gives_a_model_that_the_saved_file_gives_too(models: Any, own_folders: Path) -> None:
    output = train(models)
    model, clip, prompt, samples, loss, path, report = output.args
    assert prompt == "sks cat" and samples.shape == (2, 64, 64, 3), "after two steps and at the end"
    assert list(loss) == ["loss"] and len(loss["loss"]) == 3
    assert Path(path).name == "prior_00001_.safetensors" and path in report
    assert "3 steps, " in report and "Warning" not in report
    saved = sorted(file.name for file in (own_folders / "output" / "identity_priors").glob("*.*"))
    assert saved == ["prior_00001_.safetensors"]
    listed = [item for item in nodes.LoadIdentityPrior.define_schema().inputs if item.id == "file"][0].options
    assert listed == ["identity_priors/prior_00001_.safetensors [output]"]
    assert nodes.LoadIdentityPrior.validate_inputs(listed[0]) is True
    assert "no longer exists" in str(nodes.LoadIdentityPrior.validate_inputs("other.safetensors [output]"))
    assert nodes.LoadIdentityPrior.fingerprint_inputs(listed[0]) > 0
    loaded_model, loaded_clip, loaded_prompt, text = nodes.LoadIdentityPrior.execute(*models, listed[0], 1.0, 1.0).args
    assert loaded_prompt == prompt
    assert "3 steps" in text and "2 images of the subject, 2 of its class" in text and "Warning" not in text
    for trained, loaded in ((model, loaded_model), (clip.patcher, loaded_clip.patcher)):
        assert trained.patches.keys() == loaded.patches.keys() and trained.patches
        for key, (patch,) in trained.patches.items():
            assert torch.equal(patch[1][1][0], loaded.patches[key][0][1][1][0])
    assert not models[0].patches and not models[1].patcher.patches
    warned = nodes.LoadIdentityPrior.execute(tiny_models.sd1(seed=3), models[1], listed[0], 1.0, 1.0).args[3]
    assert "Warning: The prior was trained on another checkpoint" in warned
    with pytest.raises(IdentityEditError, match="another model family"):
        nodes.LoadIdentityPrior.execute(tiny_models.sdxl(), models[1], listed[0], 1.0, 1.0)


def test_an_interrupted_run_goes_on_when_queued_again(
    models: Any, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(models).args[4]

    shutil.rmtree(own_folders / "output")
    (own_folders / "output").mkdir()

    def stop(*_: Any) -> Any:
        def report(done: int, *_: Any) -> None:
            if done == 2:
                raise comfy.model_management.InterruptProcessingException()

        return report

    with monkeypatch.context() as patch:
        patch.setattr(nodes, "training_progress", stop)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(models)
    folder = own_folders / "output" / "identity_priors" / "checkpoints"
    assert len(list(folder.iterdir())) == 1
    assert not any("checkpoints" in name for name in loadable_files(nodes.FILE_FOLDER, nodes.CHECKPOINT_FOLDER))
    *_, loss, _, report = train(models).args
    assert "2 of them from a checkpoint" in report and loss["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert sorted(file.suffix for file in folder.iterdir()) == [".finished", ".safetensors"], "the result and its mark"


def test_the_same_training_is_not_repeated(models: Any, own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _, samples, loss, path, _ = train(models).args
    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "_gradients", lambda *_: pytest.fail("it trains again"))
        again, _, _, same_samples, same_loss, same_path, report = train(models).args
        with pytest.raises(pytest.fail.Exception, match="it trains again"):
            train(models, seed=1)
    assert same_path == path and same_loss == loss and torch.equal(same_samples, samples)
    assert "3 steps, 3 of them from a checkpoint" in report
    weights = [each.patches for each in (model, again)]
    for key, [(_, patch, *_)] in weights[0].items():
        assert torch.equal(patch[1][0], weights[1][key][0][1][1][0])
    Path(path).unlink()
    assert Path(train(models).args[5]).is_file(), "a deleted file is written again"
    train(models, seed=1)
    folder = own_folders / "output" / "identity_priors" / "checkpoints"
    assert len(list(folder.glob("*.safetensors"))) == 1, "only the last result is kept"


def test_progress_shows_samples_even_where_previews_are_off(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.utils

    shown = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *values, **_: shown.append(values))
    train(models, sample_every=1)
    ours = [(done, preview) for done, total, preview in (values[:3] for values in shown) if total == 3]
    assert [done for done, _ in ours] == [1, 2, 3]
    assert all(preview[0] == "JPEG" and preview[1].size == (8, 8) for _, preview in ours)


def test_masks_are_used_where_asked_for(models: Any) -> None:
    mask = torch.zeros(64, 64)
    mask[:32] = 1.0
    masked = dataclasses.replace(SUBJECT, masks=[mask, None])
    losses = [train(models, masked, masked_loss=on).args[4]["loss"] for on in (False, True)]
    assert losses[0] != losses[1]
    assert losses[0] == train(models).args[4]["loss"], "masks without masked_loss change nothing"
    with pytest.raises(IdentityEditError, match="masked_loss is on but no image"):
        train(models, masked_loss=True)


def test_the_class_is_not_called_by_the_token(models: Any) -> None:
    called = images(["a sks cat", "a black sks, cat in the snow"], seed=1)
    vae = Autoencoder()
    assert nodes._encode_class(vae, called, "sks").captions == ["a cat", "a black cat in the snow"]
    assert vae.encoded == 2
    with pytest.raises(IdentityEditError, match="1.png of the regularization set has no caption"):
        train(models, regularization=images(["", "a cat"]))


def test_without_a_regularization_set_there_is_a_warning(models: Any) -> None:
    assert "Warning: There is no regularization set" in train(models, regularization=None).args[6]


@pytest.mark.parametrize(
    ("captions", "message"),
    [(["a sks cat", ""], "2.png has no caption"), (["a sks cat", "a cat"], "lacks the identity token 'sks'")],
)
def test_captions_are_checked_before_anything_is_done(models: Any, captions: list[str], message: str) -> None:
    with pytest.raises(IdentityEditError, match=message):
        train(models, images(captions))


@pytest.mark.parametrize("prefix", ["", "../outside", "blocked/prior"])
def test_a_file_that_cannot_be_written_is_told_before_the_training(
    models: Any, own_folders: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_folders / "output" / "blocked").write_text("a file, not a folder")
    monkeypatch.setattr(nodes, "train_identity_prior", None)
    with pytest.raises(IdentityEditError, match="filename_prefix"):
        train(models, filename_prefix=prefix)


def test_a_lora_is_saved_where_load_lora_looks(models: Any, own_folders: Path) -> None:
    train(models)
    file = "identity_priors/prior_00001_.safetensors [output]"
    assert nodes.SaveIdentityPriorAsLoRA.validate_inputs(file) is True
    path, error, report = nodes.SaveIdentityPriorAsLoRA.execute(file, 4, "loras/cat").args
    assert Path(path) == own_folders / "output" / "loras" / "cat_00001_.safetensors"
    assert 0.0 < error < 1.0 and f"rank 4: relative error {error:.3f}" in report
    tensors = comfy.utils.load_torch_file(path)
    model, clip = comfy.sd.load_lora_for_models(*models, tensors, 1.0, 1.0)
    prior = nodes.priors.load_identity_prior(folder_paths.get_annotated_filepath(file))
    assert model.patches.keys() == prior.model_change.keys()
    assert clip.patcher.patches.keys() == prior.clip_change.keys()
