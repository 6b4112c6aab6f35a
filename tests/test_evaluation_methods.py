"""What the benchmark of editing methods rests on: the same weights in diffusers, and whose work counts for whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch


@pytest.mark.usefixtures("pack")
def test_the_unet_for_diffusers_is_the_same_network():
    from identity_edit_pack.evaluation import diffusers_models

    model = tiny_models.sd1()
    twin = diffusers_models.unet(model)
    x, context = tiny_models.latent(1, batch=2), tiny_models.conditioning(2, batch=2)[0][0]
    with torch.no_grad():
        ours = model.model.diffusion_model(x, torch.tensor([500.0, 500.0]), context=context)
        theirs = twin(x, 500, encoder_hidden_states=context).sample
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.usefixtures("pack")
def test_the_autoencoder_for_diffusers_is_comfyuis():
    from identity_edit_pack.evaluation import diffusers_models

    class Halves:
        """A VAE whose latent is the image, eight times smaller and half as bright."""

        def encode(self, images: torch.Tensor) -> torch.Tensor:
            assert images.shape[-1] == 3 and 0.0 <= float(images.min()) <= float(images.max()) <= 1.0
            return images.permute(0, 3, 1, 2)[..., ::8, ::8] / 2

        def decode(self, latent: torch.Tensor) -> torch.Tensor:
            return (latent * 2).permute(0, 2, 3, 1)

    made = diffusers_models.autoencoder(Halves(), tiny_models.sd1(), 64)
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    latent = made.encode(image).latent_dist
    assert torch.equal(latent.mean, latent.sample()) and torch.equal(latent.mean, latent.mode())
    assert torch.allclose(made.decode(latent.mean).sample, image[..., ::8, ::8], atol=1e-6)
    assert made.config.scaling_factor == 0.18215 and 2 ** (len(made.config.block_out_channels) - 1) == 8


@pytest.mark.usefixtures("pack")
def test_evaluations_are_counted_one_for_each_image_and_prompt():
    from identity_edit_pack.evaluation import diffusers_models
    from identity_edit_pack.evaluation.method import measured

    model = tiny_models.sd1()
    x, context = tiny_models.latent(1, batch=3), tiny_models.conditioning(2, batch=3)[0][0]
    with torch.no_grad(), measured() as cost:
        model.model.diffusion_model(x, torch.full((3,), 500.0), context=context)
        diffusers_models.unet(model)(x[:2], 500, encoder_hidden_states=context[:2])
    assert cost.evaluations == 5 and cost.seconds > 0.0
    with torch.no_grad():
        model.model.diffusion_model(x, torch.full((3,), 500.0), context=context)
    assert cost.evaluations == 5  # nothing is watched afterwards


@pytest.mark.usefixtures("pack")
def test_shared_work_is_done_once_and_counts_for_all_that_use_it():
    from identity_edit_pack.evaluation.method import EDIT, PREPARATION, SUBJECT, Cost, SharedWork, measured

    model, x = tiny_models.sd1(), tiny_models.latent(1)
    context = tiny_models.conditioning(2)[0][0]

    def evaluate(times: int) -> int:
        with torch.no_grad():
            for _ in range(times):
                model.model.diffusion_model(x, torch.full((1,), 500.0), context=context)
        return times

    work = SharedWork()

    def method() -> tuple[Cost, dict[str, Cost]]:
        work.begin()
        with measured() as own:
            assert work.once(("case", "inversion"), lambda: evaluate(3), EDIT) == 3
            work.once(("subject", 1), lambda: evaluate(5), SUBJECT)
            work.once(("file",), lambda: evaluate(7), PREPARATION)
            evaluate(2)
        return work.edit_cost(own), dict(work.used)

    first, _ = method()
    second, used = method()
    assert first.evaluations == second.evaluations == 5  # 2 of its own and the 3 shared ones
    assert used[SUBJECT].evaluations == 5
    work.forget("case")
    assert ("case", "inversion") not in work._results and ("subject", 1) in work._results


@pytest.mark.usefixtures("pack")
def test_a_method_says_what_it_lacks(tmp_path: Path):
    from identity_edit_pack.evaluation import methods as edit_methods
    from identity_edit_pack.evaluation.cases import EditCase

    def case(**changes: Any) -> EditCase:
        return EditCase("one", "", tmp_path / "one.png", "a cat", "a dog", **changes)

    settings = edit_methods.MethodSettings()
    assert edit_methods.METHODS["lipe"].lacks(case(), settings) == ("references", "class word")
    known = case(references=(tmp_path / "two.png",), subject_word="sks", class_word="cat")
    assert edit_methods.METHODS["lipe"].lacks(known, settings) == ()
    assert edit_methods.METHODS["mcdm"].lacks(known, settings) == ("mcdm", "instruction")
    assert edit_methods.METHODS["reference-masactrl"].lacks(known, settings) == ("masactrl",)
    assert set(edit_methods.SAME_ALGORITHM) | set(edit_methods.SAME_ALGORITHM.values()) <= set(edit_methods.METHODS)


@pytest.fixture
def subject(tmp_path: Path) -> tuple[Any, Any, Any]:
    """A tiny checkpoint, a case of a subject with three references, and settings of one step of everything."""
    import tiny_text_encoders
    import tiny_vision
    from identity_edit_pack.demo_world.train_w_plus import W_PLUS_PATH
    from identity_edit_pack.evaluation.cases import EditCase, save_image
    from identity_edit_pack.evaluation.method import Checkpoint, MethodSettings
    from identity_edit_pack.pipelines.training.images import encode_images

    generator = torch.Generator().manual_seed(0)
    photos = [save_image(torch.rand(64, 64, 3, generator=generator), tmp_path / f"{number}.png") for number in range(3)]
    checkpoint = Checkpoint(tiny_models.sd1(), tiny_text_encoders.clip("sd1"), tiny_vision.VAE(), tmp_path / "x", 64)
    case = EditCase(
        "one",
        "",
        photos[0],
        "a cat",
        "a cat in the snow",
        references=tuple(photos),
        subject_word="sks",
        class_word="cat",
    )

    def regularization(checkpoint: Any, case: Any) -> Any:
        return encode_images(checkpoint.vae, case.load_references(checkpoint.size), ["a cat"] * 3)

    settings = MethodSettings(
        steps=2, guidance_scale=2.0, training_steps=1, learning_rate=1e-2, regularization=regularization,
        subject_steps=1, subject_learning_rate=1e-1, updates_per_step=1, inner_steps=1, style_steps=2,
        style_learning_rate=1e-1, style_strength=1.0, w_plus_encoder=W_PLUS_PATH,
    )  # fmt: skip
    return checkpoint, case, settings


@pytest.mark.usefixtures("pack")
def test_generating_methods_learn_the_subject_once_and_draw_what_the_checkpoint_does_not(subject: Any):
    import comfy.sample
    from identity_edit_pack.evaluation import generating_methods
    from identity_edit_pack.evaluation.method import SUBJECT

    checkpoint, case, settings = subject
    noise = comfy.sample.prepare_noise(torch.zeros(1, 4, 8, 8), 0)
    prompts = [
        checkpoint.clip.encode_from_tokens_scheduled(checkpoint.clip.tokenize(t)) for t in (case.target_prompt, "")
    ]
    stock = comfy.sample.sample(
        checkpoint.model,
        noise,
        2,
        2.0,
        "ddim",
        "ddim_uniform",
        *prompts,
        torch.zeros(1, 4, 8, 8),
        disable_pbar=True,
        seed=0,
    )
    plain = generating_methods.METHODS["stable-diffusion"].edit(checkpoint, case, settings)
    assert torch.allclose(plain, checkpoint.vae.decode(stock), atol=1e-5)
    for name, method in generating_methods.METHODS.items():
        if name == "stable-diffusion":
            continue
        assert method.lacks(case, settings) == ()
        settings.work.begin()
        image = method.edit(checkpoint, case, settings)
        learned = settings.work.used[SUBJECT].evaluations
        assert image.shape == (1, 64, 64, 3) and bool(torch.isfinite(image).all()), name
        assert float((image - plain).abs().max()) > 1e-4, name
        made = settings.work.made.evaluations
        settings.work.begin()
        again = method.edit(checkpoint, case, settings)
        assert torch.equal(again, image) and learned > 0, name
        assert settings.work.made.evaluations == 0 and settings.work.used[SUBJECT].evaluations == learned, (name, made)
