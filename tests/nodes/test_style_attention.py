"""The style attention's nodes on a tiny model: what comes out of each socket, files, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import pytest
import tiny_styles
import torch
from comfy_execution.graph import ExecutionBlocker
from identity_edit_pack.nodes.pidiff import style_attention as nodes
from identity_edit_pack.pipelines.pidiff.w_plus import WPlus
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.subjects.images import SubjectImages
from identity_edit_pack.tests import tiny_models, tiny_text_encoders
from identity_edit_pack.tests.attention.sampling import sample
from identity_edit_pack.tests.nodes.good_inputs import with_training_settings

SETTINGS: dict[str, Any] = {
    "kind": "sequential",
    "row_groups": tiny_styles.GROUPS,
    "templates": "an image of {}\n\n  a cropped photo of {}  ",
    "steps": 3,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "text_drop": 0.5,
    "style_drop": 0.5,
    "style_noise": 0.05,
    "masked_loss": False,
    "gradient_accumulation": 1,
    "precision": "float32",
    "checkpointing": True,
    "seed": 0,
    "sample_every": 2,
    "sample_prompt": "",
    "checkpoint_every": 1,
    "filename_prefix": "style_attention/person",
}
SAVED = "style_attention/person_00001_.safetensors [output]"
W_PLUS = tiny_styles.w_plus(images=3)
APPLIED: dict[str, Any] = {"strength": 0.4, "start_percent": 0.0, "end_percent": 1.0, "schedule": ""}


class Autoencoder:
    """Images of eight times the latent's size, both ways."""

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.avg_pool2d(image.movedim(-1, 1), 8)
        return 5.0 * torch.cat([small, small[:, :1]], dim=1)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(latent[:, :3], scale_factor=8).movedim(1, -1).sigmoid()


def images(token: str = "sks", masked: bool = False, count: int = 3) -> SubjectImages:
    generator = torch.Generator().manual_seed(0)
    return SubjectImages(
        images=[torch.rand(64, 64, 3, generator=generator) for _ in range(count)],
        captions=[""] * count,
        masks=[torch.ones(64, 64) if masked else None] * count,
        names=[f"{number}.png" for number in range(1, count + 1)],
        class_word="person",
        token=token,
    )


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("output", "input", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    models = tmp_path / "models" / nodes.FILE_FOLDER
    models.mkdir(parents=True)
    folders = {nodes.FILE_FOLDER: ([str(models)], set(nodes.files.ENDINGS))}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {**folder_paths.folder_names_and_paths, **folders})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    with torch.inference_mode():
        return tiny_models.sd1(output_gain=0.1), tiny_text_encoders.clip("sd1")


def train(models: tuple[Any, Any], shown: Any = None, w_plus: Any = W_PLUS, **changes: Any) -> tuple[Any, ...]:
    settings = with_training_settings({**SETTINGS, **changes})
    with torch.inference_mode():
        return nodes.TrainStyleAttention.execute(*models, Autoencoder(), shown or images(), w_plus, **settings).args


def test_training_saves_the_style_attention_that_it_gives(models: Any, own_folders: Path) -> None:
    style, samples, loss, path, report = train(models)
    assert samples.shape == (2, 64, 64, 3) and len(loss["loss"]) == 3
    assert path in report and "3 steps on 3 images" in report and "rows 1-2, 3, 4-5, 6-7" in report
    saved = sorted(file.name for file in (own_folders / "output" / nodes.FILE_FOLDER).glob("*.*"))
    assert saved == ["person_00001_.safetensors"]
    assert nodes.LoadStyleAttention.define_schema().inputs[0].options == [SAVED]
    assert nodes.LoadStyleAttention.validate_inputs(SAVED) is True
    assert "no longer exists" in nodes.LoadStyleAttention.validate_inputs("gone.safetensors")
    assert nodes.LoadStyleAttention.fingerprint_inputs(SAVED) == Path(path).stat().st_mtime
    with torch.inference_mode():
        loaded, word, text = nodes.LoadStyleAttention.execute(SAVED).args
    assert word == "sks" and "3 training steps, learning rate 0.001, 3 images" in text
    assert all(torch.equal(v, style.network.state_dict()[name]) for name, v in loaded.network.state_dict().items())
    one = WPlus(W_PLUS.rows[:1], W_PLUS.average, W_PLUS.encoder)
    latent = tiny_models.latent(3)
    with torch.inference_mode():
        results = [
            sample(nodes.ApplyStyleCrossAttention.execute(models[0], each, one, **APPLIED).args[0], latent)
            for each in (style, loaded)
        ]
        assert torch.equal(*results)
        plain = nodes.ApplyStyleCrossAttention.execute(models[0], style, one, **{**APPLIED, "strength": 0.0}).args[0]
        assert torch.equal(sample(plain, latent), sample(models[0], latent))
    assert not torch.allclose(results[0], sample(models[0], latent), atol=1e-4)


def test_apply_warns_of_what_does_not_quite_fit(models: Any) -> None:
    style = tiny_styles.style_attention(models[0])
    one = tiny_styles.w_plus()
    _, report, nothing = nodes.ApplyStyleCrossAttention.execute(models[0], style, one, **APPLIED).args
    assert "strength 0.4" in report and "Warning" not in report
    assert isinstance(nothing, ExecutionBlocker) and "set recorded_token" in nothing.message
    renamed = WPlus(one.rows, one.average, "another")
    _, report, _ = nodes.ApplyStyleCrossAttention.execute(tiny_models.sd1(seed=4), style, renamed, **APPLIED).args
    assert "Warning" in report and "another checkpoint" in report and "from the encoder another" in report
    with pytest.raises(IdentityEditError, match="schedule is 'up'"):
        nodes.ApplyStyleCrossAttention.execute(models[0], style, one, **{**APPLIED, "schedule": "up"})


def test_a_mask_and_a_schedule_reach_the_model(models: Any) -> None:
    style, one, latent = tiny_styles.style_attention(models[0]), tiny_styles.w_plus(), tiny_models.latent(3)
    mask = torch.zeros(1, 96, 96)
    with torch.inference_mode():
        plain = sample(models[0], latent)
        masked = nodes.ApplyStyleCrossAttention.execute(models[0], style, one, **APPLIED, mask=mask).args[0]
        assert torch.equal(sample(masked, latent), plain)
        faded = nodes.ApplyStyleCrossAttention.execute(models[0], style, one, **{**APPLIED, "schedule": "0, 0"}).args[0]
        assert torch.equal(sample(faded, latent), plain)


def test_an_interrupted_run_goes_on_when_queued_again(
    models: Any, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(models)[2]

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
    assert len(list((own_folders / "output" / nodes.FILE_FOLDER / "checkpoints").iterdir())) == 1
    assert not any("checkpoints" in name for name in nodes._files())
    _, _, loss, _, report = train(models)
    assert "2 of them from a checkpoint" in report
    assert loss["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_files_of_the_models_folder_are_listed_and_foreign_ones_refused(own_folders: Path) -> None:
    adapter = {"w_proj": {"norm.weight": torch.zeros(2)}, "wplus_adapter": {"1.to_k_wplus.weight": torch.zeros(2, 2)}}
    torch.save(adapter, own_folders / "models" / nodes.FILE_FOLDER / "wplus_adapter.bin")
    name = "wplus_adapter.bin [style_attention]"
    assert nodes._files() == [name] and nodes.LoadStyleAttention.validate_inputs(name) is True
    with pytest.raises(IdentityEditError, match="is a w-plus-adapter, whose layers and row groups differ"):
        nodes.LoadStyleAttention.execute(name)


@pytest.mark.parametrize(
    "shown, w_plus, changes, message",
    [
        (images(token=""), W_PLUS, {}, "placeholder token is empty"),
        (images(), tiny_styles.w_plus(), {}, "3 images and W\\+ codes of 1"),
        (images(), W_PLUS, {"row_groups": "1-5, 6-9, 10-13, 14-18"}, "have 7 rows"),
        (images(), W_PLUS, {"templates": " \n"}, "Image 1 has no caption"),
        (images(), W_PLUS, {"templates": "a photo"}, "no place for the placeholder token"),
        (images(), W_PLUS, {"masked_loss": True}, "no image has a mask"),
        (images(), W_PLUS, {"filename_prefix": "../x"}, "points outside the output folder"),
        (dataclasses.replace(images(), images=[]), W_PLUS, {}, "no image to train on"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_training(
    models: Any, shown: Any, w_plus: Any, changes: dict[str, Any], message: str, own_folders: Path
) -> None:
    with pytest.raises(IdentityEditError, match=message):
        train(models, shown, w_plus, **changes)
    assert not [file for file in (own_folders / "output").rglob("*") if file.is_file()]


def test_the_attention_to_a_style_token_is_drawn_by_attention_heatmap(models: Any) -> None:
    from identity_edit_pack.nodes.lipe.identity_attention import CROSS_ATTENTION, AttentionHeatmap

    style, one = tiny_styles.style_attention(models[0]), tiny_styles.w_plus()
    styled, _, attention = nodes.ApplyStyleCrossAttention.execute(
        models[0], style, one, **APPLIED, recorded_token=2
    ).args
    sample(styled, tiny_models.latent(3))
    image = torch.zeros(1, 64, 64, 3)
    arguments = {"opacity": 1.0, "show": CROSS_ATTENTION, "threshold": 0.4, "self_attention_power": 1}
    drawn = AttentionHeatmap.execute(image, **arguments, identity_attention=attention).args[0]
    assert drawn.shape == (1, 64, 64, 3) and float(drawn.std()) > 0.0
