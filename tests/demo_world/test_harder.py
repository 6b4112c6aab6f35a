"""The harder world: values show and are said, training leaves compositions out, and the weights know it."""

import random

import comfy.lora
import comfy.sample
import comfy.sd
import comfy.utils
import numpy as np
import pytest
import torch
from identity_edit_pack.benchmarks.edits import embed
from identity_edit_pack.demo_world import family, harder
from identity_edit_pack.demo_world.attributes import (
    CAPTION_TEMPLATES,
    HARDER_ATTRIBUTES,
    OBJECTS,
    RARE_COSTUMES,
    RARE_PLACES,
    Attributes,
    caption,
)
from identity_edit_pack.demo_world.classifier import classify, load_classifier
from identity_edit_pack.demo_world.export import CHECKPOINT_NAME, WEIGHTS_FOLDER
from identity_edit_pack.demo_world.images import labels_of
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.demo_world.train_harder import LowRank

NEW = ("costume", "place", "size", "beside")


@pytest.mark.parametrize("name", NEW)
def test_every_value_shows_and_is_said(name):
    generator = random.Random(name)
    for template in range(CAPTION_TEMPLATES):
        drawn = harder.draw_any(generator)
        changed = [drawn.replace(**{name: value}) for value in HARDER_ATTRIBUTES[name]]
        assert len({caption(each, template) for each in changed}) == len(changed)
        assert len({render(each, 11)[0].tobytes() for each in changed}) == len(changed)


def test_an_object_is_no_part_of_the_subject():
    """The same mask with and without it, and the same pixels in the mask: a subject stands before its object."""
    for seed, beside in enumerate(OBJECTS[1:]):
        without = Attributes(pose="lying", size="small")
        plain, mask = render(without, seed)
        image, mask_beside = render(without.replace(beside=beside), seed)
        assert np.array_equal(mask, mask_beside)
        assert np.array_equal(plain[mask == 255], image[mask == 255])
        assert (plain != image).any(axis=2).sum() > 100


def test_a_small_subject_is_smaller():
    areas = [(render(Attributes(size=size), 3)[1] == 255).sum() for size in HARDER_ATTRIBUTES["size"]]
    assert areas[1] / areas[0] == pytest.approx(0.84**2, rel=0.05)


def test_training_leaves_out_what_it_says():
    generator = random.Random(0)
    drawn = [harder.draw_training(generator) for _ in range(4000)]
    assert not any(each.held_out or harder.never_trained(each) for each in drawn)
    seen = {each.beside for each in drawn}
    assert seen == set(OBJECTS) - set(harder.UNSEEN_OBJECTS)
    for part in (0, 1):  # colors and shapes of the objects that are left out
        assert {name.split()[part] for name in harder.UNSEEN_OBJECTS} <= {
            name.split()[part] for name in seen - {"none"}
        }
    small = [each for each in drawn if each.size == "small"]
    assert len(small) > 1000 and not any(each.pose == "jumping" for each in small)
    for name, rare in (("costume", RARE_COSTUMES), ("place", RARE_PLACES)):
        assert 0 < sum(getattr(each, name) in rare for each in drawn) / len(drawn) < harder.RARE_SHARE


def test_about_half_of_the_evaluation_was_never_trained():
    shown = [attributes for attributes, _ in harder.evaluation_set(400)]
    assert 0.4 < np.mean([harder.never_trained(attributes) for attributes in shown]) < 0.65


def test_training_goes_on_from_a_lora_file():
    network = torch.nn.Sequential(torch.nn.Conv2d(64, 40, 3), torch.nn.Linear(48, 64), torch.nn.GroupNorm(4, 64))
    weights = dict(network.named_parameters())
    trained, again = LowRank(network), LowRank(network)
    assert all(torch.equal(trained.changed(weights)[name], weight) for name, weight in weights.items())
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_()
    again.start_from(trained.lora(weights), weights)
    assert all(torch.equal(again.changed(weights)[name], trained.changed(weights)[name]) for name in weights)
    assert not torch.equal(again.changed(weights)["0.bias"], weights["0.bias"])


@pytest.mark.slow
def test_the_classifier_reads_clean_renders():
    pairs = harder.evaluation_set(96, seed=4)
    images = torch.stack([torch.from_numpy(np.array(render(*pair)[0])) for pair in pairs]).float() / 255
    answers = classify(load_classifier(harder.CLASSIFIER_PATH, HARDER_ATTRIBUTES), images)
    labels = torch.tensor([labels_of(attributes, HARDER_ATTRIBUTES) for attributes, _ in pairs])
    for index, name in enumerate(HARDER_ATTRIBUTES):
        assert (answers[name] == labels[:, index]).float().mean() >= 0.9, name


@pytest.mark.slow
def test_the_stock_loader_applies_the_lora_and_the_checkpoint_then_draws_objects(pack):
    """Without it the checkpoint has never seen an object."""
    family.register()
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(WEIGHTS_FOLDER / CHECKPOINT_NAME))
    lora = comfy.utils.load_torch_file(str(harder.LORA_PATH), safe_load=True)
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    assert len(comfy.lora.load_lora(lora, keys)) == len(dict(model.model.diffusion_model.named_parameters()))
    with_lora, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    asked = [Attributes(species="dog", pose="sitting", beside=beside) for beside in ("red balloon", "blue box")] * 2
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    classifier, drawn = load_classifier(harder.CLASSIFIER_PATH, HARDER_ATTRIBUTES), {}
    for name, checkpoint in (("with", with_lora), ("without", model)):
        with torch.no_grad():
            latents = comfy.sample.sample(
                checkpoint, noise, 12, 2.0, "ddim", "ddim_uniform", embed(clip, list(map(caption, asked))),
                embed(clip, [""]), torch.zeros_like(noise), disable_pbar=True, seed=0,
            )  # fmt: skip
            found = classify(classifier, vae.decode(latents).cpu())["beside"]
        drawn[name] = sum(OBJECTS[int(index)] != "none" for index in found)
    assert drawn["with"] >= 3 and drawn["without"] == 0, drawn
