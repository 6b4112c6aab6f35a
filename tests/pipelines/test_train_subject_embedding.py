"""Training a subject's embeddings: the paper's loss by other libraries in float64, Algorithm 1's order, resuming."""

from __future__ import annotations

import dataclasses
import functools
import gc
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import tiny_models
import tiny_text_encoders
import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine.families import schedule
from identity_edit_pack.pipelines.hifi_tuner import train_subject_embedding as trained
from identity_edit_pack.pipelines.hifi_tuner.subject_embedding import OUTPUT, WORD, apply_subject
from identity_edit_pack.pipelines.hifi_tuner.train_subject_embedding import SubjectSettings, train_subject_embedding
from identity_edit_pack.pipelines.lipe import identity_prior, train_identity_prior
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.training import images as training_images
from identity_edit_pack.pipelines.training import loop as training_loop
from identity_edit_pack.pipelines.training.images import TrainingImages
from identity_edit_pack.pipelines.training.loop import generator_of

CAPTIONS = ["a sks cat sitting on the grass", "a smiling sks cat in the snow"]
SETTINGS = SubjectSettings(
    class_word="cat", token="sks", steps=5, learning_rate=1e-2, sampling_steps=4, updates_per_step=2,
    regularization_weight=2e-3, precision="float32", seed=7, checkpoint_every=1, sample_every=2,
    sample_guidance_scale=2.0, sample_steps=3,
)  # fmt: skip


def images(captions: list[str] = CAPTIONS, masked: bool = True, seed: int = 1) -> TrainingImages:
    generator = torch.Generator().manual_seed(seed)
    latents = [5.0 * torch.randn(4, 8, 8, generator=generator) for _ in captions]
    masks = [(torch.rand(8, 8, generator=generator) > 0.5).float() if masked else None for _ in captions]
    return TrainingImages(latents, captions, masks, f"images {seed}")


IMAGES = images()


def make(family: str) -> tuple[Any, Any]:
    return tiny_models.FAMILIES[family](), tiny_text_encoders.clip(family)


def train(model: Any, clip: Any, settings: Any = SETTINGS, **arguments: Any):
    shown = arguments.pop("shown", IMAGES)
    return train_subject_embedding(model, clip, shown, settings, **arguments)


def without_steps(**changes: Any) -> SubjectSettings:
    return dataclasses.replace(SETTINGS, updates_per_step=0, **changes)


# -- the paper's loss --------------------------------------------------------------------------------------------------


class Reference:
    """Equation 6 by diffusers and transformers in float64, in the papers' scale."""

    def __init__(self, model: Any, clip: Any) -> None:
        self.unet = tiny_models.diffusers_twin(model).double().requires_grad_(False)
        self.text_encoder = tiny_text_encoders.transformers_twin(clip).double().requires_grad_(False)
        self.sigmas = engine.require(model).sampling.sigmas.double()
        self.clip, self.model = clip, model

    def tokens(self, text: str) -> list[int]:
        return [token for token, _ in self.clip.tokenize(text)["l"][0]]

    def encode(self, **arguments: Any) -> torch.Tensor:
        torch.set_default_dtype(torch.float64)  # transformers makes its mask in the default dtype
        try:
            return self.text_encoder(**arguments).last_hidden_state
        finally:
            torch.set_default_dtype(torch.float32)

    def start(self, kind: str) -> torch.Tensor:
        if kind == OUTPUT:
            return self.encode(input_ids=torch.tensor([self.tokens("")]))[0, -5:].detach()
        table = self.text_encoder.get_input_embeddings().weight
        return table[self.tokens("cat")[1]].detach().repeat(5, 1)

    def context(self, kind: str, caption: str, c_s: torch.Tensor) -> torch.Tensor:
        if kind == OUTPUT:
            c = self.encode(input_ids=torch.tensor([self.tokens(caption.replace("sks ", ""))]))
            return torch.cat([c[:, :-5], c_s[None]], dim=1)
        table = self.text_encoder.get_input_embeddings().weight
        before, after = caption.split("sks cat")
        first, last = self.tokens(before), self.tokens(after)
        words = len(first) - first.count(49407)
        rows = torch.cat([table[first[:words]], c_s, table[last[1:]]])[:77]
        # transformers 4 and 5 take no embeddings in CLIPTextModel: its table gives them instead.
        handle = self.text_encoder.get_input_embeddings().register_forward_hook(lambda *_: rows[None])
        try:
            ids = [0] * (words + 5) + last[1 : 77 - words - 5 + 1]
            return self.encode(input_ids=torch.tensor([ids]))
        finally:
            handle.remove()

    def loss(self, kind: str, c_s: torch.Tensor, index: int, what: str, weight: float, t: int | None) -> torch.Tensor:
        start, squares = self.start(kind), []
        chosen = training_images.batch_indices(IMAGES, 2, index, SETTINGS.seed, what)
        generator = generator_of(SETTINGS.seed, index, what)
        times = torch.randint(1000, (2,), generator=generator)
        noises = torch.randn(2, 4, 8, 8, generator=generator).double()
        for place, number in enumerate(chosen):
            time = int(times[place]) if t is None else t
            alpha_bar = 1.0 / (1.0 + self.sigmas[time] ** 2)
            z_0 = engine.to_model_scale(self.model, IMAGES.latents[number]).double()
            z = alpha_bar.sqrt() * z_0 + (1 - alpha_bar).sqrt() * noises[place]
            context = self.context(kind, IMAGES.captions[number], c_s)
            eps = self.unet(z[None], torch.tensor([time]), encoder_hidden_states=context).sample[0]
            mask = IMAGES.masks[number].double()
            squares.append((mask * (eps - noises[place]) ** 2).sum() / (4 * mask.sum()))
        return torch.stack(squares).mean() + weight * (c_s - start).square().sum()


@pytest.mark.parametrize("kind", [OUTPUT, WORD])
def test_loss_and_gradient_are_those_of_equation_6(kind: str):
    """Two steps of plain gradient descent, so that the second one's tie is not zero; in inference mode and without."""
    rate, weight = (50.0 if kind == OUTPUT else 0.5), 2e-3
    reference, expected = Reference(*make("sd1")), []
    c_s = reference.start(kind).requires_grad_(True)
    for step in range(2):
        loss = reference.loss(kind, c_s, step, "shared vectors", weight, None)
        expected.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, c_s)
        c_s = (c_s - rate * gradient).detach().requires_grad_(True)
    moved = (c_s - reference.start(kind)).float().detach()
    assert float(moved.norm()) > 0.0
    settings = without_steps(
        kind=kind, batch_size=2, regularization_weight=weight, steps=2, optimizer="SGD", learning_rate=rate
    )
    for inference_mode in (False, True):
        with torch.inference_mode(inference_mode):
            subject, run = train(*make("sd1"), settings)
        assert run.losses == pytest.approx(expected, rel=1e-4)
        (vectors,) = subject.vectors.values()
        ours = vectors - reference.start(kind).float()
        torch.testing.assert_close(ours, moved, rtol=2e-3, atol=2e-3 * float(moved.abs().max()))
        assert subject.step_vectors is None and subject.timesteps == ()


def test_the_steps_of_algorithm_1(monkeypatch: pytest.MonkeyPatch):
    """Each DDIM timestep from the highest on, I updates each, from what the one before ended with."""
    model, clip = make("sd1")
    seen: list[tuple[list[int], torch.Tensor]] = []
    original = trained.denoising_losses

    def recording(networks: Any, batch: Any, text: Any) -> Any:
        last_rows = text[0][:, -5:].detach().clone()
        assert torch.equal(last_rows[0], last_rows[1]), "both captions end in c_s"
        seen.append((batch.t.tolist(), last_rows[0]))
        return original(networks, batch, text)

    monkeypatch.setattr(trained, "denoising_losses", recording)
    rate = 0.1
    settings = dataclasses.replace(SETTINGS, batch_size=2, steps=3, optimizer="SGD", learning_rate=rate)
    subject, run = train(model, clip, settings)
    assert subject.timesteps == (751, 501, 251, 1) and len(run.losses) == 3 + 4 * 2 == len(seen)
    assert [step for step, _ in run.samples] == [2, 3, 5, 7, 9, 11]
    reference = Reference(model, clip)
    c = subject.vectors[OUTPUT].double()
    for index, (t, used) in enumerate(seen[3:]):
        expected = subject.timesteps[index // 2]
        assert t == [expected] * 2
        torch.testing.assert_close(used, c.float(), rtol=1e-4, atol=1e-5)
        c = c.detach().requires_grad_(True)
        loss = reference.loss(OUTPUT, c, index, "step-wise vectors", 2e-3, expected)
        assert run.losses[3 + index] == pytest.approx(loss.item(), rel=1e-4)
        (gradient,) = torch.autograd.grad(loss, c)
        c = c - rate * gradient
        if index % 2 == 1:
            learned = subject.step_vectors[OUTPUT][index // 2]
            torch.testing.assert_close(learned, c.detach().float(), rtol=1e-4, atol=1e-5)


def test_velocity_models_learn_through_their_denoised_output():
    """The loss of a v-prediction model is that of its velocity (Salimans and Ho 2022)."""
    model, clip = make("sd2_v")
    _, run = train(model, clip, without_steps(regularization_weight=0.0, steps=1))
    (number,) = training_images.batch_indices(IMAGES, 1, 0, SETTINGS.seed, "shared vectors")
    generator = generator_of(SETTINGS.seed, 0, "shared vectors")
    t, noise = torch.randint(1000, (1,), generator=generator), torch.randn(1, 4, 8, 8, generator=generator)
    sigma = engine.require(model).sampling.sigmas[t].reshape(-1, 1, 1, 1)
    z_0 = engine.to_model_scale(model, IMAGES.latents[number])[None]
    text = clip.encode_from_tokens(clip.tokenize(IMAGES.captions[number].replace("sks ", "")))
    text[:, -5:] = clip.encode_from_tokens(clip.tokenize(""))[:, -5:]
    with torch.no_grad():
        x = (z_0 + sigma * noise) / torch.sqrt(1 + sigma**2)
        v = model.model.diffusion_model(x, t.float(), context=text)
    target = (noise - sigma * z_0) / torch.sqrt(1 + sigma**2)
    mask = IMAGES.masks[number]
    expected = (mask * (v - target) ** 2).sum() / (4 * mask.sum())
    assert run.losses[0] == pytest.approx(float(expected), rel=1e-4)


# -- what is spent and what is left ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OUTPUT, WORD])
@pytest.mark.parametrize("family", ["sd1", "sd2_v", "sdxl"])
def test_families_and_what_they_spend(family: str, kind: str, monkeypatch: pytest.MonkeyPatch):
    with torch.inference_mode():
        model, clip = make(family)
    weights = {
        name: value.detach().clone()
        for part in (model.model, clip.cond_stage_model)
        for name, value in part.named_parameters()
    }
    counted = {"network": 0, "text": 0}

    def count(module: Any, name: str, what: str) -> None:
        original = getattr(module, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counted[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    count(model.model.diffusion_model, "forward", "network")
    count(clip.cond_stage_model, "encode_token_weights", "text")
    settings = dataclasses.replace(SETTINGS, kind=kind, sample_prompt=CAPTIONS[0], sample_every=0, accumulation=2)
    with torch.inference_mode():
        subject, run = train(model, clip, settings)
    steps = 5 + 4 * 2
    samples = 2 * 3  # one at the end of each phase, both sides in one evaluation
    assert counted["network"] == steps * 2 + samples
    assert counted["text"] == (3 if kind == OUTPUT else 1 + steps * 2 + samples), "the null prompt once in either case"
    assert len(run.losses) == steps and all(loss > 0.0 for loss in run.losses)
    names = {OUTPUT} if kind == OUTPUT else {"clip_l", "clip_g"} if family == "sdxl" else {"clip_l"}
    assert set(subject.vectors) == set(subject.step_vectors) == names
    for name, vectors in subject.vectors.items():
        assert vectors.shape[0] == 5 and subject.step_vectors[name].shape == (4, *vectors.shape)
        assert len({tuple(row.flatten().tolist()) for row in subject.step_vectors[name]}) == 4, "each is its own"
    for part in (model.model, clip.cond_stage_model):
        for name, value in part.named_parameters():
            assert torch.equal(value, weights[name]) and value.grad is None
    with torch.inference_mode():
        _, conditioning, warning = apply_subject(model, clip, subject, CAPTIONS[0])
    assert warning is None and conditioning[0][0].shape == (1, 77, 32)


@pytest.mark.parametrize("kind", [OUTPUT, WORD])
def test_a_longer_run_keeps_no_more_tensors(kind: str):
    model, clip = make("sd1")
    living: list[int] = []

    def progress(done: int, *_: Any) -> None:
        gc.collect()
        living.append(sum(isinstance(one, torch.Tensor) for one in gc.get_objects()))

    gc.freeze()  # only what is new from here on is counted, and looked through
    try:
        train(model, clip, without_steps(kind=kind, steps=12, sample_every=0, checkpoint_every=0), progress=progress)
    finally:
        gc.unfreeze()
    assert min(living) > 0
    # Both captions have been seen by then; the last step makes a sample, which is kept.
    assert max(living[8:-1]) <= max(living[4:7])


@functools.cache
def uninterrupted(kind: str) -> Any:
    return train(*make("sd1"), dataclasses.replace(SETTINGS, kind=kind))


@pytest.mark.parametrize(("kind", "stop_at"), [(OUTPUT, 3), (OUTPUT, 5), (OUTPUT, 8), (WORD, 8)])
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, stop_at: int, tmp_path: Path):
    model, clip = make("sd1")
    settings = dataclasses.replace(SETTINGS, kind=kind)
    whole, record = uninterrupted(kind)

    def stop(done: int, *_: Any) -> None:
        if done == stop_at:
            raise comfy.model_management.InterruptProcessingException()

    where = lambda run: str(tmp_path / run)  # noqa: E731
    settings = dataclasses.replace(settings, checkpoint_every=2)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(model, clip, settings, checkpoint=where, progress=stop)
    resumed, second = train(model, clip, settings, checkpoint=where)
    assert second.resumed_at == stop_at
    assert second.losses == pytest.approx(record.losses, rel=1e-6)
    assert [step for step, _ in second.samples] == [step for step, _ in record.samples]
    for name, vectors in whole.vectors.items():
        torch.testing.assert_close(resumed.vectors[name], vectors, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(resumed.step_vectors[name], whole.step_vectors[name], rtol=1e-6, atol=1e-6)
    for (_, ours), (_, theirs) in zip(second.samples, record.samples, strict=True):
        assert tiny_models.relative_error(ours, theirs) < 1e-4


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, clip = make("sd1")
    whole, _ = uninterrupted(OUTPUT)
    where = lambda run: str(tmp_path / run)  # noqa: E731

    class Killed(BaseException):
        pass

    def kill(done: int, *_: Any) -> None:
        if done == 8:
            monkeypatch.setattr(training_loop, "_write_checkpoint", lambda *_: None)  # a killed process writes no more
            raise Killed

    settings = dataclasses.replace(SETTINGS, checkpoint_every=2)
    with pytest.raises(Killed):
        train(model, clip, settings, checkpoint=where, progress=kill)
    monkeypatch.undo()
    resumed, record = train(model, clip, settings, checkpoint=where)
    assert record.resumed_at == 5 + 2, "all of the first phase, two of the three steps of the second"
    torch.testing.assert_close(resumed.step_vectors, whole.step_vectors, rtol=1e-6, atol=1e-6)


def test_the_first_phase_can_be_made_longer_and_other_settings_begin_anew(tmp_path: Path):
    model, clip = make("sd1")
    where = lambda run: str(tmp_path / run)  # noqa: E731
    train(model, clip, dataclasses.replace(SETTINGS, steps=4), checkpoint=where)
    assert train(model, clip, without_steps(), checkpoint=where)[1].resumed_at == 4, "shared vectors are the same"
    assert train(model, clip, dataclasses.replace(SETTINGS, steps=6), checkpoint=where)[1].resumed_at == 5
    for changes in ({"regularization_weight": 0.2}, {"tokens": 4}, {"masked": False}, {"kind": WORD}):
        assert train(model, clip, without_steps(**changes), checkpoint=where)[1].resumed_at == 0


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OUTPUT, WORD])
def test_the_rows_of_table_2_are_settings(kind: str):
    model, clip = make("sd1")
    plain = without_steps(kind=kind, masked=False, regularization_weight=0.0, steps=4, sample_every=0)
    subjects = {}
    for name, changes in (("baseline", {}), ("mask", {"masked": True}), ("tied", {"regularization_weight": 100.0})):
        subjects[name] = train(model, clip, dataclasses.replace(plain, **changes))[0]
    (name,) = subjects["baseline"].vectors
    assert not torch.equal(subjects["baseline"].vectors[name], subjects["mask"].vectors[name])
    distance = {row: one.training["distance_from_start"][name] for row, one in subjects.items()}
    assert distance["tied"] < distance["baseline"]
    unmasked = images(masked=False)
    again = train(model, clip, plain, shown=dataclasses.replace(unmasked, latents=IMAGES.latents))[0]
    assert torch.equal(again.vectors[name], subjects["baseline"].vectors[name])


def test_bfloat16_and_checkpointing():
    model, clip = make("sd1")
    settings = dataclasses.replace(SETTINGS, precision="float32", kind=WORD)
    exact, exact_run = train(model, clip, settings)
    same, _ = train(model, clip, dataclasses.replace(settings, checkpointing=True))
    torch.testing.assert_close(same.vectors, exact.vectors, rtol=1e-4, atol=1e-4)
    subject, run = train(model, clip, dataclasses.replace(settings, precision="bfloat16", checkpointing=True))
    assert subject.vectors["clip_l"].dtype == torch.float32
    assert run.losses == pytest.approx(exact_run.losses, rel=0.05)


def test_on_a_model_with_an_identity_prior():
    """The prior's token stays in the captions when the subject is trained without one."""
    model, clip = make("sd1")
    of_prior = train_identity_prior.PriorSettings(
        token="sks", class_word="cat", precision="float32", steps=2, learning_rate=1e-2, sample_steps=2
    )
    prior, _ = train_identity_prior.train_identity_prior(model, clip, IMAGES, None, of_prior)
    with_prior = identity_prior.apply_identity_prior(model, clip, prior)
    settings = dataclasses.replace(SETTINGS, token="")
    subject, run = train(*with_prior, settings)
    without, other = train(model, clip, settings)
    assert run.losses[0] != pytest.approx(other.losses[0], rel=1e-3)
    assert not torch.equal(subject.vectors[OUTPUT], without.vectors[OUTPUT])
    patched, conditioning, warning = apply_subject(*with_prior, subject, "a sks cat")
    assert warning is None and patched.patches.keys() == prior.model_change.keys()
    text = with_prior[1].encode_from_tokens(with_prior[1].tokenize("a sks cat"))
    torch.testing.assert_close(conditioning[0][0][:, :-5], text[:, :-5])


def test_images_and_captions_of_several_lengths_in_one_batch():
    model, clip = make("sd1")
    long = "a cat " + "on the grass " * 30
    shown = images(["a cat", long, "a cat sitting"])
    _, run = train(model, clip, without_steps(batch_size=3), shown=shown)
    singles = [train(model, clip, without_steps(steps=1), shown=images([caption]))[1] for caption in ("a cat", long)]
    assert len(run.losses) == 5 and all(len(one.losses) == 1 for one in singles)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "captions", "message"),
    [
        (SETTINGS, ["a sks cat", "a dog"], "caption of image 2 names the subject neither"),
        (SETTINGS, ["a sks cat", ""], "caption of image 2 names the subject neither"),
        (SETTINGS, ["a cat " + "on the grass " * 24, "a cat"], "caption of image 1 is too long: the prompt has 74"),
        (dataclasses.replace(SETTINGS, kind=WORD, sample_prompt="a dog"), CAPTIONS, "'a dog' does not name"),
    ],
)
def test_captions_are_checked_before_the_training(settings: Any, captions: list[str], message: str):
    with pytest.raises(IdentityEditError, match=message):
        train(*make("sd1"), settings, shown=images(captions))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "words"}, "kind is 'words'; choose one of output, word"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"tokens": 0}, "tokens is 0; choose a number from 1 to"),
        ({"tokens": 70}, "tokens is 70; choose a number from 1 to"),
        ({"batch_size": 0}, "batch_size is 0; choose a number from 1"),
        ({"sampling_steps": 0}, "sampling_steps is 0; choose a number from 1"),
        ({"updates_per_step": -1}, "updates_per_step is -1; choose a number from 0"),
        ({"regularization_weight": -1.0}, "regularization_weight is -1"),
        ({"regularization_weight": float("nan")}, "regularization_weight is nan"),
        ({"class_word": " "}, "class_word is empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(IdentityEditError, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_other_bad_input():
    with pytest.raises(IdentityEditError, match="steps is -1; choose a number from 1"):
        dataclasses.replace(SETTINGS, steps=-1)
    model, clip = make("sd1")
    with pytest.raises(IdentityEditError, match="masked_loss is on but no image has a mask"):
        train(model, clip, shown=images(masked=False))
    broken = images()
    broken.latents[0][0, 0, 0] = float("nan")
    broken.latents[1][0, 0, 0] = float("nan")
    with pytest.raises(IdentityEditError, match="not finite at step 1"):
        train(model, clip, shown=broken)
    with pytest.raises(IdentityEditError, match="steps is 2000"):
        train(model, clip, dataclasses.replace(SETTINGS, sampling_steps=2000))
    assert schedule.ddim_timesteps(50).tolist()[0] == 981
