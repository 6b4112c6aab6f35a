"""Mutual self-attention against a literal float64 attention with the source's keys and values, on real samplers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.controlnet
import comfy.ldm.modules.attention as comfy_attention
import comfy.ops
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from identity_edit_pack.attention import mutual_self_attention as mutual
from identity_edit_pack.attention.unet import attention_layers
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.attention_control.mutual_self_attention import mutual_self_attention
from identity_edit_pack.pipelines.inversion import edit_friendly, inversion
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests import tiny_models
from identity_edit_pack.tests.tiny_models import relative_error

SOURCE, NEGATIVE, TARGET = (tiny_models.conditioning(seed) for seed in (1, 2, 3))
HEIGHT, WIDTH = 8, 12


def inverted(model: Any, batch: int = 1, steps: int = 6, seed: int = 4) -> inversion.Inversion:
    latent = tiny_models.latent(seed, batch, HEIGHT, WIDTH)
    return inversion.invert_image(model, latent, SOURCE, steps=steps)


def evaluate(
    model: Any,
    pivot: inversion.Inversion,
    row: int,
    x: torch.Tensor,
    guidance_scale: float = 4.0,
    positive: list[Any] = TARGET,
    negative: list[Any] = NEGATIVE,
) -> torch.Tensor:
    """The guided estimate at one noise level, through ComfyUI's guider."""
    return engine.run_loop(
        model, positive, negative, x, pivot.sigmas,
        lambda evaluator, x: evaluator.guided(x, pivot.sigmas[row], guidance_scale),
    )  # fmt: skip


def target_latent(pivot: inversion.Inversion, row: int, batch: int = 1, seed: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 4, HEIGHT, WIDTH, generator=generator)
    return pivot.trajectory[row] + 0.5 * pivot.sigmas[row] * noise


def sampled(model: Any, pivot: inversion.Inversion, sampler: str = "euler", seed: int = 0, **changes: Any) -> Any:
    start = changes.pop("start", pivot.start_latent(model))
    given = {"positive": TARGET, "negative": NEGATIVE, "sigmas": pivot.sigmas, "cfg": 4.0, **changes}
    with torch.no_grad():
        return comfy.sample.sample_custom(
            model, torch.zeros_like(start), given["cfg"], comfy.samplers.sampler_object(sampler), given["sigmas"],
            given["positive"], given["negative"], start, disable_pbar=True, seed=seed,
        )  # fmt: skip


class Watch:
    """What the self-attention of one block was given and what it returned, call by call."""

    def __init__(self, block: Any) -> None:
        self.block = block
        self.normed: list[torch.Tensor] = []
        self._hooks = [
            block.norm1.register_forward_hook(lambda _, given, out: self.normed.append(out.clone())),
            # What the block adds to its residual: after every output patch.
            block.norm2.register_forward_pre_hook(lambda _, given: self._after.append(given[0].clone())),
            block.norm1.register_forward_pre_hook(lambda _, given: self._before.append(given[0].clone())),
        ]
        self._before: list[torch.Tensor] = []
        self._after: list[torch.Tensor] = []

    def attended(self) -> list[torch.Tensor]:
        return [after - before for before, after in zip(self._before, self._after, strict=True)]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def literal_attention(
    block: Any, target: torch.Tensor, source: torch.Tensor, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(Q_target K_source^T / sqrt(d)) V_source in float64, head by head, and the output projection."""
    attention = block.attn1
    q, k, v = (
        (rows.double() @ layer.weight.double().T).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for rows, layer in ((target, attention.to_q), (source, attention.to_k), (source, attention.to_v))
    )
    scores = q @ k.transpose(-1, -2) / attention.dim_head**0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    out = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    return out @ attention.to_out[0].weight.double().T + attention.to_out[0].bias.double()


def last_layer(model: Any) -> tuple[int, Any]:
    layers = attention_layers(model.get_model_object("diffusion_model"))
    return len(layers) - 1, layers[-1]


@pytest.mark.parametrize("family", ["sd1", "sd2_v", "sdxl"])
@pytest.mark.parametrize("batch", [1, 2])
def test_one_block_equals_a_literal_attention(family: str, batch: int) -> None:
    model = tiny_models.FAMILIES[family]()
    pivot = inverted(model, batch)
    start_layer, layer = last_layer(model)
    patched = mutual_self_attention(model, pivot, SOURCE, start_step=0.0, start_layer=start_layer)
    watch = Watch(layer.block)
    evaluate(patched, pivot, 2, target_latent(pivot, 2, batch))
    watch.close()
    (source, target), (of_source, of_target) = watch.normed, watch.attended()
    assert source.shape[0] == 2 * batch  # both sides of the guidance
    assert relative_error(of_source, literal_attention(layer.block, source, source)) < 1e-5
    assert relative_error(of_target, literal_attention(layer.block, target, source)) < 1e-5
    assert relative_error(of_target, literal_attention(layer.block, target, target)) > 1e-2


def test_sides_that_are_evaluated_apart_keep_to_their_own_side() -> None:
    """Prompts of 8 and 7 tokens do not fit into one batch, so each side is a call of its own."""
    model = tiny_models.sd1()
    pivot = inverted(model)
    negative = tiny_models.conditioning(2, tokens=7)
    start_layer, layer = last_layer(model)
    watch = Watch(layer.block)
    patched = mutual_self_attention(model, pivot, SOURCE, start_step=0.0, start_layer=start_layer)
    evaluate(patched, pivot, 2, target_latent(pivot, 2), negative=negative)
    watch.close()
    assert [rows.shape[0] for rows in watch.normed] == [1, 1, 1, 1]
    for side in (0, 1):
        expected = literal_attention(layer.block, watch.normed[2 + side], watch.normed[side])
        assert relative_error(watch.attended()[2 + side], expected) < 1e-5
    crossed = literal_attention(layer.block, watch.normed[2], watch.normed[1])
    assert relative_error(watch.attended()[2], crossed) > 1e-3


def test_rows_are_paired_by_conditioning_in_any_order() -> None:
    layer = last_layer(tiny_models.sd1())[1]
    features = mutual.SourceFeatures({layer.key: layer})
    source, target = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    extra = {"block": layer.key[:2], "block_index": layer.key[2], "uuids": ["cond", "uncond"]}
    record = features.recording_patch()
    assert all(torch.equal(given, source) for given in record(source, source, source, extra))
    n, keys, values = features.injecting_patch()(target, target, target, {**extra, "uuids": ["uncond", "cond"]})
    assert torch.equal(n, target)
    assert torch.equal(keys, source[[2, 3, 0, 1]]) and torch.equal(values, keys)
    other = {**extra, "uuids": ["cond", "another node's"]}
    assert torch.equal(
        features.injecting_patch()(target, target, target, other)[1], torch.cat([source[:2], target[2:]])
    )
    elsewhere = {**extra, "block": ("input", 0)}
    assert features.injecting_patch()(target, None, None, elsewhere) == (target, None, None)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_source_itself_is_sampled_as_without_it(family: str) -> None:
    """With the source's own prompts and latent, its keys and values are those that the target has anyway."""
    model = tiny_models.FAMILIES[family]()
    latent = tiny_models.latent(4, 2, HEIGHT, WIDTH)
    pivot = edit_friendly.edit_friendly_ddpm_inversion(model, latent, SOURCE, NEGATIVE, steps=6)
    patched = mutual_self_attention(model, pivot, SOURCE, start_step=0.0, start_layer=0)
    plain, with_it = (inversion.sample_inversion(m, pivot, SOURCE, NEGATIVE, 3.5, skip=0) for m in (model, patched))
    assert torch.equal(plain, with_it)
    other = inversion.sample_inversion(patched, pivot, TARGET, NEGATIVE, 3.5, skip=0)
    without = inversion.sample_inversion(model, pivot, TARGET, NEGATIVE, 3.5, skip=0)
    assert relative_error(other, without) > 1e-2


def test_one_source_serves_a_batch() -> None:
    model = tiny_models.sd1()
    pivot = inverted(model)
    patched = mutual_self_attention(model, pivot, SOURCE, start_step=0.0)
    x = target_latent(pivot, 1, batch=3)
    together = evaluate(patched, pivot, 1, x)
    for index in range(3):
        assert relative_error(together[index : index + 1], evaluate(patched, pivot, 1, x[index : index + 1])) < 1e-5


def test_the_negative_prompt_of_the_source() -> None:
    model = tiny_models.sd1()
    pivot = inverted(model)
    x = target_latent(pivot, 1)
    own, same, other = (
        evaluate(mutual_self_attention(model, pivot, SOURCE, negative, start_step=0.0), pivot, 1, x)
        for negative in (None, NEGATIVE, tiny_models.conditioning(8))
    )
    assert torch.equal(own, same) and relative_error(other, own) > 1e-4


def test_it_begins_at_its_step_and_costs_twice_from_there() -> None:
    model = tiny_models.sd1().clone()
    counts: list[int] = []
    model.set_model_unet_function_wrapper(
        lambda apply, given: (
            counts.append(len(given["cond_or_uncond"])) or apply(given["input"], given["timestep"], **given["c"])
        )
    )
    pivot = inverted(model, steps=10)
    patched = mutual_self_attention(model, pivot, SOURCE, start_step=0.3)
    x = target_latent(pivot, 2)
    assert torch.equal(evaluate(patched, pivot, 2, x), evaluate(model, pivot, 2, x))
    assert not torch.equal(evaluate(patched, pivot, 3, x), evaluate(model, pivot, 3, x))
    counts.clear()
    sampled(patched, pivot)
    assert sum(counts) == 2 * (3 + 2 * 7)


@pytest.mark.parametrize("sampler", ["euler", "ddim", "heun", "dpmpp_2m", "uni_pc"])
def test_stock_samplers_that_stay_on_the_noise_levels_run_it(sampler: str) -> None:
    model = tiny_models.sd1()
    pivot = inverted(model)
    patched = mutual_self_attention(model, pivot, SOURCE)
    assert not torch.equal(sampled(patched, pivot, sampler), sampled(model, pivot, sampler))


def test_noise_levels_between_those_of_the_inversion_are_refused() -> None:
    model = tiny_models.sd1()
    pivot = inverted(model)
    patched = mutual_self_attention(model, pivot, SOURCE)
    with pytest.raises(IdentityEditError, match="which the inversion does not contain"):
        sampled(patched, pivot, "dpm_2")
    with pytest.raises(IdentityEditError, match="sample with the inversion's sigmas"):
        sampled(patched, pivot, sigmas=torch.tensor([10.0, 5.0, 0.0]))


def test_nothing_remains_on_the_model() -> None:
    model = tiny_models.sd1()
    pivot = inverted(model)
    before = sampled(model, pivot)
    options = repr(model.model_options)
    patched = mutual_self_attention(model, pivot, SOURCE)
    first, second = sampled(patched, pivot), sampled(patched, pivot)
    assert torch.equal(first, second) and not torch.equal(first, before)
    assert repr(model.model_options) == options and not model.wrappers.get("predict_noise")
    assert "patches" not in patched.model_options["transformer_options"]
    assert torch.equal(sampled(model, pivot), before)


def test_other_patches_of_the_same_blocks_keep_working() -> None:
    model = tiny_models.sd1()
    pivot = inverted(model)
    layer = last_layer(model)[1]
    key = layer.key
    calls: list[str] = []
    keys: list[torch.Tensor] = []

    def attn1_patch(n: torch.Tensor, context: Any, value: Any, extra: dict[str, Any]) -> Any:
        calls.append("patch")
        return n, n * 1.5, value  # keys of its own, whatever came before

    def attn1_replace(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        calls.append("replace")
        keys.append(k)
        return comfy_attention.optimized_attention(q, k, v, extra["n_heads"])

    busy = model.clone()
    busy.set_model_attn1_patch(attn1_patch)
    busy.set_model_attn1_replace(attn1_replace, key[0], key[1], key[2])
    busy.set_model_attn1_output_patch(lambda n, extra: calls.append("output") or n)
    x = target_latent(pivot, 1)
    evaluate(busy, pivot, 1, x)
    alone = len(calls)
    calls.clear()
    patched = mutual_self_attention(busy, pivot, SOURCE, start_step=0.0)
    watch = Watch(layer.block)
    evaluate(patched, pivot, 1, x)
    watch.close()
    assert len(calls) == 2 * alone and {"patch", "replace", "output"} == set(calls)
    # What is recorded has gone through the other pack's patch, and it is the last word on the target's keys.
    expected = 1.5 * watch.normed[0].double() @ layer.block.attn1.to_k.weight.detach().double().T
    assert relative_error(keys[-1], expected) < 1e-5
    row = pivot.trajectory[1]
    own = {"positive": SOURCE, "guidance_scale": 1.0}
    assert torch.equal(evaluate(patched, pivot, 1, row, **own), evaluate(busy, pivot, 1, row, **own))


def test_guidance_functions_of_other_nodes_do_not_run_for_the_source() -> None:
    model = tiny_models.sd1().clone()
    seen: list[torch.Tensor] = []
    model.set_model_sampler_post_cfg_function(lambda args: seen.append(args["input"]) or args["denoised"])
    pivot = inverted(tiny_models.sd1())
    x = target_latent(pivot, 1)
    evaluate(mutual_self_attention(model, pivot, SOURCE, start_step=0.0), pivot, 1, x)
    assert len(seen) == 1 and torch.equal(seen[0], x)


class CountedControl(comfy.controlnet.ControlBase):
    """A ControlNet that controls nothing, and counts the rows that it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def get_control(self, x_noisy: torch.Tensor, *args: Any) -> None:
        self.batches.append(x_noisy.shape[0])


def test_what_steers_the_target_alone_does_not_reach_the_source() -> None:
    """An area, a mask and a ControlNet of the target: the source is evaluated on the same part, by its prompt."""
    model = tiny_models.sd1()
    pivot = inverted(model)
    area = [[TARGET[0][0], {**TARGET[0][1], "area": (8, 8, 0, 4), "strength": 1.0}]]
    covered = [[TARGET[0][0], {**TARGET[0][1], "mask": torch.ones(1, HEIGHT, WIDTH), "mask_strength": 1.0}]]
    start_layer, layer = last_layer(model)
    patched = mutual_self_attention(model, pivot, SOURCE, start_step=0.0, start_layer=start_layer)
    x = target_latent(pivot, 1, batch=2)
    plain = evaluate(patched, pivot, 1, x)
    assert relative_error(evaluate(patched, pivot, 1, x, positive=covered), plain) < 1e-5
    watch = Watch(layer.block)
    evaluate(patched, pivot, 1, x, positive=area, guidance_scale=1.0)
    watch.close()
    control = CountedControl()
    steered = [[TARGET[0][0], {**TARGET[0][1], "control": control, "control_apply_to_uncond": True}]]
    assert torch.equal(evaluate(patched, pivot, 1, x, positive=steered), plain)
    assert control.batches == [4]  # both sides of the target, and nothing of the source
    source, target = watch.normed
    assert source.shape[:2] == (1, 64) and target.shape[:2] == (2, 64)
    expected = literal_attention(layer.block, target, source.expand(2, -1, -1))
    assert relative_error(watch.attended()[1], expected) < 1e-5


def half_masks() -> tuple[torch.Tensor, torch.Tensor]:
    source, target = torch.zeros(1, HEIGHT, WIDTH), torch.zeros(1, HEIGHT, WIDTH)
    source[:, 1:6, 2:7] = 1.0
    target[:, 3:8, 5:11] = 1.0
    return source, target


def use_attention(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda _, *args, **kwargs: function(*args, **kwargs)


@pytest.mark.parametrize("backend", ["pytorch", "split", "sub_quad", "basic"])
def test_masks_keep_subject_and_background_apart(backend: str) -> None:
    model = tiny_models.sd1().clone()
    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = use_attention(getattr(comfy_attention, f"attention_{backend}"))
    pivot = inverted(model, batch=2)
    source_mask, target_mask = half_masks()
    both = torch.cat([source_mask, source_mask.flip(-1)])  # another one for the second image
    start_layer, layer = last_layer(model)
    patched = mutual_self_attention(
        model, pivot, SOURCE, start_step=0.0, start_layer=start_layer, source_mask=both, target_mask=target_mask
    )
    watch = Watch(layer.block)
    evaluate(patched, pivot, 2, target_latent(pivot, 2, batch=2))
    watch.close()
    source, target = watch.normed
    keys = both.flatten(1).bool().repeat(2, 1)[:, None, None, :]
    # f = f_subject * M + f_background * (1 - M)
    of_subject = literal_attention(layer.block, target, source, keys)
    of_background = literal_attention(layer.block, target, source, ~keys)
    where = target_mask.flatten().double()[None, :, None]
    expected = of_subject * where + of_background * (1 - where)
    assert relative_error(watch.attended()[1], expected) < 1e-5
    assert relative_error(watch.attended()[0], literal_attention(layer.block, source, source)) < 1e-5


def test_masks_of_everything_change_nothing() -> None:
    model = tiny_models.sd1()
    pivot = inverted(model)
    x = target_latent(pivot, 1)
    plain = evaluate(mutual_self_attention(model, pivot, SOURCE, start_step=0.0), pivot, 1, x)
    for source, target in ((1.0, 1.0), (0.0, 0.0), (0.0, 1.0)):  # the last: a subject that the source has nowhere
        masks = {"source_mask": torch.full((1, 64, 96), source), "target_mask": torch.full((1, 64, 96), target)}
        masked = mutual_self_attention(model, pivot, SOURCE, start_step=0.0, **masks)
        assert relative_error(evaluate(masked, pivot, 1, x), plain) < 1e-5
    masks = dict(zip(("source_mask", "target_mask"), half_masks(), strict=True))
    masked = mutual_self_attention(model, pivot, SOURCE, start_step=0.0, **masks)
    assert relative_error(evaluate(masked, pivot, 1, x), plain) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays_finite(dtype: torch.dtype) -> None:
    model = tiny_models.sd1(dtype=dtype)
    pivot = inverted(tiny_models.sd1())
    masks = dict(zip(("source_mask", "target_mask"), half_masks(), strict=True))
    patched = mutual_self_attention(model, pivot, SOURCE, start_step=0.0, **masks)
    assert bool(torch.isfinite(evaluate(patched, pivot, 1, target_latent(pivot, 1))).all())


SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "num_heads": 8, "use_spatial_transformer": True, "context_dim": 768,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "legacy": False,
}  # fmt: skip
SDXL = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4], "num_head_channels": 64, "use_spatial_transformer": True, "context_dim": 2048,
    "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10, "use_linear_in_transformer": True,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "legacy": False,
    "num_classes": "sequential", "adm_in_channels": 2816,
}  # fmt: skip


@pytest.mark.parametrize(("config", "count", "start"), [(SD15, 16, 10), (SDXL, 70, 64)])
def test_automatic_layers_are_those_of_the_reference(config: dict[str, Any], count: int, start: int) -> None:
    network = UNetModel(**config, device="meta", operations=comfy.ops.disable_weight_init)
    every = [layer.key for layer in attention_layers(network)]
    assert len(every) == count
    assert list(mutual.mutual_layers(network)) == every[start:] == list(mutual.mutual_layers(network, start))
    with pytest.raises(ValueError, match=f"0 to {count - 1}"):
        mutual.mutual_layers(network, count)


def test_skipped_layers_are_reported() -> None:
    model = tiny_models.sd1()
    pivot = inverted(model)
    patched = mutual_self_attention(model, pivot, SOURCE, start_step=0.0)
    network = model.model.diffusion_model
    skipped = last_layer(model)[1]
    for module in network.output_blocks[skipped.key[1]]:
        if hasattr(module, "transformer_blocks"):
            module.forward = lambda x, *args, **kwargs: x
    with pytest.raises(IdentityEditError, match="skips them"):
        evaluate(patched, pivot, 1, target_latent(pivot, 1))


def test_bad_inputs_are_refused() -> None:
    model = tiny_models.sd1()
    pivot = inverted(model, batch=2)
    mask = torch.ones(1, HEIGHT, WIDTH)
    with pytest.raises(IdentityEditError, match="Only one of source_mask and target_mask"):
        mutual_self_attention(model, pivot, SOURCE, source_mask=mask)
    with pytest.raises(IdentityEditError, match="exchange is background, which needs a model with joint attention"):
        mutual_self_attention(model, pivot, SOURCE, target_mask=mask, exchange="background")
    with pytest.raises(IdentityEditError, match="start_step is 4"):
        mutual_self_attention(model, pivot, SOURCE, start_step=4)
    with pytest.raises(IdentityEditError, match="start_layer is 99"):
        mutual_self_attention(model, pivot, SOURCE, start_layer=99)
    with pytest.raises(IdentityEditError, match="end_layer is 1, before start_layer 2"):
        mutual_self_attention(model, pivot, SOURCE, start_layer=2, end_layer=1)
    layers = list(mutual.mutual_layers(model.get_model_object("diffusion_model"), 0))
    for start, end in ((0, 2), (1, 1)):
        chosen = mutual.mutual_layers(model.get_model_object("diffusion_model"), start, end)
        assert list(chosen) == layers[start : end + 1]
    with pytest.raises(IdentityEditError, match="another model"):
        mutual_self_attention(tiny_models.sd1(seed=5), pivot, SOURCE)
    with pytest.raises(IdentityEditError, match="one for all, or one for each"):
        mutual_self_attention(model, pivot, tiny_models.conditioning(1, batch=3))
    with pytest.raises(IdentityEditError, match="channels but the model takes"):
        mutual_self_attention(model, pivot, tiny_models.conditioning(1, channels=16))
    with pytest.raises(IdentityEditError, match="source_mask must be a mask"):
        mutual_self_attention(model, pivot, SOURCE, source_mask=torch.ones(1, 3, 8, 8), target_mask=mask)
    patched = mutual_self_attention(model, pivot, SOURCE)
    with pytest.raises(IdentityEditError, match="inverted image's size"):
        sampled(patched, pivot, start=tiny_models.latent(1, 2, 8, 8))
    with pytest.raises(IdentityEditError, match="2 entries for a batch of 3"):
        sampled(patched, pivot, start=tiny_models.latent(1, 3, HEIGHT, WIDTH))
    masked = mutual_self_attention(model, pivot, SOURCE, source_mask=mask.expand(3, -1, -1), target_mask=mask)
    with pytest.raises(IdentityEditError, match="source_mask holds 3 entries"):
        sampled(masked, pivot)
