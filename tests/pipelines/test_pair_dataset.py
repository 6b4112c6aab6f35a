"""Generating pairs: what is planned, that a stopped run goes on to the same dataset, and the check of identity."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import comfy.samplers
import pytest
import torch
from identity_edit_pack.pipelines.mcdm import pair_dataset as datasets
from identity_edit_pack.pipelines.mcdm.pair_folder import PairFolder
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests import tiny_models, tiny_text_encoders
from saved_pairs import load_pair

EDITS = datasets.parse_edits(
    "hat: a {subject} -> a {subject}, hat\n# not this one: a -> b\n\nscarf: a {subject} -> a {subject}, scarf"
)
SETTINGS = datasets.PairSettings(count=5, edits=EDITS, subjects=("man", "woman"), width=64, height=48, seed=3)


class Autoencoder:
    def decode(self, latent):
        return torch.nn.functional.interpolate(latent[:, :3], scale_factor=8).movedim(1, -1).sigmoid()


class ClipVision:
    """The mean color as the embedding."""

    def encode_image(self, image, crop=True):
        return {"image_embeds": image.mean(dim=(1, 2)) - 0.5}


def generate(path, settings=SETTINGS, model=None, clip=None, **options):
    model = model or tiny_models.sd1(output_gain=0.1)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
    folder = PairFolder(path)
    done = datasets.generate_pairs(
        model, clip or tiny_text_encoders.clip("sd1"), Autoencoder(), comfy.samplers.sampler_object("euler"), sigmas,
        folder, settings, **options,
    )  # fmt: skip
    return done, folder


def hashes(folder):
    return {number: facts["files"] for number, facts in folder.finished().items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("pairs"))


def test_edits_are_read_line_by_line() -> None:
    assert [edit.name for edit in EDITS] == ["hat", "scarf"]
    assert EDITS[1].target == "a {subject}, scarf"
    assert len(datasets.parse_edits(datasets.EDITS)) == 4
    for text in ("hat a -> b", "hat: a b", "hat: -> b"):
        with pytest.raises(IdentityEditError, match="cannot be read"):
            datasets.parse_edits(text)


def test_parts() -> None:
    assert list(datasets.parse_part("", 4)) == [0, 1, 2, 3]
    assert list(datasets.parse_part("2", 4)) == [2] and list(datasets.parse_part("1-3", 4)) == [1, 2, 3]
    for text in ("4", "3-2", "-1", "x", "0-4"):
        with pytest.raises(IdentityEditError, match="from 0 to 3"):
            datasets.parse_part(text, 4)


def test_the_papers_prompts() -> None:
    settings = datasets.PairSettings(count=1, edits=datasets.parse_edits(datasets.EDITS), subjects=("woman",))
    pair = datasets.plan(settings, 0)
    assert pair.shared_prompt == "the same woman on the left and right"
    assert pair.source_prompt == "a woman, normal costume" and pair.target_prompt == "a woman, Santa Claus costume"


def test_a_plan_depends_on_seed_and_number_alone() -> None:
    longer = replace(SETTINGS, count=400)
    plans = [datasets.plan(longer, number) for number in range(400)]
    assert [datasets.plan(SETTINGS, number) for number in range(5)] == plans[:5]
    assert datasets.plan(replace(longer, seed=4), 1) != plans[1]
    assert Counter(plan.edit for plan in plans) == {"hat": 200, "scarf": 200}
    assert set(Counter(plan.subject for plan in plans)) == {"man", "woman"}
    share = sum(plan.split == datasets.VALIDATION for plan in plans) / 400
    assert 0.02 <= share <= 0.09
    seeds = {datasets.noise_seed(longer, number, attempt) for number in range(400) for attempt in range(4)}
    assert len(seeds) == 1600


def test_nobody_is_in_both_splits_and_has_the_own_subject() -> None:
    settings = replace(SETTINGS, count=600, subjects=tuple(f"person{i}" for i in range(20)), validation_share=0.3)
    plans = [datasets.plan(settings, number, identities=20, poses=7) for number in range(600)]
    splits: dict[int, set[str]] = {}
    for plan in plans:
        splits.setdefault(plan.identity, set()).add(plan.split)
        assert plan.subject == f"person{plan.identity}"
    assert len(splits) == 20 and all(len(found) == 1 for found in splits.values())
    assert {found.pop() for found in splits.values()} == {"train", "validation"}
    assert {plan.pose for plan in plans} == set(range(7))


def test_every_pair_is_made_and_described(whole) -> None:
    done, folder = whole
    assert (done.made, done.present, done.rejected) == (5, 0, 0)
    assert done.evaluations == 5 * 2 * 4
    lines = [json.loads(line) for line in (folder.path / "index.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(5))
    assert lines[1]["edit"] == "scarf" and lines[1]["similarity"] is None
    source, target, _ = load_pair(folder.path / "pairs" / "000000")
    assert source.shape == target.shape == (48, 64, 3) and not torch.equal(source, target)


def test_a_stopped_run_goes_on_to_the_same_dataset(whole, tmp_path) -> None:
    class Stopped(Exception):
        pass

    def stop(done, total, image):
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        generate(tmp_path, progress=stop)
    folder = PairFolder(tmp_path)
    assert sorted(folder.finished()) == [0, 1]
    assert len((tmp_path / "index.jsonl").read_text().splitlines()) == 2
    # One of the two is corrupt when it goes on.
    (tmp_path / "pairs/000001/target.png").write_bytes(b"")
    done, folder = generate(tmp_path)
    assert (done.made, done.present) == (4, 1)
    assert hashes(folder) == hashes(whole[1])
    done, _ = generate(tmp_path)
    assert (done.made, done.present, done.evaluations) == (0, 5, 0)


def test_parts_make_the_whole(whole, tmp_path) -> None:
    generate(tmp_path, numbers=[3, 4])
    done, folder = generate(tmp_path, numbers=[0, 1, 2])
    assert done.made == 3 and hashes(folder) == hashes(whole[1])


def test_a_full_disk_stops_the_run_and_it_goes_on(whole, tmp_path, monkeypatch) -> None:
    add = PairFolder.add

    def full(self, number, *rest):
        if number == 2:
            raise IdentityEditError("The folder cannot be written to (No space left on device); make room.")
        return add(self, number, *rest)

    monkeypatch.setattr(PairFolder, "add", full)
    with pytest.raises(IdentityEditError, match="No space left"):
        generate(tmp_path)
    monkeypatch.undo()
    assert generate(tmp_path)[0].made == 3
    assert hashes(PairFolder(tmp_path)) == hashes(whole[1])


def test_other_settings_are_refused(whole) -> None:
    path = whole[1].path
    with pytest.raises(IdentityEditError, match="another target_weight"):
        generate(path, replace(SETTINGS, target_weight=0.8))
    with pytest.raises(IdentityEditError, match="another model"):
        generate(path, model=tiny_models.sd1(seed=9, output_gain=0.1))


def test_the_check_keeps_what_is_alike_and_notes_what_is_not(whole, tmp_path) -> None:
    checked = replace(SETTINGS, smallest_similarity=0.5, attempts=3)
    done, folder = generate(tmp_path, checked, clip_vision=ClipVision())
    kept, rejected = folder.finished(), folder.rejected()
    assert sorted({**kept, **rejected}) == list(range(5)) and done.made == len(kept)
    assert kept and all(facts["similarity"] >= 0.5 for facts in kept.values())
    assert all(facts["similarity"] < 0.5 and facts["attempt"] == 2 for facts in rejected.values())
    for number, facts in kept.items():
        source, target, _ = load_pair(folder.path / "pairs" / f"{number:06}")
        means = [image.mean(dim=(0, 1)) - 0.5 for image in (source, target)]
        assert abs(float(torch.cosine_similarity(*means, dim=0)) - facts["similarity"]) < 0.02
        if facts["attempt"] == 0:
            assert facts["files"] == hashes(whole[1])[number]
    again, _ = generate(tmp_path, checked, clip_vision=ClipVision())
    assert (again.made, again.rejected, again.evaluations) == (0, len(rejected), 0)
    with pytest.raises(IdentityEditError, match="clip_vision"):
        generate(tmp_path / "other", checked)


def test_identity_words_are_in_all_three_prompts(tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(datasets, "identity_vectors", lambda words, features: {"clip_l": features})
    clip = tiny_text_encoders.clip("sd1")
    tokenize = clip.tokenize

    def encode(clip, vectors, prompt, class_word):
        asked.append((prompt, class_word, float(vectors["clip_l"].mean())))
        return clip.encode_from_tokens_scheduled(tokenize(prompt))

    monkeypatch.setattr(clip, "tokenize", lambda prompt: (asked.append((prompt,)), tokenize(prompt))[1])
    monkeypatch.setattr(datasets, "identity_conditioning", encode)
    features = torch.arange(2.0).reshape(2, 1, 1)
    words = SimpleNamespace(training={"run": "x"})
    identities = datasets.Identities(words, features)
    generate(tmp_path, replace(SETTINGS, count=1), clip=clip, identities=identities)
    pair = PairFolder(tmp_path).finished()[0]
    expected = [
        (pair[f"{name}_prompt"], pair["subject"], float(pair["identity"])) for name in ("shared", "source", "target")
    ]
    assert asked == [*expected, ("",)]


def test_saved_pairs_get_the_next_numbers(tmp_path) -> None:
    folder = PairFolder(tmp_path)
    images = torch.rand(3, 16, 24, 3)
    facts = {"source_prompt": "a", "target_prompt": "b", "edit": "hat"}
    assert datasets.save_pairs(folder, images[:2], images[1:], **facts) == [0, 1]
    assert datasets.save_pairs(folder, images[:1], images[:1], **facts) == [2]
    assert len((tmp_path / "index.jsonl").read_text().splitlines()) == 3
    assert datasets.save_pairs(folder, images[:1], images[1:], **facts) == [3, 4]  # one source for both
    with pytest.raises(IdentityEditError, match="a single image"):
        datasets.save_pairs(folder, images, images[:2], **facts)
    with pytest.raises(IdentityEditError, match="the same size"):
        datasets.save_pairs(folder, images, images[:, :8], **facts)


def test_a_subject_is_drawn_by_its_words_and_called_by_its_name():
    edits = datasets.parse_edits("smile: a {subject} -> a smiling {subject}")
    settings = replace(SETTINGS, edits=edits, subjects=("person with curly red hair | person",))
    plan = datasets.plan(settings, 0)
    assert plan.drawn_target_prompt == "a smiling person with curly red hair"
    assert plan.shared_prompt == "the same person with curly red hair on the left and right"
    assert (plan.source_prompt, plan.target_prompt) == ("a person", "a smiling person")


@pytest.mark.parametrize("subject", ["| person", "person |", "a | b | c"])
def test_a_subject_without_words_or_name_is_refused(subject):
    with pytest.raises(IdentityEditError, match="words . name"):
        replace(SETTINGS, subjects=(subject,))
