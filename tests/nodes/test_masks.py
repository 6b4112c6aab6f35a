"""The nodes of masks on a tiny model and a stand-in for its CLIP: what comes out of each socket, what is refused."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import comfy.sd1_clip
import numpy as np
import pytest
import torch
from identity_edit_pack.attention import identity_mask
from identity_edit_pack.attention.capture import IdentityAttention
from identity_edit_pack.attention.maps import MeanMap
from identity_edit_pack.attention.masks import union
from identity_edit_pack.nodes.lipe import identity_attention as nodes
from identity_edit_pack.nodes.lipe import mask_blend
from identity_edit_pack.pipelines.inversion import inversion
from identity_edit_pack.pipelines.lipe import heatmap, identity_mask_blend, identity_prompt
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests import tiny_models
from identity_edit_pack.tests.attention.sampling import NEGATIVE, POSITIVE, sample


def blend_settings(words: str = "") -> dict[str, Any]:
    return mask_blend.MaskBlendSettings.execute(words, 2, "automatic", 0.0, "instead of attention masks").args[0]


SETTINGS: dict[str, Any] = {
    "guidance_scale": 3.0,
    "threshold": 0.4,
    "skip": 0.0,
    "blend_until": 1.0,
    "blend_settings": blend_settings(),
}


class TinyClip:
    """ComfyUI's CLIP tokenizer with an embedding table of random rows for an encoder."""

    tokenizer: Any = None
    encoders = ("l",)

    def tokenize(self, text: str, return_word_ids: bool = False) -> dict[str, Any]:
        cls = type(self)
        if cls.tokenizer is None:
            cls.tokenizer = comfy.sd1_clip.SDTokenizer(embedding_size=tiny_models.CONTEXT)
        return {name: cls.tokenizer.tokenize_with_weights(text, return_word_ids) for name in self.encoders}

    def encode_from_tokens(self, tokens: dict[str, Any]) -> torch.Tensor:
        rows = []
        for chunk in tokens["l"]:
            for position, (token, _) in enumerate(chunk):
                generator = torch.Generator().manual_seed(1000 * int(token) + position)
                rows.append(torch.randn(tiny_models.CONTEXT, generator=generator))
        return torch.stack(rows).unsqueeze(0)


class TwoEncoders(TinyClip):
    encoders = ("g", "l")


CLIP = TinyClip()


def invert(model: Any, batch: int = 1) -> inversion.Inversion:
    return inversion.invert_image(model, tiny_models.latent(4, batch), POSITIVE, steps=3)


def test_without_settings_the_defaults_are_used() -> None:
    model = tiny_models.sd1()
    inverted = invert(model)
    shown = {item.id: item.default for item in mask_blend.MaskBlendSettings.define_schema().inputs}
    results = [
        mask_blend.IdentityAwareMaskBlend.execute(
            model, CLIP, inverted, POSITIVE, NEGATIVE, "sks cat", 3.0, 0.4, 0.0, 1.0, NEGATIVE, blend_settings=settings
        ).args[0]["samples"]
        for settings in (None, mask_blend.MaskBlendSettings.execute(**shown).args[0])
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("clip", [TinyClip(), TwoEncoders()])
def test_only_words_count_never_begin_end_and_padding(clip: Any) -> None:
    encode = identity_prompt.encode_identity_prompt
    assert encode(clip, "sks cat").tokens == (1, 2)
    assert encode(clip, "a photo of sks cat").tokens == (1, 2, 3, 4, 5)
    assert encode(clip, "a photo of sks cat", "sks cat").tokens == (4, 5)
    assert encode(clip, "a cat and a cat", "cat").tokens == (2, 5)
    assert encode(clip, "a (striped:1.3) cat", "striped").tokens == (2,)
    long = " ".join(["word"] * 80) + " cat"
    assert encode(clip, long, "cat").tokens == (77 + 1 + 5,)  # 75 words fit between begin and end
    assert encode(clip, long).embedding.shape == (1, 154, tiny_models.CONTEXT)
    for empty in ("", "  "):
        with pytest.raises(IdentityEditError, match="identity_prompt is empty"):
            encode(clip, empty)
    with pytest.raises(IdentityEditError, match="'a cat' does not contain the word 'sks'"):
        encode(clip, "a cat", "sks cat")


def test_identity_attention_records_any_stock_sampling() -> None:
    model, latent = tiny_models.sd1(), tiny_models.latent(4)
    recording, attention = nodes.IdentityAttentionNode.execute(model, CLIP, "sks cat", "", "automatic").args
    assert torch.equal(sample(recording, latent), sample(model, latent))
    assert attention.evaluations == 3 and set(attention.cross) == {(8, 8), (4, 4)}
    assert attention.columns == (1, 2)


def test_identity_attention_refuses_what_it_cannot_read() -> None:
    with pytest.raises(IdentityEditError, match="identity_prompt is empty"):
        nodes.IdentityAttentionNode.execute(tiny_models.sd1(), CLIP, "", "", "automatic")
    with pytest.raises(IdentityEditError, match="layers is '4' but this model has attention at 1/1, 1/2"):
        nodes.IdentityAttentionNode.execute(tiny_models.sd1(), CLIP, "cat", "", "4")


def test_identity_aware_mask_blend_gives_edit_masks_and_attention() -> None:
    model = tiny_models.sd1()
    inverted = invert(model, batch=2)
    target = tiny_models.conditioning(5)
    *outputs, step_masks = mask_blend.IdentityAwareMaskBlend.execute(
        model, CLIP, inverted, POSITIVE, target, "sks cat", **{**SETTINGS, "blend_settings": blend_settings("cat")},
        negative=NEGATIVE,
    ).args  # fmt: skip
    edited, source_mask, target_mask, source_attention, target_attention, report = outputs
    expected = identity_mask_blend.identity_mask_blend(
        model,
        inverted,
        POSITIVE,
        target,
        identity_prompt.encode_identity_prompt(CLIP, "sks cat", "cat"),
        NEGATIVE,
        guidance_scale=3.0,
        settings=identity_mask_blend.BlendSettings(0.4, 2),
    )
    assert torch.equal(edited["samples"], expected.latent) and list(edited) == ["samples"]
    for mask, latent_mask in ((source_mask, expected.source_mask), (target_mask, expected.target_mask)):
        assert mask.shape == (2, 64, 64)
        assert torch.equal(mask.view(2, 8, 8, 8, 8).amax(dim=(2, 4)), latent_mask)
        assert torch.equal(mask.view(2, 8, 8, 8, 8).amin(dim=(2, 4)), latent_mask)
    assert torch.equal(identity_mask.identity_mask(source_attention, 8, 8, 0.4, 2), expected.source_mask)
    assert torch.equal(identity_mask.identity_mask(target_attention, 8, 8, 0.4, 2), expected.target_mask)
    assert report.startswith("9 model calls; the source mask covers ")
    assert torch.equal(step_masks, expected.step_masks.flatten(0, 1)) and step_masks.shape == (6, 8, 8)
    assert torch.equal(step_masks[-2:], union(source_mask, target_mask)[:, ::8, ::8])


def test_the_nodes_run_in_inference_mode_as_comfyui_runs_them() -> None:
    model = tiny_models.sd1()
    latent, image = tiny_models.latent(4), torch.zeros(1, 64, 64, 3)
    with torch.inference_mode():
        recording, attention = nodes.IdentityAttentionNode.execute(model, CLIP, "cat", "", "automatic").args
        sample(recording, latent)
        inside = nodes.AttentionHeatmap.execute(image, nodes.REFINED, 0.3, 4, 0.6, attention).args[1]
        blended = mask_blend.IdentityAwareMaskBlend.execute(
            model, CLIP, invert(model), POSITIVE, NEGATIVE, "cat", **SETTINGS, negative=NEGATIVE
        ).args[0]["samples"]
    sample(recording, latent)
    assert torch.equal(
        inside,
        nodes.AttentionHeatmap.execute(image, nodes.REFINED, 0.3, 4, 0.6, attention).args[1],
    )
    expected = mask_blend.IdentityAwareMaskBlend.execute(
        model, CLIP, invert(model), POSITIVE, NEGATIVE, "cat", **SETTINGS, negative=NEGATIVE
    ).args[0]["samples"]
    assert torch.equal(blended, expected)


def test_the_blend_takes_masks_instead_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_models.sd1()
    inverted = invert(model)
    nothing = torch.zeros(1, 128, 128)
    edited, source_mask, _, source_attention, _, report, _ = mask_blend.IdentityAwareMaskBlend.execute(
        model, CLIP, inverted, POSITIVE, NEGATIVE, "cat", **SETTINGS, negative=NEGATIVE, source_mask=nothing,
        target_mask=nothing,
    ).args  # fmt: skip
    assert torch.equal(edited["samples"], inverted.end_latent(model))
    assert float(source_mask.max()) == 0
    assert "6 model calls" in report and "Warning: The source mask is empty" in report
    assert "The source mask is empty" in caplog.text
    with pytest.raises(ValueError, match="No attention has been recorded"):
        nodes.AttentionHeatmap.execute(torch.zeros(1, 64, 64, 3), nodes.REFINED, 0.3, 4, 0.6, source_attention)


def test_guidance_scale_0_is_the_inversions_own() -> None:
    model = tiny_models.sd1()
    inverted = invert(model)
    results = [
        mask_blend.IdentityAwareMaskBlend.execute(
            model, CLIP, inverted, POSITIVE, NEGATIVE, "cat", **{**SETTINGS, "guidance_scale": scale},
            negative=NEGATIVE,
        ).args[0]["samples"]
        for scale in (0.0, 7.5)
    ]  # fmt: skip
    assert torch.equal(*results)


def recorded() -> IdentityAttention:
    """The left half of a 4x4 grid."""
    attention = IdentityAttention((1,))
    attention.begin((4, 4))
    maps = torch.zeros(1, 4, 4)
    maps[:, :, :2] = 1
    attention.cross[4, 4] = MeanMap(maps, torch.ones(1, 4, 4))
    attention.self_grid = (4, 4)
    attention._self = MeanMap(torch.full((1, 16, 16), 1 / 16), torch.ones(1, 16))
    return attention


def test_heatmap_of_what_nobody_sampled_is_refused() -> None:
    with pytest.raises(IdentityEditError, match="^No attention has been recorded in identity_attention; sample with"):
        nodes.AttentionHeatmap.execute(
            torch.zeros(1, 32, 32, 3), nodes.CROSS_ATTENTION, 0.3, 4, 0.5, IdentityAttention((1,))
        )


def test_heatmap_lays_the_map_over_the_image() -> None:
    image = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    show = nodes.AttentionHeatmap.execute
    untouched, values = show(image, nodes.CROSS_ATTENTION, 0.3, 4, 0.0, recorded()).args
    assert torch.equal(untouched, image)
    assert values.shape == (2, 32, 32)
    assert torch.equal(values[:, :, :8], torch.ones(2, 32, 8)) and float(values[:, :, 24:].abs().max()) == 0
    opaque, _ = show(image, nodes.CROSS_ATTENTION, 0.3, 4, 1.0, recorded()).args
    assert torch.equal(opaque[0], opaque[1]), "the image still shows"
    brightness = opaque.mean(dim=-1)
    assert float(brightness[:, :, :8].min()) > float(brightness[:, :, 24:].max())
    # Self-attention that sees everything alike leaves nothing to tell apart.
    _, even = show(image, nodes.REFINED, 0.3, 4, 0.5, recorded()).args
    assert float(even.max()) == 0


def test_heatmap_outlines_masks() -> None:
    image = torch.full((1, 64, 64, 3), 0.5)
    show = nodes.AttentionHeatmap.execute
    given = torch.zeros(1, 64, 64)
    given[:, 16:48, 16:48] = 1
    drawn, values = show(image, nodes.MASK, 0.3, 0, 0.6, None, given).args
    changed = (drawn != image).any(dim=-1)[0].numpy()
    expected = np.zeros((64, 64), bool)
    expected[15:49, 15:49] = True
    expected[16:48, 16:48] = False
    assert np.array_equal(changed, expected) and torch.equal(values, given)
    drawn, values = show(image, nodes.MASK, 0.3, 0, 0.6, recorded()).args
    assert set(values.unique().tolist()) <= {0.0, 1.0} or float(values.max()) == 1.0
    assert (drawn != image).any(), "no outline"
    with pytest.raises(IdentityEditError, match="nothing to draw"):
        show(image, nodes.MASK, 0.3, 0, 0.6)
    with pytest.raises(IdentityEditError, match="mask holds 3 masks for 1 image"):
        show(image, nodes.MASK, 0.3, 0, 0.6, None, given.expand(3, -1, -1))


def test_every_node_is_listed() -> None:
    ids = [node.define_schema().node_id for node in (*nodes.NODES, *mask_blend.NODES)]
    assert ids == [
        f"IdentityEdit{name}"
        for name in (
            "IdentityAttention",
            "AttentionHeatmap",
            "AttentionMapsByStep",
            "IdentityAwareMaskBlend",
            "MaskBlendSettings",
        )  # fmt: skip
    ]


@pytest.mark.parametrize(
    ("text", "positions"),
    [("72-76", (72, 73, 74, 75, 76)), ("-2, -1", (-2, -1)), ("1 1,5\uff0c3", (1, 5, 3)), ("", ())],
)
def test_token_positions_are_read(text: str, positions: tuple[int, ...]) -> None:
    assert identity_prompt.token_positions(text) == positions


@pytest.mark.parametrize("text", ["5-3", "cat", "1.5"])
def test_other_token_positions_are_refused(text: str) -> None:
    with pytest.raises(IdentityEditError, match=f"token_numbers has '{text}'"):
        identity_prompt.token_positions(text)


def test_maps_by_step_are_labeled_images() -> None:
    recording, attention = nodes.IdentityAttentionNode.execute(
        tiny_models.sd1(), CLIP, "", "", "2", token_numbers="3, -1", by_step=True
    ).args
    image = torch.zeros(2, 64, 64, 3)
    with pytest.raises(IdentityEditError, match="no maps by step"):
        nodes.AttentionMapsByStep.execute(image, attention, "", 1.0)
    sample(recording, tiny_models.latent(4, batch=2))
    maps, labels = nodes.AttentionMapsByStep.execute(image, attention, "3, 1", 1.0).args
    assert maps.shape == (8, 78, 64, 3)  # two steps, images and tokens; a strip of 14 pixels
    assert labels.splitlines() == [
        f"step {step} of 3, token {token}" for step in (3, 1) for _ in range(2) for token in (3, -1)
    ]
    assert all(float(strip.max()) > 0.5 for strip in maps[:, 64:]) and not torch.equal(maps[0, 64:], maps[1, 64:])
    expected = identity_mask.rough_mask(attention.steps[2])[1]
    shown = heatmap.heat_colors(heatmap.enlarged((expected / expected.max())[None], image[:1]))[0]
    torch.testing.assert_close(maps[1, :64], shown)
    assert len(nodes.AttentionMapsByStep.execute(image, attention, "", 0.5).args[0]) == 12
    with pytest.raises(IdentityEditError, match="steps has 4"):
        nodes.AttentionMapsByStep.execute(image, attention, "4", 1.0)
    with pytest.raises(IdentityEditError, match="whole numbers"):
        nodes.AttentionMapsByStep.execute(image, attention, "first", 1.0)
