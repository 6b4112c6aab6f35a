"""What is read of joint attention equals a plain float64 softmax of the queries and keys that the engine's blocks hand
to their attention function, and reading it changes no bit of what is sampled."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_flow_models
import tiny_models
import torch
from comfy.ldm.lumina.model import NextDiT
from einops import rearrange
from identity_edit_pack.attention import joint
from identity_edit_pack.attention.maps import output_scores, standardized
from identity_edit_pack.tests.attention.joint_sampling import POSITIVE, Call, calls_noted_by, noise_of, sample
from tiny_joint_networks import BEHIND, CELLS, NETWORKS, NEWER, TOKENS, Network
from tiny_models import CONTEXT


@pytest.fixture(params=[*NETWORKS, *NEWER])
def network(request: pytest.FixtureRequest) -> Network:
    return {**NETWORKS, **NEWER}[request.param]


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
    if len(difference) > 1:  # the text attends to itself before the first block
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
        noise[..., 3 * network.patch - 1, 4 * network.patch] += change  # row 2, column 4 of the grid
        sample(reader, latent, cfg=1.0, noise=noise)
        keys.append(next(call.k for call in called if call.q.shape[2] == network.length))
    difference = (keys[1] - keys[0]).abs().sum(dim=(0, 1, 3)).nonzero().flatten().tolist()
    if len(difference) > 1:  # the image attends to itself before the first block
        assert set(difference) <= set(range(network.image, network.length))
    else:
        assert difference == [network.image + 2 * 6 + 4]


def spans_and_keys(model: Any, latent: torch.Tensor, runs: list[Any]) -> tuple[Any, list[torch.Tensor]]:
    """The places of text, image and references, and the keys of the first block for each prompt and noise."""
    spans, keys = [], []
    first = joint.joint_sites(model.model.diffusion_model)[0]

    def read(site, attended, output, options):
        if site == first:
            spans.append((attended.text, attended.image, attended.references))
            keys.append(attended.key.clone())

    for prompt, noise in runs:
        sample(reading(model, read), latent, prompt, cfg=1.0, noise=noise, sigmas=torch.tensor([1.0, 0.0]))
    assert len(spans) == len(runs) and all(each == spans[0] for each in spans)
    return spans[0], keys


def changed_positions(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return (after - before).abs().sum(dim=(0, 1, 3)).nonzero().flatten().tolist()


def test_reference_images_are_where_a_changed_one_changes_the_keys(network: Network) -> None:
    """Networks that take none have no such slices; for Lumina, see below."""
    if network in (NETWORKS["lumina"], NETWORKS["z_image"]):
        return
    prompts, side = [], network.patch
    for change in (0.0, 1.0):
        first = network.latent(4, height=2 * side, width=3 * side)
        second = network.latent(5, height=3 * side, width=side + 1) + change
        prompts.append([[POSITIVE[0][0], {**POSITIVE[0][1], "reference_latents": [first, second]}]])
    latent = network.latent(3)
    (_, image, slices), keys = spans_and_keys(network.model(), latent, [(each, noise_of(latent)) for each in prompts])
    if network.references is None:
        assert (image, slices) == (slice(network.image, network.image + CELLS), ())
        return
    start = network.image + CELLS if network.references == BEHIND else network.image
    assert slices == (slice(start, start + 6), slice(start + 6, start + 12))
    start = network.image if network.references == BEHIND else network.image + 12
    assert image == slice(start, start + CELLS)
    difference = changed_positions(*keys)
    if len(difference) > 6:  # the references attend to each other before the first block
        assert set(difference) == set(range(slices[0].start, slices[1].stop))
    else:
        assert difference == list(range(slices[1].start, slices[1].stop))


@pytest.mark.skipif("krea2" not in NEWER, reason="an engine without Krea 2")
def test_krea_2_has_checkpoints_without_reference_images() -> None:
    latent = NEWER["krea2"].latent(3)
    prompt = [[POSITIVE[0][0], {**POSITIVE[0][1], "reference_latents": [latent]}]]
    (_, image, references), _ = spans_and_keys(tiny_flow_models.krea2(), latent, [(prompt, noise_of(latent))])
    assert (image, references) == (slice(TOKENS, TOKENS + CELLS), ())


@pytest.mark.skipif(
    "siglip_feat_dim" not in inspect.signature(NextDiT.__init__).parameters, reason="an engine without Z-Image Omni"
)
@pytest.mark.parametrize("features", [0, 96], ids=["latents alone", "with image features"])
def test_reference_images_of_z_image(features: int) -> None:
    """Texts of the references, text, a text more, image features, references, image, each padded to 32."""
    changes = {"siglip_feat_dim": 16} if features else {}
    model = tiny_flow_models.z_image(n_refiner_layers=0, **changes)
    latent, draw = NETWORKS["z_image"].latent(3), torch.Generator().manual_seed(8)
    vision = SimpleNamespace(image_sizes=[(3, 32, 48)], last_hidden_state=torch.randn(1, 6, 16, generator=draw))
    options = {
        "reference_latents_text_embeds": [torch.randn(1, tokens, CONTEXT, generator=draw) for tokens in (5, 40, 3)],
        **({"clip_vision_outputs": [vision]} if features else {}),
    }

    def run(token: float = 0.0, pixel: float = 0.0, reference: float = 0.0) -> tuple[Any, torch.Tensor]:
        embedding, noise = POSITIVE[0][0].clone(), noise_of(latent)
        embedding[:, 3] += token
        noise[..., 5, 8] += pixel
        latents = [tiny_flow_models.latent(4, height=4, width=6), tiny_flow_models.latent(5, height=6, width=4)]
        latents[1] = latents[1] + reference
        return [[embedding, {**POSITIVE[0][1], **options, "reference_latents": latents}]], noise

    (text, image, references), keys = spans_and_keys(
        model, latent, [run(), run(token=1.0), run(pixel=1.0), run(reference=1.0)]
    )
    before = 32 + 64
    assert text == slice(before, before + TOKENS)
    before += 32 + 32 + features
    assert references == (slice(before, before + 6), slice(before + 32, before + 38))
    assert image == slice(before + 64, before + 64 + CELLS)
    assert changed_positions(keys[0], keys[1]) == [text.start + 3]
    assert changed_positions(keys[0], keys[2]) == [image.start + 2 * 6 + 4]
    assert changed_positions(keys[0], keys[3]) == list(range(references[1].start, references[1].stop))


class MingImage(NextDiT):
    """Its sequence in newer engines: more tokens behind the text, reference images behind the image."""

    def forward(self, x, timesteps, context, direct_context, ref_frames, transformer_options):
        def padded(parts: list[torch.Tensor], token: torch.Tensor) -> torch.Tensor:
            joined = torch.cat(parts, dim=1)
            return torch.cat([joined, token.expand(1, -joined.shape[1] % 32, -1)], dim=1)

        patches = [
            self.x_embedder(rearrange(each, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2))
            for each in (x, *ref_frames)
        ]
        texts = [self.cap_embedder(context), direct_context]
        sequence = torch.cat([padded(texts, self.cap_pad_token), padded(patches, self.x_pad_token)], dim=1)
        rotation = self.rope_embedder(torch.zeros(1, sequence.shape[1], 3)).movedim(1, 2)
        for number, layer in enumerate(self.layers):
            transformer_options.update(block_type="double", block_index=number)
            sequence = sequence + layer.attention(sequence, None, rotation, transformer_options)
        return sequence


def test_reference_images_of_newer_engines_behind_the_image() -> None:
    network = tiny_flow_models.z_image().model.diffusion_model
    network.__class__ = MingImage
    draw = torch.Generator().manual_seed(8)
    inputs = {
        "context": torch.randn(1, TOKENS, CONTEXT, generator=draw),
        "direct_context": torch.randn(1, 26, 256, generator=draw),
        "x": torch.randn(1, 16, 8, 12, generator=draw),
        "ref_frames": torch.randn(2, 1, 16, 4, 6, generator=draw),
    }
    seen: list[Any] = []

    def tap(site, attended, value, attend, options):
        if site.key[1] == 0:
            seen.append(attended)
        return attend(attended.query, attended.key, value)

    def run(x, context, direct_context, ref_frames):
        def executor(x, t, c_concat, c_crossattn, control, options, **conditions):
            return network(x, t, c_crossattn, transformer_options=options, **conditions)

        conditions = {"direct_context": direct_context, "ref_frames": list(ref_frames)}
        joint._tapping(network, tap)(executor, x, torch.ones(1), None, context, None, {}, **conditions)

    with torch.no_grad():
        run(**inputs)
        for name in inputs:
            run(**{**inputs, name: inputs[name] + 1.0})
    places = seen[0].text, seen[0].image, *seen[0].references
    assert places == (slice(0, 8), slice(64, 88), slice(88, 94), slice(94, 100))
    expected = [range(8), range(8, 34), range(64, 88), range(88, 100)]
    assert [changed_positions(seen[0].key, each.key) for each in seen[1:]] == [list(each) for each in expected]


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
    qwen, hidream = NETWORKS["qwen"], NETWORKS["hidream"]
    with pytest.raises(ValueError, match="a video of 3 frames"):
        sample(reading(qwen.model(), lambda *_: None), torch.zeros(1, 16, 3, 8, 8))
    with pytest.raises(ValueError, match="place of reference images in the attention of a HiDream.* is not known"):
        joint._layout(hidream.model().model.diffusion_model, hidream.latent(1), 8, {"image_cond": hidream.latent(2)})
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
