"""The subject embedding's nodes on a tiny model: what comes out of each socket, files, and what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.model_management
import comfy.sd1_clip
import folder_paths
import pytest
import torch
from identity_edit_pack.nodes.hifi_tuner import subject_embedding as nodes
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.subjects.images import SubjectImages
from identity_edit_pack.tests import tiny_models, tiny_text_encoders
from identity_edit_pack.tests.nodes.good_inputs import with_training_settings
from safetensors.torch import save_file

SETTINGS: dict[str, Any] = {
    "kind": "output",
    "tokens": 5,
    "steps": 3,
    "updates_per_step": 1,
    "sampling_steps": 2,
    "learning_rate": 1e-2,
    "regularization_weight": 1e-4,
    "masked_loss": True,
    "keep_token": False,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "precision": "float32",
    "checkpointing": False,
    "seed": 0,
    "sample_every": 2,
    "sample_prompt": "",
    "checkpoint_every": 2,
    "filename_prefix": "subject_embeddings/subject",
}
SAVED = "subject_embeddings/subject_00001_.safetensors [output]"


class Autoencoder:
    """Images of eight times the latent's size, both ways."""

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.avg_pool2d(image.movedim(-1, 1), 8)
        return 5.0 * torch.cat([small, small[:, :1]], dim=1)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(latent[:, :3], scale_factor=8).movedim(1, -1).sigmoid()


def images(captions: list[str], masked: bool = True, mask: float = 1.0) -> SubjectImages:
    generator = torch.Generator().manual_seed(0)
    half = torch.zeros(64, 64)
    half[:32] = mask
    return SubjectImages(
        images=[torch.rand(64, 64, 3, generator=generator) for _ in captions],
        captions=captions,
        masks=[half if masked else None for _ in captions],
        names=[f"{number}.png" for number in range(1, len(captions) + 1)],
        class_word="cat",
        token="sks",
    )


SHOWN = images(["a sks cat sitting", "a smiling sks cat, lying down"])


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("output", "input", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    folders = {
        name: ([str(tmp_path / "models" / name)], {".safetensors", ".pt", ".bin"})
        for name in (nodes.EMBEDDING_FOLDER, nodes.FILE_FOLDER)
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {**folder_paths.folder_names_and_paths, **folders})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    for name in folders:
        (tmp_path / "models" / name).mkdir(parents=True)
    return tmp_path


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    with torch.inference_mode():
        return tiny_models.sd1(), tiny_text_encoders.clip("sd1")


def train(models: tuple[Any, Any], shown: Any = SHOWN, **changes: Any) -> tuple[Any, ...]:
    with torch.inference_mode():
        return nodes.TrainSubjectEmbedding.execute(
            *models, Autoencoder(), shown, **with_training_settings({**SETTINGS, **changes})
        ).args


@pytest.mark.parametrize("kind", ["output", "word"])
def test_training_saves_the_subject_that_it_gives(models: Any, own_folders: Path, kind: str) -> None:
    subject, samples, loss, path, report = train(models, kind=kind)
    assert (subject.kind, subject.timesteps, subject.name) == (kind, (501, 1), "sks cat")
    assert samples.shape == (3, 64, 64, 3), "two of the first phase, one of the second"
    assert len(loss["loss"]) == 3 + 2 and path in report and "5 steps" in report and "kB" in report
    saved = sorted(file.name for file in (own_folders / "output" / nodes.FILE_FOLDER).glob("*.*"))
    assert saved == ["subject_00001_.safetensors"]
    options = nodes.StepWiseEmbeddingLoader.define_schema().inputs[0].options
    assert options == [SAVED] and nodes.StepWiseEmbeddingLoader.validate_inputs(SAVED) is True
    loaded, name, text = nodes.StepWiseEmbeddingLoader.execute(SAVED).args
    assert name == "sks cat" and "3 training steps, learning rate 0.01, 2 images" in text
    for part in subject.vectors:
        assert torch.equal(loaded.vectors[part], subject.vectors[part])
        assert torch.equal(loaded.step_vectors[part], subject.step_vectors[part])
    model, positive, text = nodes.ApplySubject.execute(*models, loaded, "a sks cat in the snow").args
    assert len(model.get_all_wrappers("predict_noise")) == 1 and not models[0].get_all_wrappers("predict_noise")
    assert positive[0][0].shape == (1, 77, 32) and "2 sampling steps" in text and "Warning" not in text


def test_warnings_are_shown(models: Any) -> None:
    subject = train(models)[0]
    text = nodes.ApplySubject.execute(*models, subject, "cat " * 73).args[2]
    assert "Warning: The prompt has 73 tokens" in text
    text = nodes.ApplySubject.execute(tiny_models.sd1(seed=3), models[1], subject, "a cat").args[2]
    assert "Warning: The subject was trained on another checkpoint" in text
    with pytest.raises(IdentityEditError, match="embeddings of 32 channels but this checkpoint has 48"):
        nodes.ApplySubject.execute(tiny_models.sd1(context_dim=48), models[1], subject, "a cat")


def test_an_interrupted_run_goes_on_when_queued_again(
    models: Any, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(models)[2]

    shutil.rmtree(own_folders / "output")
    (own_folders / "output").mkdir()

    def stop(*_: Any) -> Any:
        def report(done: int, *_: Any) -> None:
            if done == 4:
                raise comfy.model_management.InterruptProcessingException()

        return report

    with monkeypatch.context() as patch:
        patch.setattr(nodes, "training_progress", stop)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(models)
    folder = own_folders / "output" / nodes.FILE_FOLDER / "checkpoints"
    assert len(list(folder.iterdir())) == 2, "one for each phase"
    assert not any("checkpoints" in name for name in nodes._files())
    _, _, loss, path, report = train(models)
    assert "4 of them from a checkpoint" in report and loss["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert len(list(folder.glob("*.safetensors"))) == 2 and len(list(folder.glob("*.finished"))) == 1
    _, _, same_loss, same_path, report = train(models)
    assert same_loss == loss and same_path == path and "5 of them from a checkpoint" in report


def test_progress_runs_over_both_phases(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.utils

    shown = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *values, **_: shown.append(values))
    train(models, sample_every=1)
    ours = [(done, preview) for done, total, preview in (values[:3] for values in shown) if total == 5]
    assert [done for done, _ in ours] == [1, 2, 3, 4, 5]
    assert all(preview[0] == "JPEG" and preview[1].size == (8, 8) for _, preview in ours)


def test_masks_and_the_token_are_used_as_asked(models: Any) -> None:
    masked = train(models, updates_per_step=0)
    assert masked[2] != train(models, updates_per_step=0, masked_loss=False)[2]
    assert masked[2] != train(models, updates_per_step=0, keep_token=True)[2]
    assert masked[0].timesteps == () and masked[0].token == "sks"
    assert train(models, updates_per_step=0, keep_token=True)[0].token == ""


@pytest.mark.parametrize(
    ("shown", "changes", "message"),
    [
        (images(["a sks cat"], masked=False), {}, "masked_loss is on but no image"),
        (images(["a sks cat"], mask=0.0), {}, "mask of image 1 is empty"),
        (images(["a sks cat", ""]), {}, "2.png has no caption"),
        (images(["a sks cat", "a cat"]), {}, "lacks the identity token 'sks'"),
        (images(["a sks cat", "a sks dog"]), {}, "lacks the class word 'cat'"),
        (images(["a sks cat " + "on the grass " * 24]), {}, "caption of image 1 is too long"),
        (SHOWN, {"steps": -1}, "steps is -1"),
        (SHOWN, {"updates_per_step": -1}, "updates_per_step is -1"),
        (SHOWN, {"learning_rate": 0.0}, "learning_rate is 0"),
        (SHOWN, {"filename_prefix": "../outside"}, "filename_prefix"),
        (SHOWN, {"filename_prefix": ""}, "filename_prefix"),
    ],
)
def test_what_cannot_be_trained_is_told_before_the_training(
    models: Any, shown: Any, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes.learning, "train_subject_embedding", None)
    with pytest.raises(IdentityEditError, match=message):
        train(models, shown, **changes)


def test_files_of_the_models_folders_are_listed_and_read(own_folders: Path) -> None:
    vectors = torch.arange(64.0).reshape(2, 32)
    save_file({"<toy>": vectors}, own_folders / "models" / "embeddings" / "toy.safetensors")
    torch.save({"string_to_param": {"*": vectors}, "name": "thing"}, own_folders / "models" / "embeddings" / "old.pt")
    save_file({"emb_params": vectors}, own_folders / "models" / nodes.FILE_FOLDER / "mine.safetensors")
    assert set(nodes._files()) == {
        "toy.safetensors [embeddings]", "old.pt [embeddings]", "mine.safetensors [subject_embeddings]",
    }  # fmt: skip
    for file, name in (("toy.safetensors [embeddings]", "<toy>"), ("old.pt [embeddings]", "thing")):
        assert nodes.StepWiseEmbeddingLoader.fingerprint_inputs(file) > 0.0
        subject, named, report = nodes.StepWiseEmbeddingLoader.execute(file).args
        assert named == name and torch.equal(subject.vectors["clip_l"], vectors) and "2 word vectors" in report
    assert "no longer exists" in nodes.StepWiseEmbeddingLoader.validate_inputs("gone.safetensors")
    with pytest.raises(IdentityEditError, match="does not exist"):
        nodes.StepWiseEmbeddingLoader.execute("gone.pt [embeddings]")


def test_the_models_folder_of_subjects_is_registered(
    own_folders: Path, pack: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the entry point, beside a folder that extra_model_paths.yaml has named before."""
    monkeypatch.setattr(folder_paths, "models_dir", str(own_folders / "models"))
    elsewhere = own_folders / "elsewhere"
    elsewhere.mkdir()
    for named_before in (None, str(elsewhere)):
        folder_paths.folder_names_and_paths.pop(nodes.FILE_FOLDER)
        if named_before is not None:
            folder_paths.add_model_folder_path(nodes.FILE_FOLDER, named_before)
        asyncio.run(pack.comfy_entrypoint())
        save_file({"emb_params": torch.ones(1, 32)}, own_folders / "models" / nodes.FILE_FOLDER / "mine.safetensors")
        (own_folders / "models" / nodes.FILE_FOLDER / "notes.txt").write_text("not a subject")
        expected = ["mine.safetensors [subject_embeddings]"]
        if named_before is not None:
            save_file({"emb_params": torch.ones(1, 32)}, elsewhere / "other.safetensors")
            expected = ["mine.safetensors [subject_embeddings]", "other.safetensors [subject_embeddings]"]
        assert sorted(nodes._files()) == expected
        for file in expected:
            assert nodes.StepWiseEmbeddingLoader.execute(file).args[0].tokens == 1


def test_a_subject_is_saved_where_prompts_find_it(models: Any, own_folders: Path) -> None:
    subject = train(models, kind="word")[0]
    path, prompt = nodes.SaveSubjectAsEmbedding.execute(subject, "tom", False).args
    assert Path(path) == own_folders / "models" / "embeddings" / "tom.safetensors" and prompt == "embedding:tom"
    clip = tiny_text_encoders.clip("sd1")
    clip.tokenizer.clip_l.embedding_directory = folder_paths.get_folder_paths("embeddings")
    stock = clip.encode_from_tokens(clip.tokenize(f"a {prompt} in the snow"))
    ours = nodes.ApplySubject.execute(*models, dataclasses.replace(subject), "a sks cat in the snow").args[1]
    torch.testing.assert_close(stock, ours[0][0])
    with pytest.raises(IdentityEditError, match="exists; choose another name, or turn on overwrite"):
        nodes.SaveSubjectAsEmbedding.execute(subject, "tom", False)
    assert nodes.SaveSubjectAsEmbedding.execute(subject, "tom", True).args[0] == path
    assert nodes.SaveSubjectAsEmbedding.execute(subject, "cats/tom", False).args[1] == "embedding:cats/tom"
    for name in ("", "two words", "tom:1.2", "a,b", "..", "../tom", "sub/../../tom", "(tom)"):
        with pytest.raises(IdentityEditError, match="The name"):
            nodes.SaveSubjectAsEmbedding.execute(subject, name, True)
    with pytest.raises(IdentityEditError, match="train it with kind 'word'"):
        nodes.SaveSubjectAsEmbedding.execute(train(models)[0], "rows", False)
