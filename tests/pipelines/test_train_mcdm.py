"""Training an MCDM: the right loss on the right conditions, draws, kills, and the pairs' files."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import numpy as np
import pytest
import tiny_models
import tiny_text_encoders
import tiny_vision
import torch
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.mcdm import encoded_pairs
from identity_edit_pack.pipelines.mcdm import model as mcdm
from identity_edit_pack.pipelines.mcdm import train as train_mcdm
from identity_edit_pack.pipelines.mcdm.encoded_pairs import PairFiles
from identity_edit_pack.pipelines.mcdm.train import IMAGE_BIT, SPATIAL_BIT, TEXT_BIT, MCDMSettings
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.training.loop import TrainingSettings
from PIL import Image

SETTINGS = MCDMSettings(
    steps=4, learning_rate=1e-3, batch_size=2, ema_decay=0.9, image_tokens=77, precision="float32", checkpointing=False,
    seed=7, checkpoint_every=1, sample_steps=2,
)  # fmt: skip


def make_pairs(folder: Path, count: int = 5, size: int = 64) -> list[PairFiles]:
    generator = np.random.default_rng(0)
    pairs = []
    for number in range(count):
        names = [folder / f"{number}-{side}.png" for side in "ab"]
        for name in names:
            Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(name)
        pairs.append(PairFiles(*names, f"a cat {number}, calm", f"a cat {number}, laughing"))
    return pairs


def train(pairs: list[PairFiles], folder: Path, settings: Any = SETTINGS, **arguments: Any):
    parts = arguments.pop("parts", None) or networks()
    model, clip, vae, vision = parts
    return train_mcdm.train_mcdm(model, clip, vae, vision, pairs, settings, str(folder), **arguments)


def networks(name: str = "sd1") -> tuple[Any, Any, Any, Any]:
    return tiny_models.FAMILIES[name](), tiny_text_encoders.clip(name), tiny_vision.VAE(), tiny_vision.clip_vision()


# -- draws -------------------------------------------------------------------------------------------------------------


def test_draws_have_the_papers_shares_and_every_pair_has_its_turn(tmp_path: Path):
    pairs = encoded_pairs.encode_pairs(
        make_pairs(tmp_path), tiny_vision.VAE(), tiny_vision.clip_vision(), str(tmp_path)
    )
    settings = MCDMSettings(batch_size=4, seed=3)
    batches = [train_mcdm.draw_mcdm_batch(pairs, settings, 1000, index) for index in range(1500)]
    count = 4 * len(batches)
    for start in range(0, 20, 4):  # rounds of five pairs over batches of four
        some = [number for batch in batches[start * 5 : start * 5 + 5] for number in batch.chosen]
        assert Counter(some) == dict.fromkeys(range(5), 4)
    reconstructs = sum(int(batch.reconstructs.sum()) for batch in batches)
    assert reconstructs / count == pytest.approx(0.05, abs=0.012)
    dropped = Counter(bits for batch in batches for bits in batch.dropped.tolist())
    assert dropped[0] / count == pytest.approx(0.8, abs=0.02)
    assert set(dropped) == set(range(8))
    for bits in range(1, 8):
        assert dropped[bits] / count == pytest.approx(0.2 / 7, abs=0.01)
    again = train_mcdm.draw_mcdm_batch(pairs, settings, 1000, 11)
    assert torch.equal(again.noise, batches[11].noise) and again.chosen == batches[11].chosen


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd1", "sd2_v", "sdxl"])
def test_the_loss_is_that_of_the_stock_model_with_the_conditions_of_inference(name: str, tmp_path: Path):
    """Each sample alone through ComfyUI's own sampling with `mcdm.with_images`, at the noise level drawn."""
    from identity_edit_pack.pipelines.engine.edit_model import as_edit_model

    model, clip, vae, vision = networks(name)
    with torch.no_grad():
        edit = as_edit_model(model)
        first = edit.model.diffusion_model.input_blocks[0][0].weight
        first[:, 4:] = 0.1 * torch.randn(first[:, 4:].shape, generator=torch.Generator().manual_seed(0))
    pairs = make_pairs(tmp_path)
    settings = dataclasses.replace(
        SETTINGS, steps=1, learning_rate=1e-12, weight_decay=0.0, ema_decay=0.0, checkpoint_every=0, batch_size=6,
        identity_share=0.5, dropout=0.8,
    )  # fmt: skip
    trained, run = train(pairs, tmp_path, settings, parts=(edit, clip, vae, vision))
    batch = train_mcdm.draw_mcdm_batch(trained.encoded, settings, 1000, 0)
    assert len({*batch.dropped.tolist()}) > 1 and 0 < int(batch.reconstructs.sum()) < 6  # the batch tests something

    losses = []
    sampling = engine.require(edit).sampling
    for row, number in enumerate(batch.chosen):
        pair = pairs[number]
        bits = int(batch.dropped[row])
        source = encoded_pairs.read_image(pair.source)[None]
        images = mcdm.see_images(trained.mcdm, trained.model, vision, vae, source)
        prompt = pair.source_prompt if batch.reconstructs[row] else pair.target_prompt
        text = clip.encode_from_tokens_scheduled(clip.tokenize("" if bits & TEXT_BIT else prompt))
        conditioning = mcdm.without_images(
            mcdm.with_images(text, images),
            spatial=bool(bits & SPATIAL_BIT),
            image=bool(bits & IMAGE_BIT),
            name="positive",
        )
        target = source if batch.reconstructs[row] else encoded_pairs.read_image(pair.target)[None]
        z_0 = engine.to_model_scale(edit, vae.encode(target))
        sigma = sampling.sigmas[batch.t[row]].cpu()
        noise = batch.noise[row : row + 1]

        def evaluate(evaluator: Any, _: torch.Tensor, x: Any = z_0 + sigma * noise, at: Any = sigma) -> torch.Tensor:
            return evaluator.denoised(x, at)

        sigmas = torch.stack([sigma, torch.zeros(())])
        denoised = engine.run_loop(trained.model, conditioning, None, torch.zeros_like(z_0), sigmas, evaluate)
        error = (z_0 + sigma * noise - denoised) / sigma - noise
        if name == "sd2_v":
            error = error * torch.sqrt(1 + sigma**2)
        losses.append(float(error.square().mean()))
    assert run.losses[0] == pytest.approx(sum(losses) / 6, rel=2e-3)


def test_training_lowers_the_loss_changes_all_parts_and_leaves_the_given_model(tmp_path: Path):
    with torch.inference_mode():  # as ComfyUI runs a node
        parts = networks()
        before = {key: value.clone() for key, value in parts[0].model.state_dict().items()}
        settings = dataclasses.replace(SETTINGS, dropout=0.0, steps=40, learning_rate=3e-3, ema_decay=0.0)
        trained, run = train(make_pairs(tmp_path), tmp_path, settings, parts=parts)
    assert sum(run.losses[-10:]) < 0.9 * sum(run.losses[:10])
    assert all(torch.equal(value, before[key]) for key, value in parts[0].model.state_dict().items())
    first = trained.weights["diffusion_model.input_blocks.0.0.weight"]
    assert isinstance(trained.model.model, comfy.model_base.SD15_instructpix2pix)
    assert float(first[:, 4:].abs().min()) > 0.0
    assert torch.equal(trained.model.model.state_dict()["diffusion_model.input_blocks.0.0.weight"], first)
    generator = train_mcdm.generator_of(7, 0, "image embedding")
    start = mcdm.new_embedding(trained.model, parts[3], (4, 8, 8), generator, 77).state_dict()
    for key, value in trained.mcdm.embedding.state_dict().items():
        assert not torch.equal(value, start[key]), key
    assert run.samples[-1][1].shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("conditions", "image", "spatial"), [("image only", True, False), ("spatial only", False, True)]
)
def test_a_condition_that_is_not_trained_with_never_reaches_the_model(
    conditions: str, image: bool, spatial: bool, tmp_path: Path
):
    """As the weights tell: those of the source's channels stay zero without c_s, and MLP(.)'s stay without c_im."""
    settings = dataclasses.replace(SETTINGS, dropout=0.0, weight_decay=0.0, conditions=conditions)
    parts = networks()
    trained, _ = train(make_pairs(tmp_path), tmp_path, settings, parts=parts)
    first = trained.model.model.diffusion_model.input_blocks[0][0].weight
    assert (first[:, 4:].abs().max().item() > 0) is spatial
    generator = train_mcdm.generator_of(settings.seed, 0, "image embedding")
    before = mcdm.new_embedding(trained.model, parts[3], trained.encoded.latent_shape, generator, settings.image_tokens)
    moved = [
        not torch.equal(value, other)
        for value, other in zip(trained.mcdm.embedding.state_dict().values(), before.state_dict().values(), strict=True)
    ]
    assert all(moved) if image else not any(moved)
    path = str(tmp_path / "mcdm.safetensors")
    mcdm.save_mcdm(trained.mcdm, path, trained.model, None, None, trained.weights, "float32")
    assert mcdm.trained_with(mcdm.load_mcdm(path)) == conditions


def test_checkpointing_and_bfloat16_train_the_same(tmp_path: Path):
    pairs = make_pairs(tmp_path)
    _, plain = train(pairs, tmp_path / "1")
    _, recomputed = train(pairs, tmp_path / "2", dataclasses.replace(SETTINGS, checkpointing=True))
    _, half = train(pairs, tmp_path / "3", dataclasses.replace(SETTINGS, precision="bfloat16"))
    assert recomputed.losses == pytest.approx(plain.losses, rel=1e-4)
    assert half.losses == pytest.approx(plain.losses, rel=0.05)


def test_the_result_is_the_moving_average(tmp_path: Path):
    pairs = make_pairs(tmp_path)
    averaged, run = train(pairs, tmp_path / "1")
    last, same = train(pairs, tmp_path / "2", dataclasses.replace(SETTINGS, ema_decay=0.0))
    assert run.losses == pytest.approx(same.losses, rel=1e-5)  # the average takes no part in the training
    key = "diffusion_model.out.2.weight"  # behind the last weights on the way from the first, see test_training.py
    start = networks()[0].model.state_dict()[key]
    assert float((averaged.weights[key] - start).norm()) < float((last.weights[key] - start).norm())


# -- interrupts, kills, faults -----------------------------------------------------------------------------------------


def assert_same_result(one: Any, other: Any) -> None:
    assert all(torch.equal(value, other[0].weights[key]) for key, value in one[0].weights.items())
    embeddings = [result[0].mcdm.embedding.state_dict() for result in (one, other)]
    assert all(torch.equal(value, embeddings[1][key]) for key, value in embeddings[0].items())
    assert one[1].losses == other[1].losses


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tmp_path: Path):
    pairs = make_pairs(tmp_path)
    whole = train(pairs, tmp_path / "whole")

    def stop(done: int, *_: Any) -> None:
        if done == 2:
            raise comfy.model_management.InterruptProcessingException()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(pairs, tmp_path / "stopped", progress=stop)
    resumed = train(pairs, tmp_path / "stopped")
    assert resumed[1].resumed_at == 2
    assert_same_result(resumed, whole)
    assert os.path.exists(train_mcdm.checkpoint_path(str(tmp_path / "stopped"), resumed[0]))


def test_encoding_goes_on_where_it_was_stopped(tmp_path: Path):
    pairs = make_pairs(tmp_path, count=20)
    vae, vision = tiny_vision.VAE(), tiny_vision.clip_vision()
    whole = encoded_pairs.encode_pairs(pairs, vae, vision, str(tmp_path / "whole"))

    def stop(done: int, total: int) -> None:
        if done >= 16:
            raise comfy.model_management.InterruptProcessingException()

    folder = tmp_path / "stopped"
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        encoded_pairs.encode_pairs(pairs, vae, vision, str(folder), progress=stop)
    (partial,) = folder.glob("*.part")
    with open(partial, "ab") as file:
        file.write(b"half a record")
    seen: list[int] = []
    again = encoded_pairs.encode_pairs(pairs, vae, vision, str(folder), progress=lambda done, total: seen.append(done))
    assert seen == [20] and [str(path) for path in folder.glob("*") if path.suffix != ".lock"] == [again.path]
    assert np.array_equal(again.records, whole.records)
    source = encoded_pairs.read_image(pairs[3].source)[None]
    assert torch.equal(again.latents("source", [3]), vae.encode(source))


def test_two_that_encode_the_same_pairs_do_not_write_into_one_file(tmp_path: Path):
    pairs = make_pairs(tmp_path, count=20)
    vae, vision = tiny_vision.VAE(), tiny_vision.clip_vision()
    whole = encoded_pairs.encode_pairs(pairs, vae, vision, str(tmp_path / "whole"))
    seen: list[str] = []

    def encode(name: str, progress: Any) -> encoded_pairs.EncodedPairs:
        return encoded_pairs.encode_pairs(pairs, vae, vision, str(tmp_path / "shared"), progress=progress)

    def first_progress(done: int, total: int) -> None:
        seen.append("first")
        if done == 8:
            threads.submit(lambda: results.append(encode("second", lambda done, total: seen.append("second"))))
            time.sleep(1.0)  # in which the second could do what it must not

    results: list[encoded_pairs.EncodedPairs] = []
    with ThreadPoolExecutor(1) as threads:
        results.append(encode("first", first_progress))
    assert seen == ["first"] * 3 and len(results) == 2
    for found in results:
        assert np.array_equal(found.records, whole.records)


def test_mirrored_pairs_follow_and_hold_the_mirrored_images(tmp_path: Path):
    pairs = make_pairs(tmp_path)
    vae, vision = tiny_vision.VAE(), tiny_vision.clip_vision()
    both = encoded_pairs.with_mirrored(pairs)
    encoded = encoded_pairs.encode_pairs(both, vae, vision, str(tmp_path))
    assert len(encoded) == 10 and encoded.target_prompts[5:] == [pair.target_prompt for pair in pairs]
    for which, path in (("source", pairs[2].source), ("target", pairs[2].target)):
        turned = torch.from_numpy(np.array(Image.open(path).convert("RGB"))[None, :, ::-1].copy()).float() / 255
        assert torch.allclose(encoded.latents(which, [7]), vae.encode(turned), atol=1e-5)
    assert encoded.fingerprint != encoded_pairs.encode_pairs([*pairs, *pairs], vae, vision, str(tmp_path)).fingerprint


def test_a_training_goes_on_from_an_earlier_image_embedding(tmp_path: Path):
    pairs = make_pairs(tmp_path)
    first, _ = train(pairs, tmp_path)
    parts = (first.model, *networks()[1:])
    still = dataclasses.replace(SETTINGS, steps=1, learning_rate=1e-9, ema_decay=0.0, weight_decay=0.0)
    again, _ = train(pairs, tmp_path, still, parts=parts, start=first.mcdm)
    for name, weight in first.mcdm.embedding.state_dict().items():
        assert torch.allclose(again.mcdm.embedding.state_dict()[name], weight, atol=1e-6), name
    anew, _ = train(pairs, tmp_path, still, parts=parts)
    assert not torch.allclose(anew.mcdm.embedding.mix.weight, first.mcdm.embedding.mix.weight, atol=1e-6)
    other = dataclasses.replace(still, image_tokens=3)
    with pytest.raises(IdentityEditError, match="another size"):
        train(pairs, tmp_path, other, parts=parts, start=first.mcdm)
    another = dataclasses.replace(first.mcdm, vision=dataclasses.replace(first.mcdm.vision, width=7))
    with pytest.raises(IdentityEditError, match="another CLIP vision"):
        train(pairs, tmp_path, still, parts=parts, start=another)


def test_a_corrupt_missing_or_odd_image_is_named(tmp_path: Path):
    vae, vision = tiny_vision.VAE(), tiny_vision.clip_vision()
    pairs = make_pairs(tmp_path)
    whole = pairs[3].target.read_bytes()
    pairs[3].target.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IdentityEditError, match="3-b.png cannot be read"):
        encoded_pairs.encode_pairs(pairs, vae, vision, str(tmp_path / "x"))
    Image.new("RGB", (32, 64)).save(pairs[3].target)
    with pytest.raises(IdentityEditError, match="3-b.png is 32x64 and others are 64x64"):
        encoded_pairs.encode_pairs(pairs, vae, vision, str(tmp_path / "x"))
    pairs[3].target.unlink()
    with pytest.raises(IdentityEditError, match="3-b.png is missing"):
        encoded_pairs.encode_pairs(pairs, vae, vision, str(tmp_path / "x"))
    with pytest.raises(IdentityEditError, match="no pair to train on"):
        encoded_pairs.encode_pairs([], vae, vision, str(tmp_path / "x"))


def test_a_full_disk_stops_the_encoding_with_a_sentence_and_loses_nothing(tmp_path: Path):
    pairs = make_pairs(tmp_path, count=20)
    vae, vision = tiny_vision.VAE(), tiny_vision.clip_vision()
    record = encoded_pairs.encode_pairs(pairs, vae, vision, str(tmp_path / "whole")).records.dtype.itemsize
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * record, limits[1]))
    try:
        with pytest.raises(IdentityEditError, match="free disk space"):
            encoded_pairs.encode_pairs(pairs, vae, vision, str(tmp_path / "full"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    again = encoded_pairs.encode_pairs(pairs, vae, vision, str(tmp_path / "full"))
    whole = encoded_pairs.encode_pairs(pairs, vae, vision, str(tmp_path / "whole"))
    assert np.array_equal(again.records, whole.records)


def test_settings_out_of_range_are_refused():
    for changes in ({"batch_size": 0}, {"dropout": 1.5}, {"identity_share": -0.1}, {"precision": "float8"}):
        with pytest.raises(IdentityEditError, match=next(iter(changes))):
            MCDMSettings(**changes)
    with pytest.raises(IdentityEditError, match="ema_decay"):
        TrainingSettings(steps=1, learning_rate=1.0, ema_decay=1.0)
    assert json.dumps(dataclasses.asdict(MCDMSettings()))
