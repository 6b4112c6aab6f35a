"""Made images are kept and taken up again, existing ones are found, and the table says what was scored."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from identity_edit_pack.evaluation.cases import EditCase, save_image
from identity_edit_pack.evaluation.scoring import (
    EditedFolder,
    KeptImages,
    MethodScores,
    as_json,
    figures_of,
    means_by_group,
    score_case,
    set_scores,
    sheet,
    table,
)
from identity_edit_pack.pipelines.scores.edit_scores import PLAIN, Networks, Score
from identity_edit_pack.pipelines.scores.frechet import FEWEST
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from skimage.metrics import peak_signal_noise_ratio

SIZE = 16


def image(seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(SIZE, SIZE, 3, generator=generator) * 255).round() / 255


@pytest.fixture
def case(tmp_path):
    mask = torch.zeros(SIZE, SIZE, 3)
    mask[:, :8] = 1
    return EditCase(
        name="case",
        group="pose",
        image=save_image(image(0), tmp_path / "source.png"),
        source_prompt="a dog",
        target_prompt="a jumping dog",
        mask=save_image(mask, tmp_path / "mask.png"),
        target=save_image(image(1), tmp_path / "target.png"),
        references=(save_image(image(2), tmp_path / "reference.png"),),
    )


def test_a_kept_image_is_found_by_the_next_run(tmp_path, case):
    kept = KeptImages(tmp_path / "kept", {"steps": 50})
    assert kept.load("ddim", case, SIZE) is None
    kept.add("ddim", case, image(3))
    again = KeptImages(tmp_path / "kept", {"steps": 50})
    assert torch.equal(again.load("ddim", case, SIZE)[0], image(3))
    assert again.load("img2img", case, SIZE) is None


def test_images_of_other_settings_are_refused(tmp_path):
    KeptImages(tmp_path, {"steps": 50})
    with pytest.raises(IdentityEditError, match="other settings"):
        KeptImages(tmp_path, {"steps": 20})


def test_nan_is_not_kept(tmp_path, case):
    kept = KeptImages(tmp_path / "kept", {})
    with pytest.raises(IdentityEditError, match="gave NaN for case"):
        kept.add("ddim", case, torch.full((SIZE, SIZE, 3), math.nan))
    assert kept.load("ddim", case, SIZE) is None


def test_existing_images_are_found_by_name_however_deep(tmp_path, case):
    save_image(image(4), tmp_path / "0_random/1/case.png")
    assert torch.equal(EditedFolder(tmp_path).load(case, SIZE)[0], image(4))
    (tmp_path / "0_random/1/case.png").rename(tmp_path / "another.png")
    assert EditedFolder(tmp_path).load(case, SIZE) is None


def test_the_last_image_of_a_strip_is_the_edited_one(tmp_path, case):
    save_image(torch.cat([image(5), image(6), image(7), image(8)], dim=1), tmp_path / "case.png")
    assert torch.equal(EditedFolder(tmp_path).load(case, SIZE)[0], image(8))


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(IdentityEditError, match="contains no images"):
        EditedFolder(tmp_path)


def test_a_case_is_scored_against_its_source_and_its_true_edit(case):
    edited = image(9)
    scores = {
        score.name: score
        for score in score_case(edited[None], case, Networks(), size=SIZE, rule=PLAIN, compare_source=True)
    }
    for name, other in (("PSNR", 0), ("PSNR to the true edit", 1)):
        expected = peak_signal_noise_ratio(image(other).double().numpy(), edited.double().numpy(), data_range=1)
        assert float(scores[name].values) == pytest.approx(expected, abs=1e-6)
    right = peak_signal_noise_ratio(image(0)[:, 8:].double().numpy(), edited[:, 8:].double().numpy(), data_range=1)
    assert float(scores["PSNR outside"].values) == pytest.approx(right, abs=1e-6)


def test_new_images_of_a_subject_are_not_compared_with_a_source(case):
    names = {
        score.name
        for score in score_case(image(9)[None], case, Networks(), size=SIZE, rule=PLAIN, compare_source=False)
    }
    assert "PSNR" not in names


def method_scores(**values):
    """Scores of cases "a", "b", ... from lists of values by name."""
    made = MethodScores()
    directions = {"CLIP_T": True, "LPIPS": False, "inside": None}
    for number, name in enumerate("abc"[: len(next(iter(values.values())))]):
        case = EditCase(name, "g", None, "", "")
        made.add(
            case,
            [
                Score(key, torch.tensor([column[number]], dtype=torch.float64), directions[key], f"{key} is.", "X")
                for key, column in values.items()
            ],
        )
    return made


def test_the_table_has_a_row_for_each_method_and_a_direction_for_each_score():
    methods = {
        "source": method_scores(CLIP_T=[0.2, 0.4]),
        "ddim": method_scores(CLIP_T=[0.5, math.nan], LPIPS=[math.inf, 1.0], inside=[math.nan, math.nan]),
    }
    lines = table(methods, {"ddim": {"FID": 12.345}})
    assert lines[0] == "| method | cases | CLIP_T ↑ | LPIPS ↓ | inside | FID ↓ |"
    assert lines[1].count("|") == lines[0].count("|")
    assert lines[2] == "| source | 2 | 0.3000 | - | - | - |"
    assert lines[3] == "| ddim | 2 | 0.5000 | ∞ | - | 12.35 |" or lines[3] == "| ddim | 2 | 0.5000 | ∞ | - | 12.34 |"
    assert "- CLIP_T: CLIP_T is. [X]" in lines


def test_figures_are_json_with_every_case():
    figures = figures_of({"ddim": method_scores(CLIP_T=[0.5, math.nan], LPIPS=[math.inf, 1.0])}, {})
    assert json.loads(json.dumps(figures, allow_nan=False))["ddim"] == {
        "cases": 2,
        "means": {"CLIP_T": 0.5, "LPIPS": "infinite"},
        "values": {"a": {"CLIP_T": 0.5, "LPIPS": "infinite"}, "b": {"CLIP_T": None, "LPIPS": 1.0}},
    }
    assert as_json("text") == "text"


def test_kinds_of_edit_are_shown_apart_where_there_are_several():
    methods = {"ddim": method_scores(CLIP_T=[0.1, 0.2, 0.6])}
    cases = [EditCase(name, group, None, "", "") for name, group in (("a", "pose"), ("b", "pose"), ("c", "color"))]
    found = [(group, count, round(means["CLIP_T"], 6)) for group, count, _, means in means_by_group(methods, cases)]
    assert found == [("pose", 2, 0.15), ("color", 1, 0.6)]
    assert list(means_by_group(methods, cases[:2])) == []


def test_sets_are_scored_only_when_large_enough():
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(1, 4, generator=generator) for _ in range(FEWEST)]
    assert set_scores(MethodScores(features=features[1:]), features) == {}
    found = set_scores(MethodScores(features=features), features)
    assert found["FID"] == pytest.approx(0, abs=1e-6) and set(found) == {"FID", "KID"}


def test_a_sheet_is_black_where_a_method_has_no_image(case):
    (row,) = sheet({"ddim": lambda case: None}, [case, case], 8)
    assert row.shape == (2, 8, 8, 3) and not row.any()
    (row,) = sheet({"source": lambda case: case.load_image(SIZE)}, [case], 8)
    quarters = np.asarray(image(0)).reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert np.allclose(row[0].numpy(), quarters, atol=1e-6)
