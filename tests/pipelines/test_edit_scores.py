"""All scores together: which there are, of what, and what happens at the edges of masks, batches and sets."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from identity_edit_pack.pipelines.faces import detection as faces
from identity_edit_pack.pipelines.scores import edit_scores
from identity_edit_pack.pipelines.scores import lpips as lpips_score
from identity_edit_pack.pipelines.scores import pixels as image_scores
from identity_edit_pack.pipelines.scores.aesthetic import AestheticPredictor
from identity_edit_pack.pipelines.scores.report import score_table, scores_as_json
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests import tiny_scorers

GENERATOR = torch.Generator().manual_seed(0)
SOURCE = torch.rand(2, 40, 48, 3, generator=GENERATOR)
EDITED = (SOURCE + 0.1 * torch.randn(SOURCE.shape, generator=GENERATOR)).clamp(0, 1)
MASK = torch.zeros(2, 40, 48)
MASK[:, 8:30, 10:40] = 1.0
REFERENCES = [torch.rand(30, 30, 3, generator=GENERATOR), torch.rand(50, 40, 3, generator=GENERATOR)]
PROJECTION = torch.randn(3, 8, dtype=torch.float64, generator=GENERATOR)
POINTS = np.array([[60.0, 80.0], [100.0, 80.0], [80.0, 102.0], [65.0, 124.0], [95.0, 124.0]])


class Clip:
    """Embeds an image by its mean color, and a text by its letters."""

    name = "a clip"

    def images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        found = torch.stack([image.double().mean(dim=(0, 1)) - 0.3 for image in images]) @ PROJECTION
        return torch.nn.functional.normalize(found, dim=1)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        found = torch.stack([torch.tensor([ord(text[i % len(text)]) - 90.0 for i in range(8)]) for text in texts])
        return torch.nn.functional.normalize(found.double(), dim=1)


class Dino:
    name = "a dino"

    def __call__(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([image.float().std(dim=(0, 1)) for image in images])


class Detector:
    """A face in every image that is not black."""

    name = "given"

    def detect(self, image: np.ndarray) -> list[faces.Face]:
        return [] if image.max() == 0 else [faces.Face((50, 70, 110, 130), POINTS)]


class Recognizer:
    name = "an arcface"

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(images.mean(dim=(1, 2)) - 0.4, dim=1)


class Inception:
    name = "an inception"

    def features(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([image.mean(dim=(0, 1)) for image in images])


def by_name(*inputs: Any, **options: Any) -> dict[str, edit_scores.Score]:
    scores = edit_scores.score_edit(*inputs, **options)
    assert len({score.name for score in scores}) == len(scores)
    return {score.name: score for score in scores}


def test_without_any_file_there_are_errors_psnr_and_ssim() -> None:
    scores = by_name(EDITED, SOURCE)
    assert list(scores) == ["MSE", "PSNR", "SSIM"]
    torch.testing.assert_close(scores["SSIM"].values, image_scores.ssim(EDITED, SOURCE))
    assert [score.higher_is_better for score in scores.values()] == [False, True, True]
    assert scores["PSNR"].mean == pytest.approx(float(scores["PSNR"].values.mean()))
    assert by_name(EDITED, None) == {}


def test_a_mask_adds_both_parts_by_the_rule_that_is_chosen() -> None:
    plain = by_name(EDITED, SOURCE, mask=MASK)
    assert list(plain) == [
        f"{name}{part}" for name in ("MSE", "PSNR", "SSIM") for part in ("", " inside", " outside")
    ]  # fmt: skip
    outside = 1.0 - MASK
    torch.testing.assert_close(plain["SSIM outside"].values, image_scores.ssim(EDITED, SOURCE, outside))
    assert plain["PSNR outside"].higher_is_better is True and plain["PSNR inside"].higher_is_better is None
    assert "the mean over its pixels only" in plain["PSNR inside"].definition

    theirs = by_name(EDITED, SOURCE, mask=MASK, rule=edit_scores.PIE_BENCH)
    pair = [images * outside[..., None] for images in (EDITED, SOURCE)]
    torch.testing.assert_close(theirs["MSE outside"].values, (pair[0] - pair[1]).double().square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(theirs["SSIM outside"].values, image_scores.ssim(*pair))
    assert "multiplied by it" in theirs["MSE outside"].definition
    assert torch.equal(theirs["PSNR"].values, plain["PSNR"].values)
    with pytest.raises(IdentityEditError, match="rule is 'any'; choose one of"):
        by_name(EDITED, SOURCE, rule="any")


@pytest.mark.parametrize("rule", edit_scores.RULES)
def test_masks_of_ones_and_zeros(rule: str) -> None:
    both = torch.stack([torch.ones(40, 48), torch.zeros(40, 48)])
    scores = by_name(EDITED, SOURCE, mask=both, rule=rule)
    for name in ("MSE", "PSNR", "SSIM"):
        whole, inside, outside = (scores[f"{name}{part}"].values for part in ("", " inside", " outside"))
        assert float(inside[0]) == pytest.approx(float(whole[0])) and math.isnan(inside[1])
        assert float(outside[1]) == pytest.approx(float(whole[1])) and math.isnan(outside[0])
        assert scores[f"{name} inside"].mean == pytest.approx(float(whole[0]))


def test_the_parts_of_lpips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_scorers.score_folder(tmp_path, monkeypatch)
    tiny_scorers.save_lpips(folder, "SqueezeNet", tiny_scorers.lpips_of_the_authors("SqueezeNet"))
    with edit_scores.open_networks(lpips="SqueezeNet") as networks:
        plain = by_name(EDITED, SOURCE, mask=MASK, networks=networks)
        theirs = by_name(EDITED, SOURCE, mask=MASK, networks=networks, rule=edit_scores.PIE_BENCH)
        assert networks.lpips is not None
        torch.testing.assert_close(plain["LPIPS inside"].values, networks.lpips.distance(EDITED, SOURCE, MASK))
        pair = [images * MASK[..., None] for images in (EDITED, SOURCE)]
        torch.testing.assert_close(theirs["LPIPS inside"].values, networks.lpips.distance(*pair))
    assert "(SqueezeNet)" in plain["LPIPS"].definition and plain["LPIPS outside"].higher_is_better is False
    with pytest.raises(IdentityEditError, match="needs alexnet"), edit_scores.open_networks(lpips="AlexNet"):
        pass


def test_clips_scores_are_those_of_its_embeddings() -> None:
    clip = Clip()
    prompts = dict(source_prompt="a cat", target_prompt=["a dog", "a bird"])
    networks = edit_scores.Networks(clip=clip)
    scores = by_name(EDITED, SOURCE[:1], mask=MASK, references=REFERENCES, networks=networks, **prompts)
    images, source, known = clip.images(list(EDITED)), clip.images([SOURCE[0]]), clip.images(REFERENCES)
    texts, origin = clip.texts(["a dog", "a bird"]), clip.texts(["a cat"])
    wanted = {
        "CLIP-T": (images * texts).sum(1),
        "CLIP-T inside": (clip.images(list(EDITED * MASK[..., None])) * texts).sum(1),
        "CLIP-I (source)": (images @ source.T)[:, 0],
        "CLIP-I (references)": (images @ known.T).mean(1),
        "CLIP-D": torch.cosine_similarity(images - source, texts - origin),
    }
    assert [name for name in scores if name.startswith("CLIP")] == list(wanted)
    for name, values in wanted.items():
        torch.testing.assert_close(scores[name].values, values)
        assert scores[name].higher_is_better is True and "(a clip)" in scores[name].definition
    few = by_name(EDITED, SOURCE, networks=networks, target_prompt="a dog")
    assert "CLIP-T" in few and "CLIP-D" not in few and "CLIP-I (references)" not in few
    assert list(by_name(EDITED, None, networks=networks, **prompts)) == ["CLIP-T"]


def test_dinos_are_compared_with_the_source_and_all_references() -> None:
    networks = edit_scores.Networks(dino=Dino(), dinov2=Dino())
    scores = by_name(EDITED, SOURCE, references=REFERENCES, networks=networks)
    encode = Dino()
    wanted = torch.cosine_similarity(encode(list(EDITED))[:, None], encode(REFERENCES)[None], dim=2).mean(1).double()
    torch.testing.assert_close(scores["DINO-I (references)"].values, wanted, rtol=1e-6, atol=1e-6)
    wanted = torch.cosine_similarity(encode(list(EDITED)), encode(list(SOURCE))).double()
    torch.testing.assert_close(scores["DINOv2-I (source)"].values, wanted, rtol=1e-6, atol=1e-6)


def test_a_lost_face_counts_as_0_and_an_unknown_one_not_at_all() -> None:
    generator = torch.Generator().manual_seed(3)
    source = torch.rand(3, 1, 1, 3, generator=generator).expand(3, 200, 180, 3).clone()
    edited = torch.rand(3, 1, 1, 3, generator=generator).expand(3, 200, 180, 3).clone()
    edited[1], source[2] = 0.0, 0.0
    networks = edit_scores.Networks(face_detector=Detector(), face_recognizer=Recognizer())
    scores = by_name(edited, source, references=[source[0], source[1]], networks=networks)
    color = torch.nn.functional.normalize(torch.stack([edited[0, 0, 0], source[0, 0, 0], source[1, 0, 0]]) - 0.4)
    values = scores["ArcFace ID (source)"].values
    assert values.tolist()[:2] == pytest.approx([float(color[0] @ color[1]), 0.0], abs=1e-5)
    assert math.isnan(values[2])
    best = float((color[:1] @ color[1:].T).max())
    assert float(scores["ArcFace ID (references)"].values[0]) == pytest.approx(best, abs=1e-5)
    assert "maximum over them" in scores["ArcFace ID (references)"].definition
    none = by_name(edited, None, references=[source[2]], networks=networks)
    assert bool(none["ArcFace ID (references)"].values.isnan().all())
    with pytest.raises(IdentityEditError, match="needs a face detector and a recognizer"):
        by_name(edited, source, networks=edit_scores.Networks(face_recognizer=Recognizer()))


def test_the_aesthetic_score_is_of_clips_embedding() -> None:
    layer = (torch.randn(1, 8, generator=GENERATOR), torch.tensor([5.0]))
    predictor = AestheticPredictor("linear.pth", (layer,))
    scores = by_name(EDITED, None, networks=edit_scores.Networks(clip=Clip(), aesthetic=predictor))
    wanted = (Clip().images(list(EDITED)) @ layer[0].double().T + 5.0)[:, 0]
    torch.testing.assert_close(scores["aesthetic score"].values, wanted)
    with pytest.raises(IdentityEditError, match="reads CLIP's embeddings; choose a clip too"):
        by_name(EDITED, None, networks=edit_scores.Networks(aesthetic=predictor))


def test_sets_need_enough_images() -> None:
    networks = edit_scores.Networks(inception=Inception())
    many = torch.rand(50, 12, 12, 3, generator=GENERATOR)
    references = list(torch.rand(51, 9, 9, 3, generator=GENERATOR))
    scores = by_name(many, None, references=references, networks=networks)
    assert scores["FID"].values.shape == (1,) and scores["FID"].mean > 0 and scores["KID"].values.shape == (1,)
    assert "FID" in by_name(many, many.flip(1), networks=networks)
    for inputs in ((many[:49], None), (many, many[:1])):
        assert "FID" not in by_name(*inputs, networks=networks, references=references if inputs[1] is None else None)


def test_every_network_brings_its_scores_and_progress_is_told() -> None:
    structure = SimpleNamespace(name="dino", distance=lambda a, b, as_pie_bench: torch.tensor([1.0 + as_pie_bench]))
    networks = edit_scores.Networks(structure=structure)  # type: ignore[arg-type]
    told: list[tuple[int, int]] = []
    plain = by_name(EDITED, SOURCE, mask=MASK, networks=networks, progress=lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)]
    assert plain["structure distance"].values.tolist() == [1.0, 1.0] and "structure distance inside" not in plain
    theirs = by_name(EDITED, SOURCE, mask=MASK, networks=networks, rule=edit_scores.PIE_BENCH)
    assert theirs["structure distance outside"].values.tolist() == [2.0, 2.0]
    assert "pixels from 0 to 255" in theirs["structure distance"].definition


def test_bad_inputs_are_named() -> None:
    bad = [
        ((EDITED, SOURCE[:, :30]), {}, "edited has 48x40 pixels and source 48x30, a larger difference than VAE Encode"),
        ((EDITED, torch.rand(3, 40, 48, 3)), {}, "edited holds 2 images and source 3"),
        ((EDITED[:1], SOURCE), {}, "source holds 2 images for one edited"),
        ((EDITED, SOURCE), {"mask": torch.ones(3, 40, 48)}, "mask holds 3 masks for 2 images"),
        ((EDITED, SOURCE), {"mask": torch.full_like(MASK, torch.nan)}, "mask contains NaN"),
        ((EDITED, SOURCE), {"target_prompt": ["a", "b", "c"]}, "target_prompt holds 3 prompts for 2 edited"),
        ((EDITED, SOURCE), {"source_prompt": ["a", ""]}, "source_prompt is empty for some"),
        ((EDITED * torch.nan, SOURCE), {}, "edited contains NaN"),
        ((EDITED, SOURCE * 255), {}, "source has values up to 25"),
        ((EDITED[:0], SOURCE), {}, "edited must be images"),
        ((EDITED, SOURCE), {"references": [torch.zeros(3, 3)]}, "references must be images"),
    ]
    for inputs, options, message in bad:
        with pytest.raises(IdentityEditError, match=message):
            edit_scores.score_edit(*inputs, **options)


def test_the_table_and_the_json_say_what_was_measured() -> None:
    edited = EDITED.clone()
    edited[0] = SOURCE[0]
    both = torch.stack([torch.ones(40, 48), torch.zeros(40, 48)])
    scores = edit_scores.score_edit(edited, SOURCE, mask=both)
    table = score_table(scores, edit_scores.PLAIN).splitlines()
    assert table[0].split() == ["score", "mean", "lowest", "highest", "better"]
    psnr = next(score for score in scores if score.name == "PSNR")
    row = next(line for line in table if line.startswith("PSNR "))
    assert row.split() == ["PSNR", "infinite", f"{float(psnr.values[1]):.2f}", "infinite", "higher"]
    assert any(line.startswith("PSNR inside") and line.endswith("-") for line in table)
    for score in scores:
        is_part = score.name.endswith("side")
        assert (f"{score.name}: {score.definition} [{score.source}]" in table) != is_part
        assert score.definition.endswith(".") and score.definition.count(". ") == 0
    assert table[-1].endswith("given by the mask: the mean over its pixels only.")
    assert score_table(scores, edit_scores.PIE_BENCH).endswith("compared as a whole, as in PIE-Bench.")
    assert "given by the mask" not in score_table(scores[:1], edit_scores.PLAIN)
    content = json.loads(scores_as_json(scores, edit_scores.PLAIN))
    assert content["rule"] == edit_scores.PLAIN
    assert content["scores"]["PSNR"]["values"] == ["infinite", pytest.approx(float(psnr.values[1]))]
    assert content["scores"]["SSIM inside"]["values"][1] is None
    assert content["scores"]["SSIM"]["higher_is_better"] is True
    nothing = by_name(EDITED, SOURCE, mask=torch.zeros(1, 40, 48))["PSNR inside"]
    assert "none" in score_table([nothing], edit_scores.PLAIN) and math.isnan(nothing.mean)


def test_networks_are_opened_from_folders_and_given_back(tmp_path: Path) -> None:
    tiny_scorers.save_clip(tmp_path / "clip ü")
    with edit_scores.open_networks(clip=str(tmp_path / "clip ü"), dino=str(tmp_path / "clip ü")) as networks:
        scores = by_name(EDITED, SOURCE, networks=networks, target_prompt="a dog")
    assert {"CLIP-T", "CLIP-I (source)", "DINO-I (source)"} <= set(scores)
    torch.testing.assert_close(  # one and the same network by two ways
        scores["CLIP-I (source)"].values, scores["DINO-I (source)"].values, rtol=1e-5, atol=1e-5
    )
    assert lpips_score.BACKBONES.keys() == {"AlexNet", "VGG-16", "SqueezeNet"}
