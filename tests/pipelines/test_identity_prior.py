"""The personalized identity prior: exact gradients, the right weights, nothing left behind, files and LoRAs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sd
import pytest
import tiny_models
import tiny_text_encoders
import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine.families.noise import DIFFUSION
from identity_edit_pack.pipelines.engine.trainable import trainable_networks
from identity_edit_pack.pipelines.lipe import identity_prior as priors
from identity_edit_pack.pipelines.lipe.train_identity_prior import PriorSettings, train_identity_prior
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.training import images as training_images
from identity_edit_pack.pipelines.training.images import Batch, TrainingImages
from identity_edit_pack.pipelines.training.loop import generator_of
from identity_edit_pack.pipelines.training.weights import ALL, LOW_RANK

SETTINGS = PriorSettings(
    token="sks", class_word="cat", steps=4, learning_rate=1e-3, precision="float32", seed=7, checkpoint_every=1,
    sample_every=2, sample_prompt="a sks cat", sample_guidance_scale=2.0, sample_steps=3, file_dtype="float32",
)  # fmt: skip
CAPTIONS = ["a sks cat sitting on the grass", "a sks cat in the snow"]


def images(seed: int, sizes: list[tuple[int, int]], captions: list[str], masked: bool = False) -> TrainingImages:
    generator = torch.Generator().manual_seed(seed)
    latents = [5.0 * torch.randn(4, *size, generator=generator) for size in sizes]
    masks = [(torch.rand(size, generator=generator) > 0.5).float() if masked else None for size in sizes]
    return TrainingImages(latents, captions, masks, f"images {seed}")


IDENTITY = images(1, [(8, 8), (8, 8)], CAPTIONS, masked=True)
CLASS = images(2, [(8, 8), (8, 8), (8, 8)], ["a cat", "a black cat jumping", "two cats"])


def make(family: str) -> tuple[Any, Any]:
    return tiny_models.FAMILIES[family](), tiny_text_encoders.clip(family)


def train(model: Any, clip: Any, settings: Any = SETTINGS, **arguments: Any):
    identity = arguments.pop("identity", IDENTITY)
    regularization = arguments.pop("regularization", CLASS)
    return train_identity_prior(model, clip, identity, regularization, settings, **arguments)


def all_tensors(model: Any, clip: Any) -> dict[str, torch.Tensor]:
    both = {"model": model.model, "clip": clip.cond_stage_model}
    return {f"{name}.{key}": value for name, module in both.items() for key, value in module.named_parameters()}


def loaded_weights(patcher: Any) -> dict[str, torch.Tensor]:
    """The weights as ComfyUI computes with them, patches included."""
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    weights = {key: value.detach().clone() for key, value in patcher.model.state_dict().items()}
    comfy.model_management.unload_all_models()
    return weights


# -- gradients ---------------------------------------------------------------------------------------------------------


def both_images(model: Any, t: torch.Tensor) -> Batch:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    latents = engine.to_model_scale(model, torch.stack(IDENTITY.latents))
    return Batch(latents, torch.stack(IDENTITY.masks)[:, None], t, noise)


def loss_in_float64(unet: Any, text_encoder: Any, tokens: torch.Tensor, batch: Batch, t, noise, sigmas) -> torch.Tensor:
    """The masked noise-prediction loss by diffusers and transformers, in the papers' scale."""
    alpha_bar = (1.0 / (1.0 + sigmas.double() ** 2))[t].reshape(-1, 1, 1, 1)
    z = alpha_bar.sqrt() * batch.latents.double() + (1 - alpha_bar).sqrt() * noise.double()
    torch.set_default_dtype(torch.float64)  # transformers makes its mask in the default dtype
    try:
        context = text_encoder(tokens).last_hidden_state
    finally:
        torch.set_default_dtype(torch.float32)
    predicted = unet(z, t.double(), encoder_hidden_states=context).sample
    squares = batch.masks.double() * (predicted - noise.double()) ** 2
    return (squares.sum(dim=(1, 2, 3)) / (4 * batch.masks.double().sum(dim=(1, 2, 3)))).sum()


TRAINED = {
    "model": {
        "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight":
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.bias":
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.bias",
        "diffusion_model.out.2.weight": "conv_out.weight",
        "diffusion_model.input_blocks.1.0.in_layers.0.weight": "down_blocks.0.resnets.0.norm1.weight",
    },
    "clip": {
        "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight":
            "text_model.encoder.layers.0.self_attn.q_proj.weight",
        "clip_l.transformer.text_model.encoder.layers.2.self_attn.out_proj.weight":
            "text_model.encoder.layers.2.self_attn.out_proj.weight",
        "clip_l.transformer.text_model.encoder.layers.1.layer_norm2.weight":
            "text_model.encoder.layers.1.layer_norm2.weight",
        "clip_l.transformer.text_model.embeddings.token_embedding.weight":
            "text_model.embeddings.token_embedding.weight",
    },
}  # fmt: skip


@pytest.mark.parametrize(("inference_mode", "checkpointing"), [(False, True), (True, False)])
def test_gradients_against_float64_differences_of_other_libraries(inference_mode: bool, checkpointing: bool):
    with torch.inference_mode(inference_mode):  # execution.py runs every prompt in it, loading the checkpoint included
        model, clip = make("sd1")
        t = torch.tensor([100, 700])
        with torch.inference_mode(False):
            batch = both_images(model, t)
        with trainable_networks(
            model, clip, TRAINED["model"], TRAINED["clip"], dtype=torch.float32,
            latent_shape=[2, 4, 8, 8], checkpointing=checkpointing,
        ) as networks:  # fmt: skip
            loss = training_images.denoising_losses(networks, batch, networks.encode(CAPTIONS)).sum()
            loss.backward()
            gradients = {
                key: variable.grad.double()
                for part in (networks.model_variables, networks.clip_variables)
                for key, variable in part.items()
            }
    with torch.inference_mode(False), torch.no_grad():
        unet = tiny_models.diffusers_twin(tiny_models.sd1()).double()
        text_encoder = tiny_text_encoders.transformers_twin(tiny_text_encoders.clip("sd1")).double()
        tokens = torch.tensor([[token for token, _ in clip.tokenize(text)["l"][0]] for text in CAPTIONS])
        sigmas = tiny_models.sd1().model.model_sampling.sigmas
        arguments = (unet, text_encoder, tokens, batch, t, batch.noise, sigmas)
        assert float(loss) == pytest.approx(float(loss_in_float64(*arguments)), rel=1e-4)
        names = {**TRAINED["model"], **TRAINED["clip"]}
        weights = dict(unet.named_parameters()) | dict(text_encoder.named_parameters())
        for key, gradient in gradients.items():
            weight = weights[names[key]]
            direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
            # Along the gradient itself the difference is largest, across it nearly nothing: take some of each.
            direction = direction / direction.norm() + gradient / gradient.norm()
            step, differences = 1e-5, []
            for sign in (1, -1):
                weight.add_(sign * step * direction)
                differences.append(float(loss_in_float64(*arguments)))
                weight.sub_(sign * step * direction)
            difference = (differences[0] - differences[1]) / (2 * step)
            assert difference == pytest.approx(float((gradient * direction).sum()), rel=2e-3), key


@pytest.mark.parametrize("family", ["sd2_v", "sdxl"])
def test_gradients_of_other_families_against_differences(family: str):
    """The pooled output takes part too: SDXL's second encoder reaches the network through it."""
    with torch.inference_mode():
        model, clip = make(family)
        model_keys, clip_keys = priors.attention_keys(model, clip)
        with trainable_networks(
            model, clip, model_keys, clip_keys, dtype=torch.float32, latent_shape=[2, 4, 8, 8]
        ) as networks:
            batch = both_images(model, torch.tensor([300, 800]))

            def loss() -> torch.Tensor:
                return training_images.denoising_losses(networks, batch, networks.encode(CAPTIONS)).sum()

            loss().backward()
            for part in (networks.model_variables, networks.clip_variables):
                gradient = {key: variable.grad for key, variable in part.items() if variable.grad is not None}
                # The last layer's attention of an encoder that is read before it has no effect; all others have.
                without = set(part) - set(gradient)
                assert all(".layers.2." in key for key in without) and len(without) < len(part) / 2
                norm = math.sqrt(sum(float(value.square().sum()) for value in gradient.values()))
                values = []
                with torch.no_grad():
                    for sign in (1, -1):
                        for key, value in gradient.items():
                            part[key].add_(sign * 1e-2 / norm * value)
                        values.append(float(loss()))
                        for key, value in gradient.items():
                            part[key].sub_(sign * 1e-2 / norm * value)
                assert (values[0] - values[1]) / 2e-2 == pytest.approx(norm, rel=0.02)


def test_low_rank_gradients_follow_from_those_of_the_weights():
    """d loss / d B = G A^T and d loss / d A = B^T G, with G the gradient of the whole weight W + B A."""
    model, clip = make("sd1")
    keys = priors.attention_keys(model, clip, LOW_RANK)
    batch = both_images(model, torch.tensor([300, 800]))
    options: dict[str, Any] = {"dtype": torch.float32, "latent_shape": [2, 4, 8, 8]}

    def gradients(networks: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = training_images.denoising_losses(networks, batch, networks.encode(CAPTIONS)).sum()
        loss.backward()
        variables = {**networks.model_variables, **networks.clip_variables}
        return loss.detach(), {key: variable.grad for key, variable in variables.items() if variable.grad is not None}

    with trainable_networks(model, clip, *keys, rank=3, seed=5, **options) as networks:
        factors = {**networks.model_variables, **networks.clip_variables}
        assert all(float(value.abs().max()) == 0.0 for key, value in factors.items() if key.endswith(".up"))
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            for value in factors.values():
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        factors = {key: value.detach().clone() for key, value in factors.items()}
        changes = networks.changes(torch.float32)
        loss, found = gradients(networks)
    with trainable_networks(model, clip, *keys, **options) as networks:
        with torch.no_grad():
            for part, change in zip((networks.model_variables, networks.clip_variables), changes, strict=True):
                for key, variable in part.items():
                    torch.testing.assert_close(change[key], factors[f"{key}.up"] @ factors[f"{key}.down"])
                    variable.add_(change[key])
        expected_loss, whole = gradients(networks)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert len(found) == 2 * len(whole) and len(whole) > 20
    for key, gradient in whole.items():
        up, down = factors[f"{key}.up"], factors[f"{key}.down"]
        assert tiny_models.relative_error(found[f"{key}.up"], gradient @ down.T) < 1e-4, key
        assert tiny_models.relative_error(found[f"{key}.down"], up.T @ gradient) < 1e-4, key


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("weights", [LOW_RANK, ALL])
def test_the_chosen_weights_are_trained_and_applied(weights: str, checkpointing: bool):
    with torch.inference_mode():
        model, clip = make("sdxl")
        before = {key: value.clone() for key, value in all_tensors(model, clip).items()}
        settings = dataclasses.replace(SETTINGS, weights=weights, rank=2, checkpointing=checkpointing)
        prior, run = train(model, clip, settings)
        assert all(torch.equal(value, before[key]) for key, value in all_tensors(model, clip).items())
        patched, _ = priors.apply_identity_prior(model, clip, prior)
        base, changed = loaded_weights(model), loaded_weights(patched)
    assert len(run.losses) == SETTINGS.steps
    unet = [key for key in dict(model.model.named_parameters()) if key.startswith("diffusion_model.")]
    if weights == ALL:
        assert sorted(prior.model_change) == sorted(unet)
        assert any("token_embedding" in key for key in prior.clip_change)
    else:
        assert all(key.endswith(".weight") and ".attn" in key for key in prior.model_change)
        for change in prior.model_change.values():
            singular = torch.linalg.svdvals(change.double())
            assert float(singular[2]) < 1e-5 * float(singular[0])
    for key, change in prior.model_change.items():
        assert float(change.abs().max()) > 0.0, key
        torch.testing.assert_close(changed[key] - base[key], change, rtol=1e-3, atol=1e-6)


def test_weights_that_do_not_fit_the_device_are_refused(monkeypatch: pytest.MonkeyPatch):
    model, clip = make("sd1")
    count = sum(weight.numel() for key, weight in model.model.named_parameters() if key.startswith("diffusion_model."))
    needed = model.model_size() + clip.patcher.model_size() + 16 * count
    settings = dataclasses.replace(SETTINGS, weights=ALL, text_encoder=False, steps=1)
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device: needed - 1)
    with pytest.raises(IdentityEditError, match="train fewer weights"):
        train(model, clip, settings)
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device: needed)
    train(model, clip, settings)


def test_checkpointing_changes_no_training_step():
    with torch.inference_mode():
        runs = [train(*make("sd1"), dataclasses.replace(SETTINGS, checkpointing=on))[0] for on in (False, True)]
    for part in ("model_change", "clip_change"):
        for key, change in getattr(runs[0], part).items():
            torch.testing.assert_close(change, getattr(runs[1], part)[key], rtol=1e-3, atol=1e-5)


# -- the loss ----------------------------------------------------------------------------------------------------------


class Known:
    """Networks whose answer is known: an error of `error` in the prediction of noise or of velocity."""

    sampling = tiny_models.sd1().model.model_sampling

    def __init__(self, prediction: str, latents: torch.Tensor, noise: torch.Tensor, error: torch.Tensor) -> None:
        self.prediction, self.latents, self.noise, self.error = prediction, latents, noise, error
        self.family = SimpleNamespace(noise_path=DIFFUSION, prediction=prediction)

    def denoised(self, x: torch.Tensor, sigma: torch.Tensor, text: str, source: None) -> torch.Tensor:
        assert text == "text"
        sigma = sigma.double().reshape(-1, 1, 1, 1)
        alpha, level = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        z = alpha * x.double()
        if self.prediction == "eps":
            return ((z - level * (self.noise.double() + self.error)) / alpha).float()
        velocity = alpha * self.noise.double() - level * self.latents.double() + self.error
        return (alpha * z - level * velocity).float()


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_the_formula(prediction: str, gamma: float, masked: bool):
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 6, 5, generator=generator) for _ in range(2))
    error = torch.randn(2, 4, 6, 5, generator=generator).double()
    masks = torch.rand(2, 1, 6, 5, generator=generator) if masked else torch.ones(2, 1, 6, 5)
    t = torch.tensor([60, 900])
    found = training_images.denoising_losses(
        Known(prediction, latents, noise, error), Batch(latents, masks, t, noise), "text", min_snr_gamma=gamma
    )
    for row in range(2):
        total, weight = 0.0, 0.0
        for y in range(6):
            for x in range(5):
                m = float(masks[row, 0, y, x])
                total += m * sum(float(error[row, channel, y, x]) ** 2 for channel in range(4))
                weight += 4 * m
        snr = 1 / float(Known.sampling.sigmas[t[row]]) ** 2
        of_snr = {"eps": min(snr, 5.0) / snr, "v": min(snr, 5.0) / (snr + 1)}[prediction] if gamma else 1.0
        assert float(found[row]) == pytest.approx(of_snr * total / weight, rel=1e-4)


@pytest.mark.parametrize("sizes", ["equal", "different"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_takes_one_batch_of_each_set(sizes: str, masked: bool):
    """Of equal sizes both are evaluated at once, of different ones after each other."""
    weight = 0.3
    other = CLASS if sizes == "equal" else images(3, [(4, 6)], ["a cat"])
    model, clip = make("sd1")
    settings = dataclasses.replace(SETTINGS, steps=1, regularization_weight=weight, masked=masked, batch_size=2)
    _, run = train(model, clip, settings, regularization=other)
    expected = 0.0
    with trainable_networks(model, clip, dtype=torch.float32, latent_shape=[2, 4, 8, 8]) as networks:
        for what, of_set, factor in (("identity", IDENTITY, 1.0), ("regularisation", other, weight)):
            chosen = training_images.batch_indices(of_set, 2, 0, 7, what)
            generator = generator_of(7, 0, f"noise of {what}")
            latents = engine.to_model_scale(model, torch.stack([of_set.latents[number] for number in chosen]))
            masks = torch.ones_like(latents[:, :1])
            if masked and what == "identity":
                masks = torch.stack([of_set.masks[number] for number in chosen])[:, None]
            t = torch.randint(1000, (2,), generator=generator)
            batch = Batch(latents, masks, t, torch.randn(latents.shape, generator=generator))
            with torch.no_grad():
                text = networks.encode([of_set.captions[number] for number in chosen])
                each = training_images.denoising_losses(networks, batch, text)
            expected += factor * float(each.mean())
    assert run.losses == pytest.approx([expected], rel=1e-4)


# -- batches and images ----------------------------------------------------------------------------------------------


def test_every_image_comes_once_a_round_in_batches_of_one_size():
    sizes = [(8, 8)] * 4 + [(4, 8)] * 2 + [(8, 4)] * 3
    many = images(1, sizes, [""] * 9)
    rounds = []
    for number in range(3):
        batches = [training_images.batch_indices(many, 2, 5 * number + index, 0, "identity") for index in range(5)]
        assert all(len(batch) == 2 and len({sizes[place] for place in batch}) == 1 for batch in batches)
        drawn = [place for batch in batches for place in batch]
        assert set(drawn) == set(range(9)) and len(drawn) == 10, "only the last batch of three is filled up"
        rounds.append(batches)
    assert rounds[0] != rounds[1], "another order every round"
    assert training_images.batch_indices(many, 2, 7, 0, "identity") == rounds[1][2]
    assert training_images.batch_indices(images(1, [(8, 8)], [""]), 3, 0, 0, "identity") == [0, 0, 0]


class Encoder:
    """A VAE whose latent is the mean color of eight by eight pixels, cutting as ComfyUI's VAE does."""

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        height, width = (side // 8 * 8 for side in image.shape[1:3])
        top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
        cut = image[:, top : top + height, left : left + width].movedim(-1, 1)
        return torch.nn.functional.avg_pool2d(cut, 8)


def test_images_are_encoded_at_their_size_with_masks_where_the_subject_is():
    shapes = [(64, 48), (67, 90)]
    images = [torch.rand(*shape, 3, generator=torch.Generator().manual_seed(1)) for shape in shapes]
    masks = [None, (images[1][..., 0] > 0.5).float()]
    found = training_images.encode_images(Encoder(), images, ["one", "two"], masks)
    assert [tuple(latent.shape) for latent in found.latents] == [(3, 8, 6), (3, 8, 11)]
    assert found.masks[0] is None
    # A mask that is one of the image's channels must come out as that channel of the latent.
    as_image = masks[1][..., None].expand(-1, -1, 3)
    assert torch.allclose(found.masks[1], Encoder().encode(as_image[None])[0, 0], atol=1e-6)
    again = training_images.encode_images(Encoder(), images, ["one", "two"], masks)
    assert again.fingerprint == found.fingerprint
    for change in (([images[0], 1 - images[1]], ["one", "two"], masks), (images, ["one", "three"], masks),
                   (images, ["one", "two"], [None, None])):  # fmt: skip
        assert training_images.encode_images(Encoder(), *change).fingerprint != found.fingerprint


@pytest.mark.parametrize(
    ("images", "captions", "masks", "message"),
    [
        ([], [], None, "no image"),
        ([torch.rand(16, 16, 3)], [], None, "1 images, 0 captions"),
        ([torch.rand(16, 16, 3)], ["a"], [torch.zeros(16, 16)], "mask of image 1 is empty"),
        ([torch.full((16, 16, 3), math.nan)], ["a"], None, "latent of image 1 contains NaN"),
        ([torch.rand(4, 16, 3)], ["a"], None, "Image 1 is 16x4"),
    ],
)
def test_images_that_cannot_be_used_are_named(images: list, captions: list, masks: Any, message: str):
    with pytest.raises(IdentityEditError, match=message):
        training_images.encode_images(Encoder(), images, captions, masks)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sd2_v", "sdxl"])
def test_only_attention_is_learned_and_the_inputs_are_left_as_they_were(family: str):
    with torch.inference_mode():
        model, clip = make(family)
        before = {key: (value, value.clone()) for key, value in all_tensors(model, clip).items()}
        options = repr(model.model_options)
        prior, run = train(model, clip)
        after = all_tensors(model, clip)
        assert all(after[key] is value and torch.equal(value, copy) for key, (value, copy) in before.items())
        assert repr(model.model_options) == options and not model.patches and not clip.patcher.patches
        for module in (*model.model.modules(), *clip.cond_stage_model.modules()):
            assert "forward" not in vars(module) and not module._forward_pre_hooks
        patched_model, patched_clip = priors.apply_identity_prior(model, clip, prior)
        changed, unchanged = [], []
        for patcher, original in ((patched_model, model), (patched_clip.patcher, clip.patcher)):
            base = loaded_weights(original)
            for key, weight in loaded_weights(patcher).items():
                (unchanged if torch.equal(weight, base[key]) else changed).append(key)
    attention = {key for key in (*changed, *unchanged) if ".attn1.to_" in key or ".attn2.to_" in key}
    attention |= {key for key in (*changed, *unchanged) if ".self_attn." in key}
    assert set(changed) <= attention
    # In the text encoders, what is read from layer -2 does not reach the last one; a key's bias cancels in a softmax.
    assert all(".layers.2." in key or key.endswith("k_proj.bias") for key in attention - set(changed))
    assert len(run.losses) == 4 and all(map(math.isfinite, run.losses))
    assert prior.training["steps"] == 4 and prior.identity_prompt == "sks cat"


def test_the_text_encoder_can_be_left_alone():
    with torch.inference_mode():
        prior, _ = train(*make("sdxl"), dataclasses.replace(SETTINGS, text_encoder=False))
    assert prior.model_change and not prior.clip_change


def test_training_learns_the_images():
    """On two images the loss with fixed draws must fall far; without a regularization set."""
    with torch.inference_mode():
        model, clip = make("sd1")
        settings = dataclasses.replace(SETTINGS, steps=60, learning_rate=3e-3, sample_every=0)
        _, run = train(model, clip, settings, regularization=None)
    assert sum(run.losses[-10:]) < 0.8 * sum(run.losses[:10])


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_patched_model_samples_what_training_sampled(family: str):
    """The last sample preview, made with the variables in place, against ComfyUI's sampler on the patched clones."""
    with torch.inference_mode():
        model, clip = make(family)
        prior, run = train(model, clip, dataclasses.replace(SETTINGS, sample_steps=20))
        patched_model, patched_clip = priors.apply_identity_prior(model, clip, prior)
        sides = []
        for text in (SETTINGS.sample_prompt, ""):
            embedding, pooled = patched_clip.encode_from_tokens(patched_clip.tokenize(text), return_pooled=True)
            sides.append([[embedding, {"pooled_output": pooled}]])
        noise = torch.randn(1, 4, 8, 8, generator=generator_of(7, 0, "sample"))
        sampled = comfy.sample.sample(
            patched_model, noise, 20, SETTINGS.sample_guidance_scale, "ddim", "ddim_uniform", *sides,
            torch.zeros(1, 4, 8, 8), disable_pbar=True, seed=0,
        )  # fmt: skip
    step, preview = run.samples[-1]
    assert step == 4
    # ComfyUI's first sigma scales pure noise by sqrt(1 + sigma^2), a preview by sigma: 0.3 % apart at sigma 14.
    difference = float((sampled - preview).norm() / preview.norm())
    assert difference < 0.02
    without = comfy.sample.sample(
        model, noise, 20, SETTINGS.sample_guidance_scale, "ddim", "ddim_uniform", *sides,
        torch.zeros(1, 4, 8, 8), disable_pbar=True, seed=0,
    )  # fmt: skip
    assert float((without - preview).norm() / preview.norm()) > 3 * difference


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(tmp_path: Path, family: str):
    def stop(done: int, *_: Any) -> None:
        if done == 3:
            raise comfy.model_management.InterruptProcessingException()

    def checkpoint(run: str) -> str:
        return str(tmp_path / f"{run}.safetensors")

    settings = dataclasses.replace(SETTINGS, checkpoint_every=2)
    with torch.inference_mode():
        whole, whole_run = train(*make(family), settings)
        model, clip = make(family)
        before = {key: value.clone() for key, value in all_tensors(model, clip).items()}
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(model, clip, settings, checkpoint=checkpoint, progress=stop)
        assert all(torch.equal(value, before[key]) for key, value in all_tensors(model, clip).items())
        # More steps and other samples make no other run; another seed does.
        longer = dataclasses.replace(settings, steps=5, sample_every=1)
        resumed, run = train(model, clip, settings, checkpoint=checkpoint)
        assert train(model, clip, longer, checkpoint=checkpoint)[1].resumed_at == 4
        other = dataclasses.replace(settings, seed=8)
        assert train(model, clip, other, checkpoint=checkpoint)[1].resumed_at == 0
    assert run.resumed_at == 3 and run.losses == pytest.approx(whole_run.losses, rel=1e-6)
    for part in ("model_change", "clip_change"):
        for key, change in getattr(whole, part).items():
            torch.testing.assert_close(getattr(resumed, part)[key], change, rtol=1e-5, atol=1e-7)


def test_bfloat16_trains_like_float32():
    with torch.inference_mode():
        changes = [
            train(*make("sd1"), dataclasses.replace(SETTINGS, precision=precision))
            for precision in ("float32", "bfloat16")
        ]
    exact, half = (run for _, run in changes)
    assert half.losses != exact.losses and half.losses == pytest.approx(exact.losses, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_trained_in_float32(dtype: torch.dtype):
    """As on a GPU: the checkpoint's weights are halves, the variables and what is computed are not."""
    with torch.inference_mode():
        clip = tiny_text_encoders.clip("sd1")
        of_half = train(tiny_models.sd1(dtype=dtype), clip)[1]
        full = tiny_models.sd1()
        rounded = {key: value.to(dtype).float() for key, value in full.model.diffusion_model.state_dict().items()}
        full.model.diffusion_model.load_state_dict(rounded)
        assert of_half.losses == pytest.approx(train(full, clip)[1].losses, rel=1e-3)


def test_a_lora_on_the_model_is_part_of_what_is_trained():
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    with torch.inference_mode():
        model, clip = make("sd1")
        shape = model.model.state_dict()[key].shape
        change = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        patched, by_hand = model.clone(), tiny_models.sd1()
        patched.add_patches({key: ("diff", (change,))}, 0.5)
        by_hand.model.state_dict()[key].add_(0.5 * change)
        losses = [train(each, clip)[1].losses for each in (patched, by_hand, model)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] != pytest.approx(losses[2], rel=1e-3)


def test_the_change_of_a_weight_that_is_kept_in_float8():
    """As with `--fp8_e4m3fn-unet`; PyTorch subtracts no float8."""
    model, clip = make("sd1")
    weight = model.model.diffusion_model.out[2].weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    key = "diffusion_model.out.2.weight"
    with trainable_networks(model, clip, [key], dtype=torch.float32, latent_shape=[1, 4, 8, 8]) as networks:
        with torch.no_grad():
            networks.model_variables[key].add_(0.25)
        (change,) = networks.changes(torch.float32)[0].values()
    assert torch.allclose(change, torch.full_like(change, 0.25), atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_patch_that_writes_in_place_trains_like_one_that_does_not(checkpointing: bool):
    """FreeU's does; the backward pass needs the hidden state as it was."""

    def in_place(hidden: torch.Tensor, skip: torch.Tensor, options: dict[str, Any]):
        half = hidden.shape[1] // 2
        hidden[:, :half] = hidden[:, :half] * (1 + 0.1 * hidden.mean(1, keepdim=True))
        return hidden, skip

    def elsewhere(hidden: torch.Tensor, skip: torch.Tensor, options: dict[str, Any]):
        first, second = hidden.chunk(2, dim=1)
        return torch.cat([first * (1 + 0.1 * hidden.mean(1, keepdim=True)), second], dim=1), skip

    settings = dataclasses.replace(SETTINGS, checkpointing=checkpointing)
    losses = []
    for patch in (in_place, elsewhere):
        model, clip = make("sd1")
        model.set_model_output_block_patch(patch)
        losses.append(train(model, clip, settings)[1].losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_clip_without_clip_is_refused():
    class Other:
        class patcher:
            model = torch.nn.Linear(2, 2)

    with pytest.raises(IdentityEditError, match="no CLIP text encoder"):
        priors.attention_keys(tiny_models.sd1(), Other)


# -- files and LoRAs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def learned(request: pytest.FixtureRequest) -> tuple[str, Any, Any, priors.IdentityPrior]:
    with torch.inference_mode():
        model, clip = make(request.param)
        return request.param, model, clip, train(model, clip)[0]


def test_a_file_holds_the_whole_prior(tmp_path: Path, learned: Any):
    _, model, clip, prior = learned
    path = str(tmp_path / "prior.safetensors")
    priors.save_identity_prior(prior, path)
    read = priors.load_identity_prior(path)
    for part in ("model_change", "clip_change"):
        mine, its = getattr(prior, part), getattr(read, part)
        assert mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)
    assert (read.token, read.class_word, read.training) == ("sks", "cat", prior.training)
    assert read.model.difference(prior.model) is None and read.training["pack_version"].count(".") == 2
    assert priors.check_identity_prior(model, clip, read) is None
    (tmp_path / "half.safetensors").write_bytes(Path(path).read_bytes()[:5000])
    with pytest.raises(IdentityEditError, match="half.safetensors cannot be read"):
        priors.load_identity_prior(str(tmp_path / "half.safetensors"))
    with pytest.raises(IdentityEditError, match="does not exist"):
        priors.load_identity_prior(str(tmp_path / "none.safetensors"))


def test_strengths_scale_each_part(learned: Any):
    _, model, clip, prior = learned
    with torch.inference_mode():
        patched_model, patched_clip = priors.apply_identity_prior(model, clip, prior, 0.5, 0.0)
        base, half = loaded_weights(model), loaded_weights(patched_model)
        assert not patched_clip.patcher.patches
    for key, change in prior.model_change.items():
        torch.testing.assert_close(half[key] - base[key], 0.5 * change, rtol=1e-3, atol=1e-6)


def test_another_family_is_refused_and_another_checkpoint_noted(learned: Any):
    family, model, clip, prior = learned
    others = {"sd1": ("sdxl", "sd2_v"), "sdxl": ("sd1",)}[family]
    for name in others:
        with pytest.raises(IdentityEditError, match="another model family"):
            priors.apply_identity_prior(*make(name), prior)
    with pytest.raises(IdentityEditError, match="CLIP has no weight"):
        priors.apply_identity_prior(model, tiny_text_encoders.clip("sd1" if family == "sdxl" else "sdxl"), prior)
    other = tiny_models.FAMILIES[family](seed=9)
    assert "another checkpoint" in str(priors.check_identity_prior(other, clip, prior))


def test_a_lora_of_full_rank_is_the_prior(learned: Any):
    """Loaded by ComfyUI's own LoRA code."""
    _, model, clip, prior = learned
    tensors, error = priors.as_lora(prior, 4096)
    assert error < 1e-5
    with torch.inference_mode():
        by_lora = comfy.sd.load_lora_for_models(model, clip, tensors, 1.0, 1.0)
        by_prior = priors.apply_identity_prior(model, clip, prior)
        for ours, theirs in ((by_prior[0], by_lora[0]), (by_prior[1].patcher, by_lora[1].patcher)):
            assert ours.patches.keys() == theirs.patches.keys()
            base, exact, found = (loaded_weights(each) for each in (ours.clone(), ours, theirs))
            for key in ours.patches:
                assert float((exact[key] - found[key]).norm()) <= 1e-4 * float(exact[key].norm()) + 1e-7
            assert base.keys() == found.keys()


def test_a_lora_of_all_weights_is_the_prior():
    with torch.inference_mode():
        model, clip = make("sdxl")
        prior, _ = train(model, clip, dataclasses.replace(SETTINGS, weights=ALL, steps=1))
    test_a_lora_of_full_rank_is_the_prior(("sdxl", model, clip, prior))


@pytest.mark.parametrize("rank", [1, 4])
def test_a_lora_of_lower_rank_is_the_best_there_is(learned: Any, rank: int):
    _, _, _, prior = learned
    told = []
    tensors, error = priors.as_lora(prior, rank, lambda *values: told.append(values))
    left, whole = 0.0, 0.0
    for change in (*prior.model_change.values(), *prior.clip_change.values()):
        if change.ndim == 2:
            squares = torch.linalg.eigvalsh(change.double() @ change.double().T).flip(0).clamp(min=0)
            left, whole = left + float(squares[rank:].sum()), whole + float(squares.sum())
    assert error == pytest.approx(math.sqrt(left / whole), rel=1e-3) and 0.0 < error < 1.0
    assert all(value.shape[0] == rank for key, value in tensors.items() if key.endswith("lora_down.weight"))
    assert told[-1][0] == told[-1][1] == len(prior.model_change) + len(prior.clip_change)
    with pytest.raises(IdentityEditError, match="rank is 0"):
        priors.as_lora(prior, 0)


def test_a_lora_of_large_weights_is_nearly_the_best(learned: Any):
    """By random projection: exact for a change of that rank, and within 1 % of the smallest error for another."""
    prior, generator = learned[3], torch.Generator().manual_seed(5)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((300, 8), (8, 400)))
    noise = torch.randn(300, 400, generator=generator, dtype=torch.float64)
    before = torch.random.get_rng_state()
    for share, largest in ((0.0, 1e-5), (0.5, 1.0)):
        change = left @ right + share * noise
        alone = dataclasses.replace(prior, model_change={"diffusion_model.out.weight": change.float()}, clip_change={})
        squares = torch.linalg.svdvals(change).square()
        best = float((squares[8:].sum() / squares.sum()).sqrt())
        error = priors.as_lora(alone, 8)[1]
        assert error <= 1.01 * best + 1e-6 and error < largest
    assert torch.equal(torch.random.get_rng_state(), before)


def test_halves_in_the_file_are_close_to_what_was_learned():
    with torch.inference_mode():
        exact, half = (
            train(*make("sd1"), dataclasses.replace(SETTINGS, file_dtype=dtype))[0] for dtype in ("float32", "float16")
        )
    for key, change in exact.model_change.items():
        assert half.model_change[key].dtype == torch.float16
        torch.testing.assert_close(half.model_change[key].float(), change, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("change", [{"precision": "float8"}, {"file_dtype": "int8"}, {"batch_size": 0}])
def test_settings_are_checked(change: dict[str, Any]):
    with pytest.raises(IdentityEditError, match=next(iter(change))):
        dataclasses.replace(SETTINGS, **change)
