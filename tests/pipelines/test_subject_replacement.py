"""Algorithm 3 against a loop of its own with a literal control of the weights, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_text_encoders
import torch
from identity_edit_pack.attention.unet import attention_layers
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.attention_control.prompt_to_prompt import encode
from identity_edit_pack.pipelines.hifi_tuner.subject_replacement import subject_replacement
from identity_edit_pack.pipelines.inversion import inversion, null_text
from identity_edit_pack.pipelines.shared.conditioning import with_embedding
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.text.step_embeddings import StepEmbeddings, apply_step_embeddings
from identity_edit_pack.tests import tiny_models
from identity_edit_pack.tests.tiny_models import relative_error

CAT, DOG = "a photo of a cat in the snow", "a photo of a dog in the snow"
STEPS, N = 3, 5


@pytest.fixture(scope="module")
def clip() -> Any:
    return tiny_text_encoders.clip("sd1")


def inverted(model: Any, clip: Any, batch: int = 1) -> inversion.Inversion:
    pivot = inversion.invert_image(model, tiny_models.latent(4, batch, 8, 12), encode(clip, CAT), steps=STEPS)
    found = null_text.null_text_optimization(model, pivot, encode(clip, CAT), encode(clip, ""), 3.0, inner_steps=1)
    table = found.embeddings
    return pivot.with_embeddings(StepEmbeddings(table.sigmas, table.embeddings, table.pooled, guidance_scale=3.0))


def learned_table(clip: Any, pivot: inversion.Inversion) -> StepEmbeddings:
    """[c^g, c_s^t]: other tokens in the last positions at every step."""
    embedding = encode(clip, DOG)[0][0]
    rows = embedding.repeat(STEPS, 1, 1, 1)
    rows[:, :, -N:] += torch.randn(STEPS, 1, N, rows.shape[-1], generator=torch.Generator().manual_seed(9))
    return StepEmbeddings(pivot.sigmas, rows)


class LiteralAttention:
    """Every cross-attention in float64, with the weights of all tokens but `free` from a recording."""

    def __init__(self, model: Any, free: list[int]) -> None:
        self.free = free
        self.recorded: list[torch.Tensor] = []
        self.mode = "off"
        self._hooks = []
        for layer in attention_layers(model.get_model_object("diffusion_model")):
            self._hooks.append(layer.block.attn2.register_forward_hook(self._attend, with_kwargs=True))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _attend(self, attention: Any, args: Any, kwargs: Any, out: torch.Tensor) -> torch.Tensor:
        if self.mode == "off":
            return out

        def apart(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return (rows.double() @ weight.double().T).unflatten(-1, (attention.heads, -1)).transpose(1, 2)

        context = kwargs["context"]
        q, k, v = (
            apart(args[0], attention.to_q.weight), apart(context, attention.to_k.weight),
            apart(context, attention.to_v.weight),
        )  # fmt: skip
        weights = (q @ k.transpose(-1, -2) / attention.dim_head**0.5).softmax(-1)
        if self.mode == "record":
            self.recorded.append(weights)
            return out
        stored = self.recorded.pop(0).clone()
        stored[..., self.free] = weights[..., self.free]
        result = (stored @ v).transpose(1, 2).flatten(2)
        return (result @ attention.to_out[0].weight.double().T + attention.to_out[0].bias.double()).float()


def literal_algorithm_3(
    model: Any, clip: Any, pivot: inversion.Inversion, embeddings: list[torch.Tensor], free: Any
) -> Any:
    """Line by line, one side at a time, in the papers' order and with hooks in the place of ComfyUI's patches."""
    attention = LiteralAttention(model, free)
    source, empty = encode(clip, CAT), encode(clip, "")
    w, phi = pivot.embeddings.guidance_scale, pivot.embeddings.embeddings

    def loop(evaluator: Any, _: torch.Tensor) -> torch.Tensor:
        x = pivot.trajectory[0]
        for i in range(STEPS):
            sigma, sigma_next = pivot.sigmas[i], pivot.sigmas[i + 1]
            attention.mode = "record"
            evaluator.denoised(pivot.trajectory[i], sigma, "positive", source[0][0])
            attention.mode = "inject"
            conditional = evaluator.denoised(x, sigma, "positive", embeddings[i])
            attention.mode = "off"
            unconditional = evaluator.denoised(x, sigma, "negative", phi[i])
            noise = (x - (w * conditional + (1 - w) * unconditional)) / sigma
            x = x + (sigma_next - sigma) * noise
        return x / torch.sqrt(1 + pivot.sigmas[-1] ** 2)

    try:
        z_0 = engine.run_loop(model, source, empty, pivot.trajectory[0], pivot.sigmas, loop)
    finally:
        attention.close()
    return engine.to_socket_scale(model, z_0)


@pytest.mark.parametrize("batch", [1, 2])
def test_it_is_algorithm_3(clip: Any, batch: int) -> None:
    model = tiny_models.sd1(output_gain=0.3)
    pivot = inverted(model, clip, batch)
    plain = subject_replacement(model, clip, pivot, CAT, DOG)
    dog = encode(clip, DOG)[0][0]
    expected = literal_algorithm_3(model, clip, pivot, [dog] * STEPS, [5])
    assert plain.free_tokens == (5,) and plain.warning is None
    assert plain.evaluations == 3 * STEPS
    assert relative_error(plain.latent, expected) < 1e-4

    table = learned_table(clip, pivot)
    personal = apply_step_embeddings(model, table, "positive")
    target = with_embedding(encode(clip, DOG), table.embeddings[0])
    ours = subject_replacement(personal, clip, pivot, CAT, DOG, target, subject_words="dog", subject_tokens=N)
    free = [5, *range(77 - N, 77)]
    expected = literal_algorithm_3(model, clip, pivot, list(table.embeddings), free)
    assert ours.free_tokens == tuple(free)
    assert relative_error(ours.latent, expected) < 1e-4
    assert relative_error(ours.latent, plain.latent) > 1e-3
    wrong = literal_algorithm_3(model, clip, pivot, list(table.embeddings), [5])
    assert relative_error(ours.latent, wrong) > 1e-3


def test_without_control_it_is_sampling_of_the_target(clip: Any) -> None:
    model = tiny_models.sd1(output_gain=0.3)
    pivot = inverted(model, clip)
    ours = subject_replacement(model, clip, pivot, CAT, DOG, cross_replace_steps=0.0, guidance_scale=4.0)
    expected = inversion.sample_inversion(model, pivot, encode(clip, DOG), encode(clip, ""), 4.0)
    assert torch.equal(ours.latent, expected) and ours.evaluations == 2 * STEPS
    assert "optimized for 3" in ours.warning


def test_a_subject_with_the_name_of_the_old_one(clip: Any) -> None:
    """The class word of both is cat: named, its attention is its own; and the blend covers both."""
    model = tiny_models.sd1(output_gain=0.3)
    pivot = inverted(model, clip)
    target = with_embedding(encode(clip, CAT), learned_table(clip, pivot).embeddings[0])
    ours = subject_replacement(model, clip, pivot, CAT, CAT, target, "cat")
    assert ours.free_tokens == (5, *range(72, 77))
    blended = subject_replacement(model, clip, pivot, CAT, CAT, target, "cat", local_blend=True, blend_threshold=1.0)
    end = pivot.end_latent(model)
    assert relative_error(blended.latent, end) < 0.5 * relative_error(ours.latent, end)


def test_sdxl() -> None:
    clip = tiny_text_encoders.clip("sdxl")
    clip.tokenizer.untokenize = clip.tokenizer.parts["g"].untokenize
    model = tiny_models.sdxl(output_gain=0.3)
    pivot = inverted(model, clip)
    ours = subject_replacement(model, clip, pivot, CAT, "a photo of a big dog in the snow")
    assert ours.free_tokens[:2] == (5, 6) and bool(torch.isfinite(ours.latent).all())


def test_bad_inputs_are_refused(clip: Any) -> None:
    model = tiny_models.sd1()
    pivot = inverted(model, clip)
    long = "a dog " + "and a cat " * 24
    target = encode(clip, long)
    refused = [
        (dict(inversion=pivot.with_embeddings(None)), "put Null-Text Optimization between"),
        (dict(subject_words="rabbit"), "target prompt .* does not contain the word 'rabbit'"),
        (dict(target_prompt=CAT), "no word that the source prompt lacks"),
        (dict(target_prompt=long, target=target), "overlaps the last 5 positions"),
        (dict(target=encode(clip, long * 2)), "target has .* tokens but the target prompt has 77"),
        (dict(target=encode(clip, DOG), subject_tokens=77), "subject_tokens is 77"),
        (dict(target=[[torch.zeros(3, 77, 32), {}]]), "3 entries for a batch of 1"),
        (dict(model=tiny_models.sd1(seed=5)), "another model"),
    ]
    for changes, message in refused:
        given = dict(model=model, clip=clip, inversion=pivot, source_prompt=CAT, target_prompt=DOG)
        with pytest.raises(IdentityEditError, match=message):
            subject_replacement(**{**given, **changes})
