"""Pose images, and the ControlNet that was trained on them, through the stock loader and sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from identity_edit_pack.demo_world import family
from identity_edit_pack.demo_world.attributes import Attributes
from identity_edit_pack.demo_world.classifier import classify, load_classifier
from identity_edit_pack.demo_world.export import CHECKPOINT_NAME, WEIGHTS_FOLDER
from identity_edit_pack.demo_world.images import HEADS
from identity_edit_pack.demo_world.pose import LIMBS, draw_pose
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.demo_world.train_control import CONTROL_PATH

pytestmark = pytest.mark.slow

PERSON = Attributes(framing="portrait")


@pytest.fixture(scope="module")
def demo_checkpoint(pack):
    import comfy.sd

    family.register()
    return comfy.sd.load_checkpoint_guess_config(str(WEIGHTS_FOLDER / CHECKPOINT_NAME))[:3]


def middle_of(image, color):
    rows, columns = np.nonzero((image == color).all(-1))
    return columns.mean(), rows.mean()


def test_a_pose_says_nothing_of_the_person():
    other = PERSON.replace(hair_color="red", face_shape="long", expression="angry", costume="crown", place="night")
    assert np.array_equal(draw_pose(PERSON, 5), draw_pose(other, 5))
    assert not np.array_equal(draw_pose(PERSON, 5), draw_pose(PERSON, 6))


@pytest.mark.parametrize("facing", ["left", "right"])
def test_eyes_and_mouth_are_where_the_renderer_paints_them(facing):
    person = PERSON.replace(facing=facing, eye_color="blue", expression="smiling")
    pose, image = draw_pose(person, 3), render(person, 3)[0].astype(int)
    for limb in (("nose", "back eye"), ("nose", "front eye")):
        x, y = (round(v) for v in middle_of(pose, LIMBS[limb]))
        around = image[y - 4 : y + 5, x - 6 : x + 7].reshape(-1, 3)
        assert (np.abs(around - (255, 255, 255)).sum(1) < 30).any()  # the white of an eye
        assert (np.abs(around - (48, 120, 230)).sum(1) < 60).any()  # its iris
    x, y = (round(v) for v in middle_of(pose, LIMBS["nose", "mouth"]))
    around = image[y - 3 : y + 8, x - 5 : x + 6].reshape(-1, 3)
    assert (np.abs(around - (212, 50, 62)).sum(1) < 60).any()


def test_figures_have_no_pose():
    with pytest.raises(ValueError, match="only portraits"):
        draw_pose(Attributes(), 0)


def test_the_stock_loader_reads_the_control_network_and_it_turns_the_head(demo_checkpoint):
    import comfy.controlnet
    import comfy.sample

    model, clip, vae = demo_checkpoint
    control = comfy.controlnet.load_controlnet(str(CONTROL_PATH))
    assert isinstance(control, comfy.controlnet.ControlNet)
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in ("a portrait of a person", ""))
    classifier, facings = load_classifier(), []
    for facing in ("left", "right"):
        poses = [draw_pose(PERSON.replace(facing=facing), seed) for seed in (1, 2)]
        hint = torch.from_numpy(np.stack(poses)).movedim(-1, 1).float() / 255
        held = [[embedding, {**options, "control_apply_to_uncond": True}] for embedding, options in positive]
        held[0][1]["control"] = control.copy().set_cond_hint(hint, 1.0, (0.0, 1.0))
        latent = torch.zeros(2, 4, 16, 16)
        noise = comfy.sample.prepare_noise(latent, 7)
        made = comfy.sample.sample(
            model, noise, 10, 3.0, "dpmpp_2m", "karras", held, negative, latent, disable_pbar=True, seed=7
        )
        answers = classify(classifier, vae.decode(made))
        facings.append([HEADS["facing"][int(i)] for i in answers["facing"]])
    assert facings == [["left", "left"], ["right", "right"]]
