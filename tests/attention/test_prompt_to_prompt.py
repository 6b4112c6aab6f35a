"""Prompt-to-prompt attention control against a literal float64 attention, and against sampling without it."""

from __future__ import annotations

from typing import Any

import comfy.ldm.modules.attention as comfy_attention
import comfy.samplers
import pytest
import torch
from identity_edit_pack.attention import prompt_to_prompt as control
from identity_edit_pack.attention.unet import attention_layers
from identity_edit_pack.pipelines.attention_control.prompt_to_prompt import ControlSettings, with_attention_control
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests import tiny_models
from identity_edit_pack.tests.tiny_models import relative_error

SOURCE, NEGATIVE, TARGET = (tiny_models.conditioning(seed) for seed in (1, 2, 3))
TOKENS = tiny_models.TOKENS
HEIGHT, WIDTH = 8, 12
ONE_STEP = torch.tensor([4.0, 0.0])
RUN = torch.tensor([9.0, 6.0, 4.0, 2.0, 1.0, 0.0])
ALWAYS = ControlSettings(1.0, 1.0)


def identity(count: int = TOKENS) -> control.TokenMap:
    return control.TokenMap(torch.eye(count), torch.ones(count, dtype=torch.bool), torch.ones(count))


def swapped(source: int = TOKENS, target: int = TOKENS) -> control.TokenMap:
    """A word of two tokens for one of one, a free token, and a factor for two."""
    mapper = torch.zeros(source, target)
    mapper[0, 0] = mapper[1, 1] = 1.0
    mapper[[2, 3], 2] = 1.0
    for i in range(4, target):
        mapper[min(i, source - 1), i] = 1.0
    mapper[:, 3] = 0.0
    factors = torch.ones(target)
    factors[2], factors[5] = 2.5, -0.5
    return control.TokenMap(mapper, mapper.sum(dim=0) > 0, factors)


def sample(
    model: Any,
    positive: Any = TARGET,
    negative: Any = NEGATIVE,
    sigmas: torch.Tensor = RUN,
    batch: int = 1,
    sampler: str = "euler",
    cfg: float = 3.0,
) -> torch.Tensor:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    noise = torch.randn(batch, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return guider.sample(
            noise, torch.zeros_like(noise), comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=7
        )


class Watch:
    """Projected queries, keys and values of one attention, and what it made of them, call by call."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.q: list[torch.Tensor] = []
        self.k: list[torch.Tensor] = []
        self.v: list[torch.Tensor] = []
        self.out: list[torch.Tensor] = []
        self._hooks = [attention.to_out.register_forward_pre_hook(lambda _, given: self.out.append(given[0].clone()))]
        for name in ("q", "k", "v"):
            projection, kept = getattr(attention, f"to_{name}"), getattr(self, name)
            self._hooks.append(projection.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out.clone())))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def weights(self, call: int, row: int, tokens: int | None = None) -> torch.Tensor:
        """softmax(Q K^T / sqrt(d)) in float64 [heads, N, tokens]."""
        q, k = self._apart(self.q[call][row]), self._apart(self.k[call][row, :tokens])
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)

    def times_values(self, weights: torch.Tensor, call: int, row: int) -> torch.Tensor:
        values = self._apart(self.v[call][row, : weights.shape[-1]])
        return (weights @ values).transpose(0, 1).flatten(1)

    def _apart(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.double().unflatten(-1, (self.attention.heads, -1)).transpose(0, 1)


def literal(tokens: control.TokenMap, m_source: torch.Tensor, m_target: torch.Tensor) -> torch.Tensor:
    """Equation by equation, token by token, in float64."""
    result = m_target.clone()
    for j in range(m_target.shape[-1]):
        if tokens.mapped[j]:
            result[..., j] = sum(m_source[..., i] * float(tokens.mapper[i, j]) for i in range(m_source.shape[-1]))
        result[..., j] *= float(tokens.factors[j])
    return result


def last_layer(model: Any) -> Any:
    return attention_layers(model.get_model_object("diffusion_model"))[-1]


def use_attention(model: Any, name: str) -> Any:
    clone = model.clone()
    function = getattr(comfy_attention, f"attention_{name}")
    options = clone.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda _, *args, **kwargs: function(*args, **kwargs)
    return clone


@pytest.mark.parametrize("family", ["sd1", "sd2_v", "sdxl"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_same_prompt_gives_the_same_bits(family: str, batch: int) -> None:
    model = tiny_models.FAMILIES[family]()
    plain = sample(model, SOURCE, batch=batch)
    both = sample(with_attention_control(model, identity(), SOURCE, ControlSettings()), SOURCE, batch=batch)
    assert both.shape[0] == 2 * batch
    assert torch.equal(both[:batch], plain) and torch.equal(both[batch:], plain)


@pytest.mark.parametrize("backend", ["pytorch", "split", "sub_quad", "basic"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_the_same_prompt_with_every_attention_function_and_blend(backend: str, sampler: str) -> None:
    model = use_attention(tiny_models.sd1(), backend)
    plain = sample(model, SOURCE, sampler=sampler)
    controlled = with_attention_control(model, identity(), SOURCE, ControlSettings(), ((2,), (2, 3)))
    source, target = sample(controlled, SOURCE, sampler=sampler).chunk(2)
    assert torch.equal(source, plain) and torch.equal(target, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    model = tiny_models.sd1(dtype=dtype)
    plain = sample(model, SOURCE)
    source, target = sample(with_attention_control(model, identity(), SOURCE, ALWAYS), SOURCE).chunk(2)
    assert torch.equal(source, plain) and torch.equal(target, plain)
    watch = Watch(last_layer(model).block.attn2)
    other = sample(with_attention_control(model, swapped(), SOURCE, ALWAYS), sigmas=ONE_STEP)
    watch.close()
    assert watch.out[1].dtype == dtype and bool(torch.isfinite(other).all())
    expected = watch.times_values(literal(swapped(), watch.weights(0, 1), watch.weights(1, 1)), 1, 1)
    assert relative_error(watch.out[1][1], expected) < 2 * torch.finfo(dtype).eps  # rounded once, at the end


@pytest.mark.parametrize("family", ["sd1", "sd2_v", "sdxl"])
@pytest.mark.parametrize("batch", [1, 2])
def test_one_block_equals_a_literal_attention(family: str, batch: int) -> None:
    model = tiny_models.FAMILIES[family]()
    watch = Watch(last_layer(model).block.attn2)
    source = tiny_models.conditioning(1, batch)
    controlled = with_attention_control(model, swapped(), source, ControlSettings(1.0, 0.0))
    sample(controlled, sigmas=ONE_STEP, batch=batch)
    watch.close()
    assert len(watch.q) == 2  # the source's evaluation and the target's
    for b in range(batch):
        negative, positive = b, batch + b  # ComfyUI's order: the negative side first
        m_source, m_target = watch.weights(0, positive), watch.weights(1, positive)
        expected = watch.times_values(literal(swapped(), m_source, m_target), 1, positive)
        assert relative_error(watch.out[1][positive], expected) < 1e-5
        assert relative_error(watch.out[1][positive], watch.times_values(m_target, 1, positive)) > 1e-2
        # The source and the negative side are as ever.
        assert relative_error(watch.out[0][positive], watch.times_values(m_source, 0, positive)) < 1e-5
        own = watch.times_values(watch.weights(1, negative), 1, negative)
        assert relative_error(watch.out[1][negative], own) < 1e-5


@pytest.mark.parametrize("lengths", [(8, 8, 7), (8, 8, 16), (16, 8, 16), (8, 16, 8)])
def test_conditionings_apart_and_of_different_lengths(lengths: tuple[int, int, int]) -> None:
    """7 tokens do not fit into a batch with 8, so the sides are calls of their own; 8 are repeated beside 16."""
    of_source, of_target, of_negative = lengths
    source, target = tiny_models.conditioning(1, tokens=of_source), tiny_models.conditioning(3, tokens=of_target)
    tokens = swapped(of_source, of_target)
    model = tiny_models.sd1()
    watch = Watch(last_layer(model).block.attn2)
    controlled = with_attention_control(model, tokens, source, ControlSettings(1.0, 0.0), ((2,), (2,)))
    sample(controlled, target, tiny_models.conditioning(2, tokens=of_negative), ONE_STEP)
    watch.close()
    assert len(watch.q) == (4 if of_negative == 7 else 2)
    # The positive side: in a call of its own first, else the second row.
    calls, row = ((0, 2), 0) if of_negative == 7 else ((0, 1), 1)
    m_source, m_target = watch.weights(calls[0], row, of_source), watch.weights(calls[1], row, of_target)
    expected = watch.times_values(literal(tokens, m_source, m_target), calls[1], row)
    assert relative_error(watch.out[calls[1]][row], expected) < 1e-5


@pytest.mark.parametrize("tokens", [8, 16])
def test_the_same_prompt_beside_longer_negative_ones(tokens: int) -> None:
    model = tiny_models.sd1()
    negative = tiny_models.conditioning(2, tokens=tokens)
    plain = sample(model, SOURCE, negative)
    source, target = sample(with_attention_control(model, identity(), SOURCE, ALWAYS), SOURCE, negative).chunk(2)
    assert torch.equal(source, plain) and torch.equal(target, plain)


def test_self_attention_is_the_sources_with_the_targets_values() -> None:
    model = tiny_models.sd1()
    watch = Watch(last_layer(model).block.attn1)
    two_steps = torch.tensor([4.0, 2.0, 0.0])
    sample(with_attention_control(model, identity(), SOURCE, ControlSettings(0.0, 1.0, "1")), sigmas=two_steps)
    watch.close()
    source, target = 2, 3  # calls of the second step, at which the latents differ
    # The projections of the target's evaluation are those of the exchanged activations.
    for projected in (watch.q, watch.k):
        assert torch.equal(projected[target][1], projected[source][1])
        assert not torch.equal(projected[target][0], projected[source][0])  # the negative side's are its own
    assert not torch.equal(watch.v[target][1], watch.v[source][1])
    exchanged = watch.times_values(watch.weights(source, 1), target, 1)
    assert relative_error(watch.out[target][1], exchanged) < 1e-5
    assert relative_error(watch.out[target][0], watch.times_values(watch.weights(target, 0), target, 0)) < 1e-5


def test_self_attention_keeps_to_its_grids() -> None:
    """A latent of 8x12 is small: automatic takes all layers; 2 those on the grid of 4x6 and below."""
    for grid, exchanged in (("automatic", {1, 2}), ("2", {2}), ("4", set())):
        model = tiny_models.sd1()
        layers = attention_layers(model.get_model_object("diffusion_model"))
        watches = [(layer.downsampling, Watch(layer.block.attn1)) for layer in layers]
        sample(with_attention_control(model, identity(), SOURCE, ControlSettings(0.0, 1.0, grid)), sigmas=ONE_STEP)
        for downsampling, watch in watches:
            watch.close()
            same = torch.equal(watch.q[1][1], watch.q[0][1])
            first = watch is watches[0][1]  # before any text: equal in either case
            assert first or same == (downsampling in exchanged), (grid, downsampling)


def test_automatic_grids() -> None:
    class Layer:
        def __init__(self, downsampling: int) -> None:
            self.downsampling = downsampling

    sd1, sdxl = [Layer(f) for f in (1, 2, 4, 8)], [Layer(f) for f in (2, 4)]
    assert control.automatic_factor(sd1, 64, 64) == 4  # 16x16 of 512x512, as in the reference implementation
    assert control.automatic_factor(sd1, 96, 64) == 4
    assert control.automatic_factor(sd1, 128, 128) == 4
    assert control.automatic_factor(sd1, 32, 32) == 2
    assert control.automatic_factor(sd1, 16, 16) == 1
    assert control.automatic_factor(sdxl, 128, 128) == 4
    assert control.automatic_factor(sdxl, 16, 16) == 2


def test_shares_of_the_steps() -> None:
    """Of five steps 0.4 controls two of cross-attention and 0.6 three of self-attention, at both levels of heun."""
    model = tiny_models.sd1()
    watch1, watch2 = Watch(last_layer(model).block.attn1), Watch(last_layer(model).block.attn2)
    sample(with_attention_control(model, swapped(), SOURCE, ControlSettings(0.4, 0.6, "1")), sampler="heun")
    watch1.close()
    watch2.close()
    exchanged = [torch.equal(watch1.q[i][1], watch1.q[i + 1][1]) for i in range(0, len(watch1.q), 2)]
    assert exchanged == [True] * 5 + [False] * 4  # heun: levels 9, 6, 6, 4, 4, 2, 2, 1, 1; three steps begin at 9, 6, 4
    own = [
        relative_error(watch2.out[i][1], watch2.times_values(watch2.weights(i, 1), i, 1)) < 1e-5
        for i in range(1, len(watch2.out), 2)
    ]
    assert own == [False] * 3 + [True] * 6


def test_another_owner_of_the_slot_is_chained() -> None:
    """One that adds to the plain attention, for one transformer or a whole block; its addition stays."""
    model = tiny_models.sd1()
    layer = last_layer(model)
    added = torch.randn(layer.block.attn2.to_q.out_features, generator=torch.Generator().manual_seed(3))
    calls: list[torch.Size] = []

    def owner(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        calls.append(q.shape)
        return comfy_attention.optimized_attention(q, k, v, extra["n_heads"]) + added

    for key in (layer.key, layer.key[:2]):
        owned = model.clone()
        owned.set_model_attn2_replace(owner, *key)
        calls.clear()
        watch = Watch(layer.block.attn2)
        sample(with_attention_control(owned, swapped(), SOURCE, ControlSettings(1.0, 0.0)), sigmas=ONE_STEP)
        watch.close()
        expected = watch.times_values(literal(swapped(), watch.weights(0, 1), watch.weights(1, 1)), 1, 1) + added
        assert len(calls) == 2 and relative_error(watch.out[1][1], expected) < 1e-5
        plain = sample(owned, SOURCE)
        source, target = sample(with_attention_control(owned, identity(), SOURCE, ALWAYS), SOURCE).chunk(2)
        assert torch.equal(source, plain) and torch.equal(target, plain)
        # In whatever order the two nodes are.
        later = with_attention_control(model, swapped(), SOURCE, ALWAYS)
        later.set_model_attn2_replace(owner, *key)
        before = sample(with_attention_control(owned, swapped(), SOURCE, ALWAYS))
        assert torch.equal(sample(later), before)


def test_nothing_remains_on_the_model() -> None:
    model = tiny_models.sd1()
    before, options = sample(model), repr(model.model_options)
    controlled = with_attention_control(model, swapped(), SOURCE, ALWAYS, ((1,), (1,)))
    first, second = sample(controlled), sample(controlled)
    assert torch.equal(first, second)  # the blend's means begin anew in every run
    assert repr(model.model_options) == options and torch.equal(sample(model), before)
    assert "patches_replace" not in controlled.model_options["transformer_options"]
    twice = with_attention_control(controlled, identity(), SOURCE, ALWAYS)
    assert torch.equal(sample(twice), sample(with_attention_control(model, identity(), SOURCE, ALWAYS)))


def test_the_blend_is_a_running_mean_of_the_weights() -> None:
    """The means after a run of five steps, in float64 from the layers' queries and keys; and the mask made of them."""
    model = tiny_models.sd1()
    layers = [layer for layer in attention_layers(model.get_model_object("diffusion_model")) if layer.downsampling == 1]
    watches = [Watch(layer.block.attn2) for layer in layers]
    kept: list[control.LocalBlend] = []
    original = control.LocalBlend.mask

    def remember(self: control.LocalBlend, height: int, width: int) -> torch.Tensor:
        kept.append(self)
        return original(self, height, width)

    columns = ((2, 3), (2,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control.LocalBlend, "mask", remember)
        settings = ControlSettings(0.4, 0.0, blend_start=1.0)  # controlled in two steps of five, and never blended
        sample(with_attention_control(model, swapped(), SOURCE, settings, columns))
        assert not kept
        sample(with_attention_control(model, swapped(), SOURCE, ControlSettings(0.4, 0.0, blend_start=0.8), columns))
    means: dict[str, list[torch.Tensor]] = {"source": [], "target": []}
    for watch in watches:
        watch.close()
        for step in range(5):
            m_source, m_target = watch.weights(10 + 2 * step, 1), watch.weights(10 + 2 * step + 1, 1)
            means["source"].append(m_source[:, :, [2, 3]].sum(-1).mean(0))
            # Effective weights, without the factor of re-weighting: the token takes the sum of two while controlled.
            word = m_source[:, :, [2, 3]].sum(-1) if step < 2 else m_target[:, :, 2]
            means["target"].append(word.mean(0))
    assert len(kept) == 1
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    for (of, grid), mean in kept[0]._means.items():
        mine = torch.stack(means[of]).mean(0).view(HEIGHT, WIDTH)
        assert grid == (HEIGHT, WIDTH) and relative_error((mean.total / mean.weight)[0], mine) < 1e-5
        padded = torch.nn.functional.pad(mine, (1, 1, 1, 1), value=0.0)
        spread = torch.stack([padded[y : y + HEIGHT, x : x + WIDTH] for y in range(3) for x in range(3)]).amax(0)
        expected |= spread > 0.3 * spread.max()
    assert torch.equal(kept[0].mask(HEIGHT, WIDTH)[0, 0], expected)


def test_outside_of_the_blend_the_target_is_the_source() -> None:
    model = tiny_models.sd1()
    blend = ((2,), (2,))
    settings = ControlSettings(0.4, 0.0, blend_threshold=0.9, blend_start=0.0)
    kept: list[torch.Tensor] = []
    original = control.LocalBlend.mask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control.LocalBlend, "mask", lambda *a: kept.append(original(*a)) or kept[-1])
        source, target = sample(with_attention_control(model, swapped(), SOURCE, settings, blend), batch=2).chunk(2)
    ever = torch.stack(kept).any(dim=0)
    assert 0 < int(ever.sum()) < ever.numel()
    outside = ~kept[-1].expand_as(source)
    assert relative_error(target[outside], source[outside]) < 1e-6  # the run ends at sigma 0
    inside = ever.expand_as(source)
    assert not torch.equal(source[inside], target[inside])
    assert torch.equal(source, sample(model, SOURCE, batch=2))


def test_errors_while_sampling() -> None:
    model = tiny_models.sd1()
    controlled = with_attention_control(model, swapped(8, 6), SOURCE, ALWAYS)
    with pytest.raises(IdentityEditError, match="target's conditioning has 8 tokens but its prompt has 6"):
        sample(controlled)
    broken = with_attention_control(model, swapped(), SOURCE, ALWAYS)
    network, skipped = model.model.diffusion_model, last_layer(model)
    for module in network.output_blocks[skipped.key[1]]:
        if hasattr(module, "transformer_blocks"):
            module.forward = lambda x, *args, **kwargs: x
    with pytest.raises(IdentityEditError, match="node that skips them"):
        sample(broken)
