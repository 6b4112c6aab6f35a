"""The renderer: deterministic, and an edit changes what it says and nothing else."""

import random

import numpy as np
import pytest
from identity_edit_pack.demo_world.attributes import ATTRIBUTES_OF, FRAMINGS, Attributes, random_attributes
from identity_edit_pack.demo_world.renderer import SIZE, render
from scipy.ndimage import binary_dilation


@pytest.mark.parametrize("framing", FRAMINGS)
def test_same_seed_same_bits(framing):
    attributes = random_attributes(random.Random(framing), framing)
    (image, mask), (again, mask_again) = render(attributes, 5), render(attributes, 5)
    assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
    assert mask.shape == (SIZE, SIZE) and mask.dtype == np.uint8
    assert np.array_equal(image, again) and np.array_equal(mask, mask_again)
    assert not np.array_equal(image, render(attributes, 6)[0])


@pytest.mark.parametrize("framing", FRAMINGS)
def test_every_attribute_value_is_visible(framing):
    """Each value gives an image of its own, so that nothing a caption says is invisible."""
    generator = random.Random(3)
    for _ in range(5):
        drawn = random_attributes(generator, framing, held_out=None)
        for name in drawn.visible:
            choices = ATTRIBUTES_OF[framing][name]
            images = {render(drawn.replace(**{name: value}), 11)[0].tobytes() for value in choices}
            assert len(images) == len(choices), name


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("name", ["expression", "costume", "facing"])
def test_an_edit_leaves_the_background_alone(framing, name):
    """Outside the subject of both images (and the pixel at its outline), the true edit is the source image."""
    generator = random.Random(4)
    for seed in range(10):
        source = random_attributes(generator, framing, held_out=None).replace(costume="none")
        for value in ATTRIBUTES_OF[framing][name]:
            before, mask_before = render(source, seed)
            after, mask_after = render(source.replace(**{name: value}), seed)
            outside = ~binary_dilation((mask_before > 0) | (mask_after > 0))
            assert outside.mean() > 0.05
            assert np.array_equal(before[outside], after[outside])


def test_the_mask_covers_the_subject():
    """Two places, the same subject: the images agree inside the mask and differ nearly everywhere outside."""
    day, mask = render(Attributes(place="beach"), 1)
    night, mask_night = render(Attributes(place="night"), 1)
    assert np.array_equal(mask, mask_night)
    assert np.array_equal(day[mask == 255], night[mask == 255])
    assert (day != night).any(axis=2)[mask == 0].mean() > 0.99
    assert 0.1 < (mask == 255).mean() < 0.6
