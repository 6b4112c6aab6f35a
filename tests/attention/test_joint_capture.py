"""What is recorded of joint attention equals a literal float64 computation from the calls of the attention function,
and recording changes no bit of what is sampled."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import comfy.model_base
import comfy.samplers
import pytest
import tiny_flow_models
import tiny_joint_networks
import tiny_models
import torch
from comfy.patcher_extension import WrappersMP
from identity_edit_pack.attention import identity_mask, sites
from identity_edit_pack.attention.joint_capture import capture_joint_attention
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.text.step_embeddings import apply_step_embeddings, constant_embedding
from identity_edit_pack.tests.attention.joint_sampling import POSITIVE, SIGMAS, Call, calls_noted_by, sample
from tiny_joint_networks import CELLS, NETWORKS, TOKENS, Network

IDENTITY = tiny_joint_networks.conditioning(3)
COLUMNS, CONTRAST = (1, 2), (5,)
GRID = (4, 6)


@pytest.fixture(params=list(NETWORKS))
def network(request: pytest.FixtureRequest) -> Network:
    return NETWORKS[request.param]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    return calls_noted_by(monkeypatch)


def record(model: Any, prompt: Any = IDENTITY, contrast: tuple[int, ...] = CONTRAST, **options: Any) -> Any:
    return capture_joint_attention(model, prompt, COLUMNS, contrast, **options)


def model_calls(called: list[Call], network: Network) -> list[list[Call]]:
    """The joint calls of every network call."""
    joint = [call for call in called if call.q.shape[2] == network.length]
    count = len(network.blocks)
    return [joint[first : first + count] for first in range(0, len(joint), count)]


def contrast_map(call: Call, network: Network, rows: slice, columns: tuple[int, ...] = COLUMNS) -> torch.Tensor:
    """[B, 4, 6]: <o_image, o_word> - <o_image, o_contrast>, with mean 0 and standard deviation 1."""
    output = call.output[rows]
    of_image = output[:, network.image : network.image + CELLS]

    def score(tokens: tuple[int, ...]) -> torch.Tensor:
        return sum(torch.einsum("bnc,bc->bn", of_image, output[:, network.text + t]) for t in tokens) / len(tokens)

    difference = score(columns) - score(CONTRAST)
    difference = difference - difference.mean(1, keepdim=True)
    return (difference / difference.std(1, unbiased=False, keepdim=True)).unflatten(1, GRID)


def image_map(call: Call, network: Network, rows: slice) -> torch.Tensor:
    """[B, n, n]: joint softmax, mean over heads, then the text's part removed."""
    image = slice(network.image, network.image + CELLS)
    maps = call.probabilities()[rows, image, image]
    return maps / maps.sum(-1, keepdim=True)


def last(network: Network) -> slice:
    return slice(-max(1, len(network.blocks) // 3), None)


@pytest.mark.parametrize("batch", [1, 2])
def test_means_of_an_identity_prompt_equal_a_literal_computation(
    network: Network, called: list[Call], batch: int
) -> None:
    model, latent = network.model(), network.latent(4, batch)
    expected = sample(model, latent)
    called.clear()
    recording, attention = record(model, by_step=True)
    assert torch.equal(sample(recording, latent), expected), "recording changed the image"
    assert attention.evaluations == 2
    sampled_and_identity = model_calls(called, network)
    assert len(sampled_and_identity) == 4
    read = [call for calls in sampled_and_identity[1::2] for call in calls]
    refining = [call for calls in sampled_and_identity[1::2] for call in calls[last(network)]]
    mean = attention.cross[GRID].total / attention.cross[GRID].weight
    literal = torch.stack([contrast_map(call, network, slice(None)) for call in read]).mean(0)
    assert torch.allclose(mean.double(), literal, atol=1e-4, rtol=0)
    assert attention.self_grid == GRID
    own = torch.stack([image_map(call, network, slice(None)) for call in refining]).mean(0)
    assert torch.allclose(attention.self_attention().double(), own, atol=1e-5, rtol=0)
    assert torch.allclose(identity_mask.rough_mask(attention).double(), literal, atol=1e-4, rtol=0)
    refined = (own @ literal.flatten(1).unsqueeze(-1)).view_as(literal)
    low, high = refined.amin((1, 2), keepdim=True), refined.amax((1, 2), keepdim=True)
    found = identity_mask.identity_map(attention, *GRID, power=1)
    assert torch.allclose(found.double(), (refined - low) / (high - low), atol=1e-3, rtol=0)
    of_step = attention.steps[1].cross[GRID]
    tokens = [torch.stack([contrast_map(call, network, slice(None), (column,)) for call in sampled_and_identity[3]])
              .mean(0) for column in COLUMNS]  # fmt: skip
    assert torch.allclose((of_step.total / of_step.weight).double(), torch.stack(tokens, 1).flatten(0, 1), atol=1e-4)


def test_an_identity_prompt_is_read_as_if_it_were_sampled(network: Network, called: list[Call]) -> None:
    """Pooled outputs and all that goes with a prompt are the identity prompt's own."""
    model, latent = network.model(), network.latent(4)
    recording, attention = record(model)
    sample(recording, latent, sigmas=torch.tensor([1.0, 0.0]))
    alone, of_sampled = record(model, None)
    sample(alone, latent, IDENTITY, sigmas=torch.tensor([1.0, 0.0]))
    assert torch.allclose(attention.cross[GRID].total, of_sampled.cross[GRID].total, atol=1e-4)


@pytest.mark.parametrize("choice", [sites.AUTOMATIC, sites.ALL, sites.FIRST, sites.MIDDLE, sites.LAST])
def test_sampled_prompts_are_read_on_the_positive_side(choice: str, called: list[Call]) -> None:
    """In any order of the sides, without additional model calls; without a contrast, attention probabilities."""
    network = NETWORKS["flux"]
    model, latent = network.model(), network.latent(4, 2)
    chosen = {"first third": [0], "middle third": [1, 2], "last third": [3]}.get(choice, [0, 1, 2, 3])
    sides: list[tuple[int, ...]] = []

    class Reversed(comfy.samplers.CFGGuider):
        """Evaluates [negative, positive], as Dual CFG Guider does."""

        def predict_noise(self, x, timestep, model_options=None, seed=None):
            conds = [self.conds["negative"], self.conds["positive"]]
            negative, positive = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
            return negative + 3.0 * (positive - negative)

    def noting_sides(apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        sides.append(tuple(arguments["cond_or_uncond"]))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    for guider, positive_side in ((comfy.samplers.CFGGuider, 0), (Reversed, 1)):
        for contrast in ((), CONTRAST):
            noted = model.clone()
            noted.set_model_unet_function_wrapper(noting_sides)
            recording, attention = record(noted, None, contrast, layers=choice)
            expected = sample(model, latent, guider_class=guider)
            called.clear()
            sides.clear()
            assert torch.equal(sample(recording, latent, guider_class=guider), expected)
            calls = model_calls(called, network)
            assert len(calls) == attention.evaluations == 2
            literal = []
            for of_call, order in zip(calls, sides, strict=True):
                start = 2 * order.index(positive_side)
                for number in chosen:
                    rows = slice(start, start + 2)
                    if contrast:
                        literal.append(contrast_map(of_call[number], network, rows))
                    else:
                        image = of_call[number].probabilities()[rows, network.image :]
                        literal.append(image[..., list(COLUMNS)].sum(-1).unflatten(1, GRID))
            mean = attention.cross[GRID].total / attention.cross[GRID].weight
            assert torch.allclose(mean.double(), torch.stack(literal).mean(0), atol=1e-4, rtol=0)


def test_prompts_of_other_lengths_run_apart(network: Network) -> None:
    """Joint attention cannot repeat a shorter prompt; the sides and the identity prompt are then calls of their own."""
    model, latent = network.model(), network.latent(4, 2)
    longer, other = tiny_joint_networks.conditioning(5, tokens=11), tiny_joint_networks.conditioning(6, tokens=5)
    recording, attention = capture_joint_attention(model, other, (-1,), (0,))
    assert torch.equal(sample(recording, latent, longer), sample(model, latent, longer))
    assert attention.evaluations == 2 and bool(attention.cross[GRID].total.isfinite().all())


def test_few_steps_are_evaluated(called: list[Call]) -> None:
    network = NETWORKS["sd3"]
    model, latent = network.model(), network.latent(4)
    sigmas = torch.linspace(1, 0, 11)
    seen = []
    recording, attention = record(model)
    recording.add_wrapper_with_key(
        "apply_model", "test", lambda executor, x, t, *args, **kwargs: (seen.append(x.shape[0]), float(t[0]))
        and executor(x, t, *args, **kwargs)
    )  # fmt: skip
    sample(recording, latent, sigmas=sigmas)
    assert attention.evaluations == 4 and attention.step_count == 10
    assert [i for i in range(len(seen)) if seen[i] == 1] == [1, 5, 9, 13], "steps 1, 4, 7, 10"
    recording, attention = record(model, by_step=True)
    sample(recording, latent, sigmas=sigmas)
    assert attention.evaluations == 10 and sorted(attention.steps) == list(range(10))


def test_texts_padded_at_the_start() -> None:
    """Flux.2 gets texts of at least 512 tokens, whose last ones are the prompt's."""
    network = replace(NETWORKS["flux"], make=partial(tiny_flow_models.flux, base=comfy.model_base.Flux2))
    model, latent = network.model(), network.latent(4)
    padded = [[torch.nn.functional.pad(IDENTITY[0][0], (0, 0, 512 - TOKENS, 0)), IDENTITY[0][1]]]
    found = []
    for prompt, columns in ((IDENTITY, COLUMNS), (padded, tuple(512 - TOKENS + column for column in COLUMNS))):
        contrast = tuple(CONTRAST[0] + columns[0] - COLUMNS[0] for _ in CONTRAST)
        recording, attention = capture_joint_attention(model, prompt, columns, contrast)
        sample(recording, latent)
        found.append(attention.cross[GRID].total)
    assert torch.equal(*found) and float(found[0].std()) > 0.1


def test_a_sampled_text_padded_at_the_start() -> None:
    """Its columns are those of the prompt, not of what Flux.2 puts before it."""
    network = replace(NETWORKS["flux"], make=partial(tiny_flow_models.flux, base=comfy.model_base.Flux2))
    model, latent = network.model(), network.latent(4)
    padded = [[torch.nn.functional.pad(POSITIVE[0][0], (0, 0, 512 - TOKENS, 0)), POSITIVE[0][1]]]
    found = []
    for prompt, before in ((POSITIVE, 0), (padded, 512 - TOKENS)):
        columns, contrast = tuple(before + c for c in COLUMNS), tuple(before + c for c in CONTRAST)
        recording, attention = capture_joint_attention(model, None, columns, contrast)
        sample(recording, latent, prompt)
        found.append(attention.cross[GRID].total)
    assert torch.equal(*found) and float(found[0].std()) > 0.1


def test_a_text_of_another_length_for_a_step_is_read_by_its_own_columns() -> None:
    """Qwen-Image; the connected text is longer than that of the steps."""
    network = NETWORKS["qwen"]
    model, latent = network.model(), network.latent(4)
    of_steps, connected = tiny_joint_networks.conditioning(3, tokens=7), tiny_joint_networks.conditioning(5, tokens=12)
    found = []
    for prompt in (of_steps, connected):
        tabled = apply_step_embeddings(model, constant_embedding(SIGMAS, of_steps[0][0]), "positive")
        recording, attention = capture_joint_attention(tabled, None, COLUMNS, CONTRAST)
        sample(recording, latent, prompt)
        found.append(attention.cross[GRID].total)
    assert torch.equal(*found)


def test_image_maps_are_never_larger_than_32_by_32() -> None:
    network = NETWORKS["flux"]
    recording, attention = record(network.model(), None)
    sample(recording, network.latent(4, height=90, width=70), sigmas=torch.tensor([1.0, 0.0]), cfg=1.0)
    assert set(attention.cross) == {(45, 35)} and attention.self_grid == (23, 18)
    rows = attention.self_attention()
    assert rows.shape == (1, 23 * 18, 23 * 18)
    assert torch.allclose(rows.sum(-1), torch.ones(1, 23 * 18), atol=1e-5)


def test_areas_are_parts_of_the_grid() -> None:
    network = NETWORKS["flux"]
    left = [[POSITIVE[0][0], {**POSITIVE[0][1], "area": (8, 6, 0, 0)}]]
    recording, attention = record(network.model(), None, ())
    sample(recording, network.latent(4, height=8, width=12), [*left, *POSITIVE])
    weight = attention.cross[GRID].weight[0]
    assert bool((weight[:, :3] == 2 * weight[:, 3:]).all()), "both conditionings on the left half"


def test_an_identity_prompt_is_read_in_the_whole_image() -> None:
    """Whatever the areas of the sampled prompt, for which ComfyUI adds entries to every other prompt."""
    network = NETWORKS["flux"]
    part = [[POSITIVE[0][0], {**POSITIVE[0][1], "area": (5, 3, 1, 2)}]]
    recording, attention = record(network.model())
    sample(recording, network.latent(4), [*part, *POSITIVE])
    assert set(attention.cross) == {GRID}
    assert len(attention.cross[GRID].weight.unique()) == 1


def test_blocks_are_counted_only_in_the_call_that_is_read() -> None:
    """Skip Layer Guidance evaluates the sampled prompt once more without some blocks."""
    from comfy_extras import nodes_sd3

    network = NETWORKS["sd3"]
    model = nodes_sd3.SkipLayerGuidanceSD3.execute(network.model(), "0", 3.0, 0.0, 1.0)
    recording, attention = record(getattr(model, "args", model)[0])
    sample(recording, network.latent(4))
    assert attention.evaluations == len(SIGMAS) - 1


def test_an_identity_prompt_sees_what_the_sampled_prompt_does() -> None:
    """Kontext's reference images and Flux's guidance."""
    network = NETWORKS["flux"]
    given = {"reference_latents": [network.latent(5)], "guidance": 1.5}
    positive = [[POSITIVE[0][0], {**POSITIVE[0][1], **given}]]
    recording, attention = record(network.model())
    seen: list[tuple[bool, float]] = []

    def apply_model(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((kwargs.get("ref_latents") is not None, float(kwargs["guidance"].max())))
        return executor(*args, **kwargs)

    recording.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", apply_model)
    sample(recording, network.latent(4), positive, cfg=1.0)
    assert attention.evaluations == len(SIGMAS) - 1 and set(seen) == {(True, 1.5)}


def test_what_cannot_be_recorded_is_refused() -> None:
    network = NETWORKS["flux"]
    model, latent = network.model(), network.latent(4, 3)
    refused = [
        (lambda: record(model, layers="4"), "layers is '4' but all 4 blocks of this model have the same grid"),
        (lambda: capture_joint_attention(model, IDENTITY, (), CONTRAST), "identity tokens"),
        (lambda: capture_joint_attention(model, IDENTITY, COLUMNS, (TOKENS,)), "identity tokens"),
        (lambda: record(tiny_models.sd1()), "UNetModel, whose joint attention cannot be read"),
        (
            lambda: sample(record(model, tiny_joint_networks.conditioning(3, 2))[0], latent),
            "has 2 embeddings for a batch of 3",
        ),
        (
            lambda: sample(capture_joint_attention(model, None, (TOKENS,))[0], latent),
            "among the 8 tokens of the prompt",
        ),
    ]
    for call, words in refused:
        with pytest.raises(IdentityEditError, match=words):
            call()
    assert len(SIGMAS) == 3
