"""What is read of joint attention equals a plain float64 softmax of the queries and keys that the engine's blocks hand
to their attention function, and reading it changes no bit of what is sampled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.ldm.flux.math
import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.samplers
import pytest
import tiny_flow_models
import tiny_models
import torch
from identity_edit_pack.attention import joint

SIGMAS = torch.tensor([1.0, 0.6, 0.0])
TEXT = tiny_models.TOKENS
POSITIVE, NEGATIVE = tiny_models.conditioning(1), tiny_models.conditioning(2)
BLOCKS = {
    "flux": [("double", 0, 0), ("double", 1, 0), ("single", 0, 0), ("single", 1, 0)],
    "sd3": [("double", 0, 0), ("double", 1, 0)],
}


@pytest.fixture(params=list(tiny_flow_models.FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Queries and keys [B, heads, N, d] in float64 of every call of the attention function by a block."""
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def noting(function: Any) -> Any:
        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, *args: Any, **kwargs: Any) -> Any:
            apart = (each if kwargs.get("skip_reshape") else each.unflatten(2, (heads, -1)).transpose(1, 2)
                     for each in (q, k))  # fmt: skip
            calls.append(tuple(each.detach().double() for each in apart))
            return function(q, k, v, heads, *args, **kwargs)

        return attention

    for module in (comfy.ldm.flux.math, comfy.ldm.modules.diffusionmodules.mmdit):
        monkeypatch.setattr(module, "optimized_attention", noting(module.optimized_attention))
    yield calls


def sample(model: Any, latent: torch.Tensor, positive: Any = POSITIVE, cfg: float = 3.0) -> torch.Tensor:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, NEGATIVE)
    guider.set_cfg(cfg)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(7))
    return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), SIGMAS, disable_pbar=True, seed=7)


def reading(model: Any, read: Any, key: str = "test") -> Any:
    def tap(site, attended, value, attend, options):
        read(site, attended, options)
        return attend(attended.query, attended.key, value)

    return joint.with_tap(model, key, tap)


def skipped(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """A block's replacement that does nothing."""
    return {"img": args["img"], "txt": args["txt"]}


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (2, 7, 12)])
def test_probabilities_equal_a_plain_softmax_in_float64(
    family: str, called: list[tuple[torch.Tensor, torch.Tensor]], batch: int, height: int, width: int
) -> None:
    model, latent = tiny_flow_models.FAMILIES[family](), tiny_flow_models.latent(3, batch, height, width)
    expected = sample(model, latent)
    called.clear()
    found = []

    def read(site, attended, options):
        assert attended.grid == site.grid(height, width) == (-(-height // 2), -(-width // 2))
        found.append((site.key, attended.to_text([2, 5]), attended.to_image(), tuple(options["cond_or_uncond"])))

    assert torch.equal(sample(reading(model, read), latent), expected), "reading changed the image"
    cells = -(-height // 2) * -(-width // 2)
    of_blocks = [(q, k) for q, k in called if q.shape[2] == TEXT + cells]
    assert [key for key, *_ in found] == BLOCKS[family] * 2
    assert len(of_blocks) == len(found) and all(set(sides) == {0, 1} for *_, sides in found)
    for (q, k), (_, to_text, to_image, _) in zip(of_blocks, found, strict=True):
        plain = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)[:, TEXT:]
        assert torch.allclose(to_text.flatten(1).double(), plain[..., [2, 5]].sum(-1), atol=1e-5, rtol=0)
        assert torch.allclose(to_image.double(), plain[..., TEXT:], atol=1e-5, rtol=0)
        assert float(plain.std()) > 1e-3, "all alike"


def test_text_stands_where_a_changed_token_changes_the_keys(
    family: str, called: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    model, latent = tiny_flow_models.FAMILIES[family](), tiny_flow_models.latent(3)
    spans = []
    reader = reading(model, lambda site, attended, options: spans.append((attended.text, attended.image)))
    changed = [[POSITIVE[0][0].clone(), POSITIVE[0][1]]]
    changed[0][0][:, 3] += 1.0
    sample(reader, latent, cfg=1.0)
    first = called[0][1]
    called.clear()
    sample(reader, latent, changed, cfg=1.0)
    difference = (called[0][1] - first).abs().sum(dim=(0, 1, 3))
    text, image = spans[0]
    assert all(span == spans[0] for span in spans)
    assert difference.nonzero().flatten().tolist() == [text.start + 3]
    assert (text.stop, image) == (TEXT, slice(TEXT, TEXT + 16))


def test_taps_share_a_model_with_another_owner_of_the_hook(family: str) -> None:
    model, latent = tiny_flow_models.FAMILIES[family](), tiny_flow_models.latent(3)
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
    assert seen.count("first") == seen.count("second") == 2 * len(BLOCKS[family])


def test_a_tap_changes_what_the_block_projects(family: str) -> None:
    model, latent = tiny_flow_models.FAMILIES[family](), tiny_flow_models.latent(3)

    def doubled(site, attended, value, attend, options):
        return 2.0 * attend(attended.query, attended.key, value)

    def by_values(site, attended, value, attend, options):
        return attend(attended.query, attended.key, 2.0 * value)

    twice, values = (sample(joint.with_tap(model, "test", tap), latent) for tap in (doubled, by_values))
    assert tiny_models.relative_error(twice, values) < 1e-4
    assert tiny_models.relative_error(twice, sample(model, latent)) > 1e-3


def test_blocks_that_cannot_be_told_apart_and_other_networks_are_refused() -> None:
    model, latent = tiny_flow_models.sd3(), tiny_flow_models.latent(3)
    skipping = reading(model, lambda *_: None)
    skipping.set_model_patch_replace(skipped, "dit", "double_block", 0)
    with pytest.raises(ValueError, match="2 blocks with joint attention but 1 ran"):
        sample(skipping, latent)
    with pytest.raises(ValueError, match="UNetModel, whose joint attention cannot be read"):
        joint.with_tap(tiny_models.sd1(), "test", lambda *_: None)


def test_a_named_block_keeps_its_key_beside_a_skipped_one() -> None:
    seen = []
    skipping = reading(tiny_flow_models.flux(), lambda site, *_: seen.append(site.key))
    skipping.set_model_patch_replace(skipped, "dit", "double_block", 0)
    sample(skipping, tiny_flow_models.latent(3))
    assert seen == BLOCKS["flux"][1:] * 2
