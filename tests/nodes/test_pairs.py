"""The pair nodes: what comes out of each socket, and what is refused."""

from __future__ import annotations

import comfy.samplers
import folder_paths
import pytest
import torch
from comfy_execution.graph import ExecutionBlocker
from identity_edit_pack.nodes.mcdm import identity_words, pair_guider, pairs
from identity_edit_pack.pipelines.engine import CombiningGuider
from identity_edit_pack.pipelines.mcdm.pair_folder import PairFolder
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.subjects.images import from_batch
from identity_edit_pack.tests import tiny_models, tiny_text_encoders
from identity_edit_pack.tests.nodes.good_inputs import with_pair_nodes, with_training_settings


class Autoencoder:
    def encode(self, image):
        small = torch.nn.functional.avg_pool2d(image.movedim(-1, 1), 8)
        return 5.0 * torch.cat([small, small[:, :1]], dim=1)

    def decode(self, latent):
        return torch.nn.functional.interpolate(latent[:, :3], scale_factor=8).movedim(1, -1).sigmoid()


@pytest.fixture(autouse=True)
def output(tmp_path):
    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    yield tmp_path
    folder_paths.set_output_directory(before)


def defaults(node, **changes):
    given = {
        item.id: item.default for item in node.define_schema().inputs if getattr(item, "default", None) is not None
    }
    return {**given, **changes}


def generate(**changes):
    model = tiny_models.sd1(output_gain=0.1)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
    given = dict(
        model=model, clip=tiny_text_encoders.clip("sd1"), vae=Autoencoder(), sigmas=sigmas,
        sampler=comfy.samplers.sampler_object("euler"), count=2, width=64, height=64,
    )  # fmt: skip
    return pairs.GeneratePairs.execute(**defaults(pairs.GeneratePairs, **with_pair_nodes({**given, **changes})))


def test_the_guider_node_gives_a_guider() -> None:
    given = {name: tiny_models.conditioning(i) for i, name in enumerate(("shared", "source", "target", "negative"))}
    guider = pair_guider.PairGuider.execute(
        model=tiny_models.sd1(), **defaults(pair_guider.PairGuider, **given)
    ).result[0]
    assert isinstance(guider, CombiningGuider) and isinstance(guider, comfy.samplers.CFGGuider)


def test_split_pair_gives_halves_of_what_is_connected() -> None:
    images = torch.rand(2, 8, 12, 3)
    latent = {"samples": torch.rand(2, 4, 3, 6), "noise_mask": torch.rand(2, 24, 48), "batch_index": [4, 5]}
    left, right, left_latent, right_latent = pair_guider.SplitPair.execute(images=images, latent=latent).result
    assert torch.equal(torch.cat([left, right], dim=2), images)
    assert torch.equal(torch.cat([left_latent["samples"], right_latent["samples"]], dim=3), latent["samples"])
    assert right_latent["noise_mask"].shape == (2, 24, 24) and left_latent["batch_index"] == [4, 5]
    assert latent["samples"].shape == (2, 4, 3, 6)
    only = pair_guider.SplitPair.execute(images=images).result
    assert isinstance(only[2], ExecutionBlocker) and torch.equal(only[0], left)
    with pytest.raises(IdentityEditError, match="Split Pair has no input"):
        pair_guider.SplitPair.execute()


def test_generate_pairs_makes_the_dataset_once(output) -> None:
    sheet, path, report = generate().result
    assert path == str(output / "pairs" / "edits") and sheet.shape[0] == 1
    assert report.startswith("2 pairs generated with 16 model calls (8 per pair)")
    assert sorted(PairFolder(path).finished()) == [0, 1]
    assert generate().result[2].startswith("0 pairs generated, 2 already present")
    assert generate(count=3, part="2").result[2].startswith("1 pairs generated")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folder": "../elsewhere"}, "outside the output folder"),
        ({"folder": ""}, "is empty"),
        ({"edits": ""}, "edits is empty"),
        ({"subjects": " \n"}, "subjects is empty"),
        ({"part": "7"}, "from 0 to 1"),
        ({"smallest_similarity": 0.5}, "clip_vision"),
        ({"poses": torch.rand(1, 64, 64, 3)}, "control_net"),
        ({"identity_images": torch.rand(1, 64, 64, 3)}, "identity_words is missing"),
        ({"width": 100}, "multiple of 8"),
    ],
)
def test_wrong_inputs_of_generate_pairs_are_named(changes, message) -> None:
    with pytest.raises(IdentityEditError, match=message):
        generate(**changes)


def test_save_pair_adds_to_a_dataset(output) -> None:
    images = torch.rand(2, 16, 24, 3)
    given = defaults(pairs.SavePair, source=images, target=images.flip(0), folder="pairs/mine")
    assert "pair 0, 1 in" in pairs.SavePair.execute(**given).result[1]
    assert "pair 2, 3 in" in pairs.SavePair.execute(**given).result[1]
    assert sorted(PairFolder(output / "pairs" / "mine").finished()) == [0, 1, 2, 3]


def test_identity_words_are_trained_saved_loaded_and_applied(output) -> None:
    from identity_edit_pack.demo_world.clip_vision import load_clip_vision

    clip_vision, clip = load_clip_vision(), tiny_text_encoders.clip("sd1")
    shown = from_batch(torch.rand(3, 64, 64, 3), ["a person", "a smiling person", "an angry person"], "person", "")
    given = defaults(
        identity_words.TrainIdentityWords, model=tiny_models.sd1(), clip=clip, vae=Autoencoder(),
        clip_vision=clip_vision, images=shown, steps=2,
        **with_training_settings({"precision": "float32", "checkpoint_every": 1}),
    )  # fmt: skip
    with torch.inference_mode():
        words, loss, path, report = identity_words.TrainIdentityWords.execute(**given).result
        assert len(loss["loss"]) == 2 and "2 before 'person': 2 steps on 3 images" in report
        assert len(list((output / "identity_words" / "checkpoints").iterdir())) == 2, "the result and its mark"
        name = "identity_words/identity_00001_.safetensors [output]"
        assert identity_words.LoadIdentityWords.validate_inputs(name) is True
        assert "no longer exists" in identity_words.LoadIdentityWords.validate_inputs("gone [output]")
        read, _ = identity_words.LoadIdentityWords.execute(name).result
        seen = clip_vision.encode_image(torch.rand(2, 128, 128, 3))
        for each in (words, read):
            (conditioning,) = identity_words.ApplyIdentityWords.execute(clip, each, seen, "a person", "").result
            assert conditioning[0][0].shape == (2, 77, tiny_models.CONTEXT)
