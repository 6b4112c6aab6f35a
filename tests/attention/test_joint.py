"""What is read of joint attention equals a plain float64 softmax of the queries and keys that the engine's blocks hand
to their attention function, and reading it changes no bit of what is sampled."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from identity_edit_pack.attention import joint
from identity_edit_pack.attention.maps import output_scores, standardized
from identity_edit_pack.tests.attention.joint_sampling import POSITIVE, Call, calls_noted_by, noise_of, sample
from tiny_joint_networks import CELLS, NETWORKS, TOKENS, Network


@pytest.fixture(params=list(NETWORKS))
def network(request: pytest.FixtureRequest) -> Network:
    return NETWORKS[request.param]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    return calls_noted_by(monkeypatch)


def reading(model: Any, read: Any, key: str = "test") -> Any:
    def tap(site, attended, value, attend, options):
        output = attend(attended.query, attended.key, value)
        read(site, attended, output, options)
        return output

    return joint.with_tap(model, key, tap)


def skipped(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """A block's replacement that does nothing."""
    return {"img": args["img"], "txt": args["txt"]}


@pytest.mark.parametrize("batch", [1, 2])
def test_readings_equal_a_plain_softmax_in_float64(network: Network, called: list[Call], batch: int) -> None:
    model, latent = network.model(), network.latent(3, batch)
    expected = sample(model, latent)
    called.clear()
    found = []

    def read(site, attended, output, options):
        assert attended.grid == site.grid(*latent.shape[-2:]) == (4, 6)
        maps = attended.to_text([2, 5]), attended.to_image(), attended.to_image(4)
        columns = [attended.text.start + 2]
        found.append((site.key, *maps, output_scores(output, attended.image, columns), options["cond_or_uncond"]))

    assert torch.equal(sample(reading(model, read), latent), expected), "reading changed the image"
    of_blocks = [call for call in called if call.q.shape[2] == network.length]
    assert [key for key, *_ in found] == list(network.blocks) * 2
    assert len(of_blocks) == len(found) and all(set(sides) == {0, 1} for *_, sides in found)
    image = slice(network.image, network.image + CELLS)
    for call, (_, to_text, to_image, coarse, scores, _) in zip(of_blocks, found, strict=True):
        plain = call.probabilities()[:, image]
        to_word = plain[..., [network.text + 2, network.text + 5]].sum(-1)
        assert torch.allclose(to_text.flatten(1).double(), to_word, atol=1e-5, rtol=0)
        assert torch.allclose(to_image.double(), plain[..., image], atol=1e-5, rtol=0)
        assert float(plain.std()) > 1e-3, "all alike"
        for i, queries in enumerate((slice(0, 4), slice(4, 6))):  # cells of 4x4 of the grid of 4x6: 4x4 and 4x2
            for j, keys in enumerate((slice(0, 4), slice(4, 6))):
                cells = plain[..., image].unflatten(2, (4, 6)).unflatten(1, (4, 6))[:, :, queries, :, keys]
                expected_cell = cells.sum(dim=(3, 4)).mean(dim=(1, 2))
                assert torch.allclose(coarse[:, i, j].double(), expected_cell, atol=1e-5, rtol=0)
        products = torch.einsum("bnc,bc->bn", call.output[:, image], call.output[:, network.text + 2])
        assert torch.allclose(scores[..., 0].double(), products, rtol=1e-4, atol=1e-4)


def test_standardized_maps() -> None:
    maps = torch.stack([torch.arange(6.0).view(2, 3), torch.full((2, 3), 4.0)])
    plain = (maps[0] - 2.5) / (35 / 12) ** 0.5
    assert torch.allclose(standardized(maps), torch.stack([plain, torch.zeros(2, 3)]))


def test_text_stands_where_a_changed_token_changes_the_keys(network: Network, called: list[Call]) -> None:
    model, latent = network.model(), network.latent(3)
    spans = []
    reader = reading(model, lambda site, attended, *_: spans.append((attended.text, attended.image)))
    changed = [[POSITIVE[0][0].clone(), POSITIVE[0][1]]]
    changed[0][0][:, 3] += 1.0
    keys = []
    for prompt in (POSITIVE, changed):
        called.clear()
        sample(reader, latent, prompt, cfg=1.0)
        keys.append(next(call.k for call in called if call.q.shape[2] == network.length))
    difference = (keys[1] - keys[0]).abs().sum(dim=(0, 1, 3)).nonzero().flatten().tolist()
    text, image = spans[0]
    assert all(span == spans[0] for span in spans)
    assert (text, image) == (slice(network.text, network.text + TOKENS), slice(network.image, network.image + CELLS))
    if len(difference) > 1:  # Lumina's text attends to itself before the first block
        assert set(difference) <= set(range(network.image))
    else:
        assert difference == [text.start + 3]


def test_a_changed_latent_pixel_changes_the_keys_of_its_position(network: Network, called: list[Call]) -> None:
    model, latent = network.model(), network.latent(3)
    reader = reading(model, lambda *_: None)
    keys = []
    for change in (0.0, 1.0):
        called.clear()
        noise = noise_of(latent)
        noise[..., 5, 8] += change  # row 2, column 4 of the grid
        sample(reader, latent, cfg=1.0, noise=noise)
        keys.append(next(call.k for call in called if call.q.shape[2] == network.length))
    difference = (keys[1] - keys[0]).abs().sum(dim=(0, 1, 3)).nonzero().flatten().tolist()
    if len(difference) > 1:  # Lumina's image attends to itself before the first block
        assert set(difference) <= set(range(network.image, network.length))
    else:
        assert difference == [network.image + 2 * 6 + 4]


def test_reference_images_follow_the_image(network: Network) -> None:
    """A changed reference changes its own keys; networks that take none have no such slices."""
    model, latent = network.model(), network.latent(3)
    spans, keys = [], []

    def read(site, attended, output, options):
        if site.key == network.blocks[0]:
            spans.append((attended.image, attended.references))
            keys.append(attended.key.clone())

    for change in (0.0, 1.0):
        references = [network.latent(4, height=4, width=6), network.latent(5, height=6, width=3)]
        references[1] = references[1] + change
        prompt = [[POSITIVE[0][0], {**POSITIVE[0][1], "reference_latents": references}]]
        try:
            sample(reading(model, read), latent, prompt, cfg=1.0)
        except ValueError as error:  # newer ComfyUI's Lumina takes references, in another order
            assert network in (NETWORKS["lumina"], NETWORKS["z_image"]) and "reference images" in str(error)
            return
    image, slices = spans[0]
    assert image == slice(network.image, network.image + CELLS)
    if not network.references:
        assert slices == ()
        return
    assert slices == (slice(image.stop, image.stop + 6), slice(image.stop + 6, image.stop + 12))
    difference = (keys[2] - keys[0]).abs().sum(dim=(0, 1, 3)).nonzero().flatten().tolist()
    assert difference == list(range(slices[1].start, slices[1].stop))


@pytest.mark.parametrize("kind", ["boolean", "additive", "padding"])
def test_masked_attention_is_read_as_it_is_computed(kind: str, called: list[Call]) -> None:
    """A mask that another node adds, in PyTorch's meaning."""
    network = NETWORKS["flux"]
    model, latent = network.model(), network.latent(3, 2)
    draw = torch.Generator().manual_seed(6)
    if kind == "boolean":
        mask = torch.rand(network.length, network.length, generator=draw) < 0.6
        bias = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    elif kind == "additive":
        mask = bias = torch.randn(1, 1, network.length, network.length, generator=draw)
    else:
        mask = torch.zeros(4, 1, network.length).index_fill(2, torch.tensor([1, 6]), -1e9)
        bias = mask.unsqueeze(1)

    def masked(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        return extra["original_block"]({**args, "attn_mask": mask})

    masking = model.clone()
    for number in range(2):
        masking.set_model_patch_replace(masked, "dit", "double_block", number)
    expected = sample(masking, latent)
    assert not torch.equal(expected, sample(model, latent))
    called.clear()
    found = []

    def read(site, attended, output, options):
        if site.key[0] == "double":
            found.append((attended.to_text([2, 5]), attended.to_image(), attended.part(slice(2, 4)).to_text([2])))

    assert torch.equal(sample(reading(masking, read), latent), expected)
    calls = [call for call in called if call.mask is not None]
    assert len(calls) == len(found) == 4
    for call, (to_text, to_image, of_part) in zip(calls, found, strict=True):
        plain = Call(call.q, call.k, call.v, bias.double(), call.output).probabilities()[:, TOKENS:]
        assert torch.allclose(to_text.flatten(1).double(), plain[..., [2, 5]].sum(-1), atol=1e-5, rtol=0)
        assert torch.allclose(to_image.double(), plain[..., TOKENS:], atol=1e-5, rtol=0)
        assert torch.allclose(of_part.flatten(1).double(), plain[2:, :, 2], atol=1e-5, rtol=0)


def test_keys_shared_by_heads() -> None:
    """Grouped-query attention, which ComfyUI's Lumina expands before the call and newer functions need not."""
    q, k = (torch.randn(2, heads, 20, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2))
    attended = joint.Attended(q, k, (4, 4), slice(0, 4), slice(4, 20))
    plain = (q.double() @ k.double()[:, [0, 0, 1, 1]].transpose(-1, -2) / 8**0.5).softmax(-1).mean(1)
    assert torch.allclose(attended.to_text([1]).flatten(1).double(), plain[:, 4:, 1], atol=1e-6)
    assert torch.allclose(attended.to_image().double(), plain[:, 4:, 4:], atol=1e-6)


def test_taps_share_a_model_with_another_owner_of_the_hook(network: Network) -> None:
    model, latent = network.model(), network.latent(3)
    other = model.clone()

    def owner(function, *args, **kwargs):
        return 1.5 * function(*args, **kwargs)

    other.model_options["transformer_options"]["optimized_attention_override"] = owner
    expected = sample(other, latent)
    assert not torch.equal(expected, sample(model, latent))
    seen: list[str] = []
    first = reading(other, lambda *_: seen.append("first"), "first")
    both = reading(first, lambda *_: seen.append("second"), "second")
    assert torch.equal(sample(both, latent), expected)
    assert seen.count("first") == seen.count("second") == 2 * len(network.blocks)


def test_a_tap_changes_what_the_block_projects(network: Network) -> None:
    model, latent = network.model(), network.latent(3)

    def doubled(site, attended, value, attend, options):
        output = attend(attended.query, attended.key, value)
        half = output.shape[-1] // 2  # not all, because Lumina normalizes the output
        return torch.cat([2.0 * output[..., :half], output[..., half:]], dim=-1)

    def by_values(site, attended, value, attend, options):
        half = value.shape[1] // 2
        doubled_values = torch.cat([2.0 * value[:, :half], value[:, half:]], dim=1)
        return attend(attended.query, attended.key, doubled_values)

    twice, values = (sample(joint.with_tap(model, "test", tap), latent) for tap in (doubled, by_values))
    assert tiny_models.relative_error(twice, values) < 1e-4
    assert tiny_models.relative_error(twice, sample(model, latent)) > 1e-3


def test_a_tap_of_one_model_call(network: Network) -> None:
    """By model options instead of a clone, beside a clone's tap; the options passed in are not changed."""
    model, latent = network.model(), network.latent(3)
    seen: list[str] = []
    clone = reading(model, lambda *_: seen.append("clone"))

    def tap(site, attended, value, attend, options):
        seen.append("call")
        return attend(attended.query, attended.key, value)

    def predict(executor, x, timestep, model_options=None, seed=None):
        options = joint.options_with_tap(model_options, model.model.diffusion_model, "of one call", tap)
        if float(timestep.max()) < 1.0:
            return executor(x, timestep, options, seed)
        return executor(x, timestep, model_options, seed)

    clone.add_wrapper_with_key("predict_noise", "test", predict)
    assert torch.equal(sample(clone, latent), sample(model, latent))
    assert seen.count("clone") == 2 * len(network.blocks) and seen.count("call") == len(network.blocks)


def test_blocks_that_cannot_be_identified_and_other_networks_are_refused() -> None:
    network = NETWORKS["sd3"]
    model, latent = network.model(), network.latent(3)
    skipping = reading(model, lambda *_: None)
    skipping.set_model_patch_replace(skipped, "dit", "double_block", 0)
    with pytest.raises(ValueError, match="2 blocks with joint attention but 1 ran"):
        sample(skipping, latent)

    def twice(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        return extra["original_block"]({**args, **extra["original_block"](args)})

    for name, count in (("sd3", 3), ("flux", 5)):
        repeating = reading(NETWORKS[name].model(), lambda *_: None)
        repeating.set_model_patch_replace(twice, "dit", "double_block", 0)
        with pytest.raises(ValueError, match=f"blocks with joint attention but {count} ran"):
            sample(repeating, latent)
    with pytest.raises(ValueError, match="UNetModel, whose joint attention cannot be read"):
        joint.with_tap(tiny_models.sd1(), "test", lambda *_: None)


def test_inputs_with_an_unknown_place_are_refused() -> None:
    qwen, lumina = NETWORKS["qwen"], NETWORKS["lumina"]
    with pytest.raises(ValueError, match="a video of 3 frames"):
        sample(reading(qwen.model(), lambda *_: None), torch.zeros(1, 16, 3, 8, 8))
    with pytest.raises(ValueError, match="place of reference images in the attention of a NextDiT is not known"):
        joint._layout(lumina.model().model.diffusion_model, lumina.latent(1), 8, {"ref_latents": [lumina.latent(2)]})
    model, latent = NETWORKS["flux"].model(), NETWORKS["flux"].latent(3)
    masking = reading(model, lambda *_: None)
    masking.set_model_patch_replace(
        lambda args, extra: extra["original_block"]({**args, "attn_mask": torch.zeros(1, 1, 5, 1)}),
        "dit", "double_block", 0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"has a mask of shape \(1, 1, 5, 1\)"):
        sample(masking, latent)


def test_a_named_block_keeps_its_key_beside_a_skipped_one() -> None:
    seen = []
    skipping = reading(NETWORKS["flux"].model(), lambda site, *_: seen.append(site.key))
    skipping.set_model_patch_replace(skipped, "dit", "double_block", 0)
    sample(skipping, NETWORKS["flux"].latent(3))
    assert seen == list(NETWORKS["flux"].blocks[1:]) * 2


def test_blocks_that_chroma_leaves_out_are_not_expected() -> None:
    network = NETWORKS["chroma"]
    model = network.model()
    model.model.diffusion_model.skip_mmdit, model.model.diffusion_model.skip_dit = [1], [0]
    seen = []
    sample(reading(model, lambda site, *_: seen.append(site.key)), network.latent(3))
    assert seen == [("double", 0, 0), ("single", 1, 0)] * 2
