"""The gradient context: right gradients under every backend, with patches of others, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention as attention
import pytest
import tiny_models
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine.gradient_context import gradient_context
from identity_edit_pack.pipelines.shared import gradients
from identity_edit_pack.pipelines.shared.conditioning import coverage_warning
from identity_edit_pack.pipelines.shared.errors import IdentityEditError

BACKENDS = ["attention_pytorch", "attention_split", "attention_sub_quad", "attention_basic"]


def gradient_of_embedding(patcher: Any, checkpointing: bool = False, embedding: torch.Tensor | None = None):
    """Gradient of a fixed linear functional of the denoised latent with respect to the negative embedding."""
    positive, negative = tiny_models.conditioning(1), tiny_models.conditioning(2)
    direction = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))

    def loop(evaluator: engine.NetworkEvaluator, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        start = negative[0][0] if embedding is None else embedding
        variable = start.clone().requires_grad_(True)
        denoised = evaluator.denoised(latent, torch.tensor(2.0), "negative", variable)
        (gradient,) = torch.autograd.grad((denoised * direction.clone()).sum(), variable)
        return gradient, denoised.detach()

    return engine.run_loop(
        patcher, positive, negative, 0.18215 * tiny_models.latent(3), torch.tensor([2.0, 0.0]), loop, gradients=True,
        checkpointing=checkpointing,
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """The gradient by plain autograd through the UNet alone, without any of ComfyUI's sampling."""
    patcher = tiny_models.sd1()
    variable = tiny_models.conditioning(2)[0][0].clone().requires_grad_(True)
    x = tiny_models.latent(3) * 0.18215
    sampling = patcher.model.model_sampling
    sigma = torch.tensor([2.0])
    out = patcher.model.diffusion_model(
        x / (sigma**2 + 1) ** 0.5, sampling.timestep(sigma).float(), context=variable, transformer_options={}
    )
    direction = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    (gradient,) = torch.autograd.grad(((x - sigma * out) * direction).sum(), variable)
    return gradient


def close(ours: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return float((ours - other).norm()) < tolerance * float(other.norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_gradient_with_every_backend(
    monkeypatch: pytest.MonkeyPatch, expected: torch.Tensor, backend: str, checkpointing: bool, inference_mode: bool
):
    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, name, getattr(attention, backend))
    with torch.inference_mode(inference_mode):  # execution.py runs every prompt in it, loading the checkpoint included
        gradient, denoised = gradient_of_embedding(tiny_models.sd1(), checkpointing)
    assert close(gradient, expected)
    assert not denoised.requires_grad


def test_the_context_alone_leaves_inference_mode(expected: torch.Tensor):
    """As trainings use it, without a sampling loop around it."""
    with torch.inference_mode():
        patcher = tiny_models.sd1()
        with gradient_context([patcher]):
            variable = tiny_models.conditioning(2)[0][0].clone().requires_grad_(True)
            x = tiny_models.latent(3) * 0.18215
            denoised = patcher.model.apply_model(x, torch.tensor([2.0]), c_crossattn=variable, transformer_options={})
            direction = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
            (gradient,) = torch.autograd.grad((denoised * direction).sum(), variable)
        assert torch.is_inference_mode_enabled()
    assert close(gradient, expected)


@pytest.mark.parametrize("family", ["sd1", "sd2_v", "sdxl"])
def test_gradient_against_differences(family: str):
    with torch.inference_mode():
        patcher = tiny_models.FAMILIES[family]()
        start = tiny_models.conditioning(2)[0][0]
        gradient, _ = gradient_of_embedding(patcher)
        step = 1e-2 * torch.randn(start.shape, generator=torch.Generator().manual_seed(4))
        direction = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
        up, down = (gradient_of_embedding(patcher, embedding=start + sign * step)[1] for sign in (1, -1))
    difference = float(((up - down) * direction).sum()) / 2
    assert abs(difference - float((gradient * step).sum())) < 0.02 * abs(difference)


class NoBackward(torch.autograd.Function):
    """A custom operator without a backward pass, as torch.library makes them."""

    @staticmethod
    def forward(ctx, out, *inputs):
        return out.clone()

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("no derivative")


@attention.wrap_attn
def loses_the_gradient(q, k, v, heads, *args, **kwargs):
    return attention.attention_pytorch(q.detach(), k.detach(), v.detach(), heads, *args, **kwargs)


@attention.wrap_attn
def raises_in_the_backward_pass(q, k, v, heads, *args, **kwargs):
    return NoBackward.apply(attention.attention_pytorch(q, k, v, heads, *args, **kwargs).detach(), q, k, v)


@attention.wrap_attn
def gives_a_part_of_the_gradient(q, k, v, heads, *args, **kwargs):
    """As kernels do that quantize the queries and keys: the result requires a gradient, and it is wrong."""
    return attention.attention_pytorch(q.detach(), k.detach(), v, heads, *args, **kwargs)


WITHOUT_THE_GRADIENT = [loses_the_gradient, raises_in_the_backward_pass, gives_a_part_of_the_gradient]


@pytest.mark.parametrize("function", WITHOUT_THE_GRADIENT)
def test_global_attention_functions_give_way_to_pytorchs(
    monkeypatch: pytest.MonkeyPatch, expected: torch.Tensor, function: Any
):
    for slot in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, slot, function)
    assert close(gradient_of_embedding(tiny_models.sd1())[0], expected)


@pytest.mark.parametrize("function", WITHOUT_THE_GRADIENT)
def test_attention_overrides_of_other_nodes_give_way_to_pytorchs(expected: torch.Tensor, function: Any):
    calls: list[bool] = []

    def override(_: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return function(*args, **kwargs)

    patched = tiny_models.sd1().clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    assert close(gradient_of_embedding(patched)[0], expected)
    assert calls, "where no gradient is needed the override has its place"


def test_there_is_a_gradient_when_memory_is_short(monkeypatch: pytest.MonkeyPatch, expected: torch.Tensor):
    """Then ComfyUI's sub-quadratic attention divides its work and computes in place."""
    for slot in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, slot, attention.attention_sub_quad)
    monkeypatch.setattr(attention.model_management, "get_free_memory", lambda *a, **k: (1, 1) if k or a[1:] else 1)
    gradient, _ = gradient_of_embedding(tiny_models.sd1())
    assert close(gradient, expected)


def test_attention_patches_see_which_side_is_evaluated():
    """ComfyUI numbers the conditional side 0 and the unconditional 1; patches for one of them rely on it."""
    seen: list[list[int]] = []

    def look(n, extra):
        seen.append(extra["cond_or_uncond"])
        return n

    patcher = tiny_models.sd1().clone()
    patcher.set_model_attn2_output_patch(look)

    def loop(evaluator: engine.NetworkEvaluator, latent: torch.Tensor) -> int:
        evaluator.denoised(latent, torch.tensor(2.0), "positive")
        positive = len(seen)
        evaluator.denoised(latent, torch.tensor(2.0), "negative")
        return positive

    sides = tiny_models.conditioning(1), tiny_models.conditioning(2)
    positive = engine.run_loop(patcher, *sides, 0.18215 * tiny_models.latent(3), torch.tensor([2.0, 0.0]), loop)
    assert seen[:positive] == [[0]] * positive and seen[positive:] == [[1]] * positive


def test_checkpointing_with_a_patch_that_reads_its_block():
    """The UNet overwrites the position in its options; a recomputation that reads it late has wrong gradients."""

    def by_block(n, context, value, extra):
        strength = 0.1 * (extra["block"][1] + 1) + (0.5 if extra["block"][0] == "output" else 0.0)
        return n, context * (1 + strength), value * (1 + extra["transformer_index"])

    with torch.inference_mode():
        patcher = tiny_models.sd1().clone()
        patcher.set_model_attn2_patch(by_block)
        plain, _ = gradient_of_embedding(patcher)
        recomputed, _ = gradient_of_embedding(patcher, checkpointing=True)
        unpatched, _ = gradient_of_embedding(tiny_models.sd1())
    assert close(recomputed, plain, 1e-5) and not close(unpatched, plain, 0.05)


def test_checkpointing_recomputes():
    runs: list[int] = []
    patcher = tiny_models.sd1()
    last = [module for module in patcher.model.modules() if isinstance(module, ResBlock)][-1]
    last.in_layers.register_forward_hook(lambda *_: runs.append(1))
    gradient_of_embedding(patcher, checkpointing=False)
    assert len(runs) == 1
    gradient_of_embedding(patcher, checkpointing=True)
    assert len(runs) == 1 + 2


@pytest.mark.parametrize("kind", ["lora", "wrapper"])
def test_weight_patches_of_other_nodes_take_part(kind: str):
    """Against a model whose weights were changed by hand."""
    keys = [f"diffusion_model.{name}.attn2.to_k.weight" for name in (
        "middle_block.1.transformer_blocks.0", "output_blocks.2.1.transformer_blocks.0",
    )]  # fmt: skip
    with torch.inference_mode():
        torch.manual_seed(0)
        patcher, by_hand = tiny_models.sd1().clone(), tiny_models.sd1()
        state = by_hand.model.state_dict()
        for key in keys:
            rows, columns = state[key].shape
            up, down = torch.randn(rows, 2), torch.randn(2, columns)
            state[key].add_(0.5 * up @ down)
            if kind == "lora":
                patch = {key: ("diff", (up @ down,))}
                patcher.add_patches(patch, strength_patch=0.5)
            else:
                patcher.add_weight_wrapper(key, lambda weight, up=up, down=down: weight + 0.5 * up @ down)
        ours, _ = gradient_of_embedding(patcher)
        theirs, _ = gradient_of_embedding(by_hand)
        unpatched, _ = gradient_of_embedding(tiny_models.sd1())
    assert close(ours, theirs) and not close(unpatched, theirs, 0.01)


def test_a_network_inside_a_patch_takes_part():
    """Adapters keep their layers in a patch function, made in inference mode and requiring gradients."""
    with torch.inference_mode():
        layer = torch.nn.Linear(32, 32)

        def adapter(n, context, value, extra):
            return n, layer(context), layer(value)

        patcher = tiny_models.sd1().clone()
        patcher.set_model_attn2_patch(adapter)
        before = layer.weight
        gradient, _ = gradient_of_embedding(patcher)
        assert layer.weight is before and layer.weight.requires_grad
    assert bool(torch.isfinite(gradient).all()) and float(gradient.norm()) > 0


def test_everything_is_put_back():
    with torch.inference_mode():
        patcher = tiny_models.sd1()
        tensors = {**dict(patcher.model.named_parameters()), **dict(patcher.model.named_buffers())}
        wanted = {name: value.requires_grad for name, value in tensors.items()}
        options = repr(patcher.model_options)
        gradient_of_embedding(patcher, checkpointing=True)
        after = {**dict(patcher.model.named_parameters()), **dict(patcher.model.named_buffers())}
        assert all(after[name] is value for name, value in tensors.items())
        assert {name: value.requires_grad for name, value in after.items()} == wanted
        assert repr(patcher.model_options) == options and not patcher.get_all_wrappers("apply_model")
        assert not any("forward" in vars(module) for module in patcher.model.modules())
    plain = tiny_models.sd1()
    plain.model.requires_grad_(True)
    gradient_of_embedding(plain)
    assert all(parameter.requires_grad for parameter in plain.model.parameters())


def test_nothing_is_copied():
    with torch.inference_mode():
        module = torch.nn.Linear(3, 3)
        address = module.weight.data_ptr()
        with torch.inference_mode(False), gradients.plain_frozen_tensors([module]):
            assert module.weight.data_ptr() == address and not module.weight.requires_grad
            x = torch.ones(1, 3, requires_grad=True)
            module(x).sum().backward()
        assert torch.equal(x.grad[0], module.weight.sum(0))


def test_no_gradient_reaches_the_weights():
    patcher = tiny_models.sd1()
    gradient_of_embedding(patcher)
    assert all(parameter.grad is None for parameter in patcher.model.parameters())


def test_scaled_gradients_are_exact_and_survive_half_precision():
    """A loss gradient of 1e-9 vanishes in float16, where the smallest number is 6e-8."""
    weight = 0.5 + torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    variables = [torch.randn(1, 4, 2, 2, requires_grad=True) for _ in range(2)]
    for half in (False, True):
        stacked = torch.cat(variables)
        if half:
            output = torch.einsum("oc,bchw->bohw", weight.half(), stacked.half()).float()
        else:
            output = torch.einsum("oc,bchw->bohw", weight, stacked)
        loss = 1e-9 * output[:1].sum() + 1e-3 * output[1:].sum()
        first, second = gradients.gradients_by_sample(loss, output, variables)
        expected = weight.sum(0).reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
        tolerance = 5e-3 if half else 1e-6
        torch.testing.assert_close(first, 1e-9 * expected, rtol=tolerance, atol=1e-12 * tolerance)
        torch.testing.assert_close(second, 1e-3 * expected, rtol=tolerance, atol=1e-5 * tolerance)


def test_a_device_without_memory_is_said_with_what_helps(monkeypatch: pytest.MonkeyPatch):
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    patcher = tiny_models.sd1()
    patcher.set_model_attn2_patch(full)
    before = {key: value.clone() for key, value in patcher.model.state_dict().items()}
    with pytest.raises(IdentityEditError, match="checkpointing.*smaller image or batch"):
        gradient_of_embedding(patcher)
    assert all(torch.equal(value, before[key]) for key, value in patcher.model.state_dict().items())


@pytest.mark.parametrize("node", ["EasyCacheNode", "LazyCacheNode"])
def test_caches_of_steps_are_left_out_and_the_log_says_so(node: str, caplog: pytest.LogCaptureFixture):
    from comfy_extras import nodes_easycache
    from identity_edit_pack.pipelines.inversion.inversion import invert_image

    plain = tiny_models.sd1(output_gain=0.05)
    cached = getattr(nodes_easycache, node).execute(plain, 0.5, 0.0, 1.0, False).args[0]
    sides = tiny_models.latent(3), tiny_models.conditioning(1)
    expected = invert_image(plain, *sides, steps=6).trajectory
    # ComfyUI's own warning of a model that an earlier test has left is not this run's.
    assert not [message for message in caplog.messages if "memory leak with model" not in message]
    assert torch.equal(invert_image(cached, *sides, steps=6).trajectory, expected)
    assert "cache is disabled here" in caplog.text
    assert "easycache" in cached.model_options["transformer_options"], "the given model keeps it"


class TeaCache:
    """In the form of caches that are a function around the model, whose state outlives a run."""

    def apply_teacache(self, model: Any) -> Any:
        model, kept = model.clone(), []

        def around(apply: Any, call: dict[str, Any]) -> torch.Tensor:
            if not kept:
                kept.append(apply(call["input"], call["timestep"], **call["c"]))
            return kept[0]

        model.set_model_unet_function_wrapper(around)
        return model


def halved(apply: Any, call: dict[str, Any]) -> torch.Tensor:
    return 0.5 * apply(call["input"], call["timestep"], **call["c"])


def test_caches_around_the_model_are_left_out_too(caplog: pytest.LogCaptureFixture):
    from identity_edit_pack.pipelines.inversion.inversion import invert_image

    plain = tiny_models.sd1(output_gain=0.05)
    cached = TeaCache().apply_teacache(plain)
    sides = tiny_models.latent(3), tiny_models.conditioning(1)
    assert torch.equal(
        invert_image(cached, *sides, steps=6).trajectory, invert_image(plain, *sides, steps=6).trajectory
    )
    assert "TeaCache.apply_teacache is disabled here" in caplog.text
    other = plain.clone()
    other.set_model_unet_function_wrapper(halved)
    changed = invert_image(other, *sides, steps=6).trajectory
    assert not torch.equal(changed, invert_image(plain, *sides, steps=6).trajectory), "other wrappers stay"


@pytest.mark.parametrize(
    ("options", "is_partial"),
    [
        ([{}], False),
        ([{"start_percent": 0.2}], True),
        ([{"end_percent": 0.5}, {"start_percent": 0.5}], False),
        ([{"end_percent": 0.4}, {"start_percent": 0.5}], True),
        ([{"area": (8, 4, 0, 0)}], True),
        ([{"area": (8, 4, 0, 0)}, {"area": ("percentage", 1.0, 0.5, 0.0, 0.5)}], False),
        ([{"mask": torch.zeros(1, 64, 64)}], True),
        ([{"mask": torch.ones(1, 64, 64)}], False),
        ([{"mask": torch.zeros(1, 64, 64)}, {}], False),
        ([{"mask": torch.ones(64, 64), "area": (8, 4, 0, 0)}], True),
    ],
)
def test_a_prompt_for_a_part_is_noticed(options: list[dict[str, Any]], is_partial: bool):
    embedding = tiny_models.conditioning(1)[0][0]
    said = coverage_warning([[embedding, each] for each in options], torch.zeros(1, 4, 8, 8))
    assert (said is not None) == is_partial


def test_gradients_that_are_not_numbers_are_refused():
    variable = torch.zeros(1, 1, 1, 1, requires_grad=True)
    output = variable.sqrt()
    with pytest.raises(IdentityEditError, match="NaN or infinite"):
        gradients.gradients_by_sample(output.sum(), output, [variable])


def test_a_patch_that_writes_in_place_has_the_gradient_of_one_that_does_not() -> None:
    def in_place(hidden: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        half = hidden.shape[1] // 2
        hidden[:, :half] = hidden[:, :half] * hidden.mean(1, keepdim=True)
        return hidden

    def elsewhere(hidden: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        half = hidden.shape[1] // 2
        return torch.cat([hidden[:, :half] * hidden.mean(1, keepdim=True), hidden[:, half:]], dim=1)

    def gradient(patch: Callable[..., torch.Tensor]) -> torch.Tensor:
        options = {"transformer_options": {"patches": {"output_block_patch": [patch], "others": ["no function"]}}}
        (safe,) = gradients.autograd_safe_options(options)["transformer_options"]["patches"]["output_block_patch"]
        x = torch.linspace(-1, 1, 12).reshape(2, 6).requires_grad_(True)
        hidden = x.exp()  # its own backward pass needs its result as it was
        (found,) = torch.autograd.grad(safe(hidden, options).square().sum(), x)
        return found

    assert torch.allclose(gradient(in_place), gradient(elsewhere))
