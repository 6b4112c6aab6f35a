"""Style cross-attention through a stock sampler: equations 3 and 4 literally in float64, null styles, masks, sums."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import comfy.samplers
import pytest
import tiny_models
import tiny_styles
import torch
from identity_edit_pack.attention.capture import IdentityAttention
from identity_edit_pack.attention.errors import IdentityEditError
from identity_edit_pack.attention.sites import ALL
from identity_edit_pack.attention.style_cross_attention import PARALLEL, SEQUENTIAL
from identity_edit_pack.attention.unet import attention_layers, layer_key
from identity_edit_pack.pipelines.pidiff.style_attention import StyleAttention, apply_style_attention, style_tokens
from identity_edit_pack.tests.attention.sampling import NEGATIVE, POSITIVE, SIGMAS, sample

KINDS = [SEQUENTIAL, PARALLEL]


@torch.no_grad()
def literal_mapping(style: StyleAttention, rows: torch.Tensor, average: torch.Tensor) -> torch.Tensor:
    """The mapping network, row group by row group, in float64: [P, N, C] -> [P, 4, text width]."""
    mapping = style.network.mapping
    tokens = []
    for (first, last), layer in zip(mapping.groups, mapping.layers, strict=True):
        x = (rows.double() - average.double())[:, first - 1 : last].reshape(len(rows), -1)
        y = x @ layer.weight.double().T + layer.bias.double()
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5) ** 0.5
        tokens.append(y * mapping.normalize.weight.double() + mapping.normalize.bias.double())
    return torch.stack(tokens, dim=1)


def literal_attention(attention: Any, query: torch.Tensor, tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(Q' K'^T / sqrt(d)) V', head by head, in float64."""
    q, k, v = (
        (x.double() @ linear.weight.double().T).chunk(heads, dim=-1)
        for x, linear in ((query, attention.to_q), (tokens, attention.to_k), (tokens, attention.to_v))
    )
    each = [
        torch.softmax(q_h @ k_h.transpose(1, 2) / q_h.shape[-1] ** 0.5, dim=-1) @ v_h
        for q_h, k_h, v_h in zip(q, k, v, strict=True)
    ]
    return torch.cat(each, dim=-1)


class Recorder:
    """What every block's text cross-attention got and gave, and what it became; by layer, call after call."""

    def __init__(self, model: Any) -> None:
        self.model = model.clone()
        self.blocks = {layer.key: layer for layer in attention_layers(model.get_model_object("diffusion_model"))}
        self.calls: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        self.model.set_model_attn2_output_patch(self._note)
        self.hidden: dict[int, torch.Tensor] = {}
        self.given: dict[int, torch.Tensor] = {}

    def _note(self, n: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        key = layer_key(extra)
        attention = self.blocks[key].block.attn2
        self.calls[key].append(
            {
                "hidden": self.hidden[id(attention)],
                "text": self.given[id(attention)],
                "result": n.clone(),
                "sides": list(extra["cond_or_uncond"]),
                "heads": extra["n_heads"],
                "shape": extra["activations_shape"][2:],
            }
        )
        return n

    def _keep(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        self.hidden[id(module)], self.given[id(module)] = inputs[0].clone(), output.clone()

    def __enter__(self) -> Recorder:
        self.hooks = [layer.block.attn2.register_forward_hook(self._keep) for layer in self.blocks.values()]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def run(self, latent: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        with self:
            return sample(self.model, latent, *arguments, **options)


@torch.no_grad()
def expected(style: Any, recorder: Recorder, key: Any, call: dict[str, Any], tokens: Any, null: Any) -> torch.Tensor:
    """SCA of one block's call through to_out without its bias, in float64, and lambda 1."""
    each = call["text"].shape[0] // len(call["sides"])
    rows = torch.cat([(null if side else tokens).expand(each, -1, -1) for side in call["sides"]])
    query = call["text"] if style.kind == SEQUENTIAL else call["hidden"]
    attended = literal_attention(style.network.attention[key], query, rows, call["heads"])
    return attended @ recorder.blocks[key].block.attn2.to_out[0].weight.double().T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_block_adds_equation_3_literally(family: str, kind: str) -> None:
    model = tiny_models.FAMILIES[family]()
    style, w_plus = tiny_styles.style_attention(model, kind), tiny_styles.w_plus(images=2)
    recorder = Recorder(apply_style_attention(model, style, w_plus, strength=0.7))
    recorder.run(tiny_models.latent(3, batch=2), cfg=3.0)
    tokens = literal_mapping(style, w_plus.rows, w_plus.average)
    null = literal_mapping(style, w_plus.average[None], w_plus.average)
    assert set(recorder.calls) == {layer.key for layer in recorder.blocks.values()}, "a block without its SCA"
    for key, calls in recorder.calls.items():
        assert len(calls) == len(SIGMAS) - 1
        for call in calls:
            assert sorted(call["sides"]) == [0, 1]
            added = 0.7 * expected(style, recorder, key, call, tokens, null)
            error = (call["result"].double() - (call["text"].double() + added)).abs().max()
            assert float(error) < 1e-5 and float(added.abs().max()) > 0.01, key


def test_the_whole_network_equals_diffusers_with_a_literal_processor() -> None:
    """Another library's UNet in float64, whose processor is eq. 1 to 4 with to_out at the end."""
    model = tiny_models.sd1()
    style, w_plus = tiny_styles.style_attention(model), tiny_styles.w_plus()
    tokens = literal_mapping(style, w_plus.rows, w_plus.average)
    twin = tiny_models.diffusers_twin(model).double()
    # In the order of ComfyUI's blocks: down, middle, up.
    names = [name for name in twin.attn_processors if name.endswith("attn2.processor")]
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    names.sort(key=lambda name: (order[name.split(".")[0]], name))
    keys = sorted(style.network.attention.sizes, key=lambda key: (["input", "middle", "output"].index(key[0]), key[1:]))

    class Processor:
        def __init__(self, own: Any) -> None:
            self.own = own

        def __call__(self, attention: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, **_: Any):
            text = literal_attention(attention, hidden_states, encoder_hidden_states, attention.heads)
            text = attention.to_out[0](text)
            sca = literal_attention(self.own, text, tokens.expand(len(text), -1, -1), attention.heads)
            return text + 0.4 * (attention.to_out[0](sca) - attention.to_out[0].bias)

    processors = dict(twin.attn_processors)
    for name, key in zip(names, keys, strict=True):
        processors[name] = Processor(style.network.attention[key])
    twin.set_attn_processor(processors)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        result = apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        seen.append((arguments["input"], arguments["timestep"], result))
        return result

    styled = apply_style_attention(model, style, w_plus, strength=0.4)
    styled.set_model_unet_function_wrapper(note)
    sample(styled, tiny_models.latent(3), cfg=1.0)
    sampling = model.get_model_object("model_sampling")
    for x, sigma, denoised in seen:
        level = sigma.double().reshape(-1, 1, 1, 1)
        t = sampling.timestep(sigma).double()
        with torch.no_grad():
            eps = twin(x.double() / (1 + level**2) ** 0.5, t, POSITIVE[0][0].double()).sample
        assert float((denoised.double() - (x.double() - level * eps)).abs().max()) < 1e-5 * float(level.max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_lambda_0_keeps_every_bit(family: str, kind: str) -> None:
    model = tiny_models.FAMILIES[family]()
    style, w_plus, latent = tiny_styles.style_attention(model, kind), tiny_styles.w_plus(), tiny_models.latent(3)
    plain = sample(model, latent)
    for options in ({"strength": 0.0}, {"strength": 0.4, "schedule": (0.0,)}, {"schedule": (0.0, 0.0, 0.0)}):
        assert torch.equal(sample(apply_style_attention(model, style, w_plus, **options), latent), plain)
    # All noise levels of the run lie outside of the range.
    early = apply_style_attention(model, style, w_plus, strength=1.0, start_percent=0.0, end_percent=0.01)
    assert torch.equal(sample(early, latent), plain)
    styled = sample(apply_style_attention(model, style, w_plus, strength=0.4), latent)
    assert not torch.allclose(styled, plain, atol=1e-3)
    # Where lambda is 0 nothing is computed: what would be added may be no number.
    with torch.no_grad():
        next(style.network.attention.parameters()).fill_(float("nan"))
    assert torch.equal(sample(apply_style_attention(model, style, w_plus, schedule=(0.0,)), latent), plain)


def test_the_plain_model_is_untouched() -> None:
    model = tiny_models.sd1()
    latent = tiny_models.latent(3)
    before = sample(model, latent)
    apply_style_attention(model, tiny_styles.style_attention(model), tiny_styles.w_plus(), strength=1.0)
    assert torch.equal(sample(model, latent), before)
    assert not model.additional_models and not model.model_options["transformer_options"].get("patches")


def test_sides_evaluated_apart_or_in_another_order_get_their_own_styles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.sd1()
    style, w_plus = tiny_styles.style_attention(model), tiny_styles.w_plus()
    styled, latent = apply_style_attention(model, style, w_plus, strength=1.0), tiny_models.latent(3)
    together = sample(styled, latent)
    with monkeypatch.context() as patch:
        patch.setattr(comfy.samplers, "can_concat_cond", lambda first, second: first is second)
        apart = sample(styled, latent)
    assert float((apart - together).norm() / together.norm()) < 1e-5


@pytest.mark.parametrize("names", [("positive", "negative"), ("negative", "middle", "positive")])
def test_guiders_with_other_orders_of_sides(names: tuple[str, ...]) -> None:
    """Dual CFG Guider evaluates [negative, middle, positive]: ComfyUI's numbers do not say which side is which."""
    model = tiny_models.sd1()
    style, w_plus = tiny_styles.style_attention(model), tiny_styles.w_plus()
    recorder = Recorder(apply_style_attention(model, style, w_plus, strength=1.0))

    class Guider(comfy.samplers.CFGGuider):
        def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
            sides = [self.conds[name] for name in names]
            return comfy.samplers.calc_cond_batch(self.inner_model, sides, x, timestep, model_options)[0]

    guider = Guider(recorder.model)
    guider.inner_set_conds({name: tiny_models.conditioning(seed) for seed, name in enumerate(names)})
    latent = tiny_models.latent(3)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(7))
    with recorder:
        guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), SIGMAS[:2], disable_pbar=True, seed=7)
    tokens, null = style_tokens(style, w_plus)
    for key, calls in recorder.calls.items():
        for call in calls:
            numbered = {**call, "sides": [1 if names[side] == "negative" else 0 for side in call["sides"]]}
            added = expected(style, recorder, key, numbered, tokens, null)
            assert float((call["result"].double() - call["text"].double() - added).abs().max()) < 1e-5


def test_two_people_add_up_in_any_order() -> None:
    model = tiny_models.sd1()
    people = [(tiny_styles.style_attention(model, seed=seed), tiny_styles.w_plus(seed)) for seed in (1, 2)]
    latent = tiny_models.latent(3)
    results = []
    for order in (people, people[::-1]):
        styled = model
        for style, w_plus in order:
            styled = apply_style_attention(styled, style, w_plus, strength=0.5)
        assert len(styled.get_additional_models()) == 2
        recorder = Recorder(styled)
        results.append(recorder.run(latent))
        key, calls = next(iter(recorder.calls.items()))
        added = sum(
            0.5 * expected(style, recorder, key, calls[0], *style_tokens(style, w_plus)) for style, w_plus in people
        )
        assert float((calls[0]["result"].double() - calls[0]["text"].double() - added).abs().max()) < 1e-5
    assert float((results[0] - results[1]).norm() / results[0].norm()) < 1e-5
    # Two people of one style attention share its weights.
    style = people[0][0]
    both = apply_style_attention(apply_style_attention(model, style, people[0][1]), style, people[1][1])
    assert len(both.get_additional_models()) == 1


def halves(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    left = torch.zeros(1, height, width)
    left[:, :, : width // 2] = 1.0
    return left, 1.0 - left


@pytest.mark.parametrize("kind", KINDS)
def test_masks_give_each_person_their_region(kind: str) -> None:
    """Also on odd grids: 6 x 10 of the latent are 3 x 5 in the next layers."""
    model = tiny_models.sd1()
    people = [(tiny_styles.style_attention(model, kind, seed=seed), tiny_styles.w_plus(seed)) for seed in (1, 2)]
    masks = halves(48, 80)
    styled = model
    for (style, w_plus), mask in zip(people, masks, strict=True):
        styled = apply_style_attention(styled, style, w_plus, strength=1.0, mask=mask)
    recorder = Recorder(styled)
    recorder.run(tiny_models.latent(3, height=6, width=10))
    grids = set()
    for key, calls in recorder.calls.items():
        call = calls[0]
        grid = tuple(call["shape"])
        grids.add(grid)
        added = torch.zeros(call["text"].shape, dtype=torch.float64)
        for (style, w_plus), mask in zip(people, masks, strict=True):
            of_cells = torch.nn.functional.adaptive_avg_pool2d(mask.double(), grid).flatten()[None, :, None]
            added += of_cells * expected(style, recorder, key, call, *style_tokens(style, w_plus))
        assert float((call["result"].double() - call["text"].double() - added).abs().max()) < 1e-5
    assert grids == {(6, 10), (3, 5)}


def test_where_nobody_is_nothing_is_added() -> None:
    model = tiny_models.sd1()
    style, w_plus, latent = tiny_styles.style_attention(model), tiny_styles.w_plus(), tiny_models.latent(3)
    empty, full = torch.zeros(1, 64, 64), torch.ones(1, 64, 64)
    none = sample(apply_style_attention(model, style, w_plus, strength=1.0, mask=empty), latent)
    assert torch.equal(none, sample(model, latent))
    everywhere = sample(apply_style_attention(model, style, w_plus, strength=1.0, mask=full), latent)
    assert torch.equal(everywhere, sample(apply_style_attention(model, style, w_plus, strength=1.0), latent))
    left, _ = halves(64, 64)
    recorder = Recorder(apply_style_attention(model, style, w_plus, strength=1.0, mask=left))
    recorder.run(latent)
    for calls in recorder.calls.values():
        changed = (calls[0]["result"] - calls[0]["text"]).abs().amax(-1).unflatten(1, tuple(calls[0]["shape"]))
        middle = changed.shape[2] // 2
        assert float(changed[:, :, middle:].max()) == 0.0 < float(changed[:, :, :middle].min())


def test_areas_of_a_prompt_see_their_part_of_the_mask() -> None:
    """A conditioning with an area is evaluated on a part of the latent only."""
    model = tiny_models.sd1()
    style, w_plus = tiny_styles.style_attention(model), tiny_styles.w_plus()
    _, right = halves(64, 64)
    positive = [[POSITIVE[0][0], {**POSITIVE[0][1], "area": (8, 4, 0, 4), "strength": 1.0}]]
    recorder = Recorder(apply_style_attention(model, style, w_plus, strength=1.0, mask=right))
    recorder.run(tiny_models.latent(3), positive, NEGATIVE, cfg=1.0)
    for calls in recorder.calls.values():
        assert all(call["shape"][1] * 2 == call["shape"][0] for call in calls)
        assert float((calls[0]["result"] - calls[0]["text"]).abs().amax(-1).min()) > 0.0, "all of it is the person's"


def test_one_style_for_each_image_of_a_batch() -> None:
    model = tiny_models.sd1()
    style, pair, latent = tiny_styles.style_attention(model), tiny_styles.w_plus(images=2), tiny_models.latent(3, 2)
    both = sample(apply_style_attention(model, style, pair, strength=1.0), latent)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(7))
    for index in range(2):
        one = type(pair)(pair.rows[index : index + 1], pair.average, pair.encoder)
        guider = comfy.samplers.CFGGuider(apply_style_attention(model, style, one, strength=1.0))
        guider.set_conds(POSITIVE, NEGATIVE)
        guider.set_cfg(3.0)
        euler = comfy.samplers.sampler_object("euler")
        alone = guider.sample(noise[index : index + 1], latent[index : index + 1], euler, SIGMAS, disable_pbar=True)
        assert tiny_models.relative_error(both[index : index + 1], alone) < 1e-5
    with pytest.raises(ValueError, match="w_plus holds 2 entries for a batch of 3 latents"):
        sample(apply_style_attention(model, style, pair, strength=1.0), tiny_models.latent(3, 3))
    masks = torch.ones(2, 8, 8)
    with pytest.raises(ValueError, match="mask holds 2 entries for a batch of 3 latents"):
        sample(apply_style_attention(model, style, tiny_styles.w_plus(), mask=masks), tiny_models.latent(3, 3))


def test_merged_cells_and_masks_do_not_go_together() -> None:
    model = tiny_models.sd1()
    left, _ = halves(64, 64)
    styled = apply_style_attention(model, tiny_styles.style_attention(model), tiny_styles.w_plus(), mask=left)
    merging = styled.clone()
    # What token merging does: fewer cells in, the removed ones back behind the attention.
    merging.model_options["transformer_options"]["patches"]["attn2_patch"] = [
        lambda n, context, value, extra: (n[:, ::2], context, value)
    ]
    with pytest.raises(ValueError, match="remove token merging, or the mask"):
        sample(merging, tiny_models.latent(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays_near_and_finite(dtype: torch.dtype) -> None:
    exact, low = tiny_models.sd1(), tiny_models.sd1(dtype=dtype)
    w_plus, latent = tiny_styles.w_plus(), tiny_models.latent(3)
    results = []
    for model in (exact, low):
        style = tiny_styles.style_attention(model)
        styled = apply_style_attention(model, style, w_plus, strength=1.0)
        assert next(styled.get_additional_models()[0].model.parameters()).dtype == model.model_dtype()
        assert next(style.network.attention.parameters()).dtype == torch.float32
        results.append(sample(styled, latent, cfg=1.0) - sample(model, latent, cfg=1.0))
    assert torch.isfinite(results[1]).all()
    assert float((results[1] - results[0]).norm() / results[0].norm()) < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_attention_is_the_mean_softmax_and_changes_no_bit(kind: str) -> None:
    model, latent = tiny_models.sd1(), tiny_models.latent(3, batch=2)
    style, w_plus = tiny_styles.style_attention(model, kind), tiny_styles.w_plus(images=2)
    attention = IdentityAttention((2,), choice=ALL, self_attention=False)
    recorder = Recorder(apply_style_attention(model, style, w_plus, strength=0.7, attention=attention))
    recorded = recorder.run(latent, cfg=3.0)
    assert torch.equal(recorded, sample(apply_style_attention(model, style, w_plus, strength=0.7), latent, cfg=3.0))
    tokens = literal_mapping(style, w_plus.rows, w_plus.average)
    totals: dict[int, list[torch.Tensor]] = {}
    for key, calls in recorder.calls.items():
        layer = style.network.attention[key]
        for call in calls:
            each = call["text"].shape[0] // len(call["sides"])
            query = (call["text"] if kind == SEQUENTIAL else call["hidden"]).double()
            q = (query @ layer.to_q.weight.double().T).split(each)[list(call["sides"]).index(0)]
            k = tokens.double() @ layer.to_k.weight.double().T
            heads = call["heads"]
            q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
            maps = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)[..., 2].mean(1)
            totals.setdefault(maps.shape[1], []).append(maps)
    assert {grid[0] * grid[1] for grid in attention.cross} == set(totals)
    assert attention.latent_size == latent.shape[-2:]  # for Attention Heatmap
    for grid, mean in attention.cross.items():
        expected_mean = torch.stack(totals[grid[0] * grid[1]]).mean(0).unflatten(1, grid)
        assert float((mean.total / mean.weight - expected_mean).abs().max()) < 1e-5
    with pytest.raises(IdentityEditError, match="recorded_token is 9, but the style attention has"):
        apply_style_attention(model, style, w_plus, attention=IdentityAttention((8,)))
