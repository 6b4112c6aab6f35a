"""Register Edit, Keep the Rest and Select Edit as nodes: batches, sizes, and what they say."""

from __future__ import annotations

import json

import pytest
import torch
from identity_edit_pack.nodes.keep_rest.keep import COMMON, EACH, KeepTheRest, RegisterEdit
from identity_edit_pack.nodes.keep_rest.select import NONE, SelectEdit
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from skimage import data
from torch.nn.functional import interpolate

KEEP = dict(balance=0.0, undo_cast=True, grow=0.3, feather=0.6, mask_use="change inside the mask", boxes="")
SELECT = dict(recognizer=NONE, prompt="", identity_weight=1.0, prompt_weight=1.0, rest_weight=1.0)


def photo(name: str = "astronaut") -> torch.Tensor:
    """[1, 256, 256, 3]."""
    return torch.from_numpy(getattr(data, name)()[:512:2, :512:2].copy()).float()[None] / 255.0


def edits() -> torch.Tensor:
    """Two edits of the photo: shifted by (3, 2) and (5, -4) pixels, with a green square."""
    image = photo()
    image[:, 100:140, 60:110] = torch.tensor([0.1, 0.8, 0.2])
    return torch.cat([image.roll((2, 3), (1, 2)), image.roll((-4, 5), (1, 2))])


def test_every_edit_of_a_batch_is_moved_back_and_kept() -> None:
    registered, covered, transforms, trusted, report = RegisterEdit.execute(photo(), edits(), EACH).args
    shifts = [(each["shift_x"], each["shift_y"]) for each in json.loads(transforms)]
    assert shifts == [pytest.approx((3.0, 2.0), abs=0.1), pytest.approx((5.0, -4.0), abs=0.1)]
    assert trusted and covered.shape == (2, 256, 256) and report.count("shift") == 2
    image, mask, sheet, text = KeepTheRest.execute(photo(), registered, **KEEP).args
    both = photo().expand(2, -1, -1, -1)
    assert torch.equal(image[mask == 0.0], both[mask == 0.0])
    assert (mask[:, 104:136, 64:106] == 1.0).all() and mask.mean() < 0.1
    assert sheet.shape == (2, 256, 1024, 3) and text.count("equal to the original") == 2


def test_flow_is_reported_and_leaves_an_edit_without_drift_alone() -> None:
    plain, with_flow = (RegisterEdit.execute(photo(), edits()[:1], EACH, flow).args for flow in (False, True))
    assert "flow up to" in with_flow[4] and "flow" not in plain[4]
    assert (plain[0] - with_flow[0]).abs().mean() < 0.01


def test_one_transform_for_all_is_the_median() -> None:
    _, _, transforms, _, _ = RegisterEdit.execute(photo(), edits(), COMMON).args
    first, second = json.loads(transforms)
    assert first == second and first["shift_x"] == pytest.approx(4.0, abs=0.1)


@pytest.mark.parametrize("other", [photo().flip(1), photo("rocket")[:, :200]])
def test_another_image_comes_back_at_the_originals_size_and_nothing_is_kept(other: torch.Tensor) -> None:
    registered, covered, _, trusted, report = RegisterEdit.execute(photo(), other, EACH).args
    assert registered.shape == photo().shape and covered.shape == (1, 256, 256)
    assert not trusted and "was not registered" in report
    if other.shape == photo().shape:
        assert torch.equal(registered, other)
    with_alpha = torch.cat([photo(), torch.ones(1, 256, 256, 1)], dim=-1)
    with_alpha[:, :8, :8, 3] = 0.5
    image, mask, _, _ = KeepTheRest.execute(with_alpha, torch.cat([registered, photo()]), **KEEP).args
    assert torch.equal(image[0, ..., :3], registered[0]) and bool((mask[0] == 1.0).all())
    assert torch.equal(image[..., 3], with_alpha[..., 3].expand(2, -1, -1))
    assert torch.equal(image[1, 16:, 16:], with_alpha[0, 16:, 16:])


def test_an_edit_of_another_size_comes_back_at_the_originals() -> None:
    small = interpolate(photo().movedim(-1, 1), size=(160, 192), mode="area").movedim(1, -1)
    registered, _, _, trusted, _ = RegisterEdit.execute(photo(), small, EACH).args
    assert trusted and registered.shape == photo().shape


def test_counts_that_do_not_match_are_refused() -> None:
    with pytest.raises(IdentityEditError, match="original holds 2 images and edited 3"):
        RegisterEdit.execute(photo().repeat(2, 1, 1, 1), photo().repeat(3, 1, 1, 1), EACH)
    with pytest.raises(IdentityEditError, match="Register Edit"):
        KeepTheRest.execute(photo(), photo()[:, :200], **KEEP)


def test_the_best_edit_keeps_the_rest_and_the_report_says_what_is_missing() -> None:
    noisy = (photo() + 0.1 * torch.randn(1, 256, 256, 3, generator=torch.Generator().manual_seed(0))).clamp(0.0, 1.0)
    better = (photo() * 0.98).clamp(0.0, 1.0)
    best, number, report = SelectEdit.execute(photo(), torch.cat([noisy, better]), **SELECT).args
    assert number == 2 and torch.equal(best, better)
    with pytest.raises(IdentityEditError, match="before holds 1 images and edits 2"):
        SelectEdit.execute(photo(), torch.cat([noisy, better]), **SELECT, before=photo())
    assert "Identity was not checked" in report and "insightface" not in report.split("\n")[0]
