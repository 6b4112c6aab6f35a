"""The vocabulary: captions say everything and only what is shown, held-out identities leave no attribute unseen."""

import itertools
import random

import pytest
from identity_edit_pack.demo_world import attributes as world


def every_identity(framing: str) -> list[world.Attributes]:
    names = world.IDENTITY_OF[framing]
    choices = [world.ATTRIBUTES_OF[framing][name] for name in names]
    return [
        world.Attributes(framing=framing, **dict(zip(names, values, strict=True)))
        for values in itertools.product(*choices)
    ]


@pytest.mark.parametrize("framing", world.FRAMINGS)
def test_held_out_identities_leave_every_value_in_training(framing):
    trained = [identity for identity in every_identity(framing) if not identity.held_out]
    for name in world.IDENTITY_OF[framing]:
        assert {getattr(identity, name) for identity in trained} == set(world.ATTRIBUTES_OF[framing][name])


@pytest.mark.parametrize("framing", world.FRAMINGS)
def test_about_one_identity_in_eight_is_held_out(framing):
    identities = every_identity(framing)
    share = sum(identity.held_out for identity in identities) / len(identities)
    assert 0.06 < share < 0.2


def test_holding_out_depends_on_the_identity_alone():
    generator = random.Random(0)
    for _ in range(50):
        drawn = world.random_attributes(generator, held_out=None)
        changed = drawn.replace(place="night", expression="angry", facing="left", costume="crown")
        assert drawn.held_out == changed.held_out


@pytest.mark.parametrize("held_out", [False, True])
def test_random_attributes_keep_to_the_asked_identities(held_out):
    generator = random.Random(1)
    assert all(world.random_attributes(generator, held_out=held_out).held_out == held_out for _ in range(100))


@pytest.mark.parametrize("framing", world.FRAMINGS)
@pytest.mark.parametrize("template", range(world.CAPTION_TEMPLATES))
def test_different_images_have_different_captions(framing, template):
    """One attribute changed changes the caption, whatever the wording."""
    generator = random.Random(2)
    for _ in range(20):
        drawn = world.random_attributes(generator, framing, held_out=None)
        for name, choices in world.ATTRIBUTES_OF[framing].items():
            others = {world.caption(drawn.replace(**{name: value}), template) for value in choices}
            assert len(others) == len(choices), name


def test_an_unknown_value_is_refused_by_name():
    with pytest.raises(ValueError, match="pose 'flying' is not one of standing"):
        world.Attributes(pose="flying")
