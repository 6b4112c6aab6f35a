"""Prompt-to-Prompt and Mutual Self-Attention on flow models, against loops that evaluate source and target by hand."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import pytest
import tiny_flow_models
import tiny_models
import tiny_text_encoders
import torch
from comfy.patcher_extension import WrappersMP
from identity_edit_pack.attention.joint import joint_sites
from identity_edit_pack.attention.joint_exchange import JointControl, JointMutualAttention
from identity_edit_pack.attention.sites import Attended
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.attention_control.mutual_self_attention import (
    BACKGROUND,
    IMAGE,
    mutual_self_attention,
)
from identity_edit_pack.pipelines.attention_control.prompt_to_prompt import ControlSettings, encode, prompt_to_prompt
from identity_edit_pack.pipelines.inversion.inversion import Inversion, invert_image
from identity_edit_pack.pipelines.lipe.identity_mask_blend import identity_mask_blend
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from tiny_models import relative_error

SIGMAS = torch.tensor([1.0, 0.8, 0.6, 0.3, 0.0])
SOURCE, TARGET = "a cat on the grass", "a black dog on the grass"
STEPS = 4


class Clip:
    """Tiny CLIP of one encoder with a pooled output as wide as the flow models take, and as many tokens as the prompt
    has, like the demo world's flow model: the prompts differ in length."""

    def __init__(self) -> None:
        self._clip = tiny_text_encoders.clip("sd1")
        self.tokenizer, self.tokenize = self._clip.tokenizer, self._clip.tokenize

    def encode_from_tokens_scheduled(self, tokens: Any) -> Any:
        embedding, options = self._clip.encode_from_tokens_scheduled(tokens)[0]
        length = [token for token, _ in tokens["l"][0]].index(49407) + 1
        pooled = options["pooled_output"][:, : tiny_models.POOLED]
        return [[embedding[:, :length], {**options, "pooled_output": pooled}]]


CLIP = Clip()


@pytest.fixture(scope="module", params=tiny_flow_models.JOINT)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_flow_models.JOINT[request.param](output_gain=0.2)


NEGATIVE = tiny_models.conditioning(3)


def empty(model: Any, batch: int, height: int = 8, width: int = 8) -> torch.Tensor:
    """An empty latent with the model's channels and frames."""
    of_model = tiny_flow_models.latent_for(model, 1)
    return torch.zeros(batch, *of_model.shape[1:-2], height, width)


def noise_of(latent: torch.Tensor) -> torch.Tensor:
    return torch.randn(latent.shape, generator=torch.Generator().manual_seed(7))


def guided(model: Any, positive: Any, kind: Any = comfy.samplers.CFGGuider) -> Any:
    guider = kind(model)
    guider.inner_set_conds({"positive": positive, "negative": NEGATIVE})
    guider.set_cfg(3.0)
    return guider


def sample(guider: Any, noise: torch.Tensor, latent: torch.Tensor, sigmas: torch.Tensor = SIGMAS) -> torch.Tensor:
    euler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, latent, euler, sigmas, disable_pbar=True, seed=7)


class ByHand(comfy.samplers.CFGGuider):
    """Evaluates the source at its own latents, then the target with the exchange, in the first steps."""

    source_prompt: Any
    source_latents: list[torch.Tensor]
    exchange: Any
    steps: range

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        step = self.step = getattr(self, "step", -1) + 1
        if step not in self.steps:
            return super().predict_noise(x, timestep, model_options, seed)
        own, exchange = self.conds, self.exchange(self.conds)
        sources = [{**self.conds["source"][0], "uuid": entry["uuid"]} for entry in own["positive"]]
        self.conds = {**own, "positive": sources}
        super().predict_noise(self.source_latents[step].to(x), timestep, exchange.recording(model_options))
        self.conds = own
        return super().predict_noise(x, timestep, exchange.injecting(model_options))


def by_hand(model: Any, latents: list[torch.Tensor], target: Any, exchange: Any, steps: range) -> ByHand:
    guider = guided(model, target, ByHand)
    guider.inner_set_conds({"positive": target, "negative": NEGATIVE, "source": encode(CLIP, SOURCE)})
    guider.source_latents, guider.exchange, guider.steps = latents, exchange, steps
    return guider


def test_the_target_takes_queries_and_keys_of_a_generated_source(model: Any) -> None:
    latent = empty(model, 2)
    noise = noise_of(latent)
    settings = ControlSettings(self_replace_steps=0.5)
    controlled, target = prompt_to_prompt(model, CLIP, SOURCE, TARGET, "replace", settings=settings)
    both = sample(guided(controlled, target), noise, latent)
    plain = [sample(guided(model, encode(CLIP, prompt)), noise, latent) for prompt in (SOURCE, TARGET)]
    assert torch.equal(both[:2], plain[0]), "the source changed"
    path: list[torch.Tensor] = []
    source = guided(model, encode(CLIP, SOURCE))
    euler = comfy.samplers.sampler_object("euler")
    source.sample(noise, latent, euler, SIGMAS, callback=lambda i, d, x, n: path.append(x.clone()),
                  disable_pbar=True, seed=7)  # fmt: skip
    network = model.model.diffusion_model
    sites = {site.key: site for site in joint_sites(network)}

    def exchange(conds: Any) -> JointControl:
        return JointControl(network, sites, {entry["uuid"]: entry for entry in conds["positive"]}, 8, 8)

    expected = sample(by_hand(model, path, target, exchange, range(2)), noise, latent)
    assert relative_error(both[2:], expected) < 1e-5
    assert relative_error(plain[1], expected) > 3e-5
    free, target = prompt_to_prompt(model, CLIP, SOURCE, TARGET, settings=ControlSettings(self_replace_steps=0.0))
    assert torch.equal(sample(guided(free, target), noise, latent), torch.cat(plain))


@pytest.fixture(scope="module")
def pivot(model: Any) -> Inversion:
    return invert_image(model, tiny_flow_models.latent_for(model, 4, 2), encode(CLIP, SOURCE), steps=STEPS)


def from_inversion(model: Any, pivot: Inversion, positive: Any) -> torch.Tensor:
    """Sampling on from the inversion's noise, whose level is 1."""
    start = pivot.trajectory[0] / pivot.noise_path.scale(pivot.sigmas[0])
    return sample(guided(model, positive), start, torch.zeros_like(start), pivot.sigmas)


def test_the_target_takes_queries_and_keys_of_an_inverted_source(model: Any, pivot: Inversion) -> None:
    settings = ControlSettings(self_replace_steps=0.5)
    controlled, target = prompt_to_prompt(model, CLIP, SOURCE, TARGET, settings=settings, inversion=pivot)
    found = from_inversion(controlled, pivot, target)
    network = model.model.diffusion_model
    sites = {site.key: site for site in joint_sites(network)}

    def exchange(conds: Any) -> JointControl:
        return JointControl(network, sites, {entry["uuid"]: entry for entry in conds["positive"]}, 8, 8)

    guider = by_hand(model, list(pivot.trajectory), target, exchange, range(2))
    start = pivot.trajectory[0] / pivot.noise_path.scale(pivot.sigmas[0])
    expected = sample(guider, start, torch.zeros_like(start), pivot.sigmas)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(found, from_inversion(model, pivot, target)) > 1e-3


def test_the_image_changes_only_where_it_attends_to_the_words(model: Any) -> None:
    latent = empty(model, 1, 32, 24)
    noise = noise_of(latent)
    settings = ControlSettings(self_replace_steps=0.25, blend_threshold=0.97, blend_start=0.0)
    controlled, target = prompt_to_prompt(model, CLIP, SOURCE, TARGET, "refine", None, "cat, dog", settings)
    source, edited = sample(guided(controlled, target), noise, latent).chunk(2)
    changed = ((edited - source).abs() > 1e-4).any(dim=1)
    assert 0 < float(changed.float().mean()) < 1
    assert torch.equal(source, sample(guided(model, encode(CLIP, SOURCE)), noise, latent))


def test_the_local_blend_reads_its_words_beside_appended_tokens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of Flux Redux."""
    read: list[list[list[int]]] = []
    to_text = Attended.to_text
    monkeypatch.setattr(Attended, "to_text", lambda own, columns: (read[-1].append(columns), to_text(own, columns))[1])
    latent = empty(model, 1)
    for appended in (0, 5):
        read.append([])
        controlled, ((embedding, options),) = prompt_to_prompt(model, CLIP, SOURCE, TARGET, blend_words="dog")
        longer = torch.cat([embedding, torch.ones_like(embedding[:, :appended])], dim=1)
        sample(guided(controlled, [[longer, options]]), noise_of(latent), latent)
    pads = min(min(columns) for columns in read[0]) >= embedding.shape[1]  # Flux.2, at the start
    assert len(read[0]) > 0
    assert read[1] == [[column - appended * pads for column in columns] for columns in read[0]]


@pytest.mark.parametrize("technique", ["prompt-to-prompt", "mutual self-attention"])
def test_skip_layer_guidance_is_left_alone(model: Any, pivot: Inversion, technique: str) -> None:
    """It evaluates the network once more without some blocks, whose number says nothing then."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    images = []
    for scale in (None, 0.0, 3.0):
        given = model
        if scale is not None:
            given = SkipLayerGuidanceDiT.execute(model, scale, 0.0, 1.0, double_layers="0", single_layers="0").args[0]
        positive = encode(CLIP, TARGET)
        if technique == "prompt-to-prompt":
            controlled, positive = prompt_to_prompt(given, CLIP, SOURCE, TARGET, inversion=pivot)
        else:
            controlled = mutual_self_attention(given, pivot, encode(CLIP, SOURCE), start_step=0.0)
        images.append(from_inversion(controlled, pivot, positive))
    assert torch.equal(images[0], images[1]) and torch.isfinite(images[2]).all()


def test_what_prompt_to_prompt_cannot_do_on_flow_models_is_named(model: Any) -> None:
    with pytest.raises(IdentityEditError, match=r"reweight is not possible with a flow model.*fluffy:1\.3"):
        prompt_to_prompt(model, CLIP, SOURCE, TARGET, reweight={"dog": 2.0})
    with pytest.raises(IdentityEditError, match="Neither the source prompt nor the target prompt contains .*'horse'"):
        prompt_to_prompt(model, CLIP, SOURCE, TARGET, blend_words="horse")
    if engine.require(model).pooled_width:
        with pytest.raises(IdentityEditError, match="The source prompt has a pooled output of 32 channels"):
            prompt_to_prompt(model, tiny_text_encoders.clip("sd1"), SOURCE, TARGET)


@pytest.mark.parametrize(("start_layer", "end_layer"), [(-1, -1), (1, -1), (0, 0)])
def test_keys_and_values_come_from_the_inverted_image(
    model: Any, pivot: Inversion, start_layer: int, end_layer: int
) -> None:
    target = encode(CLIP, TARGET)
    attending = mutual_self_attention(
        model, pivot, encode(CLIP, SOURCE), start_step=0.25, start_layer=start_layer, end_layer=end_layer
    )
    found = from_inversion(attending, pivot, target)
    network = model.model.diffusion_model
    sites = joint_sites(network)
    # Automatic is a third of 2 or 4 blocks.
    chosen = {(-1, -1): sites[-1:], (1, -1): sites[1:], (0, 0): sites[:1]}[start_layer, end_layer]

    def exchange(_: Any) -> JointMutualAttention:
        return JointMutualAttention(network, {site.key: site for site in chosen})

    guider = by_hand(model, list(pivot.trajectory), target, exchange, range(1, STEPS))
    start = pivot.trajectory[0] / pivot.noise_path.scale(pivot.sigmas[0])
    expected = sample(guider, start, torch.zeros_like(start), pivot.sigmas)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(found, from_inversion(model, pivot, target)) > 1e-3
    assert "identity_edit" not in str(sorted(guided(attending, target).original_conds))


def test_masks_of_mutual_self_attention(model: Any, pivot: Inversion) -> None:
    """Full masks on both sides are no masks; others change the edit."""
    target, mask = encode(CLIP, TARGET), torch.ones(1, 64, 64)
    half = mask.clone()
    half[:, :, 32:] = 0
    results = [
        from_inversion(
            mutual_self_attention(model, pivot, encode(CLIP, SOURCE), encode(CLIP, ""), 0.0, -1, *masks), pivot, target
        )
        for masks in ((None, None), (mask, mask), (half, 1 - half))
    ]
    assert relative_error(results[1], results[0]) < 1e-5 and relative_error(results[2], results[0]) > 1e-3


def test_the_kept_background_of_an_edit(model: Any, pivot: Inversion) -> None:
    """All of the image edited: nothing is exchanged; nothing edited: the whole image is."""
    target, mask = encode(CLIP, TARGET), torch.ones(1, 64, 64)

    def edited(exchange: str, area: Any, source_mask: Any = None) -> torch.Tensor:
        attending = mutual_self_attention(model, pivot, encode(CLIP, SOURCE), None, 0.0, 0, source_mask, area, exchange)
        return from_inversion(attending, pivot, target)

    assert relative_error(edited(BACKGROUND, mask), from_inversion(model, pivot, target)) < 1e-5
    assert relative_error(edited(BACKGROUND, 0 * mask), edited(IMAGE, None)) < 1e-5
    mask[:, :, 32:] = 0
    assert relative_error(edited(BACKGROUND, mask), edited(IMAGE, None)) > 3e-5


def test_an_edit_with_the_kept_background_of_every_step(model: Any, pivot: Inversion) -> None:
    """KV-Edit: the mask blend restores the background's latent, the exchange its keys and values."""
    target, mask = encode(CLIP, TARGET), torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    attending = mutual_self_attention(
        model, pivot, encode(CLIP, SOURCE), None, 0.0, 0, target_mask=mask, exchange=BACKGROUND
    )
    results = [
        identity_mask_blend(
            each, pivot, encode(CLIP, SOURCE), target, None, NEGATIVE, guidance_scale=3.0, source_mask=mask,
            target_mask=mask,
        ).latent
        for each in (attending, model)
    ]  # fmt: skip
    image = pivot.end_latent(model)
    assert torch.equal(results[0][..., 4:, :], image[..., 4:, :]) and torch.equal(
        results[1][..., 4:, :], image[..., 4:, :]
    )
    assert relative_error(results[0][..., :4, :], results[1][..., :4, :]) > 3e-5


@pytest.fixture
def flux_pivot() -> tuple[Any, Inversion]:
    model = tiny_flow_models.flux(output_gain=0.05)
    return model, invert_image(model, tiny_flow_models.latent_for(model, 4, 1), encode(CLIP, SOURCE), steps=8)


def techniques(pivot: Inversion) -> dict[str, Any]:
    return {
        "mutual self-attention": lambda model: mutual_self_attention(model, pivot, encode(CLIP, SOURCE), None, 0.0),
        "prompt-to-prompt": lambda model: prompt_to_prompt(model, CLIP, SOURCE, TARGET, inversion=pivot)[0],
    }


@pytest.mark.parametrize("technique", ["mutual self-attention", "prompt-to-prompt"])
@pytest.mark.parametrize("node", ["EasyCacheNode", "LazyCacheNode"])
def test_caches_of_steps_do_not_mix_source_and_target(flux_pivot: Any, node: str, technique: str) -> None:
    from comfy_extras import nodes_easycache

    model, pivot = flux_pivot
    apply, target = techniques(pivot)[technique], encode(CLIP, TARGET)

    def cached(model: Any) -> Any:
        return getattr(nodes_easycache, node).execute(model, 0.8, 0.0, 1.0, False).args[0]

    expected = from_inversion(apply(model), pivot, target)
    for both in (apply(cached(model)), cached(apply(model))):
        assert torch.equal(from_inversion(both, pivot, target), expected)


def test_the_source_of_mutual_self_attention_has_its_own_distilled_guidance() -> None:
    """That of its inversion (FluxGuidance)."""
    model = tiny_flow_models.flux(output_gain=0.2)
    ((embedding, options),) = encode(CLIP, SOURCE)
    source, target = ([[embedding, {**options, "guidance": value}]] for value in (1.5, 4.0))
    pivot = invert_image(model, tiny_flow_models.latent_for(model, 4), source, steps=STEPS)
    attending = mutual_self_attention(model, pivot, source, start_step=0.0)
    seen: list[float] = []

    def apply_model(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(float(kwargs["guidance"].max()))
        return executor(*args, **kwargs)

    attending.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", apply_model)
    guider = guided(attending, target)
    guider.set_cfg(1.0)
    start = pivot.trajectory[0] / pivot.noise_path.scale(pivot.sigmas[0])
    sample(guider, start, torch.zeros_like(start), pivot.sigmas)
    assert seen == [1.5, 4.0] * STEPS


@pytest.mark.parametrize("technique", ["mutual self-attention", "prompt-to-prompt"])
def test_an_area_of_the_prompt_does_not_mix_it_with_the_negative(flux_pivot: Any, technique: str) -> None:
    """ComfyUI adds an entry for the area to the negative side, with the uuid of the prompt's entry; with an area of its
    own, the negative side gets none."""
    model, pivot = flux_pivot
    apply, prompt = techniques(pivot)[technique], encode(CLIP, TARGET)[0]
    positive = [[prompt[0], {**prompt[1], "area": (8, 4, 0, 0)}], prompt]
    found = from_inversion(apply(model), pivot, positive)
    same = guided(apply(model), positive)
    same.inner_set_conds({"negative": [*NEGATIVE, [NEGATIVE[0][0], {**NEGATIVE[0][1], "area": (8, 4, 0, 0)}]]})
    start = pivot.trajectory[0] / pivot.noise_path.scale(pivot.sigmas[0])
    assert torch.equal(found, sample(same, start, torch.zeros_like(start), pivot.sigmas))


def test_what_mutual_self_attention_cannot_do_is_named(model: Any, pivot: Inversion) -> None:
    count = len(joint_sites(model.model.diffusion_model))
    refused = [
        ({"end_layer": count}, f"end_layer is {count} but the model has {count} blocks with joint attention"),
        ({"start_layer": 1, "end_layer": 0}, "end_layer is 0, before start_layer 1"),
        ({"end_layer": 0}, "end_layer is 0, before the automatic start_layer"),
        ({"start_layer": count}, f"start_layer is {count} but the model has {count} blocks with joint attention"),
        ({"source_mask": torch.ones(1, 64, 64)}, "Only one of source_mask and target_mask"),
        ({"exchange": BACKGROUND}, "exchange is background but there is no target_mask"),
    ]
    for options, words in refused:
        with pytest.raises(IdentityEditError, match=words):
            mutual_self_attention(model, pivot, encode(CLIP, SOURCE), **options)
    with pytest.raises(IdentityEditError, match="A prompt has 4 channels but the model takes 32"):
        mutual_self_attention(model, pivot, [[torch.zeros(1, 8, 4), {}]])
