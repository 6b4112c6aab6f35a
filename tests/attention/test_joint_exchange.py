"""Exchanged rows of joint attention against a literal float64 softmax from the calls of the attention function."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import pytest
import tiny_joint_networks
import torch
from identity_edit_pack.attention import joint_exchange
from identity_edit_pack.attention.joint import joint_sites
from identity_edit_pack.attention.joint_exchange import JointControl, JointMutualAttention
from identity_edit_pack.attention.mutual_self_attention import MutualMasks
from identity_edit_pack.attention.prompt_to_prompt import SOURCE, TARGET, LocalBlend
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests.attention.joint_sampling import POSITIVE, Call, calls_noted_by, noise_of
from tiny_joint_networks import CELLS, NETWORKS, Network

SOURCE_PROMPT, NEGATIVE = tiny_joint_networks.conditioning(9), tiny_joint_networks.conditioning(2)
SIGMAS = torch.tensor([0.8, 0.0])


@pytest.fixture(params=list(NETWORKS))
def network(request: pytest.FixtureRequest) -> Network:
    return NETWORKS[request.param]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    return calls_noted_by(monkeypatch)


class SourceThenTarget(comfy.samplers.CFGGuider):
    """Evaluates another latent with the source's prompt on the positive side, then the sampled one."""

    exchange: Any = None
    source: torch.Tensor

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        own, exchange = self.conds, self.exchange(self.conds)
        sources = [{**self.conds["source"][0], "uuid": entry["uuid"]} for entry in own["positive"]]
        try:
            self.conds = {**own, "positive": sources}
            self.source_denoised = super().predict_noise(self.source, timestep[:1], exchange.recording(model_options))
        finally:
            self.conds = own
        return super().predict_noise(x, timestep, exchange.injecting(model_options))


def run(model: Any, latent: torch.Tensor, exchange: Any, source: torch.Tensor | None = None) -> SourceThenTarget:
    guider = SourceThenTarget(model)
    guider.inner_set_conds({"positive": POSITIVE, "negative": NEGATIVE, "source": SOURCE_PROMPT})
    guider.set_cfg(3.0)
    guider.exchange, guider.source = exchange, torch.flip(latent[:1], [-1]) if source is None else source
    guider.result = guider.sample(
        noise_of(latent), latent, comfy.samplers.sampler_object("euler"), SIGMAS, disable_pbar=True, seed=7
    )
    return guider


def sites_of(model: Any, *numbers: int) -> dict[Any, Any]:
    sites = joint_sites(model.model.diffusion_model)
    return {sites[number].key: sites[number] for number in numbers}


def source_and_target(called: list[Call], network: Network) -> tuple[list[Call], list[Call]]:
    joint = [call for call in called if call.q.shape[2] == network.length]
    count = len(network.blocks)
    assert len(joint) == 2 * count
    return joint[:count], joint[count:]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: Any = None) -> torch.Tensor:
    """[B, N, channels] in float64."""
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def with_image_rows(own: torch.Tensor, source: torch.Tensor, image: slice, rows: slice) -> torch.Tensor:
    """Image rows of the source, whose batch has half as many images, in some rows of the target."""
    mixed = own.clone()
    each = source.repeat_interleave(own.shape[0] // source.shape[0], dim=0)
    mixed[rows, :, image] = each[rows, :, image]
    return mixed


def test_keys_and_values_of_the_source_are_in_the_chosen_blocks(network: Network, called: list[Call]) -> None:
    """On both sides, one source image for a batch of two."""
    model, latent = network.model(), network.latent(3, 2)
    chosen = [len(network.blocks) - 1]
    run(model, latent, lambda _: JointMutualAttention(model.model.diffusion_model, sites_of(model, *chosen)))
    source, target = source_and_target(called, network)
    image = slice(network.image, network.image + CELLS)
    for number, (of_source, of_target) in enumerate(zip(source, target, strict=True)):
        assert torch.allclose(of_source.output, attention(of_source.q, of_source.k, of_source.v), atol=1e-4)
        own = attention(of_target.q, of_target.k, of_target.v)
        k, v = (
            with_image_rows(*pair, image, slice(None))
            for pair in ((of_target.k, of_source.k), (of_target.v, of_source.v))
        )
        exchanged = attention(of_target.q, k, v)
        assert float((exchanged - own).norm() / own.norm()) > 1e-2
        assert torch.allclose(of_target.output, exchanged if number in chosen else own, atol=1e-4)


def test_a_source_equal_to_its_target_changes_nothing(network: Network) -> None:
    model, latent = network.model(), network.latent(3)

    class Same(SourceThenTarget):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            self.source = x
            self.conds["source"] = self.conds["positive"]
            return super().predict_noise(x, timestep, model_options, seed)

    results = []
    for kind in (None, JointMutualAttention, JointControl):
        guider = (comfy.samplers.CFGGuider if kind is None else Same)(model)
        guider.inner_set_conds({"positive": POSITIVE, "negative": NEGATIVE, "source": SOURCE_PROMPT})
        guider.set_cfg(3.0)
        sites = sites_of(model, *range(len(network.blocks)))
        if kind is JointMutualAttention:
            guider.exchange = lambda _, sites=sites: JointMutualAttention(model.model.diffusion_model, sites)
        elif kind is JointControl:
            guider.exchange = lambda conds, sites=sites: control(model, conds, sites, network)
        results.append(guider.sample(
            noise_of(latent), latent, comfy.samplers.sampler_object("euler"), SIGMAS, disable_pbar=True, seed=7
        ))  # fmt: skip
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_masks_part_subject_and_background(network: Network, called: list[Call]) -> None:
    model, latent = network.model(), network.latent(3, 2)
    height, width = latent.shape[-2:]
    source_mask, target_mask = torch.zeros(1, height, width), torch.zeros(2, height, width)
    source_mask[:, :4, :6] = 1  # 2x3 positions
    target_mask[0, :, 6:] = 1
    target_mask[1] = 1  # all of the second image: nothing attends to the source's background

    def exchange(conds: dict[str, Any]) -> JointMutualAttention:
        entries = {entry["uuid"]: entry for side in conds.values() for entry in side}
        masks = MutualMasks(source_mask, target_mask, entries, height, width)
        return JointMutualAttention(model.model.diffusion_model, sites_of(model, 0), masks)

    run(model, latent, exchange)
    source, target = source_and_target(called, network)
    image = slice(network.image, network.image + CELLS)
    k, v = (
        with_image_rows(own, other, image, slice(None))
        for own, other in ((target[0].k, source[0].k), (target[0].v, source[0].v))
    )
    inside_source = torch.zeros(4, 6, dtype=torch.bool)
    inside_source[:2, :3] = True
    inside_target = torch.stack([torch.zeros(4, 6, dtype=torch.bool), torch.ones(4, 6, dtype=torch.bool)])
    inside_target[0, :, 3:] = True
    allowed = torch.ones(4, 1, network.length, network.length, dtype=torch.bool)
    same = inside_target.flatten(1)[:, :, None] == inside_source.flatten()
    allowed[:, 0, image, image] = same.repeat(2, 1, 1)  # of both sides
    assert torch.allclose(target[0].output, attention(target[0].q, k, v, allowed), atol=1e-4)


def test_the_background_alone_is_kept(network: Network, called: list[Call]) -> None:
    """Keys and values outside the edited area are the source's, inside the target's own."""
    model, latent = network.model(), network.latent(3, 2)
    height, width = latent.shape[-2:]
    mask = torch.zeros(1, height, width)
    mask[:, 2:5, 4:10] = 1  # rows 1 and 2, columns 2 to 4 of the grid

    def exchange(conds: dict[str, Any]) -> JointMutualAttention:
        entries = {entry["uuid"]: entry for side in conds.values() for entry in side}
        masks = MutualMasks(mask, mask, entries, height, width)
        return JointMutualAttention(model.model.diffusion_model, sites_of(model, 0), masks, keeps_background=True)

    run(model, latent, exchange)
    source, target = source_and_target(called, network)
    inside = [network.image + 6 * row + column for row in (1, 2) for column in (2, 3, 4)]
    image = slice(network.image, network.image + CELLS)
    mixed = []
    for own, other in ((target[0].k, source[0].k), (target[0].v, source[0].v)):
        rows = with_image_rows(own, other, image, slice(None))
        rows[:, :, inside] = own[:, :, inside]
        mixed.append(rows)
    assert torch.allclose(target[0].output, attention(target[0].q, *mixed), atol=1e-4)


def control(model: Any, conds: Any, sites: Any, network: Network, **options: Any) -> JointControl:
    entries = {entry["uuid"]: entry for entry in conds["positive"]}
    return JointControl(model.model.diffusion_model, sites, entries, 7, 12, **options)


def test_queries_and_keys_of_the_source_on_the_positive_side(network: Network, called: list[Call]) -> None:
    model, latent = network.model(), network.latent(3)
    chosen = [0, len(network.blocks) - 1]
    sides: list[tuple[int, ...]] = []

    def noting_sides(apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        sides.append(tuple(arguments["cond_or_uncond"]))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    noted = model.clone()
    noted.set_model_unet_function_wrapper(noting_sides)
    run(noted, latent, lambda conds: control(model, conds, sites_of(model, *chosen), network))
    source, target = source_and_target(called, network)
    image, row = slice(network.image, network.image + CELLS), sides[1].index(0)
    assert sides[0] == sides[1] and len(sides[1]) == 2
    for number, (of_source, of_target) in enumerate(zip(source, target, strict=True)):
        q, k = (
            with_image_rows(*pair, image, slice(row, row + 1))
            for pair in ((of_target.q, of_source.q), (of_target.k, of_source.k))
        )
        if number not in chosen:
            q, k = of_target.q, of_target.k
        assert torch.allclose(of_target.output, attention(q, k, of_target.v), atol=1e-4)


def test_blend_words_are_read_before_the_exchange(called: list[Call]) -> None:
    """Words of both prompts in the middle blocks, smoothed, 3x3 max pooled, enlarged, thresholded, united."""
    network = NETWORKS["sd3"]
    model, latent = network.model(), network.latent(3, height=8, width=8)
    words = LocalBlend((2,), (4, 5), 0.6, smoothed=True)
    sides = []
    noted = model.clone()
    noted.set_model_unet_function_wrapper(
        lambda apply_model, a: (sides.append(a["cond_or_uncond"]), apply_model(a["input"], a["timestep"], **a["c"]))[1]
    )
    sites = sites_of(model, 0, 1)
    counts = {SOURCE: 8, TARGET: 8}

    def exchange(conds: dict[str, Any]) -> JointControl:
        entries = {entry["uuid"]: entry for entry in conds["positive"]}
        return JointControl(model.model.diffusion_model, sites, entries, 8, 8, words, sites_of(model, 1), counts)

    run(noted, latent, exchange)
    calls = [call for call in called if call.q.shape[2] == 8 + 16]
    masks = []
    for call, columns, order in ((calls[1], [2], sides[0]), (calls[3], [4, 5], sides[1])):
        row = order.index(0)
        words_map = call.probabilities()[row, 8:, columns].sum(-1).view(1, 1, 4, 4)
        distance = torch.arange(-3, 4).double()
        kernel = torch.exp(-(distance[:, None] ** 2 + distance**2) / 2)
        smooth = torch.nn.functional.conv2d(words_map, (kernel / kernel.sum())[None, None], padding=3)
        pooled = torch.nn.functional.max_pool2d(smooth, 3, stride=1, padding=1)
        large = torch.nn.functional.interpolate(pooled, size=(8, 8), mode="bilinear", align_corners=False)
        masks.append(large > 0.6 * large.max())
    assert torch.equal(words.mask(8, 8), masks[0] | masks[1])
    assert 0 < float((masks[0] | masks[1]).double().mean()) < 1 and not torch.equal(*masks)


def test_rows_beyond_the_budget_wait_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS["flux"]
    model, latent = network.model(), network.latent(3)
    sites = sites_of(model, 0, 1, 2, 3)
    exchange = lambda _: JointMutualAttention(model.model.diffusion_model, sites)  # noqa: E731
    expected = run(model, latent, exchange).result
    moved = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self, *a, **k: (moved.append(self.shape), cpu(self, *a, **k))[1])
    monkeypatch.setattr(joint_exchange, "ON_DEVICE", 3 * 2 * 2 * 24 * 32 * 4)  # of 4 blocks x 2 sides
    moved.clear()
    assert torch.equal(run(model, latent, exchange).result, expected)
    assert len([shape for shape in moved if shape == (1, 2, CELLS, 32)]) == 2 * 5


def test_blocks_that_do_not_run_are_named() -> None:
    network = NETWORKS["flux"]
    model, latent = network.model(), network.latent(3)
    skipping = model.clone()
    skipping.set_model_patch_replace(
        lambda args, extra: {"img": args["img"], "txt": args["txt"]}, "dit", "double_block", 0
    )
    sites = sites_of(model, 0, 1)
    with pytest.raises(IdentityEditError, match=r"could not record the blocks \[\('double', 0, 0\)\]"):
        run(skipping, latent, lambda conds: control(model, conds, sites, network))
    blend = LocalBlend((2,), (4,), 0.3)
    with pytest.raises(IdentityEditError, match="The source's conditioning has 8 tokens but its prompt has 9"):
        run(model, latent, lambda conds: control(model, conds, sites, network, blend=blend, blend_sites=sites,
                                                 counts={SOURCE: 9, TARGET: 8}))  # fmt: skip
