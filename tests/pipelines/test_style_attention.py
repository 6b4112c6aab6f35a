"""Style attentions on a model: row groups, the schedule of lambda, memory, LoRA and hooks, files, what is refused."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.ldm.modules.attention
import comfy.lora
import comfy.model_management
import comfy.samplers
import comfy.sd
import numpy as np
import pytest
import tiny_models
import tiny_styles
import torch
from identity_edit_pack.attention.style_cross_attention import PARALLEL
from identity_edit_pack.pipelines.engine import run_loop
from identity_edit_pack.pipelines.pidiff import style_attention as styles
from identity_edit_pack.pipelines.pidiff import style_attention_files as files
from identity_edit_pack.pipelines.pidiff.style_attention import apply_style_attention
from identity_edit_pack.pipelines.pidiff.w_plus import WPlus
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.shared.files import write_tensors
from identity_edit_pack.tests.attention.sampling import NEGATIVE, POSITIVE, SIGMAS, sample
from safetensors.torch import save_file

W_PLUS = tiny_styles.w_plus()


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / second.norm())


# -- row groups and the schedule ---------------------------------------------------------------------------------------


def test_row_groups_are_those_of_the_paper_and_settable() -> None:
    paper = ((1, 5), (6, 9), (10, 13), (14, 18))
    assert styles.parse_row_groups(styles.ROW_GROUPS, 18) == paper == styles.proportional_row_groups(18)
    for text in ("1-2,3, 4 - 7", "1\N{EN DASH}2\uff0c3\u30014-7,"):
        assert styles.parse_row_groups(text, 7) == ((1, 2), (3, 3), (4, 7))
    assert styles.written_row_groups(((1, 2), (3, 3), (4, 7))) == "1-2, 3, 4-7"
    for count in range(1, 40):
        written = styles.written_row_groups(styles.proportional_row_groups(count))
        assert len(styles.parse_row_groups(written, count)) == min(count, 4) or count < 8, count
    assert styles.proportional_row_groups(14) == ((1, 4), (5, 7), (8, 10), (11, 14))
    for text in ("", "1-5, 6-9", "1-5, 7-18", "1-18, 18", "5-1, 6-18", "1-19", "a-b", "1-5-18"):
        with pytest.raises(IdentityEditError, match="row_groups is"):
            styles.parse_row_groups(text, 18)
    with pytest.raises(IdentityEditError, match="have 14 rows.*such as '1-4, 5-7, 8-10, 11-14'"):
        styles.parse_row_groups(styles.ROW_GROUPS, 14)


def test_each_token_sees_its_rows_alone() -> None:
    style = tiny_styles.style_attention(tiny_models.sd1())
    tokens, null = styles.style_tokens(style, W_PLUS)
    assert tokens.shape == (1, 4, tiny_models.CONTEXT) and null.shape == tokens.shape
    for index, (first, last) in enumerate(style.row_groups):
        rows = W_PLUS.rows.clone()
        rows[:, first - 1 : last] += 1.0
        changed, _ = styles.style_tokens(style, dataclasses.replace(W_PLUS, rows=rows))
        moved = (changed - tokens).abs().amax(dim=(0, 2)) > 1e-4
        assert moved.tolist() == [place == index for place in range(4)]
    nobody, _ = styles.style_tokens(style, dataclasses.replace(W_PLUS, rows=W_PLUS.average[None]))
    assert torch.allclose(nobody, null)


def test_tokens_are_normalized_projections_of_the_difference_from_the_average() -> None:
    style = tiny_styles.style_attention(tiny_models.sd1())
    tokens, null = styles.style_tokens(style, W_PLUS)
    weights = {name: value.double().numpy() for name, value in style.network.mapping.state_dict().items()}
    for found, rows in ((tokens, W_PLUS.rows[:1]), (null, W_PLUS.average[None])):
        away = (rows.double() - W_PLUS.average.double()).numpy()
        for index, (first, last) in enumerate(style.row_groups):
            token = weights[f"layers.{index}.weight"] @ away[0, first - 1 : last].reshape(-1)
            token = token + weights[f"layers.{index}.bias"]
            expected = (token - token.mean()) / np.sqrt(token.var() + 1e-5)
            expected = expected * weights["normalize.weight"] + weights["normalize.bias"]
            assert np.allclose(found[0, index].double().numpy(), expected, atol=1e-4)


def test_lambda_over_the_steps() -> None:
    sampling = tiny_models.sd1().get_model_object("model_sampling")

    def at(t: int, **options: Any) -> float:
        given = {"strength": 0.4, "start_percent": 0.0, "end_percent": 1.0, "schedule": (), **options}
        return styles.strength_at(sampling, float(sampling.sigmas[t]), **given)

    assert all(at(t) == 0.4 for t in (999, 500, 0))
    # percent p is timestep 999 (1 - p), as ComfyUI has it for conditionings
    half = {"start_percent": 0.0, "end_percent": 0.5}
    assert [at(t, **half) for t in (999, 520, 480, 0)] == [0.4, 0.4, 0.0, 0.0]
    assert [at(t, start_percent=0.5) for t in (999, 520, 480, 0)] == [0.0, 0.0, 0.4, 0.4]
    for t in (999, 700, 333, 0):
        assert at(t, schedule=(0.0, 1.0)) == pytest.approx(0.4 * (999 - t) / 999, abs=1e-6)
        assert at(t, schedule=(2.0,)) == 0.8
    assert at(250, schedule=(1.0, 0.0, 1.0)) == pytest.approx(0.4 * (2 * 749 / 999 - 1), abs=1e-6)
    inside = {"start_percent": 0.2, "end_percent": 0.8, "schedule": (0.0, 1.0)}
    assert at(500, **inside) == pytest.approx(0.2, abs=0.001) and at(900, **inside) == 0.0 == at(100, **inside)
    assert styles.parse_schedule(" ") == () == styles.parse_schedule(",")
    assert styles.parse_schedule("0, 0.5 ,1") == (0.0, 0.5, 1.0)
    for text in ("a", "1:2", "nan", "0, inf"):
        with pytest.raises(IdentityEditError, match="schedule is"):
            styles.parse_schedule(text)


def test_a_range_is_the_plain_model_outside_of_it() -> None:
    """Two runs that meet: styled in the first half, plain afterwards."""
    model, latent = tiny_models.sd1(output_gain=0.1), tiny_models.latent(3)
    sampling = model.get_model_object("model_sampling")
    style = tiny_styles.style_attention(model)
    sigmas = torch.tensor([float(sampling.sigmas[t]) for t in (900, 700, 300, 100)] + [0.0])
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(7))

    def run(patched: Any, start: torch.Tensor, start_latent: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        guider = comfy.samplers.CFGGuider(patched)
        guider.set_conds(POSITIVE, NEGATIVE)
        guider.set_cfg(2.0)
        return guider.sample(start, start_latent, comfy.samplers.sampler_object("euler"), levels, disable_pbar=True)

    partly = run(apply_style_attention(model, style, W_PLUS, strength=1.0, end_percent=0.5), noise, latent, sigmas)
    always = apply_style_attention(model, style, W_PLUS, strength=1.0)
    first = run(always, noise, latent, sigmas[:3])
    second = run(model, torch.zeros_like(noise), first, sigmas[2:])
    assert difference(partly, second) < 1e-5
    assert difference(partly, run(always, noise, latent, sigmas)) > 1e-3


# -- living with a model -----------------------------------------------------------------------------------------------


def test_weights_belong_to_comfyuis_model_management() -> None:
    model = tiny_models.sd1()
    style = tiny_styles.style_attention(model)
    styled = apply_style_attention(model, style, W_PLUS, strength=1.0)
    (patcher,) = styled.get_additional_models()
    assert patcher.model is style.network.attention, "float32 needs no second copy"
    sample(styled, tiny_models.latent(3))
    loaded = [entry.model.model for entry in comfy.model_management.current_loaded_models]
    assert any(module is patcher.model for module in loaded)
    size = sum(parameter.numel() * 4 for parameter in style.network.attention.parameters())
    assert patcher.model_size() == size
    comfy.model_management.unload_all_models()
    assert not any(entry.model.model is patcher.model for entry in comfy.model_management.current_loaded_models)
    assert torch.isfinite(sample(styled, tiny_models.latent(3))).all()


def test_clones_of_clones_keep_it() -> None:
    model, latent = tiny_models.sd1(), tiny_models.latent(3)
    styled = apply_style_attention(model, tiny_styles.style_attention(model), W_PLUS, strength=1.0)
    expected = sample(styled, latent)
    again = styled.clone().clone()
    assert len(again.get_additional_models()) == 1
    assert torch.equal(sample(again, latent), expected)
    # Weights that are not on the device yet (a part of a network that was offloaded) are brought there by the layers.
    assert all(
        hasattr(layer.to_q, "comfy_cast_weights") for layer in again.get_additional_models()[0].model.layers.values()
    )


def lora(model: Any, seed: int = 5) -> dict[str, torch.Tensor]:
    """A LoRA of all cross-attentions, their output projections among them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, weight in model.model.state_dict().items():
        if ".attn2." in key and key.endswith("weight"):
            name = key.removeprefix("diffusion_model.").removesuffix(".weight")
            name = "lora_unet_" + name.replace(".", "_")
            tensors[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=generator) * 0.2
            tensors[f"{name}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=generator) * 0.2
    return tensors


def test_lora_before_and_after_give_the_same() -> None:
    model, latent = tiny_models.sd1(), tiny_models.latent(3)
    style, weights = tiny_styles.style_attention(model), lora(model)
    before, _ = comfy.sd.load_lora_for_models(model, None, weights, 1.0, 1.0)
    assert len(before.patches) > 10
    one = sample(apply_style_attention(before, style, W_PLUS, strength=1.0), latent)
    after, _ = comfy.sd.load_lora_for_models(
        apply_style_attention(model, style, W_PLUS, strength=1.0), None, weights, 1.0, 1.0
    )
    assert difference(sample(after, latent), one) < 1e-5
    # to_out of the model with the LoRA, as eq. 4 has it: the same weights written into a model of their own.
    merged = tiny_models.sd1()
    state = merged.model.state_dict()
    with torch.no_grad():
        for key in before.patches:
            state[key].copy_(comfy.lora.calculate_weight(before.patches[key], state[key].clone(), key))
    assert difference(sample(apply_style_attention(merged, style, W_PLUS, strength=1.0), latent), one) < 1e-4
    assert difference(one, sample(apply_style_attention(model, style, W_PLUS, strength=1.0), latent)) > 1e-3


def test_hooks_of_one_side() -> None:
    """A LoRA as a hook on the positive side alone, beside the style."""
    model, latent = tiny_models.sd1(), tiny_models.latent(3)
    style, weights = tiny_styles.style_attention(model), lora(model)
    styled = apply_style_attention(model, style, W_PLUS, strength=1.0)
    hooks = comfy.hooks.create_hook_lora(lora=weights, strength_model=1.0, strength_clip=0.0)
    positive = comfy.hooks.set_hooks_for_conditioning(POSITIVE, hooks)
    result = sample(styled, latent, positive, cfg=1.0)
    with_lora, _ = comfy.sd.load_lora_for_models(styled, None, weights, 1.0, 0.0)
    assert difference(result, sample(with_lora, latent, cfg=1.0)) < 1e-5
    assert difference(result, sample(styled, latent, cfg=1.0)) > 1e-3
    assert difference(sample(styled, latent), sample(styled, latent)) == 0.0


def test_other_patches_of_the_same_blocks_keep_working() -> None:
    model, latent = tiny_models.sd1(), tiny_models.latent(3)
    style = tiny_styles.style_attention(model)
    called = []

    def patch(n: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        called.append(extra["block"])
        return n * 1.0

    def replace(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        called.append("replaced")
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, extra["n_heads"])

    plain = sample(apply_style_attention(model, style, W_PLUS, strength=1.0), latent)
    other = model.clone()
    other.set_model_attn2_output_patch(patch)
    other.set_model_attn2_replace(replace, "middle", 0)
    styled = apply_style_attention(other, style, W_PLUS, strength=1.0)
    styled.set_model_attn2_output_patch(patch)
    assert difference(sample(styled, latent), plain) < 1e-5
    assert "replaced" in called and ("middle", 0) in called


@pytest.mark.parametrize("kind", ["sequential", PARALLEL])
def test_gradients_pass_through_it(kind: str) -> None:
    """Null-text optimization and the like on a model with a style, in ComfyUI's inference mode."""
    with torch.inference_mode():
        model = tiny_models.sd1()
        styled = apply_style_attention(model, tiny_styles.style_attention(model, kind), W_PLUS, strength=1.0)
        latent = 0.18215 * tiny_models.latent(3)

        def loop(evaluator: Any, x: torch.Tensor) -> torch.Tensor:
            embedding = POSITIVE[0][0].detach().clone().requires_grad_(True)
            result = evaluator.denoised(x, torch.tensor(2.0), embedding=embedding)
            return torch.autograd.grad(result.square().sum(), embedding)[0]

        plain, checkpointed = (
            run_loop(styled, POSITIVE, NEGATIVE, latent, SIGMAS, loop, gradients=True, checkpointing=checkpointing)
            for checkpointing in (False, True)
        )
    assert float(plain.abs().max()) > 0 and difference(checkpointed, plain) < 1e-5


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_file_holds_all_of_it(family: str, tmp_path: Path) -> None:
    model, latent = tiny_models.FAMILIES[family](), tiny_models.latent(3)
    style = tiny_styles.style_attention(model, PARALLEL)
    files.in_file_precision(style.network)
    path = str(tmp_path / "style.safetensors")
    with torch.inference_mode():
        files.save_style_attention(style, path)
        read = files.load_style_attention(path)
    assert styles.described(read) == styles.described(style) and read.model == style.model
    assert (read.training, read.kind, read.row_groups) == (style.training, style.kind, style.row_groups)
    assert all(
        torch.equal(value, style.network.state_dict()[name]) for name, value in read.network.state_dict().items()
    )
    assert torch.equal(
        sample(apply_style_attention(model, read, W_PLUS), latent),
        sample(apply_style_attention(model, style, W_PLUS), latent),
    )
    assert (tmp_path / "style.safetensors").stat().st_size < 2.2 * sum(
        p.numel() for p in style.network.parameters()
    ) + 20000


class Code:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


ADAPTER = {
    "w_proj": {"proj_0.weight": torch.zeros(2, 2), "norm.weight": torch.zeros(2)},
    "wplus_adapter": {"1.to_k_wplus.weight": torch.zeros(2, 2)},
}


def test_wrong_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    style = tiny_styles.style_attention(tiny_models.sd1())
    good = tmp_path / "good.safetensors"
    files.save_style_attention(style, str(good))
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "text.bin").write_text("no tensors")
    write_tensors("other.safetensors", {"a": torch.zeros(1)}, {"kind": "inversion"})
    save_file({"a": torch.zeros(1)}, "unknown.safetensors")
    torch.save({"a": Code()}, "code.bin")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(Code()))
    torch.save(ADAPTER, "wplus_adapter.bin")
    flat = {f"{part}.{name}": tensor for part, state in ADAPTER.items() for name, tensor in state.items()}
    save_file(flat, "wplus_adapter.safetensors")
    torch.save({"image_proj": {}, "ip_adapter": {"1.to_k_ip.weight": torch.zeros(1)}}, "ip-adapter.bin")
    torch.save({"weight": torch.zeros(1)}, "network.pt")
    description = {"kind": files.KIND, "attention": "sequential", "row_groups": [[1, 7]]}
    write_tensors("incomplete.safetensors", dict(style.network.state_dict()), description)
    for name, message in {
        "missing.safetensors": "does not exist",
        "cut.safetensors": "cannot be read",
        "text.safetensors": "cannot be read",
        "text.bin": "contains code|cannot be read",
        "other.safetensors": "contains no style attention",
        "unknown.safetensors": "contains no style attention",
        "code.bin": "contains code, which is never executed",
        "code.pt": "contains code|cannot be read",
        "wplus_adapter.bin": "is a w-plus-adapter",
        "wplus_adapter.safetensors": "is a w-plus-adapter",
        "ip-adapter.bin": "is an IP-Adapter",
        "network.pt": "contains no style attention",
        "incomplete.safetensors": "damaged or from another version",
    }.items():
        with pytest.raises(IdentityEditError, match=message):
            files.load_style_attention(name)
    assert not (tmp_path / "executed").exists()
    with torch.no_grad():
        style.network.mapping.normalize.weight[0] = float("nan")
    with pytest.raises(IdentityEditError, match="NaN or infinite values and was not saved"):
        files.save_style_attention(style, "nan.safetensors")
    assert not (tmp_path / "nan.safetensors").exists()


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_other_models_and_styles_are_refused() -> None:
    model = tiny_models.sd1()
    style = tiny_styles.style_attention(model)
    for other in (tiny_models.sd1(context_dim=48), tiny_models.sdxl()):
        with pytest.raises(IdentityEditError, match="layers for text embeddings of 32 channels, and this model has"):
            apply_style_attention(other, style, W_PLUS)
    assert styles.check_model(style, model) is None
    assert "another checkpoint" in str(styles.check_model(style, tiny_models.sd1(seed=4)))
    with pytest.raises(IdentityEditError, match="9 rows of 6 but the style attention needs 7 of 6"):
        apply_style_attention(model, style, tiny_styles.w_plus(rows=9))
    renamed = WPlus(W_PLUS.rows, W_PLUS.average, "e4e 1234")
    assert "from the encoder e4e 1234" in str(styles.check_styles(style, renamed))
    assert styles.check_styles(style, W_PLUS) is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strength": float("nan")}, "strength is nan"),
        ({"start_percent": 0.7, "end_percent": 0.3}, "start_percent is 0.7 and end_percent 0.3"),
        ({"mask": torch.full((1, 8, 8), float("nan"))}, "mask contains NaN"),
        ({"mask": torch.zeros(1, 3, 8, 8)}, "must be a mask"),
        ({"mask": torch.zeros(0, 8, 8)}, "must be a mask"),
    ],
)
def test_bad_values_are_refused(options: dict[str, Any], message: str) -> None:
    model = tiny_models.sd1()
    with pytest.raises(IdentityEditError, match=message):
        apply_style_attention(model, tiny_styles.style_attention(model), W_PLUS, **options)
