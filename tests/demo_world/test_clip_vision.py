"""The demo world's CLIP vision is ComfyUI's own object, and its embedding says who is in an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from identity_edit_pack.demo_world.attributes import ATTRIBUTES_OF, IDENTITY_OF
from identity_edit_pack.demo_world.clip_vision import CLIP_VISION_CONFIG, CLIP_VISION_PATH, load_clip_vision
from identity_edit_pack.demo_world.images import evaluation_set
from identity_edit_pack.demo_world.renderer import render

pytestmark = pytest.mark.slow


def images_of(samples):
    return torch.stack([torch.from_numpy(np.array(render(a, seed)[0])) for a, seed in samples]).float() / 255


def test_it_is_the_stock_object(node_classes) -> None:
    import comfy.clip_vision

    import nodes

    encoder = node_classes["IdentityEditLoadDemoClipVision"].execute().result[0]
    assert isinstance(encoder, comfy.clip_vision.ClipVisionModel)
    wide = torch.rand(2, 96, 160, 3)
    (output,) = nodes.CLIPVisionEncode().encode(encoder, wide, "center")
    tokens = (CLIP_VISION_CONFIG["image_size"] // CLIP_VISION_CONFIG["patch_size"]) ** 2 + 1
    hidden = (2, tokens, CLIP_VISION_CONFIG["hidden_size"])
    assert output["image_embeds"].shape == (2, CLIP_VISION_CONFIG["projection_dim"])
    assert output["last_hidden_state"].shape == output["penultimate_hidden_states"].shape == hidden
    assert not torch.equal(output["last_hidden_state"], output["penultimate_hidden_states"])


def test_the_file_is_small() -> None:
    assert CLIP_VISION_PATH.stat().st_size < 6_000_000


def test_embeddings_of_one_identity_are_nearer_than_those_of_others() -> None:
    """Held-out identities, in other states and places: an image's twin is the nearest of twenty at least half the
    time (chance 0.05)."""
    encoder = load_clip_vision()
    for framing in ATTRIBUTES_OF:
        samples = evaluation_set(400, seed=41, held_out=True, framing=framing)
        firsts = {a.identity: (a, seed) for a, seed in reversed(samples)}
        chosen = list(firsts.values())[:20]
        seconds = []
        for number, (first, _) in enumerate(chosen):
            other, seed = samples[-1 - number]
            kept = {name: getattr(first, name) for name in IDENTITY_OF[framing]}
            seconds.append((other.replace(**kept), seed))
        one, two = (
            torch.nn.functional.normalize(encoder.encode_image(images_of(part))["image_embeds"].float(), dim=-1)
            for part in (chosen, seconds)
        )
        found = (one @ two.T).argmax(1) == torch.arange(len(chosen))
        assert float(found.float().mean()) >= 0.5, framing
